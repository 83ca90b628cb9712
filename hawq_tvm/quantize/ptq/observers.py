"""Ranges of activations, chosen from a histogram of what calibration saw: minmax, percentile, mse (least squared
error), entropy (Kullback-Leibler).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BINS = 2048
# Scales of activations and of weights are no smaller, so that the product of two is a normal float32.
LEAST = 2.0**-60
# Candidates of a search: the observed range times 1, 1 - 1/STEPS, ...
STEPS = 100


@dataclass
class Histogram:
    """How often a tensor's values fell into equal bins between its least and its greatest one.

    counts: BINS of them.  Filled by `add`, after low and high are known.
    """

    low: float
    high: float
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: Array) -> None:
        """Count values, all of which lie within [low, high]."""
        if self.high > self.low:
            # In float64, where bins have a width however close the ends are.
            self.counts += np.histogram(values.astype(np.float64), BINS, (self.low, self.high))[0]
        else:
            self.counts[0] += values.size

    @property
    def centers(self) -> Array:
        """The middles of the bins."""
        edges = np.linspace(self.low, self.high, BINS + 1)
        return (edges[:-1] + edges[1:]) / 2


@dataclass(frozen=True)
class Grid:
    """Integers that stand for real numbers: real = scale (q - zero), q from low to high (equation A1)."""

    scale: float
    zero: int
    low: int
    high: int

    def rounded(self, values: Array) -> Array:
        """The nearest numbers that the grid has, in float64 (A2)."""
        return (np.clip(np.rint(values / self.scale) + self.zero, self.low, self.high) - self.zero) * self.scale


def grid(low: float, high: float, bits: int, signed: bool, symmetric: bool) -> Grid:
    """The grid of a real range, which is widened to hold 0.

    signed: of the integers.  symmetric: zero point 0, which for unsigned integers takes low >= 0.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if symmetric:
        reach = max(-low / -least if signed else 0.0, high / most)
        return Grid(_scale(reach), 0, least, most)
    scale = _scale((high - low) / (most - least))
    return Grid(scale, int(np.clip(np.rint(least - low / scale), least, most)), least, most)


def _scale(value: float) -> float:
    """A scale as files hold it: a float32 whose product with any other is a normal one."""
    return float(np.float32(max(value, LEAST)))


Observer = Callable[[Histogram, Callable[[float, float], Grid], float], tuple[float, float]]


def minmax(seen: Histogram, make: Callable[[float, float], Grid], percentile: float) -> tuple[float, float]:
    """All that was seen."""
    return seen.low, seen.high


def percentile(seen: Histogram, make: Callable[[float, float], Grid], percentile: float) -> tuple[float, float]:
    """What remains when (100 - percentile) % are left out at either end that is not 0, to the width of a bin."""
    if not seen.counts.any():
        return seen.low, seen.high
    share = (100.0 - percentile) / 100.0 * seen.counts.sum()
    upward = np.cumsum(seen.counts)
    edges = np.linspace(seen.low, seen.high, BINS + 1)
    low = seen.low if seen.low >= 0 else float(edges[np.searchsorted(upward, share, side="right")])
    high = seen.high if seen.high <= 0 else float(edges[np.searchsorted(upward, upward[-1] - share, side="left") + 1])
    return min(low, 0.0), max(high, 0.0)


def mse(seen: Histogram, make: Callable[[float, float], Grid], percentile: float) -> tuple[float, float]:
    """The range whose rounding and clipping has the least squared error; both ends are searched in turns."""
    centers, counts = seen.centers, seen.counts.astype(np.float64)
    used = counts > 0
    centers, counts = centers[used], counts[used]

    def error(low: float, high: float) -> float:
        return float(((make(low, high).rounded(centers) - centers) ** 2) @ counts)

    return _searched(seen, error)


def _searched(seen: Histogram, error: Callable[[float, float], float]) -> tuple[float, float]:
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    factors = np.arange(STEPS, 0, -1) / STEPS
    shared = min(factors, key=lambda f: error(low * f, high * f))
    best = low * shared, high * shared
    if low < 0 < high:
        best = best[0], min((high * f for f in factors), key=lambda h: error(best[0], h))
        best = min((low * f for f in factors), key=lambda v: error(v, best[1])), best[1]
    return float(best[0]), float(best[1])


def entropy(seen: Histogram, make: Callable[[float, float], Grid], percentile: float) -> tuple[float, float]:
    """The range whose rounding keeps the distribution best: the least Kullback-Leibler divergence from what was seen
    (8-bit inference, Migacz 2017).

    Of a clipped distribution every bin outside counts to the last bin inside; rounded, the mass of the bins of one
    integer is spread evenly over those of them that are not empty. The bin that holds 0 is left out: every grid has
    0, and after a ReLU half of all values are 0. A range has at least as many bins as integers.
    """
    centers, counts = seen.centers, seen.counts.astype(np.float64)
    counts[np.searchsorted(np.linspace(seen.low, seen.high, BINS + 1)[1:-1], 0.0, side="right")] = 0
    if not counts.any():
        return seen.low, seen.high

    def divergence(low: float, high: float) -> float:
        made = make(low, high)
        inside = (centers >= low) & (centers <= high)
        if inside.sum() < min(made.high - made.low, BINS // 2):
            return float("inf")
        first, last = int(np.argmax(inside)), len(inside) - int(np.argmax(inside[::-1]))
        reference = counts[first:last].copy()
        reference[0] += counts[:first].sum()
        reference[-1] += counts[last:].sum()
        codes = np.rint(made.rounded(centers[first:last]) / made.scale).astype(np.int64)
        codes -= codes.min()
        held = counts[first:last]
        filled = held > 0
        if not filled.any():
            return float("inf")
        masses, members = np.bincount(codes, held), np.bincount(codes, filled.astype(np.float64))
        spread = np.where(filled, masses[codes] / np.maximum(members[codes], 1), 0.0)
        p, q = reference / reference.sum(), spread / spread.sum()
        q = np.maximum(q, 1e-12)
        present = p > 0
        return float((p[present] * np.log(p[present] / q[present])).sum())

    return _searched(seen, divergence)


OBSERVERS: dict[str, Observer] = {"minmax": minmax, "percentile": percentile, "mse": mse, "entropy": entropy}


def fitted(
    seen: Histogram,
    bits: int,
    positive: bool,
    symmetric: bool = False,
    observer: str = "mse",
    percentile: float = 99.99,
) -> Grid:
    """The grid that an observer chooses: unsigned with zero point 0 where nothing can be negative, else with both
    signs: of 4 bits in a signed type, of 8 in an unsigned one.
    """
    symmetric = positive or symmetric
    signed = not positive and (symmetric or bits == 4)

    def make(low: float, high: float) -> Grid:
        return grid(0.0 if positive else low, high, bits, signed, symmetric)

    return make(*OBSERVERS[observer](seen, make, percentile))
