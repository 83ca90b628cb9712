"""Thresholds of (A22) counted without a look at each: for results of very many steps.

Both formulas step at floors of lines in the number of the step, and the sum of a line's floors takes as long as
Euclid's algorithm. Where two lines are less than 1 apart, their floors differ by 0 or 1 on one side: as often as their
sums say. All in whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rescales import Lines
from .threshold_search import Searches, inclusive, twice_boundary

Array = NDArray[Any]

# From so many steps on this is faster than to compare each.
MANY = 1 << 12


def counted(searches: Searches, rounding: str, steps: tuple[int, int]) -> tuple[Array, Array]:
    """What `threshold_search.Table.compare` gives for searches without other operands: of each, the number of
    thresholds inside its interval, and how many of them differ.
    """
    inside, differing = np.zeros((2, len(searches)), np.int64)
    progressions = _progressions(rounding, steps)
    formulas = [_rows(line) for line in (searches.real, searches.dyadic)]
    ends = zip(searches.low.tolist(), searches.high.tolist(), strict=True)
    for row, (real, dyadic, (low, high)) in enumerate(zip(*formulas, ends, strict=True)):
        for p in progressions:
            counts = _compared(p.thresholds(*real), p.thresholds(*dyadic), p.count, low, high)
            inside[row] += counts[0]
            differing[row] += counts[1]
    return inside, differing


def floor_sum(count: int, factor: int, constant: int, divisor: int) -> int:
    """The sum of floor((i factor + constant) / divisor) over i in 0 .. count - 1; factor >= 0, divisor > 0."""
    total = 0
    while count > 0:
        whole, factor = divmod(factor, divisor)
        total += whole * (count * (count - 1) >> 1)
        whole, constant = divmod(constant, divisor)
        total += whole * count
        # The floors left are counted by what they reach: i and floor change places.
        count, constant = divmod(factor * count + constant, divisor)
        factor, divisor = divisor, factor
    return total


@dataclass(frozen=True)
class _Floors:
    """floor((i factor + constant) / divisor) for i = 0, 1, ..; factor and divisor are above 0."""

    factor: int
    constant: int
    divisor: int

    def reaches(self, value: int, count: int) -> int:
        """The first i at which it is at least `value`, `count` where none below that is."""
        return min(max(-((self.constant - value * self.divisor) // self.factor), 0), count)

    def total(self, start: int, end: int) -> int:
        """The sum over i in start .. end - 1."""
        return floor_sum(end - start, self.factor, self.constant + start * self.factor, self.divisor)


@dataclass(frozen=True)
class _Progression:
    """Steps whose boundaries are equally far apart, and all belong to the results above them, or none.

    twice: twice the first boundary.  gap: twice the distance.
    """

    twice: int
    gap: int
    count: int
    inclusive: bool

    def thresholds(self, factor: int, rest: int, denominator: int) -> _Floors:
        """The least v with (v factor + rest) / denominator at or beyond each boundary."""
        divisor = 2 * factor
        constant = self.twice * denominator - 2 * rest + divisor - self.inclusive
        return _Floors(self.gap * denominator, constant, divisor)


def _progressions(rounding: str, steps: tuple[int, int]) -> list[_Progression]:
    first, last = steps
    if rounding == "half_even":
        parts = [range(first, last + 1, 2), range(first + 1, last + 1, 2)]
    else:
        parts = [range(first, min(last, 0) + 1), range(max(first, 1), last + 1)]
    return [
        _Progression(int(twice_boundary(k[0], rounding)), 2 * k.step, len(k), bool(inclusive(k[0], rounding)))
        for k in parts
        if k
    ]


def _rows(lines: Lines) -> list[tuple[int, int, int]]:
    return list(zip(lines.factors[:, 0].tolist(), lines.constant.tolist(), lines.denominator.tolist(), strict=True))


def _compared(a: _Floors, b: _Floors, count: int, low: int, high: int) -> tuple[int, int]:
    """How many of two formulas' thresholds are inside low + 1 .. high, and how many differ between there."""
    begins, ends = zip(*((f.reaches(low + 1, count), f.reaches(high + 1, count)) for f in (a, b)), strict=True)
    start, end = max(begins), min(ends)
    if start >= end:  # never both inside
        return sum(ends) - sum(begins), max(max(ends) - min(begins), 0)
    every = max(ends) - min(begins)
    return every, every - (end - start) + _differing(a, b, start, end)


def _differing(a: _Floors, b: _Floors, start: int, end: int) -> int:
    """At how many i in start .. end - 1 the floors differ."""
    # a - b is (i rise + rest) / one
    one = a.divisor * b.divisor
    rise = a.factor * b.divisor - b.factor * a.divisor
    rest = a.constant * b.divisor - b.constant * a.divisor
    if rise < 0:
        return _differing(b, a, start, end)
    if rise == 0:
        if rest == 0:
            return 0
        cuts = [end if rest <= -one else start, end if rest < 0 else start, end if rest < one else start]
    else:
        cuts = [(-one - rest) // rise + 1, -(rest // rise), -((rest - one) // rise)]
    # Before the first cut a is 1 or more below b, from the last one on as much above.
    below, equal, above = (min(max(c, start), end) for c in cuts)
    near = b.total(below, equal) - a.total(below, equal) + a.total(equal, above) - b.total(equal, above)
    return below - start + near + end - above
