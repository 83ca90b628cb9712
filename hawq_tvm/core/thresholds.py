"""(A22): the proof that dyadic numbers step exactly where the real scales they stand for step.

Exact rational arithmetic decides; float64 only picks the few thresholds that need it (`threshold_search.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from operator import le, mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import arith
from .rescales import Rescale as Rescale
from .rescales import Rescales
from .rescales import dyadic_rescale as dyadic_rescale
from .threshold_search import Searches, Steps, Table, round_exactly, searches_of, verdict

Array = NDArray[Any]

# Beyond this many thresholds in a layer (steps, times the combinations of the other operands) they are not enumerated:
# seconds.
MAX_ENUMERATED = 1 << 27

# How far a correction may move a multiplier from the one nearest to its ratio.
NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)


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


# -- proofs ------------------------------------------------------------------------------------------


def prove(rescale: Rescale, rounding: str, steps: tuple[int, int]) -> Proof:
    """(A22) for one channel: compare every threshold k in steps[0] .. steps[1] inside the reachable interval.

    steps: the results before the zero point is added, first and last value of k.
    """
    return _total(_proofs(Rescales.of([rescale]), rounding, steps), [1])


def prove_all(rescales: Sequence[Rescale], rounding: str, steps: tuple[int, int]) -> Proof:
    """The proofs of all channels of a requantize; equal channels are computed once."""
    counts: dict[Rescale, int] = {}
    for rescale in rescales:
        counts[rescale] = counts.get(rescale, 0) + 1
    return _total(_proofs(Rescales.of(list(counts)), rounding, steps), list(counts.values())) if counts else Proof()


def settle(
    rescales: Sequence[Rescale], counts: Sequence[int], rounding: str, steps: tuple[int, int]
) -> tuple[Rescales, Proof]:
    """(A23) and (A22): the rescales of a layer, corrected where thresholds differ and a correction exists, and their
    proof.

    counts: how many channels each rescale stands for.
    """
    given = Rescales.of(rescales)
    found = _proofs(given, rounding, steps)
    if found is None:
        return given, Proof(enumerated=False)
    moved = {
        i: better
        for i in np.flatnonzero(found.differing).tolist()
        if (better := _moved(given[i : i + 1], rounding, steps)) is not None
    }
    again = _proofs(Rescales.of(list(moved.values())), rounding, steps) if moved else None
    if again is None:
        return given, _total(found, counts)
    put_right = [n for n, differing in enumerate(again.differing.tolist()) if not differing]
    at = np.array(list(moved), np.int64)[put_right]
    for mine, theirs in zip(found, again, strict=True):
        mine[at] = theirs[put_right]
    return given.changed({i: moved[i] for i in at.tolist()}), _total(found, counts)


def corrected(rescale: Rescale, rounding: str, steps: tuple[int, int]) -> Rescale:
    """`settle` for one rescale: itself when no correction exists, at ties of a ratio that is rational but not dyadic
    for one.
    """
    return settle([rescale], [1], rounding, steps)[0][0]


class _Proofs(NamedTuple):
    """The fields of `Proof` for many rescales."""

    thresholds: Array
    differing: Array
    enumerated: Array


def _total(proofs: _Proofs | None, counts: Sequence[int]) -> Proof:
    if proofs is None:
        return Proof(enumerated=False)
    thresholds, differing = (sum(map(mul, p.tolist(), counts)) for p in (proofs.thresholds, proofs.differing))
    return Proof(thresholds, differing, bool(proofs.enumerated.all()))


def _proofs(rescales: Rescales, rounding: str, steps: tuple[int, int]) -> _Proofs | None:
    """The proof of each rescale, None where there are too many thresholds to enumerate."""
    levels = steps[1] - steps[0] + 1
    thresholds, differing = np.zeros((2, len(rescales)), np.int64)
    enumerated = np.ones(len(rescales), bool)
    proofs = _Proofs(thresholds, differing, enumerated)

    def add(i: int, proof: Proof) -> None:
        thresholds[i] += proof.thresholds
        differing[i] += proof.differing
        enumerated[i] &= proof.enumerated

    if rounding == "double":
        if len(rescales) * levels > MAX_ENUMERATED:
            return None
        for i in range(len(rescales)):
            add(i, _proof_of_double(rescales[i : i + 1], steps))
        return proofs
    parts: list[Searches] = []
    for low, high in rescales.boxes():
        parts.append(searches_of(rescales, low, high))
        for i in np.setdiff1d(np.arange(len(rescales)), parts[-1].owner).tolist():
            add(i, _constant_proof(rescales, i, list(zip(low[i], high[i], strict=True)), rounding, steps))
    searches = Searches.joined(parts)
    if int(searches.combinations.sum()) * levels > MAX_ENUMERATED:
        return None
    if len(searches) and levels > 0:
        found = Table(searches, Steps(steps, rounding)).compare()
        if found is None:
            return None
        np.add.at(thresholds, searches.owner, found[0])
        np.add.at(differing, searches.owner, found[1])
    return proofs


def _constant_proof(
    r: Rescales, row: int, box: Sequence[tuple[int, int]], rounding: str, steps: tuple[int, int]
) -> Proof:
    """No operand moves the dyadic formula: the real one, which rises with every operand or falls, must give the same
    at both its ends.
    """
    rising = [f >= 0 for f in r.real.factors[row]]
    corners = {tuple(b[up == top] for b, up in zip(box, rising, strict=True)) for top in (False, True)}
    results = [[_clip(round_exactly(n.at(row, v), rounding), steps) for n in (r.real, r.dyadic)] for v in corners]
    return Proof(2, sum(wanted != got for wanted, got in results))


def _clip(value: int, steps: tuple[int, int]) -> int:
    return min(max(value, steps[0] - 1), steps[1])


def _proof_of_double(r: Rescales, steps: tuple[int, int]) -> Proof:
    """(A8) is monotone, but its thresholds have no closed form: they are found by bisection.  r: one rescale."""
    search = searches_of(r, *r.boxes()[0])
    if r.lows.shape[1] != 1 or not len(search):
        return Proof(enumerated=False)
    every, line = Steps(steps, "half_away"), search.real
    wanted = every.exact(np.arange(every.k.size), line.factors[:, 0], line.constant, line.denominator)
    (low,), (high,), (shift,), ((multiplier,),) = search.low, search.high, r.shift, search.dyadic.factors
    got = _bisected(lambda v: arith.double_round(v, multiplier, shift), every.k, low, high)
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


def _moved(r: Rescales, rounding: str, steps: tuple[int, int]) -> Rescale | None:
    """(A23): the one rescale with an offset, and if need be neighbouring multipliers, that put every reachable
    threshold right.

    Only where each of its boxes moves along one operand; None when there is none.
    """
    (shift,) = r.shift
    if rounding == "double" or shift == 0:
        return None
    choices = []
    for low, high in r.boxes():
        free = np.flatnonzero(low[0] < high[0])
        if not free.size and r.apart:
            continue  # a half that is always 0, as it is somewhere in the other box
        search = searches_of(r, low, high)
        if not len(search) or free.size != 1 or np.any(np.delete(low[0], free)) or np.any(np.delete(high[0], free)):
            return None
        choices.append((int(free[0]), search))
    operands = [i for i, _ in choices]
    neighbours = sorted(product(range(len(NEIGHBOURS)), repeat=len(choices)), key=sum)
    # Some of the steps are often enough to see that there is none, or which are left.
    stride = max(1, (steps[1] - steps[0]) // 512)
    if stride > 1:
        some = [cache(_offsets(s, shift, rounding, steps, stride)) for _, s in choices]
        neighbours = [n for n in neighbours if le(*_common(some, n))]
    if not neighbours:
        return None
    every = [cache(_offsets(s, shift, rounding, steps, 1)) for _, s in choices]
    return _choice(r[0], operands, every, neighbours, rounding)


Offsets = Callable[[int], tuple[int, int]]


def _common(offsets: Sequence[Offsets], neighbours: Sequence[int]) -> tuple[int, int]:
    """The least and the greatest offset that every box allows, each with its own neighbour."""
    least, most = zip(*(f(n) for f, n in zip(offsets, neighbours, strict=True)), strict=True)
    return max(least), min(most)


def _choice(
    r: Rescale, operands: Sequence[int], offsets: Sequence[Offsets], neighbours: Sequence[Sequence[int]], rounding: str
) -> Rescale | None:
    """The rescale with the first multipliers for which there is an offset; operands, offsets: one of each box."""
    for changes in neighbours:
        least, most = _common(offsets, changes)
        if least > most:
            continue
        multipliers = list(r.multipliers)
        for c, operand in zip(changes, operands, strict=True):
            multipliers[operand] += NEIGHBOURS[c] if r.ratios[operand] > 0 else -NEIGHBOURS[c]
        offset = min(max(r.offset, least), most)
        reach = sum(
            max(abs(low), abs(high)) * abs(m) for low, high, m in zip(r.lows, r.highs, multipliers, strict=True)
        )
        fits = all(abs(m) < 2**arith.MANTISSA_BITS for m in multipliers)
        if fits and reach + abs(offset) + arith.rounding_room(r.shift, rounding) < arith.INT64_LIMIT:
            return replace(r, multipliers=tuple(multipliers), offset=offset)
    return None


def _offsets(s: Searches, shift: int, rounding: str, steps: tuple[int, int], stride: int) -> Offsets:
    """(A23): of each of NEIGHBOURS, the least and the greatest offset that put every stride-th threshold of one search
    right.
    """
    (low,), (high,), first = s.low, s.high, s.dyadic.factors[0, 0]
    # Beyond the results at both ends no threshold is inside: the first such step on each side says it for all.
    ends = [round_exactly(s.real.at(0, (v, *(0 for _ in s.least[0]))), rounding) for v in (low, high)]
    every = Steps((max(steps[0], ends[0]), min(steps[1], ends[1] + 1)), rounding, stride)
    if not every.k.size:
        return lambda neighbour: (-(2**62), 2**62)
    threshold = Table(s, every).thresholds()
    reached, missed = threshold <= high, threshold > low
    at_least, at_most = np.maximum(threshold, low)[reached], np.minimum(threshold - 1, high)[missed]
    # An offset of b reaches k at v when v m + b >= edge. What 64 bits lose on the way comes back: the differences are
    # offsets, which fit.
    edge = (every.twice << shift - 1) + ~every.inclusive
    above, below = edge[reached], edge[missed] - 1

    def of(neighbour: int) -> tuple[int, int]:
        m = first + NEIGHBOURS[neighbour]
        return int((above - at_least * m).max(initial=-(2**62))), int((below - at_most * m).min(initial=2**62))

    return of
