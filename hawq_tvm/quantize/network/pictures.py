"""Pictures as arrays of pixels from 0 to 255, exactly, or a refusal; before memory is taken their size is known."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.core.need import need
from hawq_tvm.frontend.common.inputs import example

from .float_graph import Input

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[Any]
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
# Pixels of the largest picture that is read, and that one is scaled to: half a gigabyte at 4 bytes each.
PIXELS = 2**27
CHANNELS = (1, 3)
# What Pillow's readers make of damaged files; SyntaxError is their own for a wrong header.
DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
# White in what Pillow reads into 16 bits, by how the file packs it.
WHITE = {"I;16": 65535, "I;16B": 65535, "I;16N": 65535, "I;16L": 65535, "I;16R": 65535, "I;12": 4095}
DEPTH = "8 bits a channel, or one channel of 16"


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes numbers: (pixel - mean) / std, pixels from 0 to 255, one number or one per channel.

    resize: what the short side is scaled to before the middle is cut out; None: as little as covers the input.
    resample: bilinear, bicubic or nearest.  bgr: channels in the order blue, green, red.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    resample: str = "bilinear"
    bgr: bool = False


def read_picture(file: Path, model: Sequence[Input], given: Preprocess) -> Array:
    """A picture as the network's only input takes it, one image: its short side scaled to fit, the middle cut out.

    (1, channels, height, width) or (1, height, width, channels), whichever the input's shape is.
    Raises InputError for what is no picture or another network's, UsageError for a preprocessing that does not fit.
    """
    channels, height, width, last = _layout(str(file), model, given)
    pixels = np.asarray(_cut(file, opened(file, channels), height, width, given), np.float32)
    pixels = np.broadcast_to(pixels.reshape(height, width, -1), (height, width, channels))
    pixels = pixels[:, :, ::-1] if given.bgr else pixels
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are found where arrays of all kinds are checked
        normal = (pixels - np.array(given.mean, np.float32)) / np.array(given.std, np.float32)
    made = _typed(normal, model[0].dtype, file)
    return np.ascontiguousarray((made if last else made.transpose(2, 0, 1))[None])


def limits(where: str, model: Sequence[Input], given: Preprocess) -> tuple[Array, Array]:
    """What black and white are to the network's only input, float32 that broadcasts against it.

    Raises what `read_picture` raises for an input that is no picture; where: what would be one.
    """
    channels, _, _, last = _layout(where, model, given)
    mean, std = (np.broadcast_to(np.array(v, np.float32), channels) for v in (given.mean, given.std))
    ends = sorted((-mean / std, (255 - mean) / std), key=lambda v: v.sum())
    low, high = (v.reshape(-1) if last else v.reshape(-1, 1, 1) for v in ends)
    return low, high


def _layout(where: str, model: Sequence[Input], given: Preprocess) -> tuple[int, int, int, bool]:
    """Channels, height and width of the input, and whether channels come last.

    Raises InputError for an input that is no picture, has no size yet, or could be read both ways, UsageError for a
    preprocessing that does not fit.
    """
    shape, name = model[0].shape, model[0].name
    wanted = "x".join(["images", *("any" if d is None else str(d) for d in shape[1:])])
    first, last = len(shape) == 4 and shape[1] in CHANNELS, len(shape) == 4 and shape[3] in CHANNELS
    if len(model) != 1 or not (first or last):
        raise InputError(
            "is a picture, which this model does not take",
            where=where,
            expected=f"arrays of {wanted}",
            remedy="write .npy files",
        )
    if first and last:
        raise InputError(
            "is a picture, and the input's channels may be its second dimension or its last",
            where=where,
            found=wanted,
            remedy="write .npy files",
        )
    if None in shape[1:]:
        raise InputError(
            "is a picture, for which the model leaves the size open",
            where=where,
            found=wanted,
            remedy=f"pass --shape {name}={example(['?' if d is None else d for d in shape])}, with your size",
        )
    channels, height, width = (int(d or 0) for d in (shape[1:] if first else (shape[3], *shape[1:3])))
    for values, name in ((given.mean, "--mean"), (given.std, "--std")):
        if len(values) not in (1, channels):
            raise UsageError(
                "has as many numbers as channels, or one", where=name, found=f"{len(values)} for {channels} channels"
            )
    return channels, height, width, last


def opened(file: Path, channels: int) -> Image:
    """A picture upright, in 8 bits as "RGB" or "L", or grey as "F" where it has more levels than 256.

    Transparency is left out.
    Raises InputError for a file that is no picture, is damaged, an animation, too large, or whose white is not known.
    """
    need("PIL")
    from PIL import Image, ImageOps

    where = str(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about sizes, which are checked below, and about metadata
            with Image.open(file, formats=FORMATS) as picture:
                _check_size(picture.size, where)
                # Of an MPO's pictures the first is the photograph.
                if getattr(picture, "is_animated", False) and picture.format != "MPO":
                    raise InputError(
                        "holds several pictures", where=where, expected="one", remedy="write each as a file of its own"
                    )
                white = _white(picture, where)
                upright = ImageOps.exif_transpose(picture)
                if white is not None:
                    # Up to 2^16, so that the product is exact and the quotient the nearest float32.
                    levels = np.asarray(upright, np.float32)
                    return Image.fromarray(levels * np.float32(255) / np.float32(white))
                plain = (
                    upright.convert("RGBA" if upright.mode == "RGBa" else "LA")
                    if upright.mode in ("RGBa", "La")
                    else upright
                )
                colours = plain if plain.mode in ("1", "L", "LA") else plain.convert("RGB")
                return colours.convert("RGB" if channels == 3 else "L")
    except Image.DecompressionBombError as e:
        raise _too_large(where, "more") from e
    except DAMAGED as e:
        found = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise InputError("is not a readable picture", where=where, expected=", ".join(FORMATS), found=found) from e


def _white(picture: Image, where: str) -> int | None:
    """The value of white in a grey picture of more than 256 levels; None for 8 bits.

    Raises InputError where it is not known, or where Pillow would cut 16 bits of a colour down to 8.
    """
    packed = _packing(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        # Pillow scales a PGM of any depth to 16 bits.
        white = 65535 if picture.format == "PPM" and picture.mode == "I" else WHITE.get(packed)
        reversed_ = getattr(picture, "tag_v2", {}).get(262) == 0  # TIFF's WhiteIsZero
        if white is None or picture.mode == "F" or reversed_:
            raise InputError(
                "has pixels whose white is not known",
                where=where,
                expected=DEPTH,
                found=f"mode {picture.mode}, packed as {packed}",
                remedy="convert it to 8 bits, or write .npy files",
            )
        return white
    if re.search(r"(?<!BGR);16[BLNRS]?$", packed) or packed == "deep":
        raise InputError(
            "has colours of 16 bits, of which Pillow keeps 8",
            where=where,
            expected=DEPTH,
            found=packed,
            remedy="convert it to 8 bits, or write .npy files",
        )
    return None


def _packing(picture: Image) -> str:
    """How the file packs pixels, by Pillow's name; "deep" for a PPM of more than 8 bits."""
    tiles = getattr(picture, "tile", [])
    given = tiles[0].args if tiles else ()
    parts = given if isinstance(given, tuple) else (given,)
    if tiles and tiles[0].codec_name.startswith("ppm") and int(parts[-1]) > 255:
        return "deep"
    return str(parts[0]) if parts else ""


def _check_size(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > PIXELS:
        raise _too_large(where, f"{size[0]} x {size[1]}")


def _too_large(where: str, found: str) -> InputError:
    return InputError(
        "is too large a picture",
        where=where,
        expected=f"at most {PIXELS:,} pixels",
        found=found,
        remedy="scale it down",
    )


def _cut(file: Path, picture: Image, height: int, width: int, given: Preprocess) -> Image:
    """The middle of the scaled picture."""
    from PIL import Image

    factor = (
        max(width / picture.width, height / picture.height)
        if given.resize is None
        else given.resize / min(picture.size)
    )
    size = (round(picture.width * factor), round(picture.height * factor))
    if given.resize is not None and (size[0] < width or size[1] < height):
        raise UsageError(
            "makes pictures smaller than the network's input",
            where=f"--resize {given.resize}",
            expected=f"at least {max(width, height)}",
        )
    size = (max(width, size[0]), max(height, size[1]))
    if size[0] * size[1] > PIXELS:
        raise InputError(
            "is too narrow a picture",
            where=str(file),
            expected=f"at most {PIXELS:,} pixels once it is scaled",
            found=f"{size[0]} x {size[1]}",
            remedy="cut it, or give a smaller --resize",
        )
    scaled = picture if picture.size == size else picture.resize(size, Image.Resampling[given.resample.upper()])
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _typed(normal: Array, dtype: str, file: Path) -> Array:
    """The numbers in the input's type.

    Raises InputError when an integer type does not hold them.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        made = normal.astype(dtype)
    if made.dtype.kind != "f" and not (made == normal).all():
        found = f"{normal.min():g} to {normal.max():g}" if (normal == np.rint(normal)).all() else "fractions"
        raise InputError(
            f"becomes numbers that {dtype} does not hold",
            where=str(file),
            found=found,
            remedy="pass --mean 0 --std 1 for an input that takes pixels",
        )
    return made
