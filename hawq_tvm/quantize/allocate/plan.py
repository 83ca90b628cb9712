"""A float model, calibration data and budgets to bits per layer: the whole allocation in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import InputError
from hawq_tvm.core.json_files import clipped, number, read_json
from hawq_tvm.core.version import __version__
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess

from .allocation import Allocation
from .allocation import allocate as solve
from .budgets import RESOURCES, Budget
from .pareto import Front, draw, front
from .sensitivity import Progress, Sensitivities, Settings
from .sizes import blocked, end_layers, read_together, sizes_of, table_of
from .stability import Verdict, judge
from .table import Table, parse_table

Latencies = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Problem:
    """A table to allocate by, and where its numbers come from."""

    table: Table
    provenance: Mapping[str, Any]
    sensitivities: Sensitivities | None = None

    def allocate(self, budgets: Sequence[str | Budget]) -> Allocation:
        """The least sensitive assignment under budgets such as "size=0.5"; see `allocation.allocate`."""
        return solve(self.table, _budgets(budgets))

    def fronts(self) -> list[Front]:
        """The Pareto front of every resource that the table knows."""
        return [front(self.table, r) for r in self.table.resources()]


def _budgets(budgets: Sequence[str | Budget]) -> list[Budget]:
    return [b if isinstance(b, Budget) else Budget.parse(b) for b in budgets]


def problem(
    model: Any,
    calibration: str | Path,
    settings: Settings | None = None,
    *,
    preprocess: Preprocess | None = None,
    tie: bool | str = True,
    fix_ends: bool = True,
    fixed: Mapping[str, str] | None = None,
    latencies: Latencies | Callable[[], Latencies] | None = None,
    budgets: Sequence[str | Budget] = (),
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Problem:
    """The allocation problem of a float model (ONNX, .pt2 or ExportedProgram) measured on calibration data.

    The first of settings.metrics is what is minimized, the others stand beside it in reports.  tie: layers that read
    one tensor get one choice; "blocks": those of a block (`ptq/blocks.py`) do.  fix_ends: the first and the last layer
    keep the widest.  fixed: choices by layer.
    latencies: microseconds by layer and choice, or what measures them, called when all other budgets can be met.
    budgets: what bits will be chosen for, refused before anything is measured where no bits meet them; where the
    Hessian or its trace is minimized, it is measured until that choice stands (see `stability.py`), else until every
    standard error is small.
    state: a file to continue an interrupted measurement from.
    Raises ModelError, InputError and UsageError as `load_float`, `open_data`, `measure`, `Table` and `allocate` do.
    """
    graph, chosen = load_float(model), settings or Settings()
    from .measurement import measure

    for name in fixed or {}:
        graph.layer(name)
    data = open_data(calibration, graph.inputs, preprocess)
    limits, sizes, metric = _budgets(budgets), sizes_of(graph, data), chosen.metrics[0]
    ties = blocked(graph) if tie == "blocks" else read_together(graph) if tie else {}
    ends = dict.fromkeys(end_layers(graph), chosen.choices[0]) if fix_ends else {}
    if tie == "blocks":
        ties = {name: block for name, block in ties.items() if name not in ends}

    def finished(table: Table) -> Table:
        with_fixed = table.with_fixed(fixed or {})
        return with_fixed if times is None else with_fixed.with_latencies(times)

    def met(limits: Sequence[Budget]) -> None:
        nothing = np.zeros((len(graph.layers), len(chosen.choices)))
        if limits:
            solve(finished(table_of(graph, sizes, chosen.choices, nothing, ties=ties, fixed=ends)), limits)

    times: Latencies | None = None
    if callable(latencies):
        met([one for one in limits if one.resource != "latency"])
        times = latencies()
    else:
        times = latencies
    met(limits)

    def judged(found: Sensitivities) -> Verdict:
        return judge(
            found,
            # Without the other metrics beside it: some may not be measured yet.
            lambda drawn: finished(
                found.table(metric, ties=ties, fixed=ends, drawn=drawn or (found.values(metric), found.pairs(metric)))
            ),
            limits,
            chosen.seed,
        )

    asked = judged if metric in ("hessian", "trace") and limits else None
    found = measure(graph, data, chosen, Path(state) if state else None, progress, asked, sizes)
    table = finished(found.table(metric, ties=ties, fixed=ends))
    where = model if isinstance(model, str | Path) else graph.name
    return Problem(
        table,
        {"model": str(where), "calibration": str(calibration), "metric": chosen.metrics[0], **found.provenance()},
        found,
    )


def problem_of_table(
    path: str | Path, fixed: Mapping[str, str] | None = None, latencies: Mapping[str, Mapping[str, float]] | None = None
) -> Problem:
    """The allocation problem that a table in a JSON file states.

    Raises InputError and UsageError as `parse_table` does.
    """
    table = parse_table(read_json(path, "a table of layers"), str(path)).with_fixed(fixed or {})
    return Problem(table.with_latencies(latencies) if latencies is not None else table, {"table": str(path)})


def read_latencies(path: str | Path) -> dict[str, dict[str, float]]:
    """The latencies of a file that `hawq-tvm latency` wrote.

    Raises InputError when it is none.
    """
    fields = read_json(path, "a table of `hawq-tvm latency`")
    layers = fields.get("layers") if isinstance(fields, dict) else None
    if not isinstance(layers, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("latency_us"), dict) for e in layers.values()
    ):
        raise InputError(
            "is no table of latencies", where=str(path), expected='{"layers": {name: {"latency_us": {"W8A8": 1.0}}}}'
        )
    for name, entry in layers.items():
        for choice, value in entry["latency_us"].items():
            if (number(value) or 0.0) < 0 or number(value) is None:
                raise InputError(
                    "holds a latency that is no number", where=f"{path}: {name}", found=f"{choice}: {clipped(value)}"
                )
    return {name: entry["latency_us"] for name, entry in layers.items()}


def bits_file(allocation: Allocation, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What bits.json holds: `layers`, then everything about how they were chosen."""
    from hawq_tvm.quantize.allocate.rows import rows

    from .table import widths

    layers = {}
    for name, choice in allocation.assignment.items():
        weight, activation = widths(choice)
        layers[name] = {"weight": weight, "activation": activation}
    budgets = [
        {
            "budget": one.budget.text,
            "resource": one.budget.resource,
            "unit": RESOURCES[one.budget.resource][0],
            "limit": float(one.limit),
            "reached": float(allocation.totals[one.budget.resource]),
        }
        for one in allocation.limits
    ]
    return {
        "layers": layers,
        "producer": f"hawq-tvm {__version__}",
        "budgets": budgets,
        "sensitivity": allocation.sensitivity,
        "totals": {k: float(v) for k, v in allocation.totals.items()},
        "solver": dict(allocation.solver),
        "measured": dict(provenance),
        "report": rows(allocation),
    }


def fronts_file(fronts: Sequence[Front]) -> dict[str, Any]:
    """What the file of Pareto fronts holds: points [cost, sensitivity, one digit per layer], the digit numbering
    `choices`.
    """
    table = fronts[0].table
    return {
        "choices": list(table.choices),
        "layers": [r.name for r in table.rows],
        "fronts": [f.to_dict() for f in fronts],
    }


def picture(fronts: Sequence[Front], path: Path, allocation: Allocation | None) -> bytes:
    """The fronts with the uniform assignments and the chosen one, as PNG or SVG by the path's ending."""
    table = fronts[0].table
    marks = {c: {r.name: r.fixed or c for r in table.rows} for c in table.choices}
    if allocation is not None:
        marks["chosen"] = dict(allocation.assignment)
    return draw(fronts, path, marks)
