"""The options that say how pictures become numbers, for every verb that reads pictures."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hawq_tvm.core.errors import InputError, UsageError

if TYPE_CHECKING:
    from hawq_tvm.quantize.network.data import Preprocess

RESAMPLE = ("bilinear", "bicubic", "nearest")


def add_picture_options(sub: argparse.ArgumentParser) -> None:
    """Add the options to a verb."""
    sub.add_argument("--mean", default=None, metavar="M[,M,M]", help="pictures: (pixel - mean) / std, pixels from 0 to 255")
    sub.add_argument("--std", default=None, metavar="S[,S,S]")
    sub.add_argument("--resize", type=int, default=None, metavar="N", help="pictures: scale the short side to N, then cut out the middle (default: as little as covers the input)")
    sub.add_argument("--resample", choices=RESAMPLE, default=None, help="pictures: how they are scaled (default: bilinear)")
    sub.add_argument("--preprocess", metavar="FILE.json", help='instead: {"mean": 127, "std": 128, "resize": 256, "resample": "bicubic", "bgr": false}')


def read_preprocess(args: argparse.Namespace) -> Preprocess | None:
    """What the options say, None when they say nothing.

    Raises UsageError or InputError for numbers, fields or files that are not understood.
    """
    from hawq_tvm.quantize.network.data import Preprocess

    own = {"--mean": args.mean, "--std": args.std, "--resize": args.resize, "--resample": args.resample}
    given = [name for name, value in own.items() if value is not None]
    if args.preprocess:
        if given:
            raise UsageError("says the same as a file", where=given[0], expected="--preprocess, or options of their own")
        return _of_file(args.preprocess)
    if not given:
        return None
    mean, std = (_numbers(text, name) for name, text in (("--mean", args.mean or "0"), ("--std", args.std or "1")))
    return _checked(Preprocess(mean, std, args.resize, args.resample or "bilinear"), "--std", "--resize")


def _numbers(text: str, where: str) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in text.split(","))
    except ValueError as e:
        raise UsageError("is no list of numbers", where=f"{where} {text}", expected="127, or 123.7,116.3,103.5") from e


def _checked(made: Preprocess, std: str, resize: str) -> Preprocess:
    if not all(made.std):
        raise UsageError("divides by zero", where=std)
    if made.resize is not None and made.resize < 1:
        raise UsageError("is no size", where=resize, expected="at least 1", found=str(made.resize))
    return made


def _of_file(path: str) -> Preprocess:
    from hawq_tvm.quantize.allocate.table import read_json
    from hawq_tvm.quantize.network.data import Preprocess

    what = '{"mean": 127, "std": 128, "resize": 256, "resample": "bicubic", "bgr": false}, all but mean and std as you like'
    fields = read_json(path, what)
    known = {"mean", "std", "resize", "resample", "bgr"}
    if not isinstance(fields, dict) or not {"mean", "std"} <= set(fields) <= known:
        raise InputError("does not say how pixels become numbers", where=path, expected=what, found=", ".join(fields) if isinstance(fields, dict) else type(fields).__name__)
    resize, resample, bgr = fields.get("resize"), fields.get("resample", "bilinear"), fields.get("bgr", False)
    mean, std = (_listed(fields[name], f"{path}: {name}") for name in ("mean", "std"))
    if isinstance(resize, bool) or not isinstance(resize, int | None) or resample not in RESAMPLE or not isinstance(bgr, bool):
        raise InputError("holds a field of another kind", where=path, expected=what, found=f"resize {resize!r}, resample {resample!r}, bgr {bgr!r}")
    return _checked(Preprocess(mean, std, resize, resample, bgr), f"{path}: std", f"{path}: resize")


def _listed(value: Any, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) and value else [value]
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise InputError("is no list of numbers", where=where, expected="127, or [123.7, 116.3, 103.5]", found=repr(value))
    return tuple(float(v) for v in values)
