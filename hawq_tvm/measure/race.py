"""Several kernels of one layer timed in turns: what disturbs the machine meanwhile disturbs all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from hawq_tvm.compiler import tir_pipeline
from schedules.rule import Kernel

from .measure import with_pool

# Seconds per kernel and heat, and the rounds that they are made of. A final heat between the fastest decides.
HEAT, FINAL = 0.04, 0.12
ROUNDS = (7, 200)
FINALISTS = 3
# A kernel that is not faster than the first by so much is not faster: the next measurement may say the contrary.
MARGIN = 0.02


@dataclass(frozen=True)
class Result:
    """The kernel that won, its median and the first kernel's in microseconds, and the kernels that compute something
    else.
    """

    winner: int
    median_us: float
    first_us: float
    wrong: tuple[int, ...]


def race(
    kernels: Sequence[Kernel],
    inputs: Sequence[NDArray[Any]],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    target: tvm.target.Target,
    threads: int,
) -> Result:
    """The fastest of several kernels of one layer; the first is what it is unless another is clearly faster.

    outputs: shape and dtype of each.  A kernel whose outputs are not exactly the first's cannot win.
    """
    runs = _runs(kernels, inputs, outputs, target)
    return with_pool(threads, lambda stop: judge(runs, stop))


@dataclass(frozen=True)
class Contender:
    """One kernel with what it is fed with; outputs: shape and dtype of each."""

    kernel: Kernel
    inputs: Sequence[NDArray[Any]]
    outputs: Sequence[tuple[tuple[int, ...], str]]


def time_each(
    contenders: Sequence[Contender], target: tvm.target.Target, threads: int, seconds: float = FINAL
) -> list[float]:
    """The median microseconds of kernels that compute different things, called in turns for about `seconds` each."""
    runs = [_runs([c.kernel], c.inputs, c.outputs, target)[0] for c in contenders]

    def heat(stop: threading.Event) -> list[float]:
        for run in runs:
            run.call()
        medians = _heat(runs, range(len(runs)), seconds, stop)
        return [medians[i] for i in range(len(runs))]

    return with_pool(threads, heat)


@dataclass(frozen=True)
class Run:
    """One built kernel with its arguments.

    call: runs it.  results: what it writes.  time: runs it and tells the nanoseconds of one call, or of several.
    """

    call: Callable[[], Any]
    results: list[tvm.runtime.Tensor]
    time: Callable[[], list[float]]


def library(kernels: Sequence[Kernel], target: tvm.target.Target) -> tuple[tvm.runtime.Module, list[str]]:
    """The kernels in one library, and the name of each."""
    names = [f"kernel{i}" for i in range(len(kernels))]
    module = tvm.IRModule(
        {n: k.func.with_attr({"global_symbol": n, "tirx.noalias": True}) for n, k in zip(names, kernels, strict=True)}
    )
    return tvm.tirx.build(module, target=target, pipeline=tir_pipeline.CPU), names


def _runs(
    kernels: Sequence[Kernel],
    inputs: Sequence[NDArray[Any]],
    outputs: Sequence[tuple[tuple[int, ...], str]],
    target: tvm.target.Target,
) -> list[Run]:
    built, names = library(kernels, target)
    data = [tvm.runtime.tensor(x) for x in inputs]
    runs = []
    for name, kernel in zip(names, kernels, strict=True):
        results = [tvm.runtime.tensor(np.zeros(shape, dtype)) for shape, dtype in outputs]
        arguments = [*data, *(tvm.runtime.tensor(a) for a in kernel.arguments), *results]
        call = partial(built[name], *arguments)
        runs.append(Run(call, results, partial(_time_here, call)))
    return runs


def _time_here(call: Callable[[], Any]) -> list[float]:
    start = time.perf_counter_ns()
    call()
    return [time.perf_counter_ns() - start]


def judge(runs: Sequence[Run], stop: threading.Event) -> Result:
    """Compare what the kernels compute, then time them in turns; see `race`."""
    for run in runs:
        run.call()
    expected = [r.numpy() for r in runs[0].results]
    wrong = tuple(
        i
        for i, run in enumerate(runs)
        if any((r.numpy() != e).any() for r, e in zip(run.results, expected, strict=True))
    )
    right = [i for i in range(len(runs)) if i not in wrong]
    medians = _heat(runs, right, HEAT, stop)
    finalists = sorted({0, *sorted(right, key=lambda i: medians[i])[:FINALISTS]})
    medians = _heat(runs, finalists, FINAL, stop)
    fastest = min(finalists, key=lambda i: medians[i])
    winner = fastest if medians[fastest] < (1 - MARGIN) * medians[0] else 0
    return Result(winner, medians[winner], medians[0], wrong)


def _heat(runs: Sequence[Run], who: Sequence[int], seconds: float, stop: threading.Event) -> dict[int, float]:
    """The median microseconds of some kernels, in turns."""
    times: dict[int, list[float]] = {i: [] for i in who}
    least, most = ROUNDS
    end = time.perf_counter() + seconds * len(who)
    for rounds in range(most):
        if stop.is_set() or (rounds >= least and time.perf_counter() > end):
            break
        for i in who:
            times[i] += runs[i].time()
    return {i: float(np.median(t)) / 1e3 if t else float("inf") for i, t in times.items()}
