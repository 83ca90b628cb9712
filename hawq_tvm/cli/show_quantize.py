"""What an allocation and a table of latencies look like: as rows of JSON, and in a terminal; and the progress of
measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hawq_tvm.quantize.allocate.table import readable

from .show import say
from .terminal import OUT, Grid

if TYPE_CHECKING:
    from hawq_tvm.quantize.allocate.allocation import Allocation
    from hawq_tvm.quantize.allocate.latency import LatencyReport


def show_allocation(allocation: Allocation, provenance: Mapping[str, Any]) -> None:
    """Every layer with its trace, its bits and what it costs; then budgets and totals."""
    rest = [m for m in ("hessian", "fisher", "output") if m in allocation.table.rows[0].facts]
    traced = "weight_trace" in allocation.table.rows[0].facts or "trace" in allocation.table.rows[0].facts
    grid = Grid("layer", *(["trace", "+-"] if traced else []), "bits", *allocation.totals, "sensitivity", *rest, "why")
    for row in allocation.table.rows:
        choice, facts = allocation.assignment[row.name], row.facts
        trace = (
            [_short(facts.get("weight_trace", facts.get("trace"))), _short(facts.get("weight_error"))] if traced else []
        )
        costs = [readable(r, row.cost(r, choice)) for r in allocation.totals]
        why = f"fixed {row.fixed}" if row.fixed else f"reads {row.tie}" if row.tie else ""
        grid.add_row(
            row.name,
            *trace,
            choice,
            *costs,
            _short(row.sensitivity[choice]),
            *(_short(facts[m][choice]) for m in rest),
            why,
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
    say(
        f"sum of sensitivities {allocation.sensitivity:.6g}, the least there is ({allocation.solver['name']},"
        f" {allocation.solver['seconds']} s)"
    )
    if "loss" in provenance:
        show_provenance(provenance)


def show_provenance(facts: Mapping[str, Any]) -> None:
    """How sensitivities were measured."""
    text = f"measured by {facts['metric']} on {facts['images']} images, {facts['loss']}, seed {facts['seed']}"
    if "probes" in facts:
        most = f", up to {facts['most_probes']} of a layer" if facts["most_probes"] > facts["probes"] else ""
        text += f"; {facts['probes']} probes a layer{most}, on {facts['probed_images']} of them"
        text += f"; their signs leave standard errors up to {facts['worst_error']:.0%}"
        if facts["negative_traces"]:
            text += f"; {facts['negative_traces']} negative traces count as 0"
    say(text)
    if "decision" in facts:
        say(_decision(facts["decision"], facts["seconds"]))
    elif "probes" in facts and not facts["converged"]:
        say(f"not all standard errors are within {facts['tolerance']:.0%}: more --probes make them smaller")


def _decision(facts: Mapping[str, Any], seconds: float) -> str:
    """Whether the bits stand within the standard errors of what they were chosen by."""
    told = f"within the standard errors ({facts['draws']} draws) no other bits are better by {facts['margin']:.0%}"
    if facts["stable"]:
        return f"the choice stands: {told} of the sum; {seconds:.0f} s in this run"
    layers = ", ".join(facts["undecided"])
    return (
        f"the choice does NOT stand yet: in {facts['other']} of {facts['draws']} draws within the standard errors other"
        f" bits are better, by up to {facts['gain']:.0%} of the sum, after all that --probes allows ({seconds:.0f} s in"
        f" this run); it hangs on {layers}: more --probes settle it, or --fix"
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
