"""The options that say how pictures become numbers, for every verb that reads pictures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..errors import InputError, UsageError
from ..json_files import clipped, number, read_json

if TYPE_CHECKING:
    from .pictures import Preprocess

RESAMPLE = ("bilinear", "bicubic", "nearest")
# Of means and deviations, and (one over it) the least deviation; of the side that a picture is scaled to.
LARGEST, SIDE = 1e30, 16384


def add_picture_options(sub: argparse.ArgumentParser) -> None:
    """Add the options to a verb."""
    sub.add_argument(
        "--mean", default=None, metavar="M[,M,M]", help="pictures: (pixel - mean) / std, pixels from 0 to 255"
    )
    sub.add_argument("--std", default=None, metavar="S[,S,S]")
    sub.add_argument(
        "--resize",
        type=int,
        default=None,
        metavar="N",
        help="pictures: scale the short side to N, then cut out the middle (default: as little as covers the input)",
    )
    sub.add_argument(
        "--resample", choices=RESAMPLE, default=None, help="pictures: how they are scaled (default: bilinear)"
    )
    sub.add_argument(
        "--preprocess",
        metavar="FILE.json",
        help='instead: {"mean": 127, "std": 128, "resize": 256, "resample": "bicubic", "bgr": false}',
    )


def read_preprocess(args: argparse.Namespace) -> Preprocess | None:
    """What the options say, None when they say nothing.

    Raises UsageError or InputError for numbers, fields or files that are not understood.
    """
    from .pictures import Preprocess

    own = {"--mean": args.mean, "--std": args.std, "--resize": args.resize, "--resample": args.resample}
    given = [name for name, value in own.items() if value is not None]
    if args.preprocess:
        if given:
            raise UsageError(
                "says the same as a file", where=given[0], expected="--preprocess, or options of their own"
            )
        return _of_file(args.preprocess)
    if not given:
        return None
    mean, std = (_numbers(text, name) for name, text in (("--mean", args.mean or "0"), ("--std", args.std or "1")))
    return _checked(Preprocess(mean, std, args.resize, args.resample or "bilinear"), "--mean", "--std", "--resize")


def _numbers(text: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in text.split(","))
    except ValueError as e:
        raise UsageError("is no list of numbers", where=f"{where} {text}", expected="127, or 123.7,116.3,103.5") from e


def _checked(made: Preprocess, mean: str, std: str, resize: str) -> Preprocess:
    """What the options say, if pictures can be computed by it in float32.

    Raises UsageError.
    """
    for values, where in ((made.mean, mean), (made.std, std)):
        wrong = next((v for v in values if not abs(v) < LARGEST), None)
        if wrong is not None:
            raise UsageError("is no finite number", where=where, expected=f"less than {LARGEST:g}", found=f"{wrong:g}")
    if any(abs(v) < 1 / LARGEST for v in made.std):
        raise UsageError("divides by zero", where=std, expected=f"at least {1 / LARGEST:g}")
    if made.resize is not None and not 1 <= made.resize <= SIDE:
        raise UsageError("is no size", where=resize, expected=f"1 to {SIDE}", found=f"{made.resize}"[:60])
    return made


def _of_file(path: str) -> Preprocess:
    from .pictures import Preprocess

    what = '{"mean": 127, "std": 128, "resize": 256, "resample": "bicubic", "bgr": false}, all but mean and std as you like'
    fields = read_json(path, what)
    known = {"mean", "std", "resize", "resample", "bgr"}
    if not isinstance(fields, dict) or not {"mean", "std"} <= set(fields) <= known:
        raise InputError(
            "does not say how pixels become numbers",
            where=path,
            expected=what,
            found=f"{', '.join(fields) if isinstance(fields, dict) else type(fields).__name__:.60}",
        )
    resize, resample, bgr = fields.get("resize"), fields.get("resample", "bilinear"), fields.get("bgr", False)
    mean, std = (_listed(fields[name], f"{path}: {name}") for name in ("mean", "std"))
    if (
        isinstance(resize, bool)
        or not isinstance(resize, int | None)
        or not isinstance(resample, str)
        or resample not in RESAMPLE
        or not isinstance(bgr, bool)
    ):
        raise InputError(
            "holds a field of another kind",
            where=path,
            expected=what,
            found=f"resize {clipped(resize)}, resample {clipped(resample)}, bgr {clipped(bgr)}",
        )
    return _checked(Preprocess(mean, std, resize, resample, bgr), f"{path}: mean", f"{path}: std", f"{path}: resize")


def _listed(value: Any, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) and value else [value]
    if any(number(v) is None for v in values):
        raise InputError(
            "is no list of numbers", where=where, expected="127, or [123.7, 116.3, 103.5]", found=clipped(value)
        )
    return tuple(float(v) for v in values)
