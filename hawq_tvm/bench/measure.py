"""The one timing method: warm up, then time single calls until both a duration and a count are reached."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi

from ..errors import UsageError
from . import machine


@dataclass(frozen=True)
class BenchReport:
    """Latencies of single inferences in milliseconds, their machine, and the throughput in inferences per second."""

    name: str
    machine: dict[str, Any]
    threads: int
    warmup_ms: float
    times_ms: tuple[float, ...]

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
            "min": min(self.times_ms), "median": self.median_ms, "mean": float(np.mean(self.times_ms)),
            **{f"p{p}": self._percentile(p) for p in (90, 95, 99)}, "max": max(self.times_ms),
        }  # fmt: skip
        return {
            "name": self.name, "machine": self.machine, "threads": self.threads, "warmup_ms": self.warmup_ms,
            "iterations": len(self.times_ms), "latency_ms": {k: round(v, 4) for k, v in latency.items()},
            "throughput_per_s": round(self.throughput, 2),
        }  # fmt: skip


def set_threads(threads: int | None) -> int:
    """Give TVM's thread pool a number of threads (None: as many as there are cores); returns that number.

    Raises UsageError for a number below one.
    """
    if threads is not None and threads < 1:
        raise UsageError("the number of threads must be at least 1", found=str(threads))
    count = threads or machine.available_cores()
    # Mode 1 prefers the big cores of a big-little machine; elsewhere all modes are alike.
    tvm_ffi.get_global_func("runtime.config_threadpool")(1, count)
    return count


def measure(
    call: Callable[[], Any], name: str, *, warmup_ms: float = 200, duration: float = 3, iterations: int = 10, threads: int | None = None
) -> BenchReport:
    """Time `call`: at least `warmup_ms` unmeasured, then at least `iterations` calls and `duration` seconds.

    Raises UsageError for numbers that make no sense.
    """
    if warmup_ms < 0 or duration < 0 or iterations < 1:
        raise UsageError("warm-up and duration must not be negative, iterations at least 1", found=f"{warmup_ms}, {duration}, {iterations}")
    count = set_threads(threads)
    end = time.perf_counter() + warmup_ms / 1000
    call()
    while time.perf_counter() < end:
        call()
    times: list[float] = []
    end = time.perf_counter() + duration
    while len(times) < iterations or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return BenchReport(name, machine.describe(), count, warmup_ms, tuple(times))
