"""Where two formulas for the same result step: the thresholds of (A22), compared side by side for all channels of a
layer.

Both formulas are lines in the operand that is searched, so how far their thresholds can lie apart is known
beforehand, and float64's own error is bounded: where no integer lies within that reach of the real threshold, both
step at the same integer. The few thresholds left, ties among them, are decided by exact integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arith

Array = NDArray[Any]

# Beyond this many that only Python's integers can decide, they are not enumerated either: such a threshold takes a
# microsecond or two.
MAX_EXACT = 1 << 21

# Thresholds that are compared at once: their arrays fit a cache.
_AT_ONCE = 1 << 16


# -- where a result steps ----------------------------------------------------------------------------


def round_exactly(value: Fraction, rounding: str) -> int:
    """An exact rational rounded to an integer by the named rule of section 3 ("double" has none)."""
    k = value.__floor__() + 1
    boundary = Fraction(_twice_boundary(k, rounding), 2)
    return k if value > boundary or (value == boundary and _inclusive(k, rounding)) else k - 1


def _twice_boundary(k: Any, rounding: str) -> Any:
    """Twice the number at which the result steps from k - 1 to k: k - 1/2, or k or k - 1 when the rounding is
    directed.
    """
    return 2 * k - 1 if rounding not in arith.DIRECTED else 2 * k - 2 + 2 * _inclusive(k, rounding)


def _inclusive(k: Any, rounding: str) -> Any:
    """Whether the boundary of k itself rounds to k; of one k or an array."""
    if rounding == "half_even":
        return k % 2 == 0
    if rounding in ("half_up", "floor", "ceil"):
        return (k == k) & (rounding != "ceil")
    return (k >= 1) == (rounding in ("half_away", "toward_zero"))


class Steps:
    """The results of a requantize before the zero point: every k, and where the sum must be for it."""

    def __init__(self, steps: tuple[int, int], rounding: str, stride: int = 1) -> None:
        self.k = np.arange(steps[0], steps[1] + 1, stride)
        self.twice = np.asarray(_twice_boundary(self.k, rounding), np.int64)
        self.inclusive = np.asarray(_inclusive(self.k, rounding), bool)
        self.boundary = self.twice / 2

    def exact(self, at: Array, first: Array, rest: Array, denominator: Array) -> Array:
        """The least integers v with (v first + rest) / denominator at or beyond the boundaries `at`; arrays of
        Python's integers, first > 0.
        """
        distance = self.twice[at].astype(object) * denominator - 2 * rest
        return np.where(self.inclusive[at], -(-distance // (2 * first)), distance // (2 * first) + 1)


# -- the thresholds of both formulas -----------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """(sum_i x_i factors_i + constant) / denominator, in Python's integers."""

    factors: tuple[int, ...]
    constant: int
    denominator: int

    def at(self, values: Sequence[int]) -> Fraction:
        """Its value at one point."""
        return Fraction(sum(f * v for f, v in zip(self.factors, values, strict=True)) + self.constant, self.denominator)


@dataclass(frozen=True)
class Search:
    """One box of one rescale: v, an operand times its sign, is searched in low .. high; the others take every value.

    real, dyadic: the two formulas, their factor of v first and above 0.  others: the least value of each other
    operand and its number of values.
    """

    owner: int
    low: int
    high: int
    real: Line
    dyadic: Line
    others: tuple[tuple[int, int], ...]

    @property
    def combinations(self) -> int:
        """How many values the other operands take together."""
        return math.prod(n for _, n in self.others)


def search_of(owner: int, lines: tuple[Line, Line], box: Sequence[tuple[int, int]]) -> Search | None:
    """The search of a box by its widest operand; None where no operand moves the dyadic formula."""
    real, dyadic = lines
    # An operand that moves neither formula is any one of its values.
    box = [(low, high if f or g else low) for (low, high), f, g in zip(box, real.factors, dyadic.factors, strict=True)]
    usable = [
        i
        for i, (f, g) in enumerate(zip(real.factors, dyadic.factors, strict=True))
        if f * g > 0 and box[i][0] < box[i][1]
    ]
    if not usable:
        return None
    chosen = max(usable, key=lambda i: box[i][1] - box[i][0])
    sign = 1 if real.factors[chosen] > 0 else -1
    low, high = (b * sign for b in box[chosen][::sign])

    def ordered(line: Line) -> Line:
        rest = line.factors[:chosen] + line.factors[chosen + 1 :]
        return Line((line.factors[chosen] * sign, *rest), line.constant, line.denominator)

    others = tuple((lo, hi - lo + 1) for i, (lo, hi) in enumerate(box) if i != chosen)
    return Search(owner, low, high, ordered(real), ordered(dyadic), others)


class Table:
    """Searches side by side: of each formula v = boundary * slope - (constant + sum x_i factor_i), in float64 and in
    integers.
    """

    def __init__(self, searches: Sequence[Search], steps: Steps) -> None:
        self.searches, self.steps = searches, steps
        self.ends = np.cumsum([s.combinations for s in searches])
        sizes = np.array([[n for _, n in s.others] for s in searches], np.int64).reshape(len(searches), -1)
        self.sizes, self.least = (
            sizes,
            np.array([[low for low, _ in s.others] for s in searches], object).reshape(sizes.shape),
        )
        self.least_float = self.least.astype(np.float64)
        self.strides = np.cumprod(np.hstack([np.ones((len(searches), 1), np.int64), sizes[:, :-1]]), axis=1)[
            :, : sizes.shape[1]
        ]
        self.low, self.high = (
            np.array([s.low for s in searches], np.float64),
            np.array([s.high for s in searches], np.float64),
        )
        lines = [(s.real, s.dyadic) for s in searches]
        self.numbers = [np.array([_divided(pair[i]) for pair in lines]) for i in (0, 1)]
        self.apart, self.error = (np.array(x) for x in zip(*(self._reach(s) for s in searches), strict=True))
        self.same = self.apart == 0
        self.exact = 0

    def _reach(self, s: Search) -> tuple[float, float]:
        """How far the two thresholds of one boundary can lie apart, and by how much a threshold in float64 can be
        off.
        """
        f, g = s.real, s.dyadic
        most = [max(abs(low), abs(low + n - 1)) for low, n in s.others]
        # threshold = boundary * denominator / first - (constant + sum x_i factor_i) / first, of both formulas over one
        # denominator
        furthest = int(max(abs(self.steps.twice[0]), abs(self.steps.twice[-1])) + 1) // 2
        gap = abs(f.denominator * g.factors[0] - g.denominator * f.factors[0]) * furthest
        gap += abs(f.constant * g.factors[0] - g.constant * f.factors[0])
        gap += sum(
            x * abs(p * g.factors[0] - q * f.factors[0])
            for x, p, q in zip(most, f.factors[1:], g.factors[1:], strict=True)
        )
        apart = gap / (f.factors[0] * g.factors[0]) * (1 + 2.0**-40)
        rest = max(
            (abs(line.constant) + sum(x * abs(p) for x, p in zip(most, line.factors[1:], strict=True)))
            / line.factors[0]
            for line in (f, g)
        )
        # Each of its operations is off by 2^-53 of its result: a product of two rounded numbers for each operand, their
        # sum, a difference.
        size = max(abs(s.low), abs(s.high)) + 3 + apart + 2 * rest
        return apart, (len(f.factors) + 9) * 2.0**-52 * size

    def thresholds(self) -> Array:
        """The real formula's thresholds of the one search, whose other operands are constants; exact inside its
        interval.
        """
        (s,), at = self.searches, np.arange(self.steps.k.size)
        values = self.least.astype(object)
        real = self.steps.boundary * self.numbers[0][0, 0] - (
            self.numbers[0][0, 1] + (values * self.numbers[0][0, 2:]).sum()
        )
        result: Array = np.clip(np.floor(real) + 1, s.low - 1.0, s.high + 2.0).astype(np.int64)
        near = (np.abs(real - np.rint(real)) <= self.error[0]) & (real >= s.low - 2) & (real <= s.high + 2)
        some = np.flatnonzero(near)
        if some.size:
            result[some] = np.clip(self._exact([s.real], at[some], values), s.low - 1, s.high + 2).astype(np.int64)
        return result

    def compare(self) -> tuple[Array, Array] | None:
        """For every search the number of thresholds inside its interval, and how many of them differ; None when that
        would take too long.
        """
        inside, differing = np.zeros((2, len(self.searches)), np.int64)
        rows = max(1, _AT_ONCE // self.steps.k.size)
        for start in range(0, int(self.ends[-1]), rows):
            self._block(np.arange(start, min(start + rows, int(self.ends[-1]))), inside, differing)
            if self.exact > MAX_EXACT:
                return None
        return inside, differing

    def _block(self, rows: Array, inside: Array, differing: Array) -> None:
        box = np.searchsorted(self.ends, rows, side="right")
        combination = rows - np.concatenate([[0], self.ends])[box]
        offsets = combination[:, None] // self.strides[box] % self.sizes[box]
        values = offsets + self.least_float[box]
        slopes, rests = zip(
            *((n[box, 0], n[box, 1] + (values * n[box, 2:]).sum(axis=1)) for n in self.numbers), strict=True
        )
        low, high, reach = self.low[box, None], self.high[box, None], (self.apart + self.error)[box, None]
        real = self.steps.boundary * slopes[0][:, None] - rests[0][:, None]
        doubtful = np.abs(real - np.rint(real)) <= reach
        doubtful &= (real >= low - 2 - reach) & (real <= high + 2 + reach)
        if self.same.any():  # equal formulas step together: only whether a threshold is inside must be known
            edge = (np.abs(real - low) <= 2 + reach) | (np.abs(real - high) <= 2 + reach)
            doubtful &= edge | ~self.same[box, None]
        sure = (real >= low) & (real < high) & ~doubtful
        np.add.at(inside, box, sure.sum(axis=1))
        row, at = np.nonzero(doubtful)
        if row.size:
            other = self.steps.boundary[at] * slopes[1][row] - rests[1][row]
            counted, wrong = self._decide(box[row], at, offsets[row], real[row, at], other)
            np.add.at(inside, box[row], counted)
            np.add.at(differing, box[row], wrong)

    def _decide(self, box: Array, at: Array, offsets: Array, real: Array, dyadic: Array) -> tuple[Array, Array]:
        """Whether thresholds are inside, and whether they differ: by float64 where it is sure of both, else by
        integers.
        """
        error = self.error[box]
        sure = (np.abs(real - np.rint(real)) > error) & (np.abs(dyadic - np.rint(dyadic)) > error)
        low, high = self.low[box], self.high[box]
        counted, wrong = verdict(np.floor(real) + 1, np.floor(dyadic) + 1, low, high)
        some = np.flatnonzero(~sure)
        if some.size:
            boxes = box[some].tolist()
            searches = [self.searches[i] for i in (boxes if len(set(boxes)) > 1 else boxes[:1])]
            values = self.least[box[some]] + offsets[some].astype(object)
            wanted, got = (
                self._exact([getattr(s, name) for s in searches], at[some], values) for name in ("real", "dyadic")
            )
            ends = (np.array([getattr(s, name) for s in searches], object) for name in ("low", "high"))
            counted[some], wrong[some] = verdict(wanted, got, *ends)
            self.exact += some.size
        return counted, wrong

    def _exact(self, lines: Sequence[Line], at: Array, values: Array) -> Array:
        first, constant, denominator = (
            np.array(x, object) for x in zip(*((n.factors[0], n.constant, n.denominator) for n in lines), strict=True)
        )
        factors = np.array([n.factors[1:] for n in lines], object).reshape(len(lines), values.shape[1])
        return self.steps.exact(at, first, constant + (values * factors).sum(axis=1), denominator)


def _divided(line: Line) -> list[float]:
    first, *others = line.factors
    return [line.denominator / first, line.constant / first, *(p / first for p in others)]


def verdict(wanted: Array, got: Array, low: Array, high: Array) -> tuple[Array, Array]:
    inside = ((wanted > low) & (wanted <= high)) | ((got > low) & (got <= high))
    return inside.astype(bool), (np.clip(wanted, low, high + 1) != np.clip(got, low, high + 1)).astype(bool)
