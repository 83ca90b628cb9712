"""Constant weights of fewer than 8 bits in memory, in planes of 4 or 2 bits of every value, as many to a byte as fit.

A plane of N values along an axis is N b / 8 bytes there: value k is field k // n of byte k % n, the first in the
lowest bits. Values are two's complement; the highest plane comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

Array = np.ndarray[Any, Any]

# By the bits of a value, those of its planes.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2)}
SMALLEST = 64  # values; fewer are not worth opening
# Pixels; opening values that lie in several planes for fewer takes longer than it saves.
FEWEST_PIXELS = 9


def width_of(values: Array) -> int:
    """The bits that weights are stored in: the fewest that hold every value, 8 where PLANES has none."""
    if values.size < SMALLEST or values.dtype not in (np.int8, np.uint8):
        return 8
    low, high = int(values.min()), int(values.max())
    signed = values.dtype == np.int8
    fits = (w for w in PLANES if (-(2 ** (w - 1)) <= low and high < 2 ** (w - 1) if signed else high < 2**w))
    return next(fits, 8)


def wider(width: int) -> list[int]:
    """A width and those above it that there are planes for."""
    return [w for w in PLANES if w >= width]


def opened_at_once(width: int, pixels: int) -> list[int]:
    """The widths that weights may have in memory where they are opened once for so many pixels, none for 8 bits."""
    return [w for w in wider(width) if pixels >= FEWEST_PIXELS or len(PLANES[w]) == 1]


def fields(width: int) -> int:
    """The values of the narrowest plane that share a byte."""
    return 8 // min(PLANES[width])


def split(values: Array, axis: int, width: int) -> Array:
    """The bytes of weights whose planes lie one after another along an axis."""
    codes, below, planes = values.astype(np.int64) & (2**width - 1), width, []
    for bits in PLANES[width]:
        below -= bits
        parts = np.split(codes >> below & (2**bits - 1), 8 // bits, axis)
        planes.append(sum(part << (bits * i) for i, part in enumerate(parts)))
    return np.concatenate(planes, axis).astype(np.uint8)


def in_high_bits(byte: Callable[[Any], tirx.Expr], k: Any, count: int, width: int) -> tirx.Expr:
    """Value k of `count` times 2^(8 - width), as int8; byte: by its place along the axis."""
    total, start, above = None, 0, 0
    for bits in PLANES[width]:
        size = count * bits // 8
        left = (tirx.const(8 - bits, "int32") - k // size * bits).astype("uint8")
        mask = tirx.const(256 - 2 ** (8 - bits), "uint8")
        part = (byte(k % size + start if start else k % size) << left) & mask
        part = part >> tirx.const(above, "uint8") if above else part
        total, start, above = part if total is None else total | part, start + size, above + bits
    assert total is not None
    return total.astype("int8")


def opened(byte: Callable[[Any], tirx.Expr], k: Any, count: int, width: int, signed: bool) -> tirx.Expr:
    """Value k of `count`, as int8; byte: by its place along the axis."""
    total, start, below = None, 0, width
    for bits in PLANES[width]:
        size, below = count * bits // 8, below - bits
        right = (k // size * bits).astype("uint8")
        part = (byte(k % size + start if start else k % size) >> right) & tirx.const(2**bits - 1, "uint8")
        part = part << tirx.const(below, "uint8") if below else part
        total, start = part if total is None else total | part, start + size
    assert total is not None
    half = 2 ** (width - 1)
    if not signed:
        return total.astype("int8")
    return (total ^ tirx.const(half, "uint8")).astype("int8") - tirx.const(half, "int8")
