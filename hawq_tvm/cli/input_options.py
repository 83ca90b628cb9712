"""The options that say what a model leaves open: shapes, ranges of float inputs, and whether it gives classes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import SYNTHETIC, check_data, check_model, check_output


def add_shape(sub: argparse.ArgumentParser) -> None:
    """Add the option that fixes what a model leaves open; `parse_shapes` reads it."""
    sub.add_argument(
        "--shape", action="append", default=[], metavar="NAME=1x3x224x224", help="fix an input's shape; repeatable"
    )


def add_range(sub: argparse.ArgumentParser) -> None:
    """Add the option that declares what float inputs lie between; `parse_ranges` reads it."""
    sub.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="NAME=LOW:HIGH",
        help="a float input lies between LOW and HIGH, and saturates there; repeatable",
    )


def add_classes(sub: argparse.ArgumentParser) -> None:
    """Add the two options that say what the first output holds: `classes` is True, False, or None without them."""
    both = sub.add_mutually_exclusive_group()
    both.add_argument(
        "--classes",
        action="store_true",
        default=None,
        help="the output holds scores of classes (default: where there are labels, or it is a softmax or a last layer's"
        " sums, two or more for an image)",
    )
    both.add_argument(
        "--no-classes",
        dest="classes",
        action="store_false",
        default=None,
        help="it holds other numbers, such as an embedding, whose squared change counts",
    )


def check_files(args: argparse.Namespace) -> None:
    """Refuse models and data that are not there, and results that cannot be written, before libraries take seconds to
    load.

    Raises ModelError, InputError or OutputError.
    """
    for name in ("model", "real", "against"):
        if getattr(args, name, None) is not None:
            check_model(getattr(args, name))
    for name in ("calib", "data", "validation"):
        path = getattr(args, name, None)
        if path is not None and (name, path) != ("calib", SYNTHETIC):
            check_data(path)
    for name in ("output", "state", "pareto", "plot"):
        if getattr(args, name, None):
            check_output(Path(getattr(args, name)))


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME=1x3x224x224 ... as a dictionary.

    Raises UsageError for anything else.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, dims = text.rpartition("=")
        if not equals or not name or not re.fullmatch(r"\d+([x,]\d+)*", dims):
            raise UsageError(
                "a shape is not understood",
                found=text,
                expected="NAME=1x3x224x224, with the name of one of the model's inputs",
            )
        if name in shapes:
            raise UsageError("a shape is given twice", where=f"--shape {name}", found=text)
        shapes[name] = tuple(int(d) for d in re.split("[x,]", dims))
        if any(d < 1 for d in shapes[name]):
            raise UsageError("a dimension must be at least 1", found=text)
    return shapes


def parse_ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """NAME=LOW:HIGH ... as a dictionary.

    Raises UsageError for anything else.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for text in texts:
        name, equals, ends = text.rpartition("=")
        try:
            low, high = map(float, ends.split(":"))
        except ValueError:
            low = high = 0.0
            equals = ""
        if not equals or not name:
            raise UsageError(
                "a range is not understood",
                where="--range",
                found=text,
                expected="NAME=LOW:HIGH, with the name of one of the model's float inputs and two numbers",
            )
        if name in ranges:
            raise UsageError("a range is given twice", where=f"--range {name}", found=text)
        ranges[name] = low, high
    return ranges
