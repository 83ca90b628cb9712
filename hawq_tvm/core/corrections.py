"""(A23): offsets, and if need be neighbouring multipliers, that put every threshold of a dyadic formula right.

All channels of a layer are looked at side by side, each of their steps in 64 bits: a row a channel, a column a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import arith
from .rescales import Rescales
from .threshold_search import AT_ONCE, Searches, Steps, Table, round_exactly, searches_of

Array = NDArray[Any]
Offsets = Callable[[int], tuple[Array, Array]]

# How far a correction may move a multiplier from the one nearest to its ratio.
NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)
# So many steps of a row tell first whether there is any hope.
SOME = 512
# Offsets that no step asks for, or forbids.
_LEAST, _MOST = -(2**62), 2**62


def corrections(r: Rescales, rows: Array, rounding: str, steps: tuple[int, int]) -> tuple[Array, Rescales]:
    """Which of some rows can be put right, and their rescales then.

    Only those of which each box moves along one operand.
    """
    alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
    boxes = r.boxes()
    for row in rows.tolist() if rounding != "double" else ():
        along = _along(r, boxes, row) if r.shift[row] else ()
        if along:
            alike[along].append(row)
    found: list[Array] = [np.zeros(0, np.int64)]
    parts = [r.rows(found[0])]
    levels = steps[1] - steps[0] + 1
    # Some of the steps are often enough to see that there is none, or which are left.
    stride = max(1, levels // SOME)
    for along, members in alike.items():
        left = np.array(members)
        if stride > 1:
            chunks = _in_chunks(left, levels // stride + 1)
            left = np.concatenate([c[_hopeful(r.rows(c), along, rounding, steps, stride)] for c in chunks])
        for chosen in _in_chunks(left, levels):
            right, part = _put_right(r.rows(chosen), along, rounding, steps)
            found.append(chosen[right])
            parts.append(part)
    return np.concatenate(found), Rescales.joined(parts)


def _along(r: Rescales, boxes: Sequence[tuple[Array, Array]], row: int) -> tuple[int, ...]:
    """The operand that each box of a rescale moves along, -1 where a half that is always 0 is, as it is somewhere in
    another box; nothing where there is not one for each.
    """
    along = []
    for low, high in boxes:
        free = np.flatnonzero(low[row] < high[row])
        if not free.size and r.apart:
            along.append(-1)
            continue
        if free.size != 1 or np.any(np.delete(low[row], free)) or np.any(np.delete(high[row], free)):
            return ()
        (operand,) = free.tolist()
        if r.real.factors[row, operand] * r.dyadic.factors[row, operand] <= 0:
            return ()
        along.append(operand)
    return tuple(along) if max(along) >= 0 else ()


def _in_chunks(rows: Array, levels: int) -> list[Array]:
    """Rows of so many steps each, as many at once as a cache holds."""
    some = max(1, AT_ONCE // max(1, levels))
    return [rows[start : start + some] for start in range(0, len(rows), some)]


def _moving(r: Rescales, along: Sequence[int]) -> list[tuple[int, Array, Array]]:
    """The operand and the bounds of each box that moves."""
    return [(operand, *box) for operand, box in zip(along, r.boxes(), strict=True) if operand >= 0]


def _neighbours(boxes: int) -> list[tuple[int, ...]]:
    """The places in NEIGHBOURS for each box, the nearest together first."""
    return sorted(product(range(len(NEIGHBOURS)), repeat=boxes), key=sum)


def _hopeful(r: Rescales, along: Sequence[int], rounding: str, steps: tuple[int, int], stride: int) -> Array:
    """Which rows have an offset that puts each stride-th threshold right, with any of the multipliers."""
    boxes = _moving(r, along)
    some = _all_offsets(r, boxes, rounding, steps, stride)
    hopeful: Array = np.any([np.less_equal(*_common(some, n)) for n in _neighbours(len(boxes))], axis=0)
    return hopeful


def _put_right(r: Rescales, along: Sequence[int], rounding: str, steps: tuple[int, int]) -> tuple[Array, Rescales]:
    """Which rows can be put right, and their rescales: with the first multipliers for which there is an offset."""
    boxes = _moving(r, along)
    multipliers, offset = r.dyadic.factors.copy(), r.dyadic.constant.copy()
    right = np.zeros(len(r), bool)
    every = _all_offsets(r, boxes, rounding, steps, 1)
    operands = [operand for operand, *_ in boxes]
    reach = np.maximum(np.abs(r.lows), np.abs(r.highs))
    for changes in _neighbours(len(boxes)):
        least, most = _common(every, changes)
        moved = r.dyadic.factors.copy()
        for change, operand in zip(changes, operands, strict=True):
            moved[:, operand] += np.where(r.real.factors[:, operand] > 0, 1, -1).astype(object) * NEIGHBOURS[change]
        nearest = np.minimum(np.maximum(r.dyadic.constant, least.astype(object)), most.astype(object))
        worst = (reach * np.abs(moved)).sum(axis=1) + np.abs(nearest) + arith.rounding_room(r.shift, rounding)
        fits = (worst < arith.INT64_LIMIT) & np.all(np.abs(moved) < 2**arith.MANTISSA_BITS, axis=1)
        chosen = (least <= most) & fits.astype(bool) & ~right
        multipliers[chosen], offset[chosen] = moved[chosen], nearest[chosen]
        right[chosen] = True
        if right.all():
            break
    return right, r.changed(multipliers, offset).rows(right)


def _all_offsets(
    r: Rescales, boxes: Sequence[tuple[int, Array, Array]], rounding: str, steps: tuple[int, int], stride: int
) -> list[Offsets]:
    return [cache(_offsets(searches_of(r, low, high), r.shift, rounding, steps, stride)) for _, low, high in boxes]


def _common(offsets: Sequence[Offsets], neighbours: Sequence[int]) -> tuple[Array, Array]:
    """The least and the greatest offsets that every box allows, each with its own neighbour."""
    least, most = zip(*(f(n) for f, n in zip(offsets, neighbours, strict=True)), strict=True)
    return np.max(least, axis=0), np.min(most, axis=0)


def _offsets(s: Searches, shift: Array, rounding: str, steps: tuple[int, int], stride: int) -> Offsets:
    """Of each of NEIGHBOURS, the least and the greatest offset of every row that put each stride-th threshold right."""
    every = Steps(steps, rounding, stride)
    # Beyond the results at both ends no threshold is inside: the first such step on each side says it for all.
    rest = [0] * s.least.shape[1]
    first, last = (
        np.array([round_exactly(s.real.at(i, (v, *rest)), rounding) for i, v in enumerate(end)], object)
        for end in (s.low, s.high)
    )
    first, last = (np.clip(k, _LEAST, _MOST).astype(np.int64)[:, None] for k in (first, last))
    near = (every.k >= first) & (every.k <= last + 1)
    low, high = (end.astype(np.int64)[:, None] for end in (s.low, s.high))
    threshold = Table(s, every).thresholds()
    reached, missed = near & (threshold <= high), near & (threshold > low)
    at_least, at_most = np.maximum(threshold, low), np.minimum(threshold - 1, high)
    # An offset of b reaches k at v when v m + b >= edge. What 64 bits lose on the way comes back: the differences are
    # offsets, which fit.
    edge = (every.twice << shift.astype(np.int64)[:, None] - 1) + ~every.inclusive
    factor = s.dyadic.factors[:, :1].astype(np.int64)

    def of(neighbour: int) -> tuple[Array, Array]:
        m = factor + NEIGHBOURS[neighbour]
        least = np.where(reached, edge - at_least * m, _LEAST).max(axis=1, initial=_LEAST)
        return least, np.where(missed, edge - 1 - at_most * m, _MOST).min(axis=1, initial=_MOST)

    return of
