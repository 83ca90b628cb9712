"""Every assignment that is best for some budget of one resource: the exact Pareto front, by dynamic programming with
dominance (Nemhauser and Ullmann, 1969); where pairs of layers cost something, the best that exchanges find for budgets
that are evenly apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.need import need

from .allocation import allocate
from .budgets import RESOURCES, Budget
from .table import Table

# A front of more points is not computed: memory grows with points times layers.
MOST_POINTS = 5_000_000
# Budgets where pairs cost something.
BUDGETS = 64


@dataclass(frozen=True)
class Front:
    """The points of a front, cheapest first, no point as good as a cheaper one.

    costs: of `resource`, in its unit.  choices: of every point and layer, the number of its choice in table.choices,
    uint8 [points, layers].
    """

    table: Table
    resource: str
    costs: np.ndarray[Any, Any]
    sensitivities: np.ndarray[Any, Any]
    choices: np.ndarray[Any, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; an assignment is one digit per layer, the number of its choice."""
        digits = [row.tobytes().decode() for row in (self.choices + ord("0")).astype(np.uint8)]
        points = [[float(c), float(s), d] for c, s, d in zip(self.costs, self.sensitivities, digits, strict=True)]
        return {"resource": self.resource, "unit": RESOURCES[self.resource][0], "points": points}


def front(table: Table, resource: str) -> Front:
    """The whole front of sensitivity against one resource, other budgets aside; ties and fixed layers kept.

    Raises UsageError when the table does not know the resource, or there are too many points.
    """
    if table.pairs is not None:
        return _swept(table, resource)
    groups = table.groups()
    costs, values = np.zeros(1), np.zeros(1)
    parents, picks = [], []
    for rows in groups:
        choices = [table.choices.index(c) for c in table.allowed(rows)]
        steps = [
            (
                float(sum(r.cost(resource, table.choices[c]) for r in rows)),
                math.fsum(r.sensitivity[table.choices[c]] for r in rows),
            )
            for c in choices
        ]
        all_costs = np.concatenate([costs + c for c, _ in steps])
        all_values = np.concatenate([values + v for _, v in steps])
        order = np.lexsort((all_values, all_costs))
        sorted_values = all_values[order]
        before = np.minimum.accumulate(np.concatenate([[np.inf], sorted_values[:-1]]))
        kept = order[sorted_values < before]
        if len(kept) > MOST_POINTS:
            raise UsageError(
                f"the front of {resource} has more than {MOST_POINTS} points",
                where="--pareto",
                remedy="ask for budgets instead",
            )
        parents.append(kept % len(costs))
        picks.append(np.array(choices, np.uint8)[kept // len(costs)])
        costs, values = all_costs[kept], all_values[kept]
    chosen, index = np.zeros((len(costs), len(table.rows)), np.uint8), np.arange(len(costs))
    places = {row.name: i for i, row in enumerate(table.rows)}
    for rows, parent, pick in zip(reversed(groups), reversed(parents), reversed(picks), strict=True):
        chosen[:, [places[r.name] for r in rows]] = pick[index][:, None]
        index = parent[index]
    return Front(table, resource, costs, values, chosen)


def _swept(table: Table, resource: str) -> Front:
    """The assignments for BUDGETS budgets, none of them as good as a cheaper one; the last is searched for from many
    beginnings, and proved where that is possible.
    """
    near = allocate(table, [Budget(resource, "fraction", Fraction(0), "")]).assignment
    found = []
    for i in range(BUDGETS + 1):
        budget = Budget(resource, "fraction", Fraction(i, BUDGETS), "")
        near = allocate(table, [budget], near=near if i < BUDGETS else None).assignment
        found.append((table.total(resource, near), table.sensitivity(near), near))
    found.sort(key=lambda one: one[:2])
    kept = [one for i, one in enumerate(found) if all(one[1] < before[1] for before in found[:i])]
    choices = [[table.choices.index(one[r.name]) for r in table.rows] for _, _, one in kept]
    costs, values = np.array([float(cost) for cost, _, _ in kept]), np.array([value for _, value, _ in kept])
    return Front(table, resource, costs, values, np.array(choices, np.uint8))


def draw(fronts: Sequence[Front], path: Path, marks: Mapping[str, Mapping[str, str]]) -> bytes:
    """A picture of fronts, PNG or SVG by the path's ending; marks: assignments to show, by label.

    Raises UsageError for another ending, or when matplotlib is not installed.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UsageError("a picture is PNG or SVG", where=f"--plot {path}", expected="a name that ends in .png or .svg")
    need("matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scales = {"size": (8e6, "weights, MB"), "bops": (1e9, "GBOPS"), "latency": (1e3, "latency, ms")}
    with matplotlib.rc_context({"svg.hashsalt": "hawq", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * len(fronts), 4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, one in zip(np.atleast_1d(figure.subplots(1, len(fronts))), fronts, strict=True):
            unit, label = scales[one.resource]
            axes.step(
                one.costs / unit,
                one.sensitivities,
                where="post",
                color="#0072b2",
                linewidth=1.2,
                label=f"front, {len(one.costs)} points",
            )
            for (name, assignment), style in zip(marks.items(), ("o", "s", "^", "D", "v") * len(marks), strict=False):
                axes.plot(
                    float(one.table.total(one.resource, assignment)) / unit,
                    one.table.sensitivity(assignment),
                    style,
                    label=name,
                    markersize=5,
                )
            positive = one.sensitivities[one.sensitivities > 0]
            if len(positive) == len(one.sensitivities) and len(positive) > 1 and positive[0] / positive[-1] > 30:
                axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel("sum of sensitivities")
            axes.legend(frameon=False)
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return stream.getvalue()
