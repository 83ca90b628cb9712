"""Exponents of wide scores (A24): a grid of powers of two, and two short tables."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arith

Int = NDArray[np.int64]
# log2(e) to 60 digits, and bits of the grid below a power of two: what a row's scores are told apart by.
LOG2_E = Fraction("1.44269504088896340735992468100189213742664595415298593413545")
MOST_FRACTION, LEAST_FRACTION = 20, 12
# Scores of this many units at most, so that their differences have 31 bits.
OPEN_BITS = 29


def fraction_of(most: float) -> int | None:
    """F: the even number of fraction bits for scores of at most `most`; None where they are too large for any."""
    for fraction in range(MOST_FRACTION, LEAST_FRACTION - 1, -2):
        if most * 1.4427 * 2.0**fraction < 2.0**OPEN_BITS:
            return fraction
    return None


def tables(fraction: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """A[i] = rne(2^30 2^(-i / 2^(F/2))) and B[i] = rne(2^30 2^(-i / 2^F)), each correctly rounded."""
    size = 1 << fraction // 2
    return _powers(size, fraction // 2), _powers(size, fraction)


@cache
def _powers(size: int, bits: int) -> NDArray[np.int32]:
    made = powers(size, bits, 30).astype(np.int32)
    made.setflags(write=False)  # one for all that ask
    return made


def powers(size: int, bits: int, scale: int) -> Int:
    """rne(2^scale 2^(-i / 2^bits)) for i < size, each correctly rounded."""
    with localcontext() as context:
        context.prec = 50
        base = Decimal(2)
        values = [
            int((base ** (scale - Decimal(i) / (1 << bits))).to_integral_value(ROUND_HALF_EVEN)) for i in range(size)
        ]
    return np.array(values, np.int64)


def exponents(x: Int, axis: int, fraction: int, coarse: Int, fine: Int) -> Int:
    """(A24): e of scores on the grid."""
    x, half = np.asarray(x, np.int64), fraction // 2
    d = x.max(axis=axis, keepdims=True) - x
    rest = d & ((1 << fraction) - 1)
    product = np.asarray(coarse, np.int64)[rest >> half] * np.asarray(fine, np.int64)[rest & ((1 << half) - 1)]
    e: Int = ((product + (1 << 29)) >> 30) >> np.minimum(d >> fraction, 31)
    return e


def softmax(x: Int, axis: int, fraction: int, multiplier: int, shift: int, **output: Any) -> Int:
    """(A24) and then (A17) from the sum on."""
    coarse, fine = tables(fraction)
    e = exponents(x, axis, fraction, coarse.astype(np.int64), fine.astype(np.int64))
    return arith.normalize_exponents(e, axis, multiplier, shift, **output)


def distance(count: int, inverse: float, shift: int, fraction: int, off: float = 1.0) -> float:
    """(A24e) how far beyond 1/2 a result can be from the real softmax of scores that lie `off` units of the grid from
    their integers: half a unit and what the requantize loses, and more where it reads integers that are near.
    """
    spread = math.expm1(2 * math.log(2) * min(off * 2.0**-fraction, 8.0))
    return inverse * ((5 * count + 4) * 2.0**-31 + spread / 4) + 2.0**-shift
