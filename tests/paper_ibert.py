"""Algorithms 1 to 4 of I-BERT, transcribed from the paper: an integer q and its scale S give an integer and its scale.

Scales are Fractions, and the square root of two is one of 60 digits. What the paper leaves to its 32-bit integers is a
parameter: how many bits of i-erf are dropped, and by how many i-exp is magnified before it is shifted.
"""

from __future__ import annotations

import math
from fractions import Fraction
from math import floor

ROOT2 = Fraction(math.isqrt(2 * 10**120), 10**60)
LN2 = Fraction("0.69314718055994530941723212145817656807550013436025525412068")


def i_poly(q: int, scale: Fraction, a: Fraction, b: Fraction, c: Fraction) -> tuple[int, Fraction]:
    """Algorithm 1: a (x + b)^2 + c."""
    return (q + floor(b / scale)) ** 2 + floor(c / (a * scale**2)), a * scale**2


def i_erf(q: int, scale: Fraction, dropped: int = 0) -> tuple[int, Fraction]:
    """Algorithm 2's erf."""
    a, b, c = Fraction("-0.2888"), Fraction("-1.769"), Fraction(1)
    sign = (q > 0) - (q < 0)
    value, unit = i_poly(min(abs(q), -floor(b / scale)), scale, a, b, c)
    return sign * value // 2**dropped, unit * 2**dropped


def i_gelu(q: int, scale: Fraction, dropped: int = 0) -> tuple[int, Fraction]:
    """Algorithm 2."""
    erf, unit = i_erf(q, scale / ROOT2, dropped)
    return q * (erf + floor(1 / unit)), scale * unit / 2


def i_exp(q: int, scale: Fraction, magnified: int = 0) -> tuple[int, Fraction]:
    """Algorithm 3's exponential of q <= 0."""
    a, b, c = Fraction("0.3585"), Fraction("1.353"), Fraction("0.344")
    ln2 = floor(LN2 / scale)
    z = -q // ln2
    value, unit = i_poly(q + z * ln2, scale, a, b, c)
    return floor(Fraction(value) * Fraction(2) ** magnified) >> z, unit / Fraction(2) ** magnified


def i_softmax(row: list[int], scale: Fraction, magnified: int = 0) -> list[Fraction]:
    """Algorithm 3, its quotient not rounded."""
    e = [i_exp(q - max(row), scale, magnified)[0] for q in row]
    return [Fraction(v, sum(e)) for v in e]


def i_sqrt(n: int) -> int:
    """Algorithm 4."""
    if n == 0:
        return 0
    x = 2 ** -(-n.bit_length() // 2)
    while True:
        y = (x + n // x) // 2
        if y >= x:
            return x
        x = y


def i_layer_norm(row: list[int]) -> list[int]:
    """Section 3.6, with the mean and the quotient of the authors' program; scale sqrt(n) / 2^30."""
    mean = round(Fraction(sum(row), len(row)))
    deviation = i_sqrt(sum((q - mean) ** 2 for q in row))
    return [(q - mean) * (2**31 // max(deviation, 1)) // 2 for q in row]
