"""The one timing method: warm up, then time single calls until both a duration and a count are reached."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import tvm_ffi

from hawq_tvm.core.errors import UsageError

from . import machine

T = TypeVar("T")

# TVM's thread pool takes half of the processors for hyper-threads unless told, and binds the calling thread to
# processor 0 even where taskset or a container allows others only. It asks when a thread makes its pool, at its first
# parallel loop.
os.environ.setdefault("TVM_NUM_THREADS", str(machine.available_cores()))
os.environ.setdefault("TVM_BIND_THREADS", "0")


@dataclass(frozen=True)
class BenchReport:
    """Latencies of single inferences in milliseconds, their machine, and the throughput in inferences per second."""

    name: str
    machine: dict[str, Any]
    threads: int
    warmup_ms: float
    times_ms: tuple[float, ...]

    def __repr__(self) -> str:
        return f"<BenchReport of {self.name}: {self.median_ms:.3f} ms, median of {len(self.times_ms)}>"

    def _percentile(self, p: float) -> float:
        return float(np.percentile(self.times_ms, p))

    @property
    def median_ms(self) -> float:
        """The median latency."""
        return self._percentile(50)

    @property
    def throughput(self) -> float:
        """Inferences per second, one after the other."""
        return 1000 * len(self.times_ms) / sum(self.times_ms)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        latency = {
            "min": min(self.times_ms),
            "median": self.median_ms,
            "mean": float(np.mean(self.times_ms)),
            **{f"p{p}": self._percentile(p) for p in (90, 95, 99)},
            "max": max(self.times_ms),
        }
        return {
            "name": self.name,
            "machine": self.machine,
            "threads": self.threads,
            "warmup_ms": self.warmup_ms,
            "iterations": len(self.times_ms),
            "latency_ms": {k: round(v, 4) for k, v in latency.items()},
            "throughput_per_s": round(self.throughput, 2),
        }


def measure(
    call: Callable[[], Any],
    name: str,
    *,
    warmup_ms: float = 200,
    duration: float = 3,
    iterations: int = 10,
    threads: int | None = None,
) -> BenchReport:
    """Time `call`: at least `warmup_ms` unmeasured, then at least `iterations` calls and `duration` seconds.

    threads: the size of TVM's thread pool (None: one per usable core), for this measurement only.
    Raises UsageError for numbers that make no sense.
    """
    count = checked_threads(warmup_ms, duration, iterations, threads)

    def loop(stop: threading.Event) -> tuple[float, ...]:
        end = time.perf_counter() + warmup_ms / 1000
        call()
        while time.perf_counter() < end and not stop.is_set():
            call()
        times: list[float] = []
        end = time.perf_counter() + duration
        while (len(times) < iterations or time.perf_counter() < end) and not stop.is_set():
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
        return tuple(times)

    return BenchReport(name, machine.describe(), count, warmup_ms, with_pool(count, loop))


def checked_threads(warmup_ms: float, duration: float, iterations: int, threads: int | None) -> int:
    """The number of threads that a measurement has (None: one per usable core).

    Raises UsageError for numbers that make no sense.
    """
    if not (0 <= warmup_ms < float("inf") and 0 <= duration < float("inf") and iterations >= 1):
        raise UsageError(
            "warm-up and duration must be finite and not negative, iterations at least 1",
            found=f"{warmup_ms}, {duration}, {iterations}",
        )
    if threads is not None and threads < 1:
        raise UsageError("the number of threads must be at least 1", found=str(threads))
    return threads or machine.available_cores()


def with_pool(threads: int, work: Callable[[threading.Event], T]) -> T:
    """What `work` returns in a new thread whose TVM thread pool has `threads` threads.

    Its argument is set when nobody waits for the result any more.
    """
    stop = threading.Event()
    # A pool belongs to the thread that first needs it and keeps its size: a new thread gets one of exactly `threads`.
    with ThreadPoolExecutor(1, initializer=make_pool, initargs=(threads,)) as thread:
        try:
            return thread.submit(work, stop).result()
        finally:
            stop.set()


_environment = threading.Lock()


def make_pool(threads: int) -> None:
    """Give the calling thread, which has no TVM thread pool yet, one of `threads` threads."""
    with _environment:
        before = os.environ.get("TVM_NUM_THREADS")
        os.environ["TVM_NUM_THREADS"] = str(threads)
        try:
            # Mode 1 prefers the big cores of a big-little machine; elsewhere all modes are alike.
            tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        finally:
            if before is None:
                del os.environ["TVM_NUM_THREADS"]
            else:
                os.environ["TVM_NUM_THREADS"] = before
