"""Where the time of one inference goes: every kernel timed inside the real sequence.

The kernels' times come from inferences in which TVM's virtual machine hands each kernel call to an instrument, which makes
the call itself and times it: same order, same buffers, same thread pool. What the call costs when it is made from Python
(converting the arguments, reading the clock) is measured beside every kernel, by calling a function that does nothing with the same arguments,
and its median is subtracted. Inferences without an instrument alternate with these; their median is the latency. What an
inference without instrument takes longer than the kernels of its neighbour with one, in the median, is spent outside
kernels. The rest of the latency is disturbance: a program that takes the processor away for a moment lengthens one kernel of
many inferences, and so the latency, but no kernel's median. Between two kernels the instrument runs some
Python, which may push a little of the kernels' data out of the innermost cache; nothing corrects for that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from .. import instrument
from ..errors import PackageError, UsageError
from ..verify.compare import layer_calls
from . import machine
from .measure import checked_threads, with_pool
from .work import layer_products


@dataclass(frozen=True)
class KernelRow:
    """One kernel call: its median time in milliseconds and what it does in that time.

    layer: its name in the user's model.  order: its place in the network, from 0.  products: the multiplications of its
    conv2d and matmul, those with padding included.  bytes: its inputs, constants and outputs as the library holds
    them, each counted once.  share: of the latency of the whole inference.
    """

    layer: str
    function: str
    rule: str
    tile: str
    order: int
    median_ms: float
    products: int
    bytes: int
    share: float
    limit_tops: float | None = None

    @property
    def gop(self) -> float:
        """Billions of operations, a multiplication and its addition being two."""
        return 2 * self.products / 1e9

    @property
    def tops(self) -> float | None:
        """Trillions of operations per second; None for a kernel without products, or too short to be told from nothing."""
        return self.gop / self.median_ms if self.products and self.median_ms > 0 else None

    @property
    def share_of_limit(self) -> float | None:
        """The part of the limit that is reached; None without a limit or without products."""
        return self.tops / self.limit_tops if self.tops is not None and self.limit_tops else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "layer": self.layer, "function": self.function, "rule": self.rule, "tile": self.tile, "order": self.order,
            "median_ms": round(self.median_ms, 6), "share": round(self.share, 6), "products": self.products, "gop": self.gop,
            "tops": _rounded(self.tops), "share_of_limit": _rounded(self.share_of_limit), "bytes": self.bytes,
        }  # fmt: skip


@dataclass(frozen=True)
class ProfileReport:
    """The kernels in network order, the latency without an instrument (median, milliseconds), and the machine.

    outside_ms: what of the latency is spent outside kernels: the virtual machine, its memory, a float head or tail; noise and
    the Python between kernels can make it negative.  instrument_us: the median cost of the instrument per kernel call in microseconds, kept out of the kernels' times.
    limit_tops: the operations per second that the machine can reach at most, in trillions, where somebody said so.
    """

    name: str
    machine: dict[str, Any]
    threads: int
    warmup_ms: float
    iterations: int
    latency_ms: float
    outside_ms: float
    instrument_us: float
    rows: tuple[KernelRow, ...]
    limit_tops: float | None = None

    @property
    def by_time(self) -> list[KernelRow]:
        """The kernels, slowest first."""
        return sorted(self.rows, key=lambda r: (-r.median_ms, r.order))

    @property
    def kernels_ms(self) -> float:
        """The sum of the kernels' medians."""
        return sum(r.median_ms for r in self.rows)

    @property
    def disturbance_ms(self) -> float:
        """The latency less the kernels and what is outside: near 0 on a quiet machine."""
        return self.latency_ms - self.kernels_ms - self.outside_ms

    def parts(self) -> list[tuple[str, float, int]]:
        """What the latency is made of: (name, milliseconds, kernels), the rules first and the one with most time ahead."""
        rules = [(rule, ms, count) for rule, (count, ms) in self.rules().items()]
        return [*rules, ("outside kernels", self.outside_ms, 0), ("disturbance", self.disturbance_ms, 0)]

    @property
    def gop(self) -> float:
        """Billions of operations of one inference."""
        return sum(r.gop for r in self.rows)

    @property
    def tops(self) -> float:
        """Trillions of operations per second over the whole latency."""
        return self.gop / self.latency_ms

    def rules(self) -> dict[str, tuple[int, float]]:
        """The kernels and the milliseconds of every rule, the rule with most time first."""
        found: dict[str, tuple[int, float]] = {}
        for row in self.rows:
            count, ms = found.get(row.rule, (0, 0.0))
            found[row.rule] = (count + 1, ms + row.median_ms)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; kernels slowest first."""
        return {
            "name": self.name, "machine": self.machine, "threads": self.threads, "warmup_ms": self.warmup_ms,
            "iterations": self.iterations, "latency_ms": round(self.latency_ms, 6), "kernels_ms": round(self.kernels_ms, 6),
            "outside_kernels_ms": round(self.outside_ms, 6), "disturbance_ms": round(self.disturbance_ms, 6),
            "instrument_us": round(self.instrument_us, 4),
            "gop": self.gop, "tops": _rounded(self.tops), "limit_tops": self.limit_tops,
            "rules": {rule: {"kernels": n, "ms": round(ms, 6)} for rule, (n, ms) in self.rules().items()},
            "kernels": [r.to_dict() for r in self.by_time],
        }  # fmt: skip

    def overlay(self, model: Any = None) -> dict[str, Any]:
        """Node data for Google's Model Explorer: milliseconds by ONNX node name.

        A kernel computes several ONNX nodes; its time stands at the last of them, the kernel's layer name.  model: the ONNX
        model that was compiled (path, bytes or ModelProto). With it, kernels that have names of our own (a change of layout, a branch of a
        concat) count for the node that they were made for, and the data says for which graph it is; without it, they keep
        their names, which match no node, and Model Explorer lays the data over the graph it shows.
        Raises ModelError when the model cannot be read.
        """
        graph, nodes = _nodes(model) if model is not None else ("", {})
        times: dict[str, float] = {}
        for row in self.rows:
            node = _node_of(row.layer, nodes)
            times[node] = times.get(node, 0.0) + row.median_ms
        data = {
            "results": {node: {"value": round(ms, 6)} for node, ms in times.items()},
            "gradient": [{"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d7301f"}],
        }
        return {graph: data} if graph else data

    def svg(self) -> str:
        """A picture of where the time goes: one bar per kernel in network order."""
        from .picture import draw

        return draw(self)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _nodes(model: Any) -> tuple[str, dict[str, str]]:
    """The name of a model's graph, and its nodes by their own names and by those of their outputs."""
    from ..frontend.onnx.reader import read_model

    graph = read_model(model).graph
    outputs = {name: node.name for node in graph.node for name in node.output if name and node.name}
    return graph.name, outputs | {node.name: node.name for node in graph.node if node.name}


def _node_of(layer: str, nodes: Mapping[str, str]) -> str:
    """The node that a layer was made for: we name what we add after it, with a dot and a word; the layer when none is known."""
    name = layer
    while name not in nodes and "." in name:
        name = name.rpartition(".")[0]
    return nodes.get(name, layer)


def profile(
    vm: relax.VirtualMachine, graph: tvm.IRModule, kernels: Sequence[Mapping[str, Any]], call: Callable[[], Any], name: str, *,
    warmup_ms: float = 200, duration: float = 3, iterations: int = 10, threads: int | None = None, limit_tops: float | None = None,
    finish: Callable[[], None] | None = None,
) -> ProfileReport:  # fmt: skip
    """Time every kernel that `call`, one inference of `vm`, runs.

    graph: the PACKED module.  kernels: the compile report.  duration: of all timed inferences together, half of them with
    the instrument.  iterations: at least so many of each.  threads: the size of TVM's thread pool (None: one per usable core).
    finish: waits until the device has done what it was told, where kernels only start (a GPU); a kernel's time then has its launch in it.
    Raises UsageError for numbers that make no sense, PackageError when the library runs other kernels than the graph has.
    """
    count = checked_threads(warmup_ms, duration, iterations, threads)
    if limit_tops is not None and not 0 < limit_tops < float("inf"):
        raise UsageError("the limit must be a positive number of trillions of operations per second", found=str(limit_tops))
    calls = layer_calls(graph)
    stopwatch = _Stopwatch({b.value.op.name_hint for b in calls}, len(calls), finish or _nothing)
    latencies = with_pool(count, partial(_alternate, vm, call, stopwatch, warmup_ms, duration, iterations))
    latency = float(np.median(latencies))
    shape = (len(calls), len(latencies))  # a graph may have no kernels
    costs = np.median(np.array(stopwatch.costs, np.float64).reshape(shape), axis=1)
    taken = (np.array(stopwatch.times, np.float64).reshape(shape) - costs[:, None]) / 1e6
    times = np.median(taken, axis=1)
    # By pairs of neighbours: the two medians of a disturbed machine may lie on different humps.
    outside = float(np.median(np.array(latencies) - taken.sum(axis=0)))
    facts = {k["function"]: k for k in kernels}
    rows = []
    for i, binding in enumerate(calls):
        function = binding.value.op.name_hint
        rows.append(KernelRow(
            binding.var.name, function, facts[function]["rule"], facts[function]["tile"], i, float(times[i]),
            layer_products(graph[function]), stopwatch.bytes[i], float(times[i]) / latency, limit_tops,
        ))  # fmt: skip
    return ProfileReport(
        name, machine.describe(), count, warmup_ms, len(latencies), latency, outside, float(np.median(costs)) / 1e3 if calls else 0.0, tuple(rows), limit_tops
    )


def _nothing() -> None:
    """What there is to wait for after a kernel of the CPU."""


class _Stopwatch:
    """The instrument: it makes every kernel call itself, and keeps its nanoseconds and those of calling nothing."""

    def __init__(self, kernels: set[str], count: int, finish: Callable[[], None] = _nothing) -> None:
        self.kernels, self.count, self.finish = kernels, count, finish
        self.bytes = [0] * count
        self.nothing = tvm_ffi.get_global_func("testing.nop")
        self.forget()

    def forget(self) -> None:
        """Drop every time taken so far."""
        self.position = 0
        self.times: list[list[int]] = [[] for _ in range(self.count)]
        self.costs: list[list[int]] = [[] for _ in range(self.count)]

    def run(self, call: Callable[[], Any]) -> None:
        """One inference, with this as its instrument."""
        self.position = 0
        call()
        if self.position != self.count:
            raise PackageError(
                "the library runs other kernels than its graph has", expected=f"{self.count} kernel calls",
                found=str(self.position), remedy="compile it again",
            )  # fmt: skip

    def __call__(self, func: Callable[..., Any], symbol: str, before: bool, ret: Any, *args: Any) -> int:
        del ret
        if not before or symbol not in self.kernels:
            return 0
        i, self.position = self.position, self.position + 1
        if i >= self.count:
            return 0
        if not self.bytes[i]:
            self.bytes[i] = sum(a.numpy().nbytes for a in args)
        now, nothing, finish = time.perf_counter_ns, self.nothing, self.finish
        nothing(*args)  # so that the next two calls find the same things in the cache
        finish()
        start = now()
        nothing(*args)
        finish()
        middle = now()
        func(*args)
        finish()
        end = now()
        self.costs[i].append(middle - start)
        self.times[i].append(end - middle)
        return instrument.CALLED


def _alternate(
    vm: relax.VirtualMachine, call: Callable[[], Any], stopwatch: _Stopwatch, warmup_ms: float, duration: float, iterations: int,
    stop: threading.Event,
) -> list[float]:  # fmt: skip
    """Inferences without and with the instrument by turns, so that both meet the same machine; the latencies without, in ms."""
    latencies: list[float] = []

    def plain() -> None:
        start = time.perf_counter()
        call()
        latencies.append(1000 * (time.perf_counter() - start))

    def watched() -> None:
        with instrument.watched(vm, observer):
            stopwatch.run(call)

    def turn() -> None:
        # Each is first every other time: buffers that change places with every inference favour neither.
        for one in (plain, watched) if len(latencies) % 2 else (watched, plain):
            one()

    observer = tvm_ffi.convert(stopwatch)
    end = time.perf_counter() + warmup_ms / 1000
    turn()
    while time.perf_counter() < end and not stop.is_set():
        turn()
    latencies.clear()
    stopwatch.forget()
    end = time.perf_counter() + duration
    while (len(latencies) < iterations or time.perf_counter() < end) and not stop.is_set():
        turn()
    return latencies
