"""The numbers of I-BERT's i-GELU (A28), i-softmax (A29) and i-LayerNorm (A30), their arithmetic in NumPy, and how far
each can be from the real formula.

Algorithms 1 to 4 of "I-BERT: Integer-only BERT Quantization" (2021), every floor where it has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import expm1, floor, isqrt, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arith

Int = NDArray[np.int64]
NAME = "ibert"
ROOT2 = Fraction("1.414213562373095048801688724209698078569671875376948073176680")
LN2 = Fraction("0.693147180559945309417232121458176568075500134360255254120680")
# a (x + b)^2 + 1 for erf in 0 .. -b; a (x + b)^2 + c for exp in -ln 2 .. 0.
ERF = (Fraction("-0.2888"), Fraction("-1.769"))
EXP = (Fraction("0.3585"), Fraction("1.353"), Fraction("0.344"))
# The most of |polynomial - erf|, of |x / 2 (polynomial - erf)|, for GELU's tanh form too, of |polynomial / exp - 1|.
ERF_ERROR, GELU_ERROR, EXP_ERROR = 0.09625, 0.01816, 0.0031
# A product of i-GELU keeps below this, so that a requantize of it has 20 bits of multiplier.
PRODUCT_BITS, WORD_BITS = 42, 31
# Bits after the point of scores: a coarser scale is made finer, one that is finer still goes onto the first grid.
LEAST_FRACTION, MOST_FRACTION, GRID_BITS = 13, 25, 29
NORMALIZED_BITS = 30


@dataclass(frozen=True)
class Polynomial:
    """What i-erf or i-GELU (A28) is computed with, of every channel where scales differ.

    corner: B, where |q| is clipped.  constant: C.  one: I, which i-erf does without.  shift: t.
    scale: of the result.  distance: how far a result can be from erf or GELU, in its own units (A28e).
    """

    corner: tuple[int, ...]
    constant: tuple[int, ...]
    one: tuple[int, ...]
    shift: int
    scale: tuple[Fraction, ...]
    distance: tuple[float, ...]

    @staticmethod
    def erf(scales: Sequence[Fraction], most: Sequence[int]) -> Polynomial:
        """The numbers of i-erf for integers of these scales.

        Raises OverflowError where a clipped square takes more than 62 bits.
        """
        a, b = ERF
        corner, squares = _corners([b / s for s in scales]), [-a * s * s for s in scales]
        constant = tuple(-floor(-1 / v) for v in squares)
        shift = max(0, max(constant).bit_length() - PRODUCT_BITS)
        scale = tuple(v * (1 << shift) for v in squares)
        off = [ERF_ERROR + float(2 * v * c + v + u) for v, c, u in zip(squares, corner, scale, strict=True)]
        distance = tuple(d / float(u) for d, u in zip(off, scale, strict=True))
        return Polynomial(corner, constant, (), shift, scale, distance)

    @staticmethod
    def gelu(scales: Sequence[Fraction], most: Sequence[int]) -> Polynomial:
        """The numbers of i-GELU for integers of these scales, of magnitudes up to `most`.

        Raises OverflowError where a clipped square takes more than 62 bits.
        """
        a, b = ERF
        corner = _corners([b * ROOT2 / s for s in scales])
        squares = [-a * s * s / 2 for s in scales]
        constant = tuple(-floor(-1 / v) for v in squares)
        widest = max(m * (2 * c + 4) for m, c in zip(most, constant, strict=True))
        shift = max(0, widest.bit_length() - PRODUCT_BITS)
        units = [v * (1 << shift) for v in squares]
        one = tuple(-floor(-1 / u) for u in units)
        scale = tuple(s * u / 2 for s, u in zip(scales, units, strict=True))
        # The corner is up to 1 too far, and three floors lose up to a unit of theirs.
        off = [
            GELU_ERROR + float(s * v) * c * c / 4 + m * float(s * (v + 2 * u)) / 2
            for s, v, c, m, u in zip(scales, squares, corner, most, units, strict=True)
        ]
        distance = tuple(d / float(s) for d, s in zip(off, scale, strict=True))
        return Polynomial(corner, constant, one, shift, scale, distance)


def _corners(ratios: Sequence[Fraction]) -> tuple[int, ...]:
    corner = tuple(-floor(r) for r in ratios)
    if max(corner).bit_length() > WORD_BITS:
        raise OverflowError("a scale below 2^-30")
    return corner


def erf(x: Int, corner: Any, constant: Any, shift: int) -> Int:
    """(A28): i-erf of integers; corner and constant broadcast."""
    q = np.asarray(x, np.int64)
    rest = np.minimum(np.abs(q), corner) - corner
    square = rest * rest - constant
    result: Int = -((np.sign(q) * square) >> shift)
    return result


def gelu_bounds(low: int, high: int, corner: int, constant: int, one: int, shift: int) -> tuple[int, int]:
    """Bounds of i-GELU for integers in low .. high: beyond the corner it is within 2 units of |q|, and before it the
    cubic u (B - u)^2 is 4 / 27 B^3 at most.
    """
    beside = max(-low, high, 0) * 3
    least = -((4 * corner**3 // 27 >> shift) + beside + 1) if low < 0 else 0
    return least, max(high, 0) * ((constant >> shift) + one) + beside


@dataclass(frozen=True)
class Softmax:
    """What the exponents of (A29) are computed with.

    left: k.  ln2, shifted, constant: Q, B and C.  up: n, negative for a shift to the right.
    """

    left: int
    ln2: int
    shifted: int
    constant: int
    up: int

    @staticmethod
    def of(scale: Fraction) -> Softmax:
        """The numbers for scores of this scale, which is positive and at least 2^-MOST_FRACTION."""
        left = 0
        while scale * (1 << LEAST_FRACTION) > 1 << left:
            left += 1
        finer, (a, b, c) = scale / (1 << left), EXP
        shifted, constant = floor(b / finer), floor(c / (a * finer * finer))
        return Softmax(left, floor(LN2 / finer), shifted, constant, 31 - (shifted**2 + constant).bit_length())

    @property
    def furthest(self) -> int:
        """The difference, before it is shifted, from which on an exponent is 0."""
        return -(-32 * self.ln2 >> self.left)


def fraction_of(most: float) -> int | None:
    """The bits after the point of scores of at most `most` that go onto a grid; None where they are too large."""
    fraction = LEAST_FRACTION + 1
    return fraction if most < 2.0 ** (GRID_BITS - fraction) else None


def exponents(x: Int, axis: int, numbers: Softmax) -> Int:
    """(A29): e of every score."""
    q = np.asarray(x, np.int64)
    d = np.minimum(q.max(axis=axis, keepdims=True) - q, numbers.furthest) << numbers.left
    z = d // numbers.ln2
    p = z * numbers.ln2 - d + numbers.shifted
    value = p * p + numbers.constant
    up = numbers.up
    e: Int = (value << up if up >= 0 else value >> -up) >> np.minimum(z, 31)
    return e


def softmax_dyadic(inverse: Fraction, count: int) -> tuple[int, int]:
    """M and k of (A17) for exponents of 31 bits: M has 30 bits, or as many as k + bits(sum) <= 62 leaves.

    Raises OverflowError when `inverse` is 2^30 or more.
    """
    return arith.dyadic(inverse, WORD_BITS - 1, arith.MAX_SHIFT - (count << WORD_BITS).bit_length())


def softmax_distance(scale: float, count: int, inverse: float, shift: int, off: float = 0.0) -> float:
    """(A29e) how far beyond 1/2 a result can be from the softmax of scores of this scale, which they have after they
    were made finer; off: how far these are from the real ones, in units.
    """
    # Of each exponent: the polynomial, its two floors, and 31 times what Q has too little.
    relative = EXP_ERROR + 36 * scale
    spread = relative / (2 * (1 - relative)) + expm1(min(2 * off * scale, 8.0)) / 4
    return inverse * (spread + (5 * count + 4) * 2.0**-31) + 2.0**-shift


def root(value: Int) -> Int:
    """Algorithm 4: the floor of the square root, by Newton from the first power of two above it."""
    return np.array([isqrt(int(v)) for v in np.ravel(value)], np.int64).reshape(np.shape(value))


def normalized(x: Int, axes: Sequence[int], zero_point: int = 0) -> Int:
    """(A30): h of every element of a row along `axes`."""
    q, along = np.asarray(x, np.int64) - zero_point, tuple(int(a) for a in axes)
    n = int(np.prod([q.shape[a] for a in along]))
    twice = 2 * q.sum(axis=along, keepdims=True) + n
    mean = twice // (2 * n)
    mean -= (twice % (2 * n) == 0) & (mean % 2 == 1)
    y = q - mean
    factor = (1 << 31) // np.maximum(root((y * y).sum(axis=along, keepdims=True)), 1)
    h: Int = y * factor >> 1
    return h


def normalized_scale(count: int) -> Fraction:
    """sqrt(n) / 2^30, the scale of h, to 100 bits where it is no fraction."""
    return Fraction(isqrt(count << 200), 1 << 100 + NORMALIZED_BITS)


def normalized_distance(count: int) -> float:
    """(A30e) how far h can be from the real normalized value, in its units: all that both can be, since there is no
    epsilon and the mean is an integer.
    """
    return (sqrt(count) + sqrt(max(count - 1, 0))) / sqrt(count) * 2.0**NORMALIZED_BITS
