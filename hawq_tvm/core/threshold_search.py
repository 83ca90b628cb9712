"""Where two formulas for the same result step: the thresholds of (A22), compared side by side for all channels of a
layer.

Both formulas are lines in the operand that is searched, so how far their thresholds can lie apart is known
beforehand, and float64's own error is bounded: where no integer lies within that reach of the real threshold, both
step at the same integer. The few thresholds left, ties among them, are decided by exact integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arith
from .rescales import Lines, Rescales

Array = NDArray[Any]

# Beyond this many that only Python's integers can decide, they are not enumerated either: such a threshold takes a
# microsecond or two.
MAX_EXACT = 1 << 21

# Thresholds that are compared at once: their arrays fit a cache.
AT_ONCE = 1 << 16


# -- where a result steps ----------------------------------------------------------------------------


def round_exactly(value: Fraction, rounding: str) -> int:
    """An exact rational rounded to an integer by the named rule of section 3 ("double" has none)."""
    k = value.__floor__() + 1
    boundary = Fraction(twice_boundary(k, rounding), 2)
    return k if value > boundary or (value == boundary and inclusive(k, rounding)) else k - 1


def twice_boundary(k: Any, rounding: str) -> Any:
    """Twice the number at which the result steps from k - 1 to k: k - 1/2, or k or k - 1 when the rounding is
    directed.
    """
    return 2 * k - 1 if rounding not in arith.DIRECTED else 2 * k - 2 + 2 * inclusive(k, rounding)


def inclusive(k: Any, rounding: str) -> Any:
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
        self.twice = np.asarray(twice_boundary(self.k, rounding), np.int64)
        self.inclusive = np.asarray(inclusive(self.k, rounding), bool)
        self.boundary = self.twice / 2

    def exact(self, at: Array, first: Array, rest: Array, denominator: Array) -> Array:
        """The least integers v with (v first + rest) / denominator at or beyond the boundaries `at`; arrays of
        Python's integers, first > 0.
        """
        distance = self.twice[at].astype(object) * denominator - 2 * rest
        return np.where(self.inclusive[at], -(-distance // (2 * first)), distance // (2 * first) + 1)


# -- the thresholds of both formulas -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Searches:
    """Boxes of rescales, one a row: v, an operand times its sign, is searched in low .. high; the others take every
    value.

    owner: the number of the row's rescale.  real, dyadic: the two formulas, their factor of v first and above 0.
    least, count: the least value of each other operand and its number of values.
    """

    owner: Array
    low: Array
    high: Array
    real: Lines
    dyadic: Lines
    least: Array
    count: Array

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.owner)

    @property
    def alone(self) -> bool:
        """Whether no other operands are left."""
        return not self.count.shape[1]

    @property
    def combinations(self) -> Array:
        """How many values the other operands of each take together."""
        combinations: Array = np.multiply.reduce(self.count, axis=1)
        return combinations

    @staticmethod
    def joined(parts: Sequence[Searches]) -> Searches:
        """The rows of all parts, which have the same number of operands."""

        def every(name: str) -> Array:
            return np.concatenate([attrgetter(name)(p) for p in parts])

        real, dyadic = (Lines(*(every(f"{n}.{f.name}") for f in fields(Lines))) for n in ("real", "dyadic"))
        return Searches(every("owner"), every("low"), every("high"), real, dyadic, every("least"), every("count"))


def searches_of(r: Rescales, low: Array, high: Array) -> Searches:
    """The searches of a box low .. high of every rescale by its widest operand, without those whose operands do not
    move the dyadic formula.
    """
    f, g = r.real.factors, r.dyadic.factors
    # An operand that moves neither formula is any one of its values.
    high = np.where((f != 0) | (g != 0), high, low)
    usable = (f * g > 0) & (low < high)
    owner = np.flatnonzero(usable.any(axis=1))
    chosen = np.argmax(np.where(usable, high - low, -1)[owner], axis=1)
    order = np.argsort(np.arange(f.shape[1]) != chosen[:, None], axis=1, kind="stable")
    f, g, low, high = (np.take_along_axis(a[owner], order, axis=1) for a in (f, g, low, high))
    sign = np.where(f[:, 0] > 0, 1, -1).astype(object)
    f[:, 0], g[:, 0] = f[:, 0] * sign, g[:, 0] * sign
    least, most = (np.where(sign > 0, a[:, 0], -b[:, 0]) for a, b in ((low, high), (high, low)))
    real, dyadic = (Lines(a, line.constant[owner], line.denominator[owner]) for a, line in ((f, r.real), (g, r.dyadic)))
    return Searches(owner, least, most, real, dyadic, low[:, 1:], high[:, 1:] - low[:, 1:] + 1)


class Table:
    """Searches side by side: of each formula v = boundary * slope - (constant + sum x_i factor_i), in float64 and in
    integers.
    """

    def __init__(self, searches: Searches, steps: Steps) -> None:
        self.searches, self.steps = searches, steps
        self.ends = np.cumsum(searches.combinations.astype(np.int64))
        self.sizes = searches.count.astype(np.int64)
        self.least_float = searches.least.astype(np.float64)
        sizes = np.hstack([np.ones((len(searches), 1), np.int64), self.sizes[:, :-1]])
        self.strides = np.cumprod(sizes, axis=1)[:, : self.sizes.shape[1]]
        self.low, self.high = searches.low.astype(np.float64), searches.high.astype(np.float64)
        self.numbers = [_divided(line) for line in (searches.real, searches.dyadic)]
        self.apart, self.error = self._reach()
        self.same = self.apart == 0
        self.exact = 0

    def _reach(self) -> tuple[Array, Array]:
        """How far the two thresholds of one boundary can lie apart, and by how much a threshold in float64 can be
        off.
        """
        s = self.searches
        f, g = s.real, s.dyadic
        most = np.maximum(np.abs(s.least), np.abs(s.least + s.count - 1))
        # threshold = boundary * denominator / first - (constant + sum x_i factor_i) / first, of both formulas over one
        # denominator
        furthest = int(max(abs(self.steps.twice[0]), abs(self.steps.twice[-1])) + 1) // 2
        first, second = f.factors[:, 0], g.factors[:, 0]
        gap = np.abs(f.denominator * second - g.denominator * first) * furthest
        gap += np.abs(f.constant * second - g.constant * first)
        gap += (most * np.abs(f.factors[:, 1:] * second[:, None] - g.factors[:, 1:] * first[:, None])).sum(axis=1)
        apart = (gap / (first * second)).astype(np.float64) * (1 + 2.0**-40)
        rest = np.maximum(
            *((np.abs(n.constant) + (most * np.abs(n.factors[:, 1:])).sum(axis=1)) / n.factors[:, 0] for n in (f, g))
        ).astype(np.float64)
        # Each of its operations is off by 2^-53 of its result: a product of two rounded numbers for each operand, their
        # sum, a difference.
        size = (np.maximum(np.abs(s.low), np.abs(s.high)) + 3).astype(np.float64) + apart + 2 * rest
        return apart, (f.factors.shape[1] + 9) * 2.0**-52 * size

    def thresholds(self) -> Array:
        """The real formula's thresholds of every search, whose other operands are constants, by step; exact inside its
        interval.
        """
        s, numbers = self.searches, self.numbers[0]
        low, high = self.low[:, None], self.high[:, None]
        rest = numbers[:, 1] + (self.least_float * numbers[:, 2:]).sum(axis=1)
        real = self.steps.boundary * numbers[:, :1] - rest[:, None]
        result: Array = np.clip(np.floor(real) + 1, low - 1, high + 2).astype(np.int64)
        near = (np.abs(real - np.rint(real)) <= self.error[:, None]) & (real >= low - 2) & (real <= high + 2)
        row, at = np.nonzero(near)
        if row.size:
            exact = self._exact(s.real[row], at, s.least[row])
            result[row, at] = np.clip(exact, s.low[row] - 1, s.high[row] + 2).astype(np.int64)
        return result

    def compare(self) -> tuple[Array, Array] | None:
        """For every search the number of thresholds inside its interval, and how many of them differ; None when that
        would take too long.
        """
        inside, differing = np.zeros((2, len(self.searches)), np.int64)
        rows = max(1, AT_ONCE // self.steps.k.size)
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
        real = self.steps.boundary * slopes[0][:, None]
        real -= rests[0][:, None]
        low, high, reach = self.low[box], self.high[box], (self.apart + self.error)[box]
        away = np.rint(real)
        away -= real
        row, at = np.divmod(np.flatnonzero(np.abs(away, out=away) <= reach[:, None]), real.shape[1])
        near = real[row, at]
        least, most = low[row], high[row]
        doubtful = (near >= least - 2 - reach[row]) & (near <= most + 2 + reach[row])
        if self.same.any():  # equal formulas step together: only whether a threshold is inside must be known
            edge = (np.abs(near - least) <= 2 + reach[row]) | (np.abs(near - most) <= 2 + reach[row])
            doubtful &= edge | ~self.same[box[row]]
        row, at, near = row[doubtful], at[doubtful], near[doubtful]
        # Sure are all those inside but the doubtful ones.
        _add_at(inside, box, (real < high[:, None]).sum(axis=1) - (real < low[:, None]).sum(axis=1))
        inside -= np.bincount(box[row[(near >= low[row]) & (near < high[row])]], minlength=inside.size)
        if row.size:
            other = self.steps.boundary[at] * slopes[1][row] - rests[1][row]
            counted, wrong = self._decide(box[row], at, offsets[row], near, other)
            _add_at(inside, box[row], counted)
            _add_at(differing, box[row], wrong)

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
            boxes, s = box[some], self.searches
            values = s.least[boxes] + offsets[some].astype(object)
            rows = boxes if np.any(boxes != boxes[0]) else boxes[:1]
            wanted, got = (self._exact(line[rows], at[some], values) for line in (s.real, s.dyadic))
            ends = s.low[boxes], s.high[boxes]
            counted[some], wrong[some] = verdict(wanted, got, *ends)
            self.exact += some.size
        return counted, wrong

    def _exact(self, lines: Lines, at: Array, values: Array) -> Array:
        rest = lines.constant + (values * lines.factors[:, 1:]).sum(axis=1)
        return self.steps.exact(at, lines.factors[:, 0], rest, lines.denominator)


def _add_at(counts: Array, at: Array, values: Array) -> None:
    """Add counts below 2^53 to those of their searches; np.add.at takes ten times as long."""
    counts += np.bincount(at, values, counts.size).astype(np.int64)


def _divided(lines: Lines) -> Array:
    first = lines.factors[:, :1]
    columns = (lines.denominator[:, None], lines.constant[:, None], lines.factors[:, 1:])
    return np.hstack([column / first for column in columns]).astype(np.float64)


def verdict(wanted: Array, got: Array, low: Array, high: Array) -> tuple[Array, Array]:
    inside = ((wanted > low) & (wanted <= high)) | ((got > low) & (got <= high))
    return inside.astype(bool), (np.clip(wanted, low, high + 1) != np.clip(got, low, high + 1)).astype(bool)
