"""Pictures of every mode that Pillow has: the right numbers, or a sentence; none turns white or fills the memory."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hawq_tvm.errors import InputError
from hawq_tvm.quantize.data import open_data
from hawq_tvm.quantize.evaluation import open_images
from hawq_tvm.quantize.float_graph import Input
from hawq_tvm.quantize.pictures import PIXELS, Preprocess, opened, read_picture

PLAIN = Preprocess((0.0,), (1.0,))
SIDE = 8
# 64 levels of 16 bits, none of them a multiple of 257.
LEVELS = np.arange(100, 65535, 1038, np.uint16)[: SIDE * SIDE].reshape(SIDE, SIDE)


def model(channels: int = 3, last: bool = False, dtype: str = "float32") -> list[Input]:
    return [Input("x", dtype, (None, SIDE, SIDE, channels) if last else (None, channels, SIDE, SIDE))]


def pixels(file: Path, channels: int = 3) -> Any:
    return read_picture(file, model(channels), PLAIN)[0]


def png(path: Path, width: int, height: int, depth: int, colour: int, rows: bytes, more: bytes = b"") -> Path:
    """A PNG of raw samples, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


# -- 16 bits ------------------------------------------------------------------------------------------------------


def exact(levels: Any, white: int = 65535) -> Any:
    """Every level's share of white, of 255, to the nearest float32."""
    return np.array([np.float32(float(Fraction(int(v) * 255, white))) for v in levels.ravel()], np.float32).reshape(
        levels.shape
    )


@pytest.mark.parametrize("how", ["png", "tiff", "tiff big-endian", "pgm", "labelled"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_scaled_exactly(how: str, channels: int, tmp_path: Path) -> None:
    file = tmp_path / {"pgm": "p.pgm", "png": "p.png", "labelled": "p.png"}.get(how, "p.tif")
    if how == "pgm":
        file.write_bytes(b"P5 8 8 65535\n" + LEVELS.astype(">u2").tobytes())
    elif how == "tiff big-endian":
        Image.frombytes("I;16B", (SIDE, SIDE), LEVELS.astype(">u2").tobytes()).save(file)
    else:
        Image.fromarray(LEVELS).save(file)
    assert (pixels(file, channels) == exact(LEVELS)).all()
    data = open_data(tmp_path, model(channels), PLAIN)
    if how == "labelled":
        (tmp_path / "labels.txt").write_text("p.png 3\n")
        data = open_images(tmp_path, tuple(model(channels)), PLAIN)
    batch = next(data.batches(1))
    assert len(np.unique(batch.inputs["x"])) == 64 and (batch.inputs["x"][0] == exact(LEVELS)).all()


def test_levels_of_16_bits_are_kept_when_scaled(tmp_path: Path) -> None:
    """Twice as large, in tiles of 2 x 2 equal pixels: scaled down, every level comes back, more than 8 bits hold."""
    Image.fromarray(np.repeat(np.repeat(LEVELS, 2, 0), 2, 1)).save(tmp_path / "p.png")
    nearest = read_picture(tmp_path / "p.png", model(1), Preprocess((0.0,), (1.0,), SIDE, "nearest"))
    assert (nearest[0, 0] == exact(LEVELS)).all()


@pytest.mark.parametrize("maxval", [256, 1023, 4095])
def test_grey_of_any_depth(maxval: int, tmp_path: Path) -> None:
    """PGM says what white is; Pillow rounds to one of 65,536 levels."""
    levels = np.linspace(0, maxval, 64).astype(np.uint16).reshape(SIDE, SIDE)
    (tmp_path / "p.pgm").write_bytes(b"P5 8 8 %d\n" % maxval + levels.astype(">u2").tobytes())
    assert np.abs(pixels(tmp_path / "p.pgm", 1)[0] - exact(levels, maxval)).max() <= 0.5 * 255 / 65535 + 1e-4


RGB16 = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 3)).astype(">u2")


@pytest.mark.parametrize(("colour", "samples"), [(2, 3), (6, 4), (4, 2)], ids=["RGB", "RGBA", "LA"])
def test_colours_of_16_bits_are_refused(colour: int, samples: int, tmp_path: Path) -> None:
    rows = b"".join(b"\0" + bytes(2 * samples * SIDE) for _ in range(SIDE))
    png(tmp_path / "p.png", SIDE, SIDE, 16, colour, rows)
    with pytest.raises(
        InputError,
        match=r"p\.png: has colours of 16 bits, of which Pillow keeps 8; expected 8 bits a channel.*remedy: convert it",
    ):
        pixels(tmp_path / "p.png")


@pytest.mark.parametrize("head", [b"P6 8 8 65535\n", b"P6 8 8 1023\n"])
def test_ppm_of_16_bits_is_refused(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.ppm").write_bytes(head + RGB16.tobytes())
    with pytest.raises(InputError, match="has colours of 16 bits"):
        pixels(tmp_path / "p.ppm")


# -- every mode ---------------------------------------------------------------------------------------------------

COLOURS = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
# What each mode makes of COLOURS, in a format that holds it.
MODES = {
    "1": "png",
    "L": "png",
    "P": "png",
    "LA": "png",
    "RGB": "png",
    "RGBA": "png",
    "PA": "tif",
    "RGBX": "tif",
    "CMYK": "tif",
    "YCbCr": None,
    "LAB": "tif",
    "HSV": None,
    "La": None,
    "RGBa": None,
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_8_bits(mode: str, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pillow's own convert; modes that no file format brings are handed to the reader as if one did."""
    source = Image.fromarray(COLOURS)
    steps = {"La": ("LA", "La"), "RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,))
    for step in steps:
        if step == "LAB":
            from PIL import ImageCms

            to = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
            made = ImageCms.applyTransform(source, to)
            assert made is not None
            source = made
        else:
            source = source.convert(step)
    file = tmp_path / f"p.{MODES[mode] or 'png'}"
    if MODES[mode] and mode != "PA":
        source.save(file)
    else:
        Image.fromarray(COLOURS).save(file)
        monkeypatch.setattr(Image, "open", lambda *_, **__: source.copy())
    found = pixels(file, channels)
    plain = source.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)) if mode in ("La", "RGBa") else source
    plain = plain if mode in ("1", "L", "LA", "La") else plain.convert("RGB")
    wanted = np.asarray(plain.convert("RGB" if channels == 3 else "L"), np.float32).reshape(SIDE, SIDE, channels)
    assert (found.transpose(1, 2, 0) == wanted).all() and found.std() > 10
    if channels == 3 and mode in ("RGB", "RGBA", "RGBX", "CMYK", "La", "RGBa", "LAB", "HSV", "YCbCr"):
        far = np.abs(
            wanted - (COLOURS if mode != "La" else np.asarray(Image.fromarray(COLOURS).convert("L"))[:, :, None])
        )
        assert far.max() <= {"LAB": 60, "HSV": 8, "YCbCr": 3}.get(mode, 0), far.max()


def test_transparency_is_left_out(tmp_path: Path) -> None:
    """As in `convert("RGB")`: what a transparent pixel's colour is counts, in palettes as well."""
    alpha = np.dstack([COLOURS, np.zeros((SIDE, SIDE), np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png").transpose(1, 2, 0) == COLOURS).all()
    palette = Image.fromarray(COLOURS).quantize(16)
    for transparency in (3, bytes(range(16))):
        palette.save(tmp_path / "p.png", transparency=transparency)
        assert Image.open(tmp_path / "p.png").mode == "P"
        assert (pixels(tmp_path / "p.png").transpose(1, 2, 0) == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize(("mode", "dtype"), [("F", np.float32), ("I", np.int32)])
def test_pixels_without_a_white_are_refused(mode: str, dtype: Any, tmp_path: Path) -> None:
    Image.fromarray(LEVELS.astype(dtype), mode).save(tmp_path / "p.tif")
    with pytest.raises(
        InputError, match=rf"p\.tif: has pixels whose white is not known; expected 8 bits.*found mode {mode}"
    ):
        pixels(tmp_path / "p.tif")


def test_white_that_is_zero_is_refused(tmp_path: Path) -> None:
    Image.fromarray(LEVELS).save(tmp_path / "p.tif", tiffinfo={262: 0})
    if Image.open(tmp_path / "p.tif").tag_v2[262] == 0:  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="whose white is not known"):
            pixels(tmp_path / "p.tif", 1)


# -- upright, one, whole, and small enough ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_pictures_stand_upright(orientation: int, suffix: str, tmp_path: Path) -> None:
    """Whichever way a camera was held, what its EXIF says is undone, as every viewer does."""
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    blocks = np.kron(np.array([[10, 80], [150, 240]], np.uint8), np.ones((4, 4), np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored(blocks))).save(
        tmp_path / f"p.{suffix}", exif=exif, **({"quality": 100} if suffix == "jpg" else {})
    )
    assert np.abs(pixels(tmp_path / f"p.{suffix}", 1)[0] - blocks).max() <= 2


def test_one_picture_in_a_file(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((SIDE, SIDE), v, np.uint8)) for v in (0, 100, 200)]
    for suffix in ("gif", "png", "webp", "tif"):
        frames[1].save(tmp_path / f"one.{suffix}")
        assert np.abs(pixels(tmp_path / f"one.{suffix}", 1) - 100).max() <= 2, suffix
        frames[0].save(tmp_path / f"more.{suffix}", save_all=True, append_images=frames[1:])
        with pytest.raises(
            InputError, match=rf"more\.{suffix}: holds several pictures; expected one; remedy: write each as a file"
        ):
            pixels(tmp_path / f"more.{suffix}")
    # Phones append previews to a photograph, which is the first.
    frames[1].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[2:])
    assert np.abs(pixels(tmp_path / "phone.jpg", 1) - 100).max() <= 2


def test_damaged_files(tmp_path: Path) -> None:
    """Cut or changed anywhere, a file is read or refused with a sentence."""
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "gif", "tif", "webp", "bmp", "ppm"):
        file = tmp_path / f"p.{suffix}"
        Image.fromarray(COLOURS).save(file)
        whole = file.read_bytes()
        for at in range(0, len(whole) - 8, max(1, len(whole) // 12)):
            file.write_bytes(whole[:at])
            with pytest.raises(InputError, match=rf"p\.{suffix}: is not a readable picture; expected JPEG, PNG"):
                pixels(file)
        for _ in range(30):
            damaged = bytearray(whole)
            damaged[int(rng.integers(len(whole)))] = int(rng.integers(256))
            file.write_bytes(damaged)
            try:
                pixels(file)
            except InputError as e:
                assert str(file) in str(e) and "\n" not in str(e)
    for content in (b"", b"nothing", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"):
        (tmp_path / "p.png").write_bytes(content)
        with pytest.raises(InputError, match="is not a readable picture"):
            pixels(tmp_path / "p.png")


@pytest.mark.parametrize("side", [11586, 15000, 20000])
def test_bombs_are_refused_before_memory_is_taken(side: int, tmp_path: Path) -> None:
    """A picture of one colour: kilobytes in the file, hundreds of megabytes in memory."""
    assert side**2 > PIXELS
    squeezed = zlib.compressobj(9)
    row = bytes(1 + side)
    rows = b"".join(squeezed.compress(row) for _ in range(side)) + squeezed.flush()
    whole = png(tmp_path / "p.png", side, side, 8, 0, b"").read_bytes()
    start = whole.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows))
    (tmp_path / "p.png").write_bytes(whole[:start] + chunk + whole[-12:])
    program = (
        "import resource, sys; from pathlib import Path; from hawq_tvm.quantize.pictures import opened\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: opened(Path(sys.argv[1]), 3)\n"
        "except Exception as e: print(type(e).__name__, e)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "p.png"], capture_output=True, text=True, check=True
    )
    sentence, taken = done.stdout.splitlines()
    assert (
        "InputError" in sentence
        and f"is too large a picture; expected at most {PIXELS:,} pixels" in sentence
        and done.stderr == ""
    )
    assert int(taken) < 50_000  # kilobytes


def test_narrow_pictures_are_not_scaled_up(tmp_path: Path) -> None:
    """One pixel by 60,000: its short side scaled to 224 would make three gigapixels."""
    Image.new("L", (60_000, 1), 7).save(tmp_path / "p.png")
    wide = [Input("x", "float32", (None, 1, 224, 224))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"p\.png: is too narrow a picture.*found 13440000 x 224"):
        read_picture(tmp_path / "p.png", wide, PLAIN)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# -- networks with channels last ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bgr", [False, True])
def test_channels_last(channels: int, bgr: bool, tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "p.png")
    given = Preprocess(tuple(range(channels)), (2.0,), bgr=bgr)
    first = read_picture(tmp_path / "p.png", model(channels), given)
    last = read_picture(tmp_path / "p.png", model(channels, last=True), given)
    assert (
        last.shape == (1, SIDE, SIDE, channels)
        and (last.transpose(0, 3, 1, 2) == first).all()
        and last.flags.c_contiguous
    )
    assert (open_data(tmp_path, model(channels, last=True), given).count) == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((None, 3, 8, 3), "channels may be its second dimension or its last; found imagesx3x8x3"),
        ((None, 1, 8, 1), "may be its second dimension or its last"),
        ((None, 3, None, None), r"leaves the size open; found imagesx3xanyxany; remedy: pass --shape x=1x3x224x224"),
        ((None, None, None, 3), r"remedy: pass --shape x=1x224x224x3"),
        ((None, 4, 8, 8), "which this model does not take"),
        ((None, 8, 8), "which this model does not take"),
        ((None, 8, 8, 8), "which this model does not take"),
    ],
    ids=lambda v: v if isinstance(v, str) else "x".join(map(str, v)),
)
def test_inputs_that_are_no_pictures(shape: Any, message: str, tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "p.png")
    with pytest.raises(InputError, match=message):
        read_picture(tmp_path / "p.png", [Input("x", "float32", shape)], PLAIN)


def test_inputs_of_integers(tmp_path: Path) -> None:
    """An input that takes pixels takes them as they are; what it cannot hold is not cut off."""
    Image.fromarray(COLOURS).save(tmp_path / "p.png")
    assert (read_picture(tmp_path / "p.png", model(dtype="uint8"), PLAIN)[0].transpose(1, 2, 0) == COLOURS).all()
    assert (
        read_picture(tmp_path / "p.png", model(dtype="int8"), Preprocess((128.0,), (1.0,)))[0].transpose(1, 2, 0)
        == COLOURS - 128.0
    ).all()
    for given, dtype, found in (
        (PLAIN, "int8", "found . to 25."),
        (Preprocess((127.0,), (128.0,)), "uint8", "found fractions"),
        (PLAIN, "bool", "found . to 25."),
    ):
        with pytest.raises(InputError, match=rf"becomes numbers that {dtype} does not hold; {found}.*--mean 0 --std 1"):
            read_picture(tmp_path / "p.png", model(dtype=dtype), given)


def test_modes_of_a_folder(tmp_path: Path) -> None:
    """A folder with all kinds of pictures is one set of data."""
    for i, (mode, suffix) in enumerate(
        [("L", "png"), ("RGB", "PNG"), ("RGB", "gif"), ("CMYK", "tiff"), ("RGB", "ppm"), ("L", "pgm"), ("RGB", "jpeg")]
    ):
        Image.fromarray(COLOURS).convert(mode).save(tmp_path / f"{i}.{suffix}")
    assert open_data(tmp_path, model(), PLAIN).count == 7
    assert opened(tmp_path / "0.png", 3).mode == "RGB"
