"""The numbers of a normalization by a row's own mean and variance (A25), and how far it is from the real formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import expm1, isqrt, log1p, prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
# The root is taken of a number of 61 or 62 bits, and the reciprocal is that of the root in 2^61.
ROOT_BITS, WIDEST_SPARE = 62, 30


@dataclass(frozen=True)
class Norm:
    """What (A25) is computed with.

    count: n, the elements of a row.  zero_point: is taken from every element first.  shift: f, even; bits of the
    variance below its unit, negative for bits that are left out.  epsilon: E.  fraction: H, the fraction bits of the
    result.  centered: whether the mean is taken away (LayerNorm) or not (RMSNorm).
    """

    count: int
    zero_point: int
    shift: int
    epsilon: int
    fraction: int
    centered: bool

    @staticmethod
    def of(count: int, bounds: tuple[int, int], scale: Fraction, epsilon: Fraction, zero: int | None) -> Norm:
        """The numbers for rows of `count` integers in `bounds` with this scale; zero: the point that stands for 0 where
        the mean is not taken away, None where it is.

        Raises OverflowError when n times the range of the integers takes more than 32 bits, or when epsilon is beyond
        anything that the variance of such integers can be.
        """
        low, high = bounds
        middle = (low + high + 1) // 2 if zero is None else zero
        reach = max(high - middle, middle - low)
        spread = count * (high - low) if zero is None else 2 * count * reach
        if spread > 1 << 32 or count * reach > 1 << 31:
            raise OverflowError("rows too long for integers of so many bits")
        added = count * count * epsilon / scale**2
        most = max(spread * spread // 4, 1)
        shift = min(WIDEST_SPARE, ROOT_BITS - most.bit_length() + (most & (most - 1) == 0))
        shift = min(shift, ROOT_BITS - 1 - _bits(added))
        shift -= shift % 2
        if shift < -WIDEST_SPARE:
            raise OverflowError("an epsilon far beyond every variance")
        fraction = 30 - ((count - 1).bit_length() + 1) // 2
        return Norm(count, middle, shift, round(added * Fraction(2) ** shift), fraction, zero is None)

    @property
    def largest(self) -> int:
        """The most that |h| can be."""
        turns = self.count - 1 if self.centered else self.count
        return isqrt(turns << 2 * self.fraction) + 1 + (1 << 8)

    @property
    def distance(self) -> float:
        """(A25e) how far h / 2^H can be from the real normalized value of the integers."""
        turns = self.count - 1 if self.centered else self.count
        if not turns:
            return 0.0
        # The least W of a row that is not constant, and what E and V lose before the root.
        least = max(turns * Fraction(2) ** self.shift + self.epsilon, Fraction(1))
        lost = float((Fraction(1, 2) if self.shift >= 0 else Fraction(3, 2)) / least)
        # What is lost of W is lost of its inverse root about half as much: never more than this.
        e = expm1(-log1p(-lost) / 2) * (1 + 2.0**-40) if lost < 1 / 2 else lost
        return float(turns**0.5) * (2.0**-30 + 2.0**-56 + e) + 2.0 ** -(self.fraction + 1)

    def moved(self, off: float) -> float:
        """(A25d) by how much the real normalized value can change where the integers of a row are off by so much."""
        turns = self.count - 1 if self.centered else self.count
        # The deviation is at least the root of epsilon, in units of the integers.
        least = sqrt(max(self.epsilon - 0.5, 0.0)) * 2.0 ** (-self.shift // 2) / self.count
        change = off * (sqrt(turns) + 1 + self.centered)
        most = 2 * sqrt(turns)
        return change / least if change < most * least else most

    def to_dict(self) -> dict[str, Any]:
        """The attributes of hawq.layer_norm, but for its axes."""
        return {**{k: int(v) for k, v in asdict(self).items() if k != "count"}}


def norm_of(attrs: Any, shape: Sequence[int]) -> Norm:
    """The numbers that a call of hawq.layer_norm carries, for data of this shape."""
    count = prod(shape[int(a)] for a in attrs["axes"])
    zero_point, shift, epsilon, fraction = (int(attrs[k]) for k in ("zero_point", "shift", "epsilon", "fraction"))
    return Norm(count, zero_point, shift, epsilon, fraction, bool(int(attrs["centered"])))


def _bits(value: Fraction) -> int:
    """The least b with value <= 2^b; a value of 0 needs none."""
    if not value:
        return -(1 << 10)
    bits = value.numerator.bit_length() - value.denominator.bit_length() - 1
    while value > Fraction(2) ** bits:
        bits += 1
    return bits


def normalized(x: NDArray[Any], axes: Sequence[int], norm: Norm) -> Int:
    """(A25): h for every element of x, over `axes`."""
    q, along = np.asarray(x, np.int64) - norm.zero_point, tuple(int(a) for a in axes)
    n = np.int64(norm.count)
    total = q.sum(axis=along, keepdims=True) * int(norm.centered)
    spread = n * (q * q).sum(axis=along, keepdims=True) - total * total
    f = norm.shift
    wide = np.maximum((spread << f if f >= 0 else spread >> -f) + norm.epsilon, 1)
    extra = 2 * sum((wide < np.int64(1) << 62 - 2 * j).astype(np.int64) for j in range(31)) - 2
    root = np.full_like(wide, np.int64(1) << 31)
    square = np.where(extra < 0, wide >> 2, wide << np.maximum(extra, 0))
    for _ in range(5):
        root = (root + square // root) >> 1
    root -= root * root > square
    product = (n * q - total) * ((np.int64(1) << 61) // root)
    by = np.clip(61 - norm.fraction - ((extra + f) >> 1), 1, 62)
    rounded: Int = (product + (np.int64(1) << (by - 1))) >> by
    return rounded
