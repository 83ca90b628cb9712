"""(A22): the proof that dyadic numbers step exactly where the real scales they stand for step.

Exact rational arithmetic decides; float64 only picks the few thresholds that need it (`threshold_search.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import arith, threshold_sums
from .corrections import corrections
from .rescales import Rescale as Rescale
from .rescales import Rescales
from .rescales import dyadic_rescale as dyadic_rescale
from .threshold_search import Searches, Steps, Table, round_exactly, searches_of, verdict

Array = NDArray[Any]

# Beyond this many thresholds in a layer (steps, times the combinations of the other operands) they are not enumerated:
# seconds.
MAX_ENUMERATED = 1 << 27


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
    at, moved = corrections(given, np.flatnonzero(found.differing), rounding, steps)
    again = _proofs(moved, rounding, steps) if at.size else None
    if again is None:
        return given, _total(found, counts)
    right = again.differing == 0
    at = at[right]
    for mine, theirs in zip(found, again, strict=True):
        mine[at] = theirs[right]
    multipliers, offset = given.dyadic.factors.copy(), given.dyadic.constant.copy()
    multipliers[at], offset[at] = moved.dyadic.factors[right], moved.dyadic.constant[right]
    return given.changed(multipliers, offset), _total(found, counts)


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
        if searches.alone and levels >= threshold_sums.MANY:
            found: tuple[Array, Array] | None = threshold_sums.counted(searches, rounding, steps)
        else:
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
