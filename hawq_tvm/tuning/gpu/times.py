"""Times that an exported run brought back from a GPU, made records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.core.files import check_output, write_text
from hawq_tvm.core.json_files import read_json
from hawq_tvm.measure.race import MARGIN
from hawq_tvm.targets.target import gpu_architectures
from hawq_tvm.tuning.gpu.plan import TIMES, identity
from hawq_tvm.tuning.tuner import Outcome, TuneReport, existing
from schedules import record
from schedules.record import Record

from .export import gpu_target, model_workloads


def import_times(
    times: str | Path,
    records: str | Path,
    model: Any = None,
    target: str | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_float_tail: bool = False,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> TuneReport:
    """Make records of times.json, into the file `records`; what else it holds is kept.

    model: refuse times of another one.  target: refuse those of another architecture; with a model it is the times'
    own by default.
    Raises InputError for a file that is damaged, of another format, or of another plan than it says; UsageError for
    a foreign model or target; OutputError when `records` cannot be written.
    """
    source, path = Path(times), Path(records)
    check_output(path)
    known, found = existing(path), _read(source)
    arch = found["plan"]["arch"]
    parsed = gpu_target(target or f"cuda-{arch.replace('_', '')}")
    if [arch] != list(gpu_architectures(parsed)):
        raise UsageError(
            "the times are of another architecture",
            where=f"--target {target}" if target else str(source),
            expected=", ".join(gpu_architectures(parsed)),
            found=arch,
        )
    if model is not None:
        keys, own = (
            {w["key"] for w in found["plan"]["workloads"]},
            {w.key for w in model_workloads(model, parsed, shapes, allow_float_tail, ranges)},
        )
        if keys != own:
            raise UsageError(
                "the times are of another model, or of another version's kernels",
                where=str(source),
                expected=f"{len(own)} workloads of the model",
                found=f"{len(keys - own)} that it has not, and {len(own - keys)} missing",
                remedy="export the model again and measure that",
            )
    outcomes = []
    for planned in found["plan"]["workloads"]:
        measured = found["workloads"].get(planned["key"])
        if measured is not None and any(t is not None for t in measured["median_us"]):
            entry, outcome = _record(planned, measured, found)
            known[planned["key"]] = entry
            outcomes.append(outcome)
    write_text(path, record.dump(known))
    return TuneReport(path, 0, tuple(outcomes), 0, len(found["plan"]["workloads"]) - len(outcomes))


def _record(
    planned: Mapping[str, Any], measured: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[Record, Outcome]:
    """The record of a workload: the fastest tile if it is faster than the cost model's by more than the CPU tuner's
    margin.
    """
    times, layer = {i: t for i, t in enumerate(measured["median_us"]) if t is not None}, planned["layers"][0]
    fastest = min(times, key=lambda i: times[i])
    for i in measured["wrong"]:
        record.warn(
            f"{layer}: the tile {planned['tiles'][i]} computes something else than most and was left out; this is a"
            " bug, report it"
        )
    if 0 not in times:
        record.warn(f"{layer}: the cost model's tile has no time; the fastest of the others is kept")
    default = times.get(0, times[fastest])
    chosen = fastest if 0 not in times or times[fastest] < (1 - MARGIN) * default else 0
    machine = found["machine"]
    versions = {
        **found["plan"]["versions"],
        "cuda": str(machine.get("nvcc", "unknown")),
        "driver": str(machine["driver"]),
    }
    tiles, key, rule, us = planned["tiles"], planned["key"], planned["rule"], round(times[chosen], 3)
    entry = Record(
        rule,
        tiles[chosen],
        us,
        round(default, 3),
        layer,
        0,
        len(times),
        machine["gpu"],
        0.0,
        versions,
        measured["date"],
    )
    texts = [", ".join(f"{k} {v}" for k, v in tiles[i].items()) for i in (0, chosen)]
    return entry, Outcome(key, tuple(planned["layers"]), rule, texts[0], texts[1], round(default, 3), us, len(times))


def _read(path: Path) -> dict[str, Any]:
    """The contents of times.json, as run.py writes it.

    Raises InputError.
    """
    expected = "times.json, which run.py of an exported folder writes"
    content = read_json(path, expected)
    if not isinstance(content, dict) or content.get("format") != TIMES:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise InputError("is of another format", where=str(path), expected=TIMES, found=f"{found!r:.60}")
    if content.get("id") != identity(content.get("plan")):
        raise InputError(
            "its plan is not the one that was exported: its hash is another", where=str(path), remedy="measure again"
        )
    why = _wrong(content)
    if why:
        raise InputError("is damaged", where=str(path), expected=expected, found=why, remedy="measure again")
    return content


def _wrong(content: Mapping[str, Any]) -> str | None:
    """Why times do not fit their plan, whose hash is right, or None."""
    machine, workloads = content.get("machine"), content.get("workloads")
    if (
        not isinstance(machine, dict)
        or not isinstance(machine.get("gpu"), str)
        or type(machine.get("driver")) is not int
        or not isinstance(workloads, dict)
    ):
        return "no machine, or no workloads"
    planned = {w["key"]: len(w["tiles"]) for w in content["plan"]["workloads"]}
    for key, measured in workloads.items():
        if key not in planned:
            return f"a workload that is not in the plan: {key}"
        times = measured.get("median_us") if isinstance(measured, dict) else None
        wrong = measured.get("wrong") if isinstance(measured, dict) else None
        if (
            not isinstance(times, list)
            or len(times) != planned[key]
            or not all(t is None or (type(t) in (int, float) and 0 < t < float("inf")) for t in times)
        ):
            return f"the times of {key}"
        if not isinstance(wrong, list) or not all(
            type(i) is int and 0 <= i < len(times) and times[i] is None for i in wrong
        ):
            return f"the wrong candidates of {key}"
        if not isinstance(measured.get("date"), str):
            return f"the date of {key}"
    return None
