"""Tuning: the tile that makes each kernel of a model fastest on this machine, measured kernel by kernel.

Layers of one structure are one workload. Every workload's candidates are built, compared with each other element by
element and timed in turns; its record is on disk before the next one begins, so that an interrupted run is continued
by the next.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import arith, ops, ranges, stages
from hawq_tvm.core.errors import OutputError, UsageError
from hawq_tvm.core.files import check_output, write_text
from hawq_tvm.core.version import __version__
from hawq_tvm.core.work import layer_products
from hawq_tvm.measure import machine
from hawq_tvm.measure.measure import checked_threads
from hawq_tvm.measure.race import Contender, Result, race
from hawq_tvm.remote.tracker import Servers
from hawq_tvm.targets import target as targets
from schedules import lower, record, workload
from schedules.layer import Layer
from schedules.record import Record
from schedules.rule import Kernel, Tile, Tiled, choose
from schedules.rules import rules_for

from .crew import Crew, Job

Array = NDArray[Any]
TRIALS = 400
# The load per core from which a machine is too busy to measure on.
BUSY = 0.5


@dataclass(frozen=True)
class Workload:
    """Layers of one structure: their key, names and rule, the tiles to try, and what one of them is fed with.

    bounds: the least and the largest value of each input.  work: the multiplications of all of them.
    """

    key: str
    layers: tuple[str, ...]
    layer: Layer
    rule: Tiled
    tiles: Sequence[Tile]
    inputs: tuple[Array, ...]
    bounds: tuple[tuple[int, int], ...]
    work: int


@dataclass(frozen=True)
class Outcome:
    """What was measured for one workload, in microseconds; default: the cost model's tile."""

    key: str
    layers: tuple[str, ...]
    rule: str
    default: str
    tile: str
    default_us: float
    median_us: float
    candidates: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**self.__dict__, "layers": list(self.layers)}


@dataclass(frozen=True)
class TuneReport:
    """A finished run.

    kept: workloads that had a record already.  left: those that the trials did not suffice for.
    served: over RPC, the workloads that each server measured.  notes: what went wrong there.  failed: workloads that
    were given up.
    """

    records: Path
    threads: int
    outcomes: tuple[Outcome, ...]
    kept: int
    left: int
    served: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failed: int = 0

    @property
    def trials(self) -> int:
        """How many tiles were measured."""
        return sum(o.candidates for o in self.outcomes)

    def saved_us(self) -> tuple[float, float]:
        """The time of all layers measured now, with the cost model's tiles and with the fastest."""
        return sum(len(o.layers) * o.default_us for o in self.outcomes), sum(
            len(o.layers) * o.median_us for o in self.outcomes
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        default, tuned = self.saved_us()
        there = (
            {"rpc": {"servers": dict(self.served), "notes": list(self.notes), "failed": self.failed}}
            if self.served or self.notes
            else {}
        )
        return {
            "records": str(self.records),
            "threads": self.threads,
            "trials": self.trials,
            "kept": self.kept,
            "left": self.left,
            "default_us": round(default, 2),
            "tuned_us": round(tuned, 2),
            "workloads": [o.to_dict() for o in self.outcomes],
            **there,
        }


@dataclass(frozen=True)
class TuneStep:
    """Where a run is: workload `number` of `of` begins, or is done when it has an outcome; seconds_left: an
    estimate, if there is one.
    """

    number: int
    of: int
    layer: str
    candidates: int
    outcome: Outcome | None = None
    seconds_left: float | None = None


class Here:
    """This machine, as a place where tiles are raced.

    Raises UsageError for a target that it cannot run.
    """

    def __init__(self, target: str, threads: int | None) -> None:
        self.target, self.threads, self.cpu = (
            runnable(target),
            checked_threads(0, 0, 1, threads),
            str(machine.describe()["cpu"]),
        )
        self.served, self.notes, self.failed = dict[str, int](), list[str](), 0
        if os.getloadavg()[0] > BUSY * machine.available_cores():
            record.warn(
                f"other programs keep this machine busy (load average {os.getloadavg()[0]:.1f}): what is measured now"
                " may mislead"
            )

    def measure(self, jobs: Sequence[Job], begins: Callable[[Job], None]) -> Generator[tuple[Job, Result], None, None]:
        """Every job's result, one after the other."""
        for job in jobs:
            begins(job)
            yield job, race(job.kernels(), job.inputs, job.outputs, self.target, self.threads)


def tune(
    model: Any,
    records: str | Path,
    target: str = "host",
    *,
    trials: int = TRIALS,
    threads: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_float_tail: bool = False,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    progress: Callable[[TuneStep], None] | None = None,
    servers: Servers | None = None,
) -> TuneReport:
    """Measure the tiles of a model's kernels on this machine and write the fastest to the file `records`, for
    `compile`.

    What the file holds already is kept and not measured again.  trials: measure at most so many tiles in all.
    threads: the size of TVM's thread pool (None: one per usable core).  progress: called when a workload begins and
    ends.
    servers: measure on these machines instead, on all at once; "host" means their CPU, and threads None what TVM
    takes there.
    Raises ModelError as `compile` does, UsageError for a target that this machine cannot run, OutputError when
    `records` cannot be written, RemoteError when no server can measure.
    """
    if trials < 2:
        raise UsageError("at least 2 trials are needed to compare anything", where="--trials", found=str(trials))
    path = Path(records)
    checked_threads(0, 0, 1, threads)
    check_output(path)
    known = existing(path)
    place: Here | Crew = Here(target, threads) if servers is None else Crew(servers, target, threads)
    fixed = {k: tuple(int(d) for d in v) for k, v in (shapes or {}).items()}
    annotated = pipeline.import_annotated(model, shapes=fixed, allow_float_tail=allow_float_tail, ranges=ranges)
    packed = pipeline.to_packed(annotated, target=place.target)
    found = workloads(packed, place.target, place.threads)
    usable = record.check_rules(known, rules_for(place.target))
    told: set[str] = set()
    missing = [w for w in found if record.find(usable, [w.key], w.rule, w.layer, place.target, told) is None]
    shares = _shares([len(w.tiles) for w in missing], trials)
    planned = [(w, n) for w, n in zip(missing, shares, strict=True) if n]
    jobs = [
        Job(i, w.layers[0], partial(_kernels, w, n, place.target), w.inputs, _outputs(w.layer))
        for i, (w, n) in enumerate(planned)
    ]
    tell, start, outcomes = progress or (lambda step: None), time.monotonic(), list[Outcome]()

    def step(job: Job, outcome: Outcome | None) -> None:
        done = sum(o.candidates for o in outcomes)
        seconds = (time.monotonic() - start) / done * (sum(n for _, n in planned) - done) if done else None
        tell(
            TuneStep(
                len(outcomes) + (outcome is None), len(planned), job.what, planned[job.number][1], outcome, seconds
            )
        )

    with closing(place.measure(jobs, lambda job: step(job, None))) as results:
        for job, result in results:
            one, share = planned[job.number]
            entry, outcome = _recorded(one, share, place, result)
            known[one.key] = entry
            write_text(path, record.dump(known))
            outcomes.append(outcome)
            step(job, outcome)
    left = len(missing) - len(planned)
    return TuneReport(
        path,
        place.threads,
        tuple(outcomes),
        len(found) - len(missing),
        left,
        place.served,
        tuple(place.notes),
        place.failed,
    )


def runnable(text: str) -> tvm.target.Target:
    """A target whose code this machine can run, and this process now may.

    Raises UsageError for another.
    """
    parsed = targets.parse(text)
    if targets.gpu_architectures(parsed):
        raise UsageError(
            "tiles are measured on this machine's CPU",
            where=f"--target {text}",
            expected="a CPU",
            found="a GPU",
            remedy="add --export DIR and measure on a machine with such a GPU",
        )
    refused = targets.prepare(targets.architecture(parsed), targets.required_features(parsed))
    if refused is not None:
        raise UsageError(
            "this machine cannot run what it should measure",
            where=f"--target {text}",
            expected=refused.expected,
            found=refused.found,
            remedy=refused.remedy or "measure on such a machine",
        )
    return parsed


def existing(path: Path) -> dict[str, Record]:
    """The records of a file that may not exist yet; a file of something else is not overwritten.

    Raises OutputError when it holds something else.
    """
    if not path.exists():
        return {}
    found = record.parse(path.read_bytes(), str(path))
    if found is None:
        raise OutputError(
            "exists and is no file of records", where=str(path), remedy="choose another name, or remove it"
        )
    return found


def workloads(packed: tvm.IRModule, target: tvm.target.Target, threads: int) -> list[Workload]:
    """The workloads of a PACKED module that have several tiles, those that compute most first."""
    rules, groups = rules_for(target), dict[str, list[tuple[Layer, relax.Call]]]()
    for b in stages.bindings(packed["main"]):
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar):
            layer = Layer.of(b.value.op, packed[b.value.op])
            rule = choose(rules, layer, target).rule
            if isinstance(rule, Tiled) and len(rule.tiles(layer, target)) > 1:
                key = workload.keys(rule, layer, target)[workload.threads_class(threads)]
                groups.setdefault(key, []).append((layer, b.value))
    bounds, rng, made = _bounds(packed), np.random.default_rng(0), []
    for key, members in groups.items():
        layer, call = members[0]
        rule = choose(rules, layer, target).rule
        assert isinstance(rule, Tiled)
        inputs = tuple(_random(rng, a, bounds[a]) for a in call.args)
        work = len(members) * layer_products(layer.func)
        limits = tuple(bounds[a] for a in call.args)
        made.append(
            Workload(
                key, tuple(one.name for one, _ in members), layer, rule, rule.tiles(layer, target), inputs, limits, work
            )
        )
    return sorted(made, key=lambda w: -w.work)


def main_kernel(packed: tvm.IRModule, target: tvm.target.Target) -> tuple[Contender, str]:
    """The kernel that multiplies most in a PACKED module, as `compile` makes it for `target`, fed with random
    values; and its rule's name.

    Raises UsageError when nothing in it multiplies.
    """
    packed = pipeline.with_records(packed, target, {})
    calls = [
        b.value
        for b in stages.bindings(packed["main"])
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar)
    ]
    call = max(calls, key=lambda c: layer_products(packed[c.op]), default=None)
    if call is None or not layer_products(packed[call.op]):
        raise UsageError("there is no kernel with products in it")
    layer = Layer.of(call.op, packed[call.op])
    rule = choose(rules_for(target), layer, target).rule
    kernel, _ = lower.build(rule, layer, target)
    bounds, rng = _bounds(packed), np.random.default_rng(0)
    return Contender(kernel, tuple(_random(rng, a, bounds[a]) for a in call.args), _outputs(layer)), rule.name


def _outputs(layer: Layer) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of every result of a layer."""
    body = layer.func.body.ty
    types = list(body.fields) if isinstance(body, relax.TupleType) else [body]
    return [(tuple(int(d) for d in t.shape.values), str(t.dtype)) for t in types]


def _bounds(packed: tvm.IRModule) -> dict[relax.Var, tuple[int, int]]:
    """The least and the largest value that every tensor of `main` can have; floats, which have none, are left at 0,
    0.
    """
    main, named = packed["main"], ranges.module_ranges(packed)
    types = [str(t) for t in (main.attrs or {}).get("hawq.input_types", [])]
    bounds = {b.var: named[b.var.name].scalar if b.var.name in named else (0, 0) for b in stages.bindings(main)}
    for i, p in enumerate(main.params):
        bounds[p] = arith.RANGES.get(types[i] if types else ops.dtype_of(p), (0, 1))
    return bounds


def _random(rng: np.random.Generator, tensor: relax.Expr, bounds: tuple[int, int]) -> Array:
    """Values that a tensor can have: the kernels of others would overflow, or read beyond a table."""
    shape, dtype = ops.shape_of(tensor), ops.dtype_of(tensor)
    if dtype.startswith("float"):
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(int(bounds[0]), int(bounds[1]), shape, np.int64, endpoint=True).astype(dtype)


def _shares(sizes: Sequence[int], trials: int) -> list[int]:
    """How many tiles of each workload may be measured: two at least, then as many for each as the trials allow."""
    shares = [0] * len(sizes)
    for i in range(len(sizes)):
        if trials >= 2:
            shares[i], trials = 2, trials - 2
    while trials and any(0 < s < n for s, n in zip(shares, sizes, strict=True)):
        for i, n in enumerate(sizes):
            if trials and 0 < shares[i] < n:
                shares[i], trials = shares[i] + 1, trials - 1
    return shares


def _kernels(one: Workload, share: int, target: tvm.target.Target) -> list[Kernel]:
    """The kernels of a workload's first `share` tiles."""
    return [one.rule.build(one.layer, target, tile) for tile in one.tiles[:share]]


def _recorded(one: Workload, share: int, place: Here | Crew, result: Result) -> tuple[Record, Outcome]:
    """The record of a workload whose first `share` tiles were raced; the load of another machine is not known, 0."""
    for i in result.wrong:
        record.warn(
            f"{one.layers[0]}: the tile {one.tiles[i]} computes something else than {one.tiles[0]} and was left out;"
            " this is a bug, report it"
        )
    tile, median, default = one.tiles[result.winner], round(result.median_us, 3), round(result.first_us, 3)
    versions = {
        "hawq_tvm": __version__,
        "tvm": str(tvm.__version__),
        "llvm": str(tvm.target.codegen.llvm_version_major()),
    }
    load = round(os.getloadavg()[0], 2) if isinstance(place, Here) else 0.0
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    entry = Record(
        one.rule.name,
        record.fields_of(tile),
        median,
        default,
        one.layers[0],
        place.threads,
        share,
        place.cpu,
        load,
        versions,
        now,
    )
    return entry, Outcome(one.key, one.layers, one.rule.name, str(one.tiles[0]), str(tile), default, median, share)
