"""The choice of bits per layer: an integer linear programme (HAWQ-V3, equations 8 to 11) with any number of budgets,
solved exactly by HiGHS; a quadratic one where pairs of layers cost something, too (`quadratic.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from hawq_tvm.core.errors import HawqError, UsageError
from hawq_tvm.core.need import need
from hawq_tvm.core.printed import printed_nowhere

from .budgets import Budget, readable
from .quadratic import Choices, proved, searched
from .table import Row, Table

# The objective is scaled to this span: HiGHS stops at an absolute gap of 1e-6, so the sum is the least one to 1e-9 of
# the span.
SPAN = 1e3
CUTS = 200
# Of a quadratic programme: how many assignments exchanges begin from, by sensitivities that differ by factors of this
# deviation; and a proof's most variables (of more, its bound says nothing in useful time) and nodes.
STARTS, SPREAD, PROVABLE, NODES = 24, 0.7, 2000, 1000


class InfeasibleError(UsageError):
    """No assignment meets the budgets; says which, what is the least that can be reached, and by which layers."""


class SolverError(HawqError):
    """The solver did not finish."""


@dataclass(frozen=True)
class Limit:
    """A budget with its limit in the resource's unit, exactly."""

    budget: Budget
    limit: Fraction


@dataclass(frozen=True)
class Allocation:
    """The choice of every layer, the sum of sensitivities (with those of pairs), what is taken of every resource the
    table knows, and how it was found: solver["status"] is "optimal", or "best found" where that is not proved.
    """

    table: Table
    assignment: Mapping[str, str]
    sensitivity: float
    totals: Mapping[str, Fraction]
    limits: tuple[Limit, ...]
    solver: Mapping[str, Any]


@dataclass(frozen=True)
class _Group:
    """Layers with one choice: their allowed choices, and for each the sensitivity and the cost of every budgeted
    resource.
    """

    rows: Sequence[Row]
    choices: tuple[str, ...]
    values: tuple[float, ...]
    costs: tuple[tuple[Fraction, ...], ...]


def allocate(table: Table, budgets: Sequence[Budget], near: Mapping[str, str] | None = None) -> Allocation:
    """The assignment with the least sum of sensitivities that meets every budget; where pairs cost something, the best
    that exchanges find, proved to be the least where the layers are not many.

    near: an assignment to begin from where pairs cost something: one search from there and one from the best sum
    without pairs, and no proof.
    Raises InfeasibleError when none does, UsageError for a resource that the table does not know or a budget given
    twice.
    """
    resources = [b.resource for b in budgets]
    repeated = next((r for r in resources if resources.count(r) > 1), None)
    if repeated:
        raise UsageError(
            f"there are two budgets of {repeated}", where="--budget", found=", ".join(b.text for b in budgets)
        )
    groups = _groups(table, resources)
    limits = tuple(Limit(b, _limit(groups, k, table, b)) for k, b in enumerate(budgets))
    need("scipy.optimize")
    import scipy

    start = time.perf_counter()
    tops = [one.limit for one in limits]
    picked, rounds = _solve([g.values for g in groups], groups, tops)
    if picked is None:
        raise _infeasible(groups, limits)
    known: dict[str, Any] = {"status": "optimal"}
    if table.pairs is not None:
        picked, known = _with_pairs(table, groups, tops, picked, near)
    assignment = {row.name: group.choices[c] for group, c in zip(groups, picked, strict=True) for row in group.rows}
    solver = {
        "name": "HiGHS",
        "scipy": scipy.__version__,
        **known,
        "seconds": round(time.perf_counter() - start, 4),
        "rounds": rounds,
        "variables": sum(len(g.choices) for g in groups),
    }
    ordered = {row.name: assignment[row.name] for row in table.rows}
    return Allocation(
        table,
        ordered,
        table.sensitivity(ordered),
        {r: table.total(r, ordered) for r in table.resources()},
        limits,
        solver,
    )


def _with_pairs(
    table: Table,
    groups: Sequence[_Group],
    limits: Sequence[Fraction],
    picked: Sequence[int],
    near: Mapping[str, str] | None,
) -> tuple[list[int], dict[str, Any]]:
    """The choice of every group where pairs cost something, from the best without pairs; and how it was found."""
    assert table.pairs is not None
    starts = np.cumsum([0, *(len(g.choices) for g in groups)])
    member = np.zeros((starts[-1], len(table.pairs)))
    places = {row.name: i * len(table.choices) for i, row in enumerate(table.rows)}
    for begin, group in zip(starts, groups, strict=False):
        for c, choice in enumerate(group.choices):
            member[begin + c, [places[r.name] + table.choices.index(choice) for r in group.rows]] = 1
    costs = [tuple(g.costs[k][c] for k in range(len(limits))) for g in groups for c in range(len(g.choices))]
    choices = Choices(starts, member @ table.pairs @ member.T, costs, limits)
    begins = [starts[:-1] + picked]
    if near is not None:
        ours = starts[:-1] + [g.choices.index(near[g.rows[0].name]) for g in groups]
        return list(searched(choices, [*begins, *([ours] if choices.met(ours) else [])]) - starts[:-1]), {}
    rng = np.random.default_rng(0)
    for _ in range(STARTS):
        factors = rng.lognormal(0, SPREAD, len(groups))
        other, _ = _solve([[f * v for v in g.values] for f, g in zip(factors, groups, strict=True)], groups, limits)
        begins += [starts[:-1] + other] if other is not None else []
    taken, found = searched(choices, begins), False
    if choices.products <= PROVABLE:
        taken, found = proved(choices, taken, NODES)
    return list(taken - starts[:-1]), {"status": "optimal" if found else "best found"}


def _groups(table: Table, resources: Sequence[str]) -> list[_Group]:
    made = []
    for rows in table.groups():
        choices = table.allowed(rows)
        values = tuple(math.fsum(r.sensitivity[c] for r in rows) for c in choices)
        costs = tuple(tuple(sum((r.cost(k, c) for r in rows), Fraction(0)) for c in choices) for k in resources)
        made.append(_Group(rows, choices, values, costs))
    return made


def _least(groups: Sequence[_Group], k: int) -> Fraction:
    return sum((min(g.costs[k]) for g in groups), Fraction(0))


def _limit(groups: Sequence[_Group], k: int, table: Table, budget: Budget) -> Fraction:
    """The limit of a budget; the widest choice everywhere still respects what is fixed only in a fraction."""
    if budget.kind == "absolute":
        return budget.value
    if budget.kind == "share":
        return budget.value * sum((r.cost(budget.resource, table.choices[0]) for r in table.rows), Fraction(0))
    least, widest = _least(groups, k), sum((g.costs[k][0] for g in groups), Fraction(0))
    return least + budget.value * max(widest - least, Fraction(0))


def _solve(
    values: Sequence[Sequence[float]], groups: Sequence[_Group], limits: Sequence[Fraction | None]
) -> tuple[list[int] | None, int]:
    """The choice (its number) of every group with the least sum of values, None when no assignment keeps the limits;
    None is no limit.

    The second result counts the solver's runs.  HiGHS works with tolerances; what it returns is checked in rational
    numbers, and an assignment that passes a limit by less than a tolerance is cut away before another run.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    starts = np.cumsum([0, *(len(g.choices) for g in groups)])
    upper, rows, tops = np.ones(starts[-1]), [], []
    for k, limit in enumerate(limits):
        if limit is None:
            continue
        least = _least(groups, k)
        if least > limit:
            return None, 0
        extra = [[c - min(g.costs[k]) for c in g.costs[k]] for g in groups]
        flat = [c for one in extra for c in one]
        upper[[i for i, c in enumerate(flat) if c > limit - least]] = 0
        unit = max((c for c in flat if c <= limit - least), default=Fraction(0))
        if unit:
            rows.append([float(c / unit) if c <= limit - least else 0.0 for c in flat])
            tops.append(float((limit - least) / unit))
    lows = [min(v) for v in values]
    span = math.fsum(max(v) - low for v, low in zip(values, lows, strict=True)) or 1.0
    objective = np.array([SPAN * (x - low) / span for v, low in zip(values, lows, strict=True) for x in v])
    one_each = np.zeros((len(groups), starts[-1]))
    for i in range(len(groups)):
        one_each[i, starts[i] : starts[i + 1]] = 1
    fixed = [LinearConstraint(one_each, 1, 1)] + (
        [LinearConstraint(np.array(rows), -np.inf, np.array(tops))] if rows else []
    )
    cuts: list[np.ndarray[Any, Any]] = []
    for rounds in range(1, CUTS + 1):
        constraints = fixed + ([LinearConstraint(np.array(cuts), -np.inf, len(groups) - 1)] if cuts else [])
        with printed_nowhere():
            result = milp(
                objective,
                integrality=np.ones(starts[-1]),
                bounds=Bounds(0, upper),
                constraints=constraints,
                options={"mip_rel_gap": 0},
            )
        if result.status == 2:
            return None, rounds
        if result.status != 0:
            raise SolverError("the integer programme was not solved", found=str(result.message))
        picked = [int(np.argmax(result.x[a:b])) for a, b in pairwise(starts)]
        if all(
            limit is None or sum((g.costs[k][c] for g, c in zip(groups, picked, strict=True)), Fraction(0)) <= limit
            for k, limit in enumerate(limits)
        ):
            return picked, rounds
        cut = np.zeros(starts[-1])
        cut[[a + c for a, c in zip(starts, picked, strict=False)]] = 1
        cuts.append(cut)
    raise SolverError(
        f"{CUTS} assignments in a row pass a budget by less than the solver's tolerance",
        remedy="change a budget a little",
    )


def _infeasible(groups: Sequence[_Group], limits: Sequence[Limit]) -> InfeasibleError:
    """Why no assignment meets the budgets: one of them alone, or one given the others."""
    for k, one in enumerate(limits):
        least = _least(groups, k)
        if least > one.limit:
            picked = [g.costs[k].index(min(g.costs[k])) for g in groups]
            resource = one.budget.resource
            return InfeasibleError(
                "no assignment meets this budget",
                where=f"--budget {one.budget.text}",
                expected=f"{resource} of at most {readable(resource, one.limit)}",
                found=f"{readable(resource, least, up=True)} at least, by {_by(groups, k, picked)}",
                remedy=f"raise it to {readable(resource, least, up=True)}, or fix fewer layers",
            )
    # The earliest budget that the ones before it exclude: those are met together, with it none is.
    for last in range(1, len(limits)):
        kept: list[Fraction | None] = [one.limit if i < last else None for i, one in enumerate(limits)]
        floats = [tuple(float(c) for c in g.costs[last]) for g in groups]
        cheapest, _ = _solve(floats, groups, kept)
        assert cheapest is not None
        least = sum((g.costs[last][c] for g, c in zip(groups, cheapest, strict=True)), Fraction(0))
        if least > limits[last].limit:
            one, resource = limits[last], limits[last].budget.resource
            others = ", ".join(before.budget.text for before in limits[:last])
            return InfeasibleError(
                f"no assignment meets this budget together with {others}",
                where=f"--budget {one.budget.text}",
                expected=f"{resource} of at most {readable(resource, one.limit)}",
                found=f"{readable(resource, least, up=True)} at least under {others}, by {_by(groups, last, cheapest)}",
                remedy=f"raise it to {readable(resource, least, up=True)}, or loosen {others}",
            )
    return InfeasibleError(
        "no assignment meets the budgets", where="--budget", found=", ".join(one.budget.text for one in limits)
    )


def _by(groups: Sequence[_Group], k: int, picked: Sequence[int]) -> str:
    """The layers that take most of a resource in an assignment."""
    taken = [(group.costs[k][c], group, group.choices[c]) for group, c in zip(groups, picked, strict=True)]
    total = sum((cost for cost, _, _ in taken), Fraction(0)) or Fraction(1)
    most = sorted(taken, key=lambda t: -t[0])[:3]
    texts = [
        f"{' + '.join(r.name for r in g.rows)} {choice}{' (fixed)' if len(g.choices) == 1 else ''}"
        f" {float(cost / total):.0%}"
        for cost, g, choice in most
    ]
    return ", ".join(texts) + (f" and {len(taken) - len(most)} more" if len(taken) > len(most) else "")
