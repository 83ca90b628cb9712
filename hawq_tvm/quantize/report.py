"""What an allocation and a table of latencies look like: as rows of JSON, and in a terminal; and the progress of measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..show import say
from ..terminal import OUT, Grid, Terminal
from .table import readable

if TYPE_CHECKING:
    from .allocation import Allocation
    from .latency import LatencyReport
    from .sensitivity import Step


def rows(allocation: Allocation) -> list[dict[str, Any]]:
    """Per layer its choice, sensitivity, costs and facts (traces among them), JSON-ready."""
    found = []
    for row in allocation.table.rows:
        choice = allocation.assignment[row.name]
        costs = {r: float(row.cost(r, choice)) for r in allocation.totals}
        entry = {"layer": row.name, "choice": choice, "parameters": row.parameters, "macs": row.macs, "sensitivity": row.sensitivity[choice], **costs}
        found.append({**entry, **({"tie": row.tie} if row.tie else {}), **({"fixed": row.fixed} if row.fixed else {}), **row.facts})
    return found


def show_allocation(allocation: Allocation, provenance: Mapping[str, Any]) -> None:
    """Every layer with its trace, its bits and what it costs; then budgets and totals."""
    rest = [m for m in ("hessian", "fisher", "output") if m in allocation.table.rows[0].facts]
    traced = "weight_trace" in allocation.table.rows[0].facts or "trace" in allocation.table.rows[0].facts
    grid = Grid("layer", *(["trace", "+-"] if traced else []), "bits", *allocation.totals, "sensitivity", *rest, "why")
    for row in allocation.table.rows:
        choice, facts = allocation.assignment[row.name], row.facts
        trace = [_short(facts.get("weight_trace", facts.get("trace"))), _short(facts.get("weight_error"))] if traced else []
        costs = [readable(r, row.cost(r, choice)) for r in allocation.totals]
        why = f"fixed {row.fixed}" if row.fixed else f"reads {row.tie}" if row.tie else ""
        grid.add_row(row.name, *trace, choice, *costs, _short(row.sensitivity[choice]), *(_short(facts[m][choice]) for m in rest), why)
    _print(grid)
    for one in allocation.limits:
        resource = one.budget.resource
        say(f"{one.budget.text:<14} {readable(resource, allocation.totals[resource])} of at most {readable(resource, one.limit)}")
    for resource, total in allocation.totals.items():
        if resource not in [one.budget.resource for one in allocation.limits]:
            say(f"{resource:<14} {readable(resource, total)}")
    say(f"sum of sensitivities {allocation.sensitivity:.6g}, the least there is ({allocation.solver['name']}, {allocation.solver['seconds']} s)")
    if "loss" in provenance:
        show_provenance(provenance)


def show_provenance(facts: Mapping[str, Any]) -> None:
    """How sensitivities were measured."""
    text = f"measured by {facts['metric']} on {facts['images']} images, {facts['loss']}, seed {facts['seed']}"
    if "probes" in facts:
        state = f"all standard errors within {facts['tolerance']:.0%}" if facts["converged"] else f"standard errors up to {facts['worst_error']:.0%}, NOT within {facts['tolerance']:.0%}"
        text += f"; {facts['probes']} probes on {facts['probed_images']} of them, {state}"
        if facts["negative_traces"]:
            text += f"; {facts['negative_traces']} negative traces count as 0"
    say(text)


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


@contextmanager
def measuring(console: Terminal, quiet: bool) -> Iterator[Callable[[Step], None] | None]:
    """The progress of a measurement: a bar in a terminal, else a line at every tenth of a phase, or nothing."""
    if quiet:
        yield None
    elif not console.is_terminal:
        yield lambda step: console.print(f"  {_told(step)}") if step.done * 10 // step.of != (step.done - 1) * 10 // step.of else None
    else:
        columns = (TextColumn("{task.fields[phase]}"), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
        # Twice a second: whoever draws takes time from what is measured.
        with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
            task = bar.add_task("", total=None, phase="")
            yield lambda step: bar.update(task, total=step.of, completed=step.done, phase=step.phase, description=_detail(step))


def _told(step: Step) -> str:
    detail = _detail(step)
    return f"{step.phase} {step.done} of {step.of}{', ' if detail else ''}{detail}"


def _detail(step: Step) -> str:
    worst = f"worst standard error {step.worst:.0%}" if step.worst is not None else ""
    left = f"at most {step.seconds_left:.0f} s left" if step.seconds_left is not None else ""
    return ", ".join(filter(None, (worst, left)))
