"""(A27), (A31): where a real function of a sum crosses the boundaries of its rounded result, against the integers.

The crossings are enclosed by bisection: bounds of the function over an interval that hold no boundary decide it, what
is left is halved. Against them stand the integers that the sums before and behind a crossing become.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rescales import Rescale
from .thresholds import Proof

Array = NDArray[Any]
Bounds = Callable[[Array, Array], tuple[Array, Array]]
# Beyond these no thresholds are looked for: steps of the result, and steps times channels.
MOST_STEPS, MOST_THRESHOLDS = 1 << 12, 1 << 23
# Intervals to begin with, halvings, and intervals that may be undecided at once.
PIECES, HALVINGS, MOST_OPEN = 1 << 12, 60, 1 << 17
UNDECIDED = -(1 << 40)


def boundary(level: Array, rounding: str) -> Array:
    """The real number from which on, or beyond which, a rounding gives `level` or more."""
    up = {"floor": np.zeros(()), "ceil": np.ones(()), "toward_zero": level <= 0, "away": level > 0}
    return np.asarray(level - up.get(rounding, np.asarray(0.5)))


@dataclass(frozen=True)
class Crossings:
    """The rounded result of a function: from starts[j] on it is levels[j], or UNDECIDED in a tiny interval."""

    starts: Array
    levels: Array


def crossings(bounds: Bounds, low: float, high: float, steps: tuple[int, int], rounding: str) -> Crossings | None:
    """The rounded result of a function over low .. high; None where it has too many steps.

    bounds: encloses the function's values, in steps, over intervals.  steps: the first and the last threshold.
    """
    if steps[1] - steps[0] >= MOST_STEPS:
        return None
    edges = boundary(np.arange(steps[0], steps[1] + 1), rounding).astype(np.float64)
    points = np.linspace(low, high, PIECES + 1) if high > low else np.array([low, high])
    lows, highs = points[:-1], points[1:]
    starts, levels = [], []
    for _ in range(HALVINGS):
        least, most = bounds(lows, highs)
        reached = np.searchsorted(edges, least, "left")
        decided = reached == np.searchsorted(edges, most, "right")
        starts.append(lows[decided])
        levels.append(steps[0] - 1 + reached[decided])
        lows, highs = lows[~decided], highs[~decided]
        middle = lows + (highs - lows) / 2
        # What is narrower is as narrow as the bounds are true: halves of it would stay undecided, too.
        split = highs - lows > np.maximum(np.abs(lows), np.abs(highs)) * 2.0**-45
        if not split.any():
            break
        if lows.size > MOST_OPEN:
            return None
        starts.append(lows[~split])
        levels.append(np.full(int((~split).sum()), UNDECIDED))
        lows, highs, middle = lows[split], highs[split], middle[split]
        lows, highs = np.concatenate([lows, middle]), np.concatenate([middle, highs])
    starts.append(lows)
    levels.append(np.full(lows.size, UNDECIDED))
    order = np.argsort(np.concatenate(starts), kind="stable")
    start, level = np.concatenate(starts)[order], np.concatenate(levels)[order]
    first = np.concatenate([[True], level[1:] != level[:-1]])
    return Crossings(start[first], level[first])


def compare(
    real: Crossings,
    rescales: Sequence[Rescale],
    counts: Sequence[int],
    levels_of: Callable[[Array], Array],
    step: Fraction,
    zero: Fraction | int,
) -> Proof:
    """How many thresholds of the real function lie inside every channel's interval, and how many of them its integers
    pass at another sum, or may pass.

    rescales: a sum v to the grid, before its clamp, which rounds half up.  counts: how many channels each stands for.
    levels_of: the levels of the grid's integers, clamped or not; integer i stands for (i - zero) step.
    """
    if len(counts) * max(real.levels.size, 1) > MOST_THRESHOLDS or any(len(r.ratios) != 1 for r in rescales):
        return Proof(enumerated=False)
    total = Proof()
    for r, count in zip(rescales, counts, strict=True):
        sign = 1 if r.ratios[0] >= 0 else -1
        if r.ratios[0] == 0 or r.multipliers[0] == 0:
            total += Proof(enumerated=False)
            continue
        low, high = sorted((sign * r.lows[0], sign * r.highs[0]))
        v, levels = _inside(_first_sums(real.starts[1:], r, step, zero), real.levels, low, high)
        half = (1 << r.shift) >> 1
        before, after = (
            levels_of((sums * (sign * r.multipliers[0]) + r.offset + half) >> r.shift) for sums in (v - 1, v)
        )
        decided = (levels[1:] != UNDECIDED) & (levels[:-1] != UNDECIDED)
        alike = (before == levels[:-1]) & (after == levels[1:]) & decided
        total += Proof(int(v.size), int(v.size - alike.sum())) * count
    return total


def _inside(first: Array, levels: Array, low: int, high: int) -> tuple[Array, Array]:
    """The steps inside low .. high: the arguments above `low` where the level changes, and the levels around them."""
    # Of several steps at one argument the last one counts.
    last = np.concatenate([first[1:] != first[:-1], [True]]) if first.size else np.zeros(0, bool)
    first, levels = first[last], np.concatenate([levels[:1], levels[1:][last]])
    inside = (first > low) & (first <= high)
    start = int(np.searchsorted(first, low, "right"))
    first, levels = first[inside], np.concatenate([levels[start : start + 1], levels[1:][inside]])
    changed = levels[1:] != levels[:-1]
    return first[changed], np.concatenate([levels[:1], levels[1:][changed]])


def _first_sums(x: Array, r: Rescale, step: Fraction, zero: Fraction | int) -> Array:
    """The least v, or -v where the sum falls with it, with a real value of at least x, exactly."""
    slope, constant = abs(r.ratios[0]), r.constant - zero
    estimate = (x.astype(np.longdouble) / _long(step) - _long(constant)) / _long(slope)
    return _ceilings(estimate, lambda j: (Fraction(float(x[j])) / step - constant) / slope)


def _ceilings(estimate: Array, exactly: Callable[[int], Fraction]) -> Array:
    """Ceilings as int64, of what lies near an integer by its exact value; beyond 2^40 they all lie outside."""
    estimate = np.clip(estimate, -(2.0**40), 2.0**40)
    result = np.ceil(estimate).astype(np.int64)
    for j in np.flatnonzero(np.abs(estimate - np.rint(estimate)) < 1e-6).tolist():
        exact = exactly(j)
        result[j] = min(max(-(-exact.numerator // exact.denominator), -(1 << 40)), 1 << 40)
    return result


def _long(value: Fraction) -> np.longdouble:
    """A fraction in long double, whose last bits are right."""
    whole = np.longdouble(float(value))
    return whole + np.longdouble(float(value - Fraction(float(value))))
