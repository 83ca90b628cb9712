"""(A22): the proof that dyadic numbers step exactly where the real scales they stand for step.

Exact rational arithmetic decides; float64 only picks the few thresholds that need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arith
from .errors import ModelError

# Beyond this many thresholds (steps, times the combinations of the other operands) a proof by enumeration takes too long.
MAX_ENUMERATED = 1 << 25

# How far `corrected` may move a multiplier from the one nearest to its ratio.
NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)


@dataclass(frozen=True)
class Rescale:
    """One requantize at one channel: real ratios and constant, the dyadic numbers for them, and what can reach it.

    ratios, multipliers, lows, highs: one entry per operand.  constant: the real addend in output steps.
    """

    ratios: tuple[Fraction, ...]
    constant: Fraction
    multipliers: tuple[int, ...]
    offset: int
    shift: int
    lows: tuple[int, ...]
    highs: tuple[int, ...]


@dataclass(frozen=True)
class Proof:
    """How many thresholds were compared and how many differ; not `enumerated` when there were too many operands."""

    thresholds: int = 0
    differing: int = 0
    enumerated: bool = True

    def __add__(self, other: Proof) -> Proof:
        return Proof(
            self.thresholds + other.thresholds, self.differing + other.differing, self.enumerated and other.enumerated
        )

    def __mul__(self, count: int) -> Proof:
        return Proof(self.thresholds * count, self.differing * count, self.enumerated)


def dyadic_rescale(
    ratios: tuple[Fraction, ...], zeros: Sequence[int], constant: Fraction, lows: tuple[int, ...], highs: tuple[int, ...], rounding: str, where: str
) -> Rescale:  # fmt: skip
    """(A3), (A4): the widest multipliers for sum (x_i - zero_i) ratio_i + constant that cannot overflow 64 bits.

    lows, highs: the least and greatest x_i.  where: the layer, for errors.
    Raises ModelError when a ratio is too large, or every precision overflows.
    """
    reach = [max(abs(low), abs(high)) for low, high in zip(lows, highs, strict=True)]
    for max_shift in range(arith.MAX_SHIFT, -1, -1):
        try:
            multipliers, shift = arith.common_dyadic(ratios, max_shift=max_shift)
        except OverflowError as e:
            raise ModelError(
                "a requantize has a scale ratio that no dyadic number holds", where=where, found=str(e),
                remedy="check the scales of this layer's inputs and output",
            ) from e  # fmt: skip
        addend = arith.round_fraction(constant * 2**shift)
        offset = addend - sum(z * m for z, m in zip(zeros, multipliers, strict=True))
        worst = sum(x * abs(m) for x, m in zip(reach, multipliers, strict=True)) + abs(offset) + arith.rounding_room(shift, rounding)
        if worst < arith.INT64_LIMIT and (rounding != "double" or _double_fits(reach[0], shift)):
            real = constant - sum((z * r for z, r in zip(zeros, ratios, strict=True)), Fraction(0))
            return Rescale(ratios, real, tuple(multipliers), offset, shift, lows, highs)
    raise ModelError(
        "a requantize overflows 64 bits at every precision", where=where, found=f"operands up to {max(reach)}",
        remedy="use fewer bits or fewer terms in this layer",
    )  # fmt: skip


def _double_fits(reach: int, shift: int) -> bool:
    return reach << max(0, 31 - shift) < 2**31


def prove(rescale: Rescale, rounding: str, steps: tuple[int, int]) -> Proof:
    """(A22) for one channel: compare every threshold k in steps[0] .. steps[1] inside the reachable interval.

    steps: the results before the zero point is added, first and last value of k.
    """
    sizes = [high - low + 1 for low, high in zip(rescale.lows[1:], rescale.highs[1:], strict=True)]
    if np.prod([float(n) for n in sizes]) * (steps[1] - steps[0] + 1) > MAX_ENUMERATED:
        return Proof(enumerated=False)
    real_part = np.zeros(1, object) + rescale.constant
    integer_part = np.zeros(1, object) + rescale.offset
    for r, m, low, high in zip(
        rescale.ratios[1:], rescale.multipliers[1:], rescale.lows[1:], rescale.highs[1:], strict=True
    ):
        values = np.arange(low, high + 1).astype(object)
        real_part = np.add.outer(real_part, values * r).ravel()
        integer_part = np.add.outer(integer_part, values * m).ravel()
    low, high, ratio, multiplier = rescale.lows[0], rescale.highs[0], rescale.ratios[0], rescale.multipliers[0]
    if ratio < 0:
        low, high, ratio, multiplier = -high, -low, -ratio, -multiplier
    if ratio == 0 or multiplier <= 0:
        return _constant_proof(rescale, rounding, steps, low, high, ratio, multiplier, real_part, integer_part)
    denominator = 2**rescale.shift
    exact = Fraction(multiplier, denominator) == ratio and rounding != "double"
    total = Proof()
    for c, b in zip(real_part, integer_part, strict=True):
        if exact and Fraction(b, denominator) == c:
            total += Proof(_count_reachable(ratio, c, rounding, steps, low, high), 0)
        else:
            total += _compare(ratio, c, multiplier, b, rescale.shift, rounding, steps, (low, high))
    return total


def _count_reachable(ratio: Fraction, c: Fraction, rounding: str, steps: tuple[int, int], low: int, high: int) -> int:
    first = max(steps[0], round_exactly(low * ratio + c, rounding) + 1)
    last = min(steps[1], round_exactly(high * ratio + c, rounding))
    return max(0, last - first + 1)


def _constant_proof(
    rescale: Rescale, rounding: str, steps: tuple[int, int], low: int, high: int,
    ratio: Fraction, multiplier: int, real_part: NDArray[Any], integer_part: NDArray[Any],
) -> Proof:  # fmt: skip
    """A ratio (nearly) zero: the result must be the same number at both ends of the interval."""
    if rounding == "double":
        return Proof(enumerated=False)
    differing = 0
    for c, b in zip(real_part, integer_part, strict=True):
        for v in {low, high}:
            wanted = _clip(round_exactly(v * ratio + c, rounding), steps)
            got = _clip(round_exactly(Fraction(v * multiplier + b, 2**rescale.shift), rounding), steps)
            differing += wanted != got
    return Proof(2 * len(real_part), differing)


def _clip(value: int, steps: tuple[int, int]) -> int:
    return min(max(value, steps[0] - 1), steps[1])


def round_exactly(value: Fraction, rounding: str) -> int:
    """An exact rational rounded to an integer by the named rule of section 3 ("double" has none)."""
    k = value.__floor__() + 1
    boundary = Fraction(_twice_boundary(k, rounding), 2)
    return k if value > boundary or (value == boundary and _inclusive(k, rounding)) else k - 1


def _twice_boundary(k: int, rounding: str) -> int:
    """Twice the number at which the result steps from k - 1 to k: k - 1/2, or k or k - 1 when the rounding is directed."""
    if rounding not in arith.DIRECTED:
        return 2 * k - 1
    return 2 * k if _inclusive(k, rounding) else 2 * k - 2


def _boundaries(ks: NDArray[Any], rounding: str) -> NDArray[np.float64]:
    """`_twice_boundary` of many, halved."""
    if rounding not in arith.DIRECTED:
        return ks - 0.5
    excluded = {"floor": ks != ks, "ceil": ks == ks, "toward_zero": ks < 1, "away": ks >= 1}
    return ks - excluded[rounding].astype(np.float64)


def _inclusive(k: int, rounding: str) -> bool:
    """Whether the boundary of k itself rounds to k."""
    if rounding == "half_even":
        return k % 2 == 0
    if rounding in ("half_up", "floor", "ceil"):
        return rounding != "ceil"
    return (k >= 1) == (rounding in ("half_away", "toward_zero"))


def _exact_threshold(k: int, ratio: Fraction, c: Fraction, rounding: str) -> int:
    """The least integer v with round(v ratio + c) >= k, ratio > 0."""
    t = (Fraction(_twice_boundary(k, rounding), 2) - c) / ratio
    return -((-t).__floor__()) if _inclusive(k, rounding) else t.__floor__() + 1


def _thresholds(
    ratio: Fraction, c: Fraction, dyadic: tuple[Fraction, Fraction], rounding: str, ks: NDArray[Any], interval: tuple[int, int]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The thresholds of the real and of the dyadic formula for every k, exact wherever they are reachable."""
    low, high = interval
    boundaries = _boundaries(ks, rounding)
    real, approximate = _float_threshold(boundaries, ratio, c), _float_threshold(boundaries, *dyadic)
    wanted, got = np.floor(real) + 1, np.floor(approximate) + 1
    # float64 is wrong by a few units in the last place: near an integer only exact arithmetic decides.
    error = 1e-12 * (np.abs(real) + abs(float(c / ratio)) + 1)
    unsure = (np.abs(real - np.rint(real)) <= error) | (np.abs(approximate - np.rint(approximate)) <= error)
    for i in np.flatnonzero(unsure & (real >= low - 2) & (real <= high + 2)):
        k = int(ks[i])
        wanted[i] = _exact_threshold(k, ratio, c, rounding)
        got[i] = _exact_threshold(k, *dyadic, rounding)
    return wanted, got


def _compare(
    ratio: Fraction, c: Fraction, multiplier: int, offset: int, shift: int,
    rounding: str, steps: tuple[int, int], interval: tuple[int, int],
) -> Proof:  # fmt: skip
    low, high = interval
    ks = np.arange(steps[0], steps[1] + 1)
    if rounding == "double":
        wanted = np.array([_exact_threshold(int(k), ratio, c, "half_away") for k in ks])
        got = _search_double(ks, multiplier, shift, low, high)
    else:
        dyadic = Fraction(multiplier, 2**shift), Fraction(offset, 2**shift)
        wanted, got = _thresholds(ratio, c, dyadic, rounding, ks, interval)
    wanted, got = np.clip(wanted, low, high + 1), np.clip(got, low, high + 1)
    inside = ((wanted > low) & (wanted <= high)) | ((got > low) & (got <= high))
    return Proof(int(inside.sum()), int((wanted != got).sum()))


def corrected(rescale: Rescale, rounding: str, steps: tuple[int, int]) -> Rescale:
    """(A23): a rescale whose offset, and if need be a neighbouring multiplier, puts every reachable threshold right.

    The rescale itself comes back when none does: at ties of a ratio that is rational but not dyadic, for one.
    """
    if rounding == "double" or len(rescale.ratios) != 1 or rescale.multipliers[0] == 0 or rescale.shift == 0:
        return rescale
    low, high, ratio, m = rescale.lows[0], rescale.highs[0], rescale.ratios[0], rescale.multipliers[0]
    if ratio < 0:
        low, high, ratio, m = -high, -low, -ratio, -m
    ks = np.arange(steps[0], steps[1] + 1)
    dyadic = Fraction(m, 2**rescale.shift), Fraction(rescale.offset, 2**rescale.shift)
    wanted, got = _thresholds(ratio, rescale.constant, dyadic, rounding, ks, (low, high))
    if np.array_equal(np.clip(wanted, low, high + 1), np.clip(got, low, high + 1)):
        return rescale
    steps_at = [
        (_twice_boundary(k, rounding) << rescale.shift >> 1, not _inclusive(k, rounding), int(t))
        for k, t in zip(ks.tolist(), wanted.tolist(), strict=True)
    ]
    for change in NEIGHBOURS:
        near = m + change
        least, most = -(2**62), 2**62
        for tie, strict, t in steps_at:  # tie = (k - 1/2) 2^s; k 2^s or (k - 1) 2^s when the rounding is directed
            if t <= high:
                least = max(least, tie - max(t, low) * near + strict)
            if t > low:
                most = min(most, tie - min(t - 1, high) * near - 1 + strict)
        if least <= most and abs(near) < 2**arith.MANTISSA_BITS:
            offset = min(max(rescale.offset, least), most)
            if max(abs(low), abs(high)) * abs(near) + abs(offset) + arith.rounding_room(rescale.shift, rounding) < arith.INT64_LIMIT:
                return replace(rescale, multipliers=(near if rescale.ratios[0] > 0 else -near,), offset=offset)
    return rescale


def _float_threshold(boundaries: NDArray[Any], ratio: Fraction, c: Fraction) -> NDArray[np.float64]:
    return np.asarray(boundaries * float(1 / ratio) - float(c / ratio), np.float64)


def _search_double(ks: NDArray[Any], multiplier: int, shift: int, low: int, high: int) -> NDArray[Any]:
    """Thresholds of (A8) by bisection: it is monotone, but has no closed form."""
    below = np.full(ks.shape, low - 1, np.int64)
    above = np.full(ks.shape, high + 1, np.int64)
    while np.any(above - below > 1):
        middle = (below + above) >> 1
        reached = arith.double_round(middle, multiplier, shift) >= ks
        above, below = np.where(reached, middle, above), np.where(reached, below, middle)
    return above


def prove_all(rescales: Sequence[Rescale], rounding: str, steps: tuple[int, int]) -> Proof:
    """The proofs of all channels of a requantize; equal channels are computed once."""
    counts: dict[Rescale, int] = {}
    for rescale in rescales:
        counts[rescale] = counts.get(rescale, 0) + 1
    total = Proof()
    for rescale, count in counts.items():
        total += prove(rescale, rounding, steps) * count
    return total
