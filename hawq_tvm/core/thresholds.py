"""(A22): the proof that dyadic numbers step exactly where the real scales they stand for step.

Exact rational arithmetic decides; float64 only picks the few thresholds that need it (`threshold_search.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.threshold_search import Line, Search, Steps, Table, round_exactly, search_of, verdict

from . import arith
from .errors import ModelError

Array = NDArray[Any]

# Beyond this many thresholds in a layer (steps, times the combinations of the other operands) they are not enumerated:
# seconds.
MAX_ENUMERATED = 1 << 27

# How far a correction may move a multiplier from the one nearest to its ratio.
NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)


@dataclass(frozen=True)
class Rescale:
    """One requantize at one channel: real ratios and constant, the dyadic numbers for them, and what can reach it.

    ratios, multipliers, lows, highs: one entry per operand.  constant: the real addend in output steps.
    apart: pairs of operands of which one is always 0, the two halves of a LeakyRelu.
    """

    ratios: tuple[Fraction, ...]
    constant: Fraction
    multipliers: tuple[int, ...]
    offset: int
    shift: int
    lows: tuple[int, ...]
    highs: tuple[int, ...]
    apart: tuple[tuple[int, int], ...] = ()

    def boxes(self) -> list[tuple[tuple[int, int], ...]]:
        """The bounds of all operands, once for every choice of the operands that are 0."""
        bounds = list(zip(self.lows, self.highs, strict=True))
        zero = [set(chosen) for chosen in product(*self.apart[:8])]
        return [tuple((0, 0) if i in z else b for i, b in enumerate(bounds)) for z in zero]


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
    ratios: tuple[Fraction, ...],
    zeros: Sequence[int],
    constant: Fraction,
    lows: tuple[int, ...],
    highs: tuple[int, ...],
    rounding: str,
    where: str,
    apart: tuple[tuple[int, int], ...] = (),
) -> Rescale:
    """(A3), (A4): the widest multipliers for sum (x_i - zero_i) ratio_i + constant that cannot overflow 64 bits.

    lows, highs: the least and greatest x_i.  where: the layer, for errors.  apart: see Rescale.
    Raises ModelError when a ratio is too large, or every precision overflows.
    """
    reach = [max(abs(low), abs(high)) for low, high in zip(lows, highs, strict=True)]
    for max_shift in range(arith.MAX_SHIFT, -1, -1):
        try:
            multipliers, shift = arith.common_dyadic(ratios, max_shift=max_shift)
        except OverflowError as e:
            raise ModelError(
                "a requantize has a scale ratio that no dyadic number holds",
                where=where,
                found=str(e),
                remedy="check the scales of this layer's inputs and output",
            ) from e
        addend = arith.scaled(constant, shift)
        offset = addend - sum(z * m for z, m in zip(zeros, multipliers, strict=True))
        worst = (
            sum(x * abs(m) for x, m in zip(reach, multipliers, strict=True))
            + abs(offset)
            + arith.rounding_room(shift, rounding)
        )
        if worst < arith.INT64_LIMIT and (rounding != "double" or _double_fits(reach[0], shift)):
            real = constant - sum((z * r for z, r in zip(zeros, ratios, strict=True) if z), Fraction(0))
            return Rescale(ratios, real, tuple(multipliers), offset, shift, lows, highs, apart)
    raise ModelError(
        "a requantize overflows 64 bits at every precision",
        where=where,
        found=f"operands up to {max(reach)}",
        remedy="use fewer bits or fewer terms in this layer",
    )


def _double_fits(reach: int, shift: int) -> bool:
    return reach << max(0, 31 - shift) < 2**31


# -- proofs ------------------------------------------------------------------------------------------


def _lines(r: Rescale) -> tuple[Line, Line]:
    """The real formula and the dyadic one."""
    denominator = math.lcm(r.constant.denominator, *(x.denominator for x in r.ratios))
    factors = tuple(x.numerator * (denominator // x.denominator) for x in r.ratios)
    constant = r.constant.numerator * (denominator // r.constant.denominator)
    return Line(factors, constant, denominator), Line(r.multipliers, r.offset, 1 << r.shift)


def prove(rescale: Rescale, rounding: str, steps: tuple[int, int]) -> Proof:
    """(A22) for one channel: compare every threshold k in steps[0] .. steps[1] inside the reachable interval.

    steps: the results before the zero point is added, first and last value of k.
    """
    proofs = _proofs([rescale], rounding, steps)
    return proofs[0] if proofs else Proof(enumerated=False)


def prove_all(rescales: Sequence[Rescale], rounding: str, steps: tuple[int, int]) -> Proof:
    """The proofs of all channels of a requantize; equal channels are computed once."""
    counts: dict[Rescale, int] = {}
    for rescale in rescales:
        counts[rescale] = counts.get(rescale, 0) + 1
    return _total(_proofs(list(counts), rounding, steps), list(counts.values()))


def settle(
    rescales: Sequence[Rescale], counts: Sequence[int], rounding: str, steps: tuple[int, int]
) -> tuple[list[Rescale], Proof]:
    """(A23) and (A22): the rescales of a layer, corrected where thresholds differ and a correction exists, and their
    proof.

    counts: how many channels each rescale stands for.
    """
    result, proofs = list(rescales), _proofs(rescales, rounding, steps)
    if proofs is None:
        return result, Proof(enumerated=False)
    wrong = [i for i, p in enumerate(proofs) if p.differing]
    moved = {i: better for i in wrong if (better := _moved(rescales[i], rounding, steps)) is not None}
    again = _proofs(list(moved.values()), rounding, steps) or []
    for (i, better), proof in zip(moved.items(), again, strict=True):
        if not proof.differing:
            result[i], proofs[i] = better, proof
    return result, _total(proofs, counts)


def corrected(rescale: Rescale, rounding: str, steps: tuple[int, int]) -> Rescale:
    """`settle` for one rescale: itself when no correction exists, at ties of a ratio that is rational but not dyadic
    for one.
    """
    return settle([rescale], [1], rounding, steps)[0][0]


def _total(proofs: Sequence[Proof] | None, counts: Sequence[int]) -> Proof:
    if proofs is None:
        return Proof(enumerated=False)
    return sum((p * n for p, n in zip(proofs, counts, strict=True)), Proof())


def _proofs(rescales: Sequence[Rescale], rounding: str, steps: tuple[int, int]) -> list[Proof] | None:
    """The proof of each rescale, None where there are too many thresholds to enumerate."""
    levels = steps[1] - steps[0] + 1
    if rounding == "double":
        return [_proof_of_double(r, steps) for r in rescales] if len(rescales) * levels <= MAX_ENUMERATED else None
    proofs = [Proof() for _ in rescales]
    searches: list[Search] = []
    work = 0
    for owner, r in enumerate(rescales):
        lines = _lines(r)
        for box in r.boxes():
            search = search_of(owner, lines, box)
            if search is None:
                proofs[owner] += _constant_proof(lines, box, rounding, steps)
                continue
            work += search.combinations * levels
            if work > MAX_ENUMERATED:
                return None
            searches.append(search)
    if searches and levels > 0:
        found = Table(searches, Steps(steps, rounding)).compare()
        if found is None:
            return None
        for s, inside, differing in zip(searches, *(x.tolist() for x in found), strict=True):
            proofs[s.owner] += Proof(inside, differing)
    return proofs


def _constant_proof(
    lines: tuple[Line, Line], box: Sequence[tuple[int, int]], rounding: str, steps: tuple[int, int]
) -> Proof:
    """No operand moves the dyadic formula: the real one, which rises with every operand or falls, must give the same
    at both its ends.
    """
    rising = [f >= 0 for f in lines[0].factors]
    corners = {tuple(b[up == top] for b, up in zip(box, rising, strict=True)) for top in (False, True)}
    results = [[_clip(round_exactly(line.at(v), rounding), steps) for line in lines] for v in corners]
    return Proof(2, sum(wanted != got for wanted, got in results))


def _clip(value: int, steps: tuple[int, int]) -> int:
    return min(max(value, steps[0] - 1), steps[1])


def _proof_of_double(r: Rescale, steps: tuple[int, int]) -> Proof:
    """(A8) is monotone, but its thresholds have no closed form: they are found by bisection."""
    lines = _lines(r)
    search = search_of(0, lines, r.boxes()[0]) if len(r.ratios) == 1 else None
    if search is None:
        return Proof(enumerated=False)
    every = Steps(steps, "half_away")
    line = search.real
    wanted = every.exact(
        np.arange(every.k.size), *(np.array([x], object) for x in (line.factors[0], line.constant, line.denominator))
    )
    low, high = search.low, search.high
    got = _bisected(lambda v: arith.double_round(v, search.dyadic.factors[0], r.shift), every.k, low, high)
    inside, wrong = verdict(wanted, got, np.array(low), np.array(high))
    return Proof(int(inside.sum()), int(wrong.sum()))


def _bisected(function: Callable[[Array], Array], ks: Array, low: int, high: int) -> Array:
    """The least v in low .. high with function(v) >= k, high + 1 where there is none."""
    below, above = np.full(ks.shape, low - 1, np.int64), np.full(ks.shape, high + 1, np.int64)
    while np.any(above - below > 1):
        middle = (below + above) >> 1
        reached = function(middle) >= ks
        above, below = np.where(reached, middle, above), np.where(reached, below, middle)
    return above


# -- corrections -------------------------------------------------------------------------------------


def _moved(r: Rescale, rounding: str, steps: tuple[int, int]) -> Rescale | None:
    """(A23): the rescale with an offset, and if need be neighbouring multipliers, that put every reachable threshold
    right.

    Only where each of its boxes moves along one operand; None when there is none.
    """
    if rounding == "double" or r.shift == 0:
        return None
    lines, choices = _lines(r), []
    for box in r.boxes():
        free = [i for i, (low, high) in enumerate(box) if low < high]
        if not free and len(r.apart) > 0:
            continue  # a half that is always 0, as it is somewhere in the other box
        search = search_of(0, lines, box)
        if search is None or len(free) != 1 or any(b != (0, 0) for i, b in enumerate(box) if i != free[0]):
            return None
        choices.append((free[0], search))
    # Some of the steps are often enough to see that there is none.
    for stride in dict.fromkeys((max(1, (steps[1] - steps[0]) // 512), 1)):
        found = _choice(r, [(i, *_offsets(s, r.shift, rounding, steps, stride)) for i, s in choices], rounding)
        if found is None:
            return None
    return found


def _choice(r: Rescale, choices: Sequence[tuple[int, list[int], list[int]]], rounding: str) -> Rescale | None:
    """The rescale with the nearest multipliers whose least and greatest offsets leave room; choices: (operand,
    least, greatest) by neighbour.
    """
    for changes in sorted(product(range(len(NEIGHBOURS)), repeat=len(choices)), key=sum):
        least = max(lows[c] for c, (_, lows, _) in zip(changes, choices, strict=True))
        most = min(highs[c] for c, (_, _, highs) in zip(changes, choices, strict=True))
        if least > most:
            continue
        multipliers = list(r.multipliers)
        for c, (operand, *_) in zip(changes, choices, strict=True):
            multipliers[operand] += NEIGHBOURS[c] if r.ratios[operand] > 0 else -NEIGHBOURS[c]
        offset = min(max(r.offset, least), most)
        reach = sum(
            max(abs(low), abs(high)) * abs(m) for low, high, m in zip(r.lows, r.highs, multipliers, strict=True)
        )
        fits = all(abs(m) < 2**arith.MANTISSA_BITS for m in multipliers)
        if fits and reach + abs(offset) + arith.rounding_room(r.shift, rounding) < arith.INT64_LIMIT:
            return replace(r, multipliers=tuple(multipliers), offset=offset)
    return None


def _offsets(s: Search, shift: int, rounding: str, steps: tuple[int, int], stride: int) -> tuple[list[int], list[int]]:
    """(A23): the least and the greatest offset that put every stride-th threshold of a search right, for each of
    NEIGHBOURS.
    """
    # Beyond the results at both ends no threshold is inside: the first such step on each side says it for all.
    ends = [round_exactly(s.real.at((v, *(0 for _ in s.others))), rounding) for v in (s.low, s.high)]
    every = Steps((max(steps[0], ends[0]), min(steps[1], ends[1] + 1)), rounding, stride)
    if not every.k.size:
        return [-(2**62)] * len(NEIGHBOURS), [2**62] * len(NEIGHBOURS)
    threshold = Table([s], every).thresholds()
    reached, missed = threshold <= s.high, threshold > s.low
    at_least, at_most = np.maximum(threshold, s.low)[reached], np.minimum(threshold - 1, s.high)[missed]
    # An offset of b reaches k at v when v m + b >= edge. What 64 bits lose on the way comes back: the differences are
    # offsets, which fit.
    edge = (every.twice << shift - 1) + ~every.inclusive
    least, most = [], []
    for change in NEIGHBOURS:
        m = s.dyadic.factors[0] + change
        least.append(int((edge[reached] - at_least * m).max(initial=-(2**62))))
        most.append(int((edge[missed] - at_most * m - 1).min(initial=2**62)))
    return least, most
