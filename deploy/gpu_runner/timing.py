"""One way to time everything on a GPU: events around launches that are queued ahead, inputs rotated past the second-level cache.

A chunk of launches is put into a stream before the first is waited for, with an event between any two: so the GPU's time is measured, and the
CPU's share only where the CPU is slower than the GPU (which is the case of short networks launched kernel by kernel; a graph has one launch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from math import ceil
from typing import Any

import numpy as np

from .driver import Graph, Stream, closing
from .noise import image
from .refusal import FAILURES, sentence

CHUNK = 64  # launches queued at once
MOST_INPUTS = 128
BEYOND = 1.2  # rotated inputs take so many times the second-level cache
REPEATS = 20  # of one kernel in a graph
SKIP = 1  # an instrument's answer: it made the call itself


def statistics(times: list[float]) -> dict[str, Any]:
    """Milliseconds: the median, the percentiles 10 and 90, the least; and how many there were."""
    p10, median, p90 = (round(float(np.percentile(times, p)), 5) for p in (10, 50, 90))
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "min_ms": round(min(times), 5), "iterations": len(times)}


def measure(stream: Stream, launches: list[Callable[[], Any]], seconds: float = 1.0, warmup: float = 0.3, least: int = 20, most: int = 4000) -> dict[str, Any]:
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


def rotation(shape: tuple[int, ...], itemsize: int, l2: int) -> int:
    """How many inputs are rotated: enough to overrun the second-level cache, at least two and at most MOST_INPUTS."""
    return min(MOST_INPUTS, max(2, ceil(BEYOND * l2 / (int(np.prod(shape)) * itemsize))))


def ours(machine: Any, entry: Mapping[str, Any], stream: Stream, l2: int, seconds: float = 1.0) -> dict[str, Any]:
    """The times of a library: kernel by kernel as the virtual machine launches them, and as one graph.

    {"launched": ..., "graph": ...} or, where the graph cannot be had, {"launched": ..., "graph": None, "graph_error": why}.
    """
    shape = tuple(entry["inputs"][0]["shape"])
    count = rotation(shape, 4, l2)
    arrays = [machine.tensor(image(1000 + i, shape)) for i in range(count)]
    with on(machine, stream):
        launched = measure(stream, [lambda a=a: machine.main(a) for a in arrays], seconds)
        fields: dict[str, Any] = {"launched": launched, "inputs_rotated": count, "bytes_rotated": count * int(np.prod(shape)) * 4}
        plain = machine.main(arrays[0])
        stream.wait()
        wanted = [machine.numpy(t) for t in plain]
        graphs: list[Graph] = []
        with closing(graphs):
            try:
                for a in arrays:
                    graphs.append(stream.captured(lambda a=a: machine.main(a)))
                fields["graph"] = measure(stream, [g.launch for g in graphs], seconds)
                graphs[0].launch()
                stream.wait()
                equal = all(np.array_equal(w, machine.numpy(t), equal_nan=w.dtype.kind == "f") for w, t in zip(wanted, graphs[0].kept, strict=True))
                fields["graph_equal"] = bool(equal)
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
        rows.append({"layer": layer["layer"], "us": micros, "products": layer["products"], **{k: layer[k] for k in ("rule", "tile", "matrix") if k in layer}})
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
