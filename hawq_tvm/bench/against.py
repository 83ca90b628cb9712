"""A package beside other runtimes and packages: one process, one run, turn by turn, the same inputs, threads and
processors.

Times of two runs, minutes apart on a machine that others use too, cannot be compared. So the engines take turns of a
fraction of a second; whatever slows the machine slows them all. A turn begins when the process rests, because the
threads of a pool that has nothing to do wait busily for a while (TVM's for more than a tenth of a second) and would
take the next engine's processors. Then come calls that are not timed, to warm the caches.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core import files
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.measure import limits, machine, pinning
from hawq_tvm.measure.measure import BenchReport
from hawq_tvm.package.package import Package

from . import agreement, peers
from .engine import CannotRun
from .packaged import C, InC, Packaged, Rival, is_package

Array = NDArray[Any]
TURN = 0.3  # seconds that an engine is timed before the next one's turn
SETTLE = 0.05  # seconds of calls that are not timed at the start of a turn
REST = 0.005  # seconds over which the process must have used less than a tenth of one processor to count as resting
PATIENCE = 10  # seconds to wait for that


@dataclass(frozen=True)
class EngineReport:
    """One engine's part: its times, the multiplications of one inference, and its outputs beside ours.

    agreement: empty for ours and for another integer graph, which computes something else.  cpu_ms: the processors'
    time of every timed call, of all of the process's threads, which other processes disturb less.
    """

    name: str
    version: str
    what: str
    bench: BenchReport
    products: int
    agreement: tuple[agreement.OutputAgreement, ...]
    cpu_ms: tuple[float, ...]


@dataclass(frozen=True)
class AgainstReport:
    """Every engine of one comparison, ours first.

    products: multiplications of one inference.  limits: of one core of this machine, measured in the same run.
    others: the share of the processors' time that other processes took while the engines had their turns.
    excluded: engines that cannot run here, each with the reason.
    """

    name: str
    machine: dict[str, Any]
    threads: int
    cores: tuple[int, ...]
    turns: int
    others: float
    products: int
    limits: limits.Limits
    engines: tuple[EngineReport, ...]
    excluded: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; ratio_to_fastest is of medians, ratio_of_minima of the shortest calls, 1 the fastest."""
        fastest, least = (min(f(e) for e in self.engines) for f in (_median, _least))
        rows = []
        for e in self.engines:
            fields = e.bench.to_dict()
            rows.append(
                {
                    "engine": e.name,
                    "version": e.version,
                    "what": e.what,
                    **{k: fields[k] for k in ("iterations", "latency_ms", "throughput_per_s")},
                    "cpu_ms": {"median": round(float(np.median(e.cpu_ms)), 6), "min": round(min(e.cpu_ms), 6)},
                    "ratio_to_fastest": round(_median(e) / fastest, 3),
                    "ratio_of_minima": round(_least(e) / least, 3),
                    **speed(e.bench, e.products, self.limits),
                    "products": e.products,
                    "agreement": [a.to_dict() for a in e.agreement],
                    "agreement_text": [a.sentence() for a in e.agreement],
                }
            )
        return {
            "name": self.name,
            "machine": self.machine,
            "threads": self.threads,
            "pinned_to": list(self.cores),
            "turns": self.turns,
            "others_share": round(self.others, 3),
            "products": self.products,
            "limits": self.limits.to_dict(),
            "engines": rows,
            "excluded": [{"engine": name, "reason": reason} for name, reason in self.excluded],
        }


def _median(engine: EngineReport) -> float:
    return engine.bench.median_ms


def _least(engine: EngineReport) -> float:
    return min(engine.bench.times_ms)


def speed(bench: BenchReport, products: int, found: limits.Limits) -> dict[str, float | None]:
    """10^12 operations per second (two per multiplication) at the median, and their share of the measured limit x
    threads.

    None for the share where no limit could be measured.
    """
    tops, limit = 2e-9 * products / bench.median_ms, found.tops(bench.threads)
    return {"tops": round(tops, 5), "share_of_limit": None if limit is None else round(tops / limit, 4)}


def alone(package: Package, inputs: Mapping[str, Array] | None = None, **options: Any) -> dict[str, Any]:
    """A package's own times (options: those of `Package.bench`) with its speed and the machine's limits, JSON-ready.

    A package for a GPU has the GPU's: see `on_gpu.alone`.
    """
    if package.on_gpu:
        from hawq_tvm.bench.gpu.on_gpu import alone as alone_on_gpu

        return alone_on_gpu(package, inputs, **options)
    report, products, found = package.bench(inputs, **options), package.products, limits.measure()
    return {**report.to_dict(), "products": products, **speed(report, products, found), "limits": found.to_dict()}


def compare(
    package: Package,
    model: str | Path | None,
    names: Sequence[str],
    inputs: Mapping[str, Array] | None = None,
    *,
    warmup_ms: float = 200,
    duration: float = 3,
    iterations: int = 10,
    threads: int | None = None,
) -> AgainstReport:
    """Time a package beside the named peers: runtimes (see peers.PEERS) on the ONNX model that it was compiled from,
    and other packages.

    model: needed by runtimes only.  duration, iterations: at least so many seconds and calls are timed of each
    engine.  threads: of each engine, each with a processor of its own (None: all).  An engine that cannot run here
    is left out and named in `excluded`.
    Raises UsageError, ModelError when a peer does not run the same network, CannotRun when no peer is left.
    """
    if not (0 <= warmup_ms < float("inf") and 0 <= duration < float("inf") and iterations >= 1):
        raise UsageError(
            "warm-up and duration must be finite and not negative, iterations at least 1",
            found=f"{warmup_ms}, {duration}, {iterations}",
        )
    if package.on_gpu:
        raise UsageError(
            "the other runtimes are timed on the CPU",
            where=package.name,
            expected="a package for a CPU",
            found="one for a GPU",
            remedy="bench it alone",
        )
    count = machine.available_cores() if threads is None else threads
    cores, path = pinning.choose_cores(count), None if model is None else Path(model)
    peers.check_needs(names, path)
    if path is not None:
        check_model(path, package)
    given = package.prepare(inputs) if inputs is not None else package.random_inputs(1, 0)[0]
    wanted: list[Any] = [Packaged(package), *(_rival(n, package) for n in names)]
    stop, described = threading.Event(), machine.describe()

    def run() -> AgainstReport:
        pinning.pin_all(cores)
        found = limits.measure()
        with _closing(wanted):
            engines, agreements, excluded = _prepare(wanted, path, given, count, package.manifest["outputs"])
            pinning.pin_all(cores)
            with pinning.other_processes(cores) as others:
                times, turns = _take_turns(engines, warmup_ms / 1000, duration, iterations, stop)
            if not pinning.pinned(cores):
                raise UsageError(
                    "an engine moved its threads to other processors, so the times were not comparable",
                    found=", ".join(names),
                )
            products = engines[0].products
            reports = tuple(
                EngineReport(
                    e.name,
                    e.version,
                    e.what,
                    BenchReport(e.name, described, count, warmup_ms, tuple(wall for wall, _ in t)),
                    getattr(e, "products", products),
                    a,
                    tuple(cpu for _, cpu in t),
                )
                for e, t, a in zip(engines, times, agreements, strict=True)
            )
        return AgainstReport(
            package.name, described, count, tuple(cores), turns, others[0], products, found, reports, tuple(excluded)
        )

    # A new thread, because TVM's pool belongs to the thread that first needs it: this one's has exactly `count`
    # threads.
    with pinning.restored_affinity(), ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(run).result()
        finally:
            stop.set()


def _rival(name: str, package: Package) -> Any:
    if name == C:
        return InC(package)
    return Rival(name, package) if is_package(name) else peers.PEERS[name]()


@contextmanager
def _closing(engines: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for engine in engines:
            engine.close()


Agreements = tuple[agreement.OutputAgreement, ...]


def _prepare(
    wanted: Sequence[Any],
    model: Path | None,
    inputs: Mapping[str, Array],
    threads: int,
    specs: Sequence[Mapping[str, Any]],
) -> tuple[list[Any], list[Agreements], list[tuple[str, str]]]:
    """Load every engine, run each once, and check the outputs before any time is spent on measuring.

    The result: the engines that run, their outputs beside the first's, and the engines that cannot, with the reason.
    """
    engines: list[Any] = []
    found: list[Agreements] = []
    excluded: list[tuple[str, str]] = []
    for engine in wanted:
        try:
            engine.prepare(model, inputs, threads)
        except CannotRun as e:
            excluded.append((engine.name, str(e)))
            continue
        engine.call()
        engines.append(engine)
        found.append(() if engine is wanted[0] else _agreement(wanted[0], engine, model, specs))
    if len(engines) < 2:
        raise CannotRun(
            "nothing is left to compare with", where="--against", found="; ".join(reason for _, reason in excluded)
        )
    return engines, found, excluded


def _agreement(ours: Packaged, engine: Any, model: Path | None, specs: Sequence[Mapping[str, Any]]) -> Agreements:
    """The outputs of an engine beside ours.

    Raises ModelError where they cannot be those of one network; packages of one integer graph must be equal.
    """
    if isinstance(engine, Rival) and not engine.same:
        return ()
    try:
        rows = agreement.compare(ours.outputs(), engine.outputs(), specs)
    except ValueError as e:
        raise ModelError(
            f"{engine.name} did not run the network of the package: {e}",
            where=str(model),
            remedy="give the model that the package was compiled from",
        ) from e
    for row in rows:
        if isinstance(engine, Rival | InC):
            if not row.equal:
                raise ModelError(
                    "two libraries of one integer graph have different outputs",
                    where=engine.name,
                    expected="equal ones",
                    found=row.sentence(),
                    remedy="verify both",
                )
        elif not row.same_network:
            raise ModelError(
                f"{engine.name} did not run the network of the package, or ran it wrongly",
                where=str(model),
                found=row.sentence(),
                expected=f"a correlation of at least {agreement.LEAST_CORRELATION:g} ({agreement.WHY})",
                remedy=f"give the model that the package was compiled from, or leave {engine.name} out",
            )
    return tuple(rows)


def _take_turns(
    engines: Sequence[Any], warmup: float, duration: float, iterations: int, stop: threading.Event
) -> tuple[list[list[tuple[float, float]]], int]:
    """Milliseconds of every timed call of every engine, by the clock and of the processors, and the number of turns
    that each had; seconds otherwise.
    """
    for engine in engines:
        _until(engine.call, warmup, stop)
    times: list[list[tuple[float, float]]] = [[] for _ in engines]
    turns, turn = 0, min(TURN, duration)
    while not stop.is_set() and any(len(t) < iterations or sum(wall for wall, _ in t) < 1000 * duration for t in times):
        # Everybody's turn also when some have enough: the same stretch of time for all. Each begins a round in its
        # turn.
        for i in range(len(engines)):
            k = (turns + i) % len(engines)
            _wait_for_rest(engines[k - 1].name)
            _until(engines[k].call, min(SETTLE, duration), stop)
            times[k] += _timed(engines[k].call, turn)
        turns += 1
    return times, turns


def _wait_for_rest(before: str) -> None:
    """Sleep until no thread of the process works any more.

    Raises UsageError naming the engine that ran before when its threads never stop.
    """
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(REST)
        if time.process_time() - used < 0.1 * (time.perf_counter() - wall):
            return
    raise UsageError(
        "its threads go on working when it has nothing to do, so nothing can be timed beside it",
        where=f"--against {before}",
        found=f"busy for {PATIENCE} s",
    )


def _until(call: Callable[[], None], seconds: float, stop: threading.Event) -> None:
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end and not stop.is_set():
        call()


def _timed(call: Callable[[], None], seconds: float) -> list[tuple[float, float]]:
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        call()
        times.append((1000 * (time.perf_counter() - start), 1000 * (time.process_time() - used)))
    return times


def check_model(model: Path, package: Package) -> None:
    """Whether an ONNX file has the package's inputs and outputs, with the same static shapes.

    Raises ModelError naming what differs, and for a package whose library is not the whole model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    where = str(model)
    files.check_model(model)
    if "cut" in package.manifest:
        tensors = ", ".join(package.manifest["cut"]["tensors"])
        raise ModelError(
            "does more than the package's library, which ends where the float end was cut off",
            where=where,
            expected=f"a model that ends at {tensors}",
            remedy="onnx.utils.extract_model cuts one there; compile and time that",
        )
    try:
        graph = onnx.load(where, load_external_data=False).graph
    except (DecodeError, OSError) as e:
        raise ModelError(
            "cannot be read", where=where, expected="an ONNX model", found=str(e) or type(e).__name__
        ) from e
    stored = {i.name for i in graph.initializer}
    has = {i.name: i.type.tensor_type for i in graph.input if i.name not in stored}
    wanted = {i["name"]: i for i in package.manifest["inputs"]}
    remedy = "give the model that the package was compiled from"
    if set(has) != set(wanted):
        raise ModelError(
            "has other inputs than the package",
            where=where,
            expected=", ".join(wanted),
            found=", ".join(has) or "none",
            remedy=remedy,
        )
    outputs, ours = [o.name for o in graph.output], [o["name"] for o in package.manifest["outputs"]]
    if outputs != ours:
        raise ModelError(
            "has other outputs than the package",
            where=where,
            expected=", ".join(ours),
            found=", ".join(outputs) or "none",
            remedy=remedy,
        )
    for name, spec in wanted.items():
        dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in has[name].shape.dim]
        text, expected = "x".join(map(str, dims)), "x".join(map(str, spec["shape"]))
        if not all(isinstance(d, int) and d > 0 for d in dims):
            raise ModelError(
                f"the input {name} has a symbolic dimension, so not everybody would run the same shape",
                where=where,
                expected=expected,
                found=text,
                remedy=(
                    f"fix it: python -m onnxruntime.tools.make_dynamic_shape_fixed --input_name {name} --input_shape"
                    f" {expected.replace('x', ',')} IN OUT"
                ),
            )
        if dims != list(spec["shape"]):
            raise ModelError(
                f"the input {name} has another shape than the package's",
                where=where,
                expected=expected,
                found=text,
                remedy=remedy,
            )
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(has[name].elem_type)).name
        if kind != spec["dtype"]:
            raise ModelError(
                f"the input {name} has a type that cannot be compared", where=where, expected=spec["dtype"], found=kind
            )
