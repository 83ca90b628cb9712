"""What an allocation and a table of latencies look like: as rows of JSON, and in a terminal; and the progress of
measuring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from hawq_tvm.quantize.allocate.budgets import readable
from hawq_tvm.quantize.allocate.table import BLOCK
from hawq_tvm.quantize.network.answers import Answers

from .show import hint, say
from .terminal import OUT, Grid

if TYPE_CHECKING:
    from hawq_tvm.quantize.allocate.allocation import Allocation
    from hawq_tvm.quantize.allocate.latency import LatencyReport
    from hawq_tvm.quantize.allocate.table import Row


def show_allocation(allocation: Allocation, provenance: Mapping[str, Any]) -> None:
    """Every layer with its trace, its bits and what it costs; then budgets and totals."""
    table = allocation.table
    rest = [m for m in ("hessian", "trace", "fisher", "output") if isinstance(table.rows[0].facts.get(m), dict)]
    traced = "weight_trace" in table.rows[0].facts or ("trace" in table.rows[0].facts and "trace" not in rest)
    paired = table.pairs is not None
    shares = table.shares(allocation.assignment)
    grid = Grid(
        "layer",
        *(["trace", "+-"] if traced else []),
        "bits",
        *allocation.totals,
        "sensitivity",
        *(["with others"] if paired else []),
        *rest,
        "why",
    )
    blocks = any(row.tie.startswith(BLOCK) for row in table.rows)
    for rows in table.groups() if blocks else [[row] for row in table.rows]:
        choice, first = allocation.assignment[rows[0].name], rows[0]
        name = first.name if len(rows) == 1 else f"{first.name} to {rows[-1].name}, {len(rows)} layers"
        traces = [_sum(rows, "weight_trace", "trace"), _root(rows, "weight_error")] if traced else []
        costs = [readable(r, sum((row.cost(r, choice) for row in rows), Fraction(0))) for r in allocation.totals]
        why = f"fixed {first.fixed}" if first.fixed else first.tie if blocks else f"reads {first.tie}"
        grid.add_row(
            name,
            *map(_short, traces),
            choice,
            *costs,
            _short(sum(row.sensitivity[choice] for row in rows)),
            *([_short(sum(shares[row.name] for row in rows))] if paired else []),
            *(_short(sum(row.facts[m][choice] for row in rows)) for m in rest),
            why if first.tie or first.fixed else "",
        )
    _print(grid)
    for one in allocation.limits:
        resource = one.budget.resource
        say(
            f"{one.budget.text:<14} {readable(resource, allocation.totals[resource])} of at most"
            f" {readable(resource, one.limit)}"
        )
    for resource, total in allocation.totals.items():
        if resource not in [one.budget.resource for one in allocation.limits]:
            say(f"{resource:<14} {readable(resource, total)}")
    say(f"sum of sensitivities {allocation.sensitivity:.6g}, {_least(allocation)}")
    if "loss" in provenance:
        show_provenance(provenance)


def _least(allocation: Allocation) -> str:
    """Whether the sum is the least, or how far from it at most."""
    solver = allocation.solver
    by = f"({solver['name']}, {solver['seconds']} s)"
    if solver["status"] == "optimal":
        return f"the least there is {by}"
    return f"which no other bits of two layers make less; among so many pairs that proves no least {by}"


def _sum(rows: Sequence[Row], *keys: str) -> float | None:
    """Of the first of these facts that a layer has."""
    found = [next((row.facts[k] for k in keys if row.facts.get(k) is not None), None) for row in rows]
    return None if None in found else math.fsum(x for x in found if x is not None)


def _root(rows: Sequence[Row], key: str) -> float | None:
    found = [row.facts.get(key) for row in rows]
    return None if None in found else math.hypot(*(x for x in found if x is not None))


def show_provenance(facts: Mapping[str, Any]) -> None:
    """How sensitivities were measured."""
    hint(Answers(facts["answers"] == "classes", facts["answers_by"]))
    text = f"measured by {facts['metric']} on {facts['images']} images, {facts['loss']}, seed {facts['seed']}"
    if "rounded_images" in facts:
        text += f"; every layer rounded alone on {facts['rounded_images']} of them"
    if "probes" in facts:
        most = f", up to {facts['most_probes']} of a layer" if facts["most_probes"] > facts["probes"] else ""
        text += f"; {facts['probes']} probes a layer{most}, on {facts['probed_images']} of them"
        if facts["negative_traces"]:
            text += f"; {facts['negative_traces']} negative traces count as 0"
    if facts.get("worst_error") is not None:
        by = "images" if facts["metric"] == "hessian" else "signs"
        text += f"; {by} leave standard errors up to {facts['worst_error']:.0%}"
    say(text)
    more = "--probes" if facts["metric"] == "trace" else "images in --calib"
    if "decision" in facts:
        say(_decision(facts["decision"], facts["seconds"], more))
    elif "converged" in facts and not facts["converged"]:
        say(f"not all standard errors are within {facts['tolerance']:.0%}: more {more} make them smaller")


def _decision(facts: Mapping[str, Any], seconds: float, more: str) -> str:
    """Whether the bits stand within the standard errors of what they were chosen by."""
    told = f"within the standard errors ({facts['draws']} draws) no other bits are better by {facts['margin']:.0%}"
    if facts["stable"]:
        return f"the choice stands: {told} of the sum; {seconds:.0f} s in this run"
    layers = ", ".join(facts["undecided"])
    return (
        f"the choice does NOT stand yet: in {facts['other']} of {facts['draws']} draws within the standard errors other"
        f" bits are better, by up to {facts['gain']:.0%} of the sum, after all there is to measure by ({seconds:.0f} s"
        f" in this run); it hangs on {layers}: more {more} settle it, or --fix"
    )


def show_fronts(points: Mapping[str, int]) -> None:
    """How many points each front has."""
    say("fronts         " + ", ".join(f"{resource}: {count} points" for resource, count in points.items()))


def show_latencies(report: LatencyReport) -> None:
    """Microseconds of every layer in every choice, and the sums."""
    choices: Sequence[str] = list(next(iter(report.latencies.values())))
    grid = Grid("layer", *(f"{c}, us" for c in choices), "rule")
    for name, times in report.latencies.items():
        grid.add_row(name, *(f"{times[c]:.1f}" for c in choices), ", ".join(dict.fromkeys(report.rules[name].values())))
    _print(grid)
    sums = ", ".join(f"{c} {sum(t[c] for t in report.latencies.values()) / 1e3:.3f} ms" for c in choices)
    say(f"all layers: {sums}; batch {report.batch}, {report.threads} threads, {report.machine['cpu']}")


def _print(grid: Grid) -> None:
    """A table; one that goes to a file is not squeezed into 80 columns."""
    OUT.print(grid)


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"
