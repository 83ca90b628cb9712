"""The choice of bits where pairs of layers cost something, too: a search by exchanges of one and two groups of layers,
and an integer programme that proves its answer where the groups are not many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from hawq_tvm.core.printed import printed_nowhere

Array = np.ndarray[Any, Any]
# Costs are added in float64, and an exchange within this share of a limit is checked in rational numbers.
NEAR = 1e-9
# What a proof leaves open, as a share of the sum, or of LEAST of what all choices cost alone where the sum is less: it
# may be 0.
SAME, LEAST = 1e-6, 1e-3


@dataclass(frozen=True)
class Choices:
    """Groups of layers, their choices one after another.

    starts: of every group, and the number of all.  pairs: what two choices cost together, twice a pair and once on the
    diagonal [choice, choice].  costs: of every choice, by budget.  limits: by budget.
    """

    starts: Array
    pairs: Array
    costs: Sequence[Sequence[Fraction]]
    limits: Sequence[Fraction]

    @property
    def groups(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    @property
    def products(self) -> int:
        """Pairs of choices of two groups."""
        sizes = np.diff(self.starts)
        return int(sizes.sum() ** 2 - (sizes**2).sum()) // 2

    def value(self, taken: Array) -> float:
        """What an assignment (the number of a choice for every group) costs."""
        return float(self.pairs[np.ix_(taken, taken)].sum())

    def met(self, taken: Sequence[int] | Array) -> bool:
        """Whether it keeps all limits, exactly."""
        return all(sum((self.costs[c][k] for c in taken), Fraction(0)) <= limit for k, limit in enumerate(self.limits))


def exchanged(choices: Choices, start: Sequence[int] | Array) -> Array:
    """An assignment that no exchange of the choices of one or two groups makes better, from one that keeps all limits:
    the best exchange, again and again.
    """
    taken, pairs = np.array(start), choices.pairs
    owner = np.repeat(np.arange(choices.groups), np.diff(choices.starts))
    same = owner[:, None] == owner
    costs = np.array([[float(c) for c in one] for one in choices.costs]).reshape(len(owner), len(choices.limits))
    limits, alone = np.array([float(one) for one in choices.limits]), np.diag(pairs)
    while True:
        held = taken[owner]
        # What every choice adds in place of its group's, alone, and what two of them add besides.
        sums = pairs[:, taken].sum(1)
        one = 2 * (sums - sums[held]) + alone + alone[held] - 2 * pairs[np.arange(len(owner)), held]
        two = pairs - pairs[:, held] - pairs[held] + pairs[np.ix_(held, held)]
        added = np.where(same, np.inf, one[:, None] + one + 2 * two)
        np.fill_diagonal(added, one)
        more = costs - costs[held]
        spent = costs[taken].sum(0)
        over = (spent + more[:, None] + np.where(np.eye(len(owner), dtype=bool)[..., None], 0, more)) > limits * (
            1 + NEAR
        )
        added[over.any(2)] = np.inf
        least = -1e-9 * abs(choices.value(taken))
        better = [(added[i, j], i, j) for i, j in np.argwhere(added < least) if i <= j]
        for _, i, j in sorted(better):
            other = taken.copy()
            other[owner[i]], other[owner[j]] = i, j
            if choices.met(other):
                taken = other
                break
        else:
            return taken


def searched(choices: Choices, starts: Sequence[Sequence[int] | Array]) -> Array:
    """The best of what exchanges make of several assignments that keep all limits."""
    return min((exchanged(choices, start) for start in starts), key=choices.value)


def proved(choices: Choices, taken: Array, nodes: int) -> tuple[Array, bool]:
    """An assignment that is as good or better, and whether a search of so many nodes shows that none costs less.

    The integer programme has a variable for every choice and for every two of two groups; those of a choice add up to
    it.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    starts, number = choices.starts, int(choices.starts[-1])
    rows: list[Array] = []
    columns: list[Array] = []
    entries: list[Array] = []
    objective, top, row = [np.diag(choices.pairs)], number, choices.groups

    def put(r: Array, c: Array, x: float) -> None:
        rows.append(r.ravel())
        columns.append(c.ravel())
        entries.append(np.full(r.size, x))

    owner = np.repeat(np.arange(choices.groups), np.diff(starts))
    put(owner, np.arange(number), 1.0)
    for i in range(choices.groups):
        for j in range(i + 1, choices.groups):
            a, b = np.arange(starts[i], starts[i + 1]), np.arange(starts[j], starts[j + 1])
            both = top + np.arange(len(a) * len(b)).reshape(len(a), len(b))
            objective.append(2 * choices.pairs[np.ix_(a, b)].ravel())
            for ours, table in ((a, both), (b, both.T)):
                put(np.repeat(row + np.arange(len(ours)), table.shape[1]), table, 1.0)
                put(row + np.arange(len(ours)), ours, -1.0)
                row += len(ours)
            top += both.size
    for k, limit in enumerate(choices.limits):
        put(np.full(number, row + k), np.arange(number), 1.0)
        entries[-1] = np.array([float(one[k] / limit) if limit else float(bool(one[k])) for one in choices.costs])
    low, high = np.zeros(row + len(choices.limits)), np.zeros(row + len(choices.limits))
    low[: choices.groups] = high[: choices.groups] = 1
    low[row:], high[row:] = -np.inf, [1 + NEAR if limit else NEAR for limit in choices.limits]
    costs = np.concatenate(objective)
    found = choices.value(taken)
    floor = LEAST * float(np.abs(np.diag(choices.pairs)).sum())
    scale = 1e3 / (max(abs(found), floor) or 1.0)
    matrix = coo_array((np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), (len(low), top))
    with printed_nowhere():
        result = milp(
            costs * scale,
            integrality=np.concatenate([np.ones(number), np.zeros(top - number)]),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix.tocsr(), low, high),
            options={"node_limit": nodes, "mip_rel_gap": 0},
        )
    if result.x is not None:
        other = np.array([a + int(np.argmax(result.x[a:b])) for a, b in pairwise(starts)])
        if choices.met(other):
            taken = min(taken, exchanged(choices, other), key=choices.value)
    least = result.mip_dual_bound
    value = choices.value(taken)
    return taken, least is not None and value - float(least) / scale <= SAME * max(abs(value), floor)
