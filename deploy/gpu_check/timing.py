"""One way to time everything on a GPU: events around launches that are queued ahead, inputs rotated past the
second-level cache.

A chunk of launches is put into a stream before the first is waited for, with an event between any two: so the GPU's
time is measured, and the CPU's share only where the CPU is slower than the GPU (which is the case of short networks
launched kernel by kernel; a graph has one launch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import ceil
from typing import Any

import numpy as np

from deploy.machine.driver import Graph, Stream, closing
from deploy.machine.refusal import FAILURES, sentence

from .noise import image

CHUNK = 64  # launches queued at once
MOST_INPUTS = 128
BEYOND = 1.2  # rotated inputs take so many times the second-level cache
REPEATS = 20  # of one kernel in a graph
SKIP = 1  # an instrument's answer: it made the call itself


def statistics(times: list[float]) -> dict[str, Any]:
    """Milliseconds: the median, the percentiles 10 and 90, the least; and how many there were."""
    p10, median, p90 = (round(float(np.percentile(times, p)), 5) for p in (10, 50, 90))
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "min_ms": round(min(times), 5), "iterations": len(times)}


def measure(
    stream: Stream,
    launches: Sequence[Callable[[], Any]],
    seconds: float = 1.0,
    warmup: float = 0.3,
    least: int = 20,
    most: int = 4000,
) -> dict[str, Any]:
    """Time launches in turns: `warmup` seconds unmeasured, then at least `least` and `seconds`, at most `most`."""
    chunk = max(1, min(CHUNK, most))

    def turns(begin: int) -> list[Callable[[], Any]]:
        return [launches[(begin + i) % len(launches)] for i in range(chunk)]

    done, end = 0, time.perf_counter() + warmup
    while done == 0 or time.perf_counter() < end:
        done += len(stream.milliseconds(turns(done)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < most and (len(times) < least or time.perf_counter() < end):
        times += stream.milliseconds(turns(done + len(times)))
    return statistics(times)


def rotation(size: int, l2: int) -> int:
    """How many inputs of `size` bytes are rotated: enough to overrun the second-level cache, at least two and at
    most MOST_INPUTS.
    """
    return min(MOST_INPUTS, max(2, ceil(BEYOND * l2 / size)))


def images(entry: Mapping[str, Any], l2: int) -> list[list[Any]]:
    """Inputs of an entry to be rotated: lists of arrays."""
    shape = tuple(entry["inputs"][0]["shape"])
    count = rotation(4 * int(np.prod(shape)), l2)
    return [[image(1000 + i, shape)] for i in range(count)]


def ours(
    machine: Any,
    inputs: Sequence[Sequence[Any]],
    stream: Stream,
    seconds: float = 1.0,
    warmup: float = 0.3,
    least: int = 20,
) -> dict[str, Any]:
    """The times of a library: kernel by kernel as the virtual machine launches them, and as one graph.

    inputs: arrays to be rotated.  The result: {"launched", "graph", "graph_equal"} or, where the graph cannot be
    had, {"launched", "graph": None, "graph_error": why}.  graph_equal: whether a graph gives the same bits as the
    kernels launched one by one.
    """
    tensors = [[machine.tensor(a) for a in arrays] for arrays in inputs]
    calls = [partial(machine.main, *t) for t in tensors]
    size = sum(a.nbytes for arrays in inputs for a in arrays)

    with on(machine, stream):
        fields: dict[str, Any] = {
            "inputs_rotated": len(inputs),
            "bytes_rotated": size,
            "launched": measure(stream, calls, seconds, warmup, least),
        }
        plain = machine.main(*tensors[0])
        stream.wait()
        wanted = [machine.numpy(t) for t in plain]
        graphs: list[Graph] = []
        with closing(graphs):
            try:
                for call in calls:
                    graphs.append(stream.captured(call))
                fields["graph"] = measure(stream, [g.launch for g in graphs], seconds, warmup, least)
                graphs[0].launch()
                stream.wait()
                found = [machine.numpy(t) for t in graphs[0].kept]
                fields["graph_equal"] = all(w.tobytes() == f.tobytes() for w, f in zip(wanted, found, strict=True))
            except FAILURES as e:
                fields |= {"graph": None, "graph_error": sentence(e)}
    return fields


def layers(machine: Any, entry: Mapping[str, Any], stream: Stream) -> list[dict[str, Any]]:
    """The time of every kernel alone, in microseconds: a graph of REPEATS launches of it inside a real inference."""
    known = {layer["kernel"] for layer in entry["layers"]}
    rows: list[dict[str, Any]] = []

    def observe(function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> int | None:
        del result
        if not before or symbol not in known or len(rows) >= len(entry["layers"]):
            return None
        layer = entry["layers"][len(rows)]
        function(*arguments)
        graph = stream.captured(lambda: [function(*arguments) for _ in range(REPEATS)])
        with closing([graph]):
            times = stream.milliseconds([graph.launch] * 8)[2:]
        micros = round(1000 * float(np.median(times)) / REPEATS, 3)
        rows.append(
            {
                "layer": layer["layer"],
                "us": micros,
                "products": layer["products"],
                **{k: layer[k] for k in ("rule", "tile", "matrix") if k in layer},
            }
        )
        return SKIP

    tensors = [machine.tensor(image(1, tuple(i["shape"]))) for i in entry["inputs"]]
    with on(machine, stream):
        machine.main(*tensors)
        stream.wait()
        machine.watch(observe, *tensors)
        stream.wait()
    return rows


def on(machine: Any, stream: Stream) -> AbstractContextManager[Any]:
    """While this lasts TVM's kernels go into a stream."""
    made: AbstractContextManager[Any] = machine.ffi.use_raw_stream(machine.device, stream.handle)
    return made
