"""The candidates of one workload on the GPU: their data, their outputs compared, their times in turns. Part of an
exported run.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gpu import BROKEN_CONTEXT, OUT_OF_MEMORY, CannotRun, CudaError, Gpu
from mma_pack import pack

Array = np.ndarray[Any, Any]
ALIGNMENT = 256
GRAPH_SECONDS = 3e-4  # of a graph of launches, so that events measure kernels and not themselves
LAUNCHES = (3, 32)
WARM_UP, ROUNDS, FINAL, LEAST = 3, 15, 45, 5
FINALISTS = 3
POISON = 0xA5


def made(spec: dict[str, Any]) -> Array:
    """Random values of a spec: shape, dtype, seed, and bounds low and high, around `mean` with deviation `std` if it
    has these.
    """
    rng = np.random.Generator(np.random.PCG64(spec["seed"]))
    if spec["dtype"].startswith("float"):
        return rng.standard_normal(spec["shape"]).astype(spec["dtype"])
    if "std" in spec:
        drawn = np.rint(rng.standard_normal(spec["shape"]) * spec["std"] + spec["mean"])
        return np.clip(drawn, spec["low"], spec["high"]).astype(spec["dtype"])
    return rng.integers(spec["low"], spec["high"], spec["shape"], np.int64, endpoint=True).astype(spec["dtype"])


def aligned(nbytes: int) -> int:
    """Bytes from one copy of an array to the next."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def size(spec: dict[str, Any]) -> int:
    """The bytes of a spec's array."""
    return prod(spec["shape"]) * np.dtype(spec["dtype"]).itemsize


class Contest:
    """One workload's memory on the GPU and its candidates.

    wrong, failed: candidates by number, with what is wrong.
    """

    def __init__(
        self, gpu: Gpu, entry: dict[str, Any], cubins: dict[str, Path], constants: Any, known: dict[str, str]
    ) -> None:
        self.gpu, self.entry, self.constants = gpu, entry, constants
        self.candidates = entry["candidates"]
        self.failed: dict[int, str] = {int(i): why for i, why in known.items()}
        self.wrong: list[int] = []
        self.held: list[int] = []
        self.arrays: dict[str, int] = {}
        self.data: dict[str, Array] = {}
        self.modules = {
            s: gpu.made("cuModuleLoadData", cubins[s].read_bytes())
            for s in sorted({c["source"] for c in self.candidates})
            if s in cubins
        }
        self.functions: dict[int, int] = {}
        for i, c in enumerate(self.candidates):
            if c["source"] not in cubins:
                self.failed.setdefault(i, "nvcc refuses its source")
            elif i not in self.failed:
                self.attempt(
                    i,
                    lambda i=i, c=c: self.functions.__setitem__(
                        i, gpu.function(self.modules[c["source"]], c["kernel"], c["shared"])
                    ),
                )
        self.copies = 1
        self.events = (gpu.made("cuEventCreate", 0), gpu.made("cuEventCreate", 0))

    def attempt(self, candidate: int, action: Any) -> None:
        """Do something for a candidate; what fails for it alone is noted, what concerns all is raised."""
        try:
            action()
        except CudaError as e:
            if e.code in (*BROKEN_CONTEXT, OUT_OF_MEMORY):
                e.candidate = candidate
                raise
            self.failed[candidate] = str(e)

    def right(self) -> list[int]:
        """The candidates that are neither wrong nor failed."""
        return [i for i in range(len(self.candidates)) if i not in self.failed and i not in self.wrong]

    def close(self) -> None:
        """Give the memory back."""
        for address in self.held:
            self.gpu.call("cuMemFree_v2", address)
        for module in self.modules.values():
            self.gpu.call("cuModuleUnload", module)
        self.held, self.arrays, self.modules = [], {}, {}

    # -- data ---------------------------------------------------------------------------------------------------

    def hold(self, nbytes: int) -> int:
        """New memory, given back by `close`."""
        address = self.gpu.allocate(nbytes)
        self.held.append(address)
        return address

    def source(self, argument: dict[str, Any]) -> Array:
        """The array behind an input, weights or constant argument."""
        kind, what = argument["kind"], argument["what"]
        name = json.dumps([kind, what if kind != "weights" else None])
        if name not in self.data:
            spec = (
                self.entry["inputs"][what] if kind == "input" else self.entry["weights"] if kind == "weights" else None
            )
            self.data[name] = made(spec) if spec else self.constants[what]
        array = pack(self.data[name], **what) if kind == "weights" else self.data[name]
        if (array.nbytes, str(array.dtype)) != (size(argument), argument["dtype"]):
            raise CannotRun(f"the manifest contradicts itself: {argument} is {array.nbytes} bytes of {array.dtype}")
        return np.ascontiguousarray(array)

    def address(self, argument: dict[str, Any], copy: int) -> int:
        """Where copy number `copy` of an argument lies; constants, being small, have one."""
        name, kind, stride = json.dumps(argument, sort_keys=True), argument["kind"], aligned(size(argument))
        copies = 1 if kind == "constant" else self.copies
        if name not in self.arrays:
            self.arrays[name] = first = self.hold(copies * stride)
            if kind != "output":
                array = self.source(argument)
                self.gpu.call("cuMemcpyHtoD_v2", first, array.ctypes.data, array.nbytes)
                for i in range(1, copies):
                    self.gpu.call("cuMemcpyDtoD_v2", first + i * stride, first, array.nbytes)
        return self.arrays[name] + copy % copies * stride

    def drop(self) -> None:
        """Forget the arrays on the GPU, before there are more copies of each."""
        for address in self.held:
            self.gpu.call("cuMemFree_v2", address)
        self.held, self.arrays = [], {}

    # -- outputs ------------------------------------------------------------------------------------------------

    def launch(self, i: int, copy: int = 0) -> None:
        """Launch a candidate on one copy of the data."""
        c = self.candidates[i]
        self.gpu.launch(
            self.functions[i], c["grid"], c["block"], c["shared"], [self.address(a, copy) for a in c["arguments"]]
        )

    def result(self, i: int) -> list[bytes]:
        """A candidate's outputs."""
        places = [(self.address(a, 0), size(a)) for a in self.candidates[i]["arguments"] if a["kind"] == "output"]
        for address, nbytes in places:
            self.gpu.call("cuMemsetD8_v2", address, POISON, nbytes)
        self.launch(i)
        self.gpu.call("cuStreamSynchronize", self.gpu.stream)
        found = []
        for address, nbytes in places:
            host = np.empty(nbytes, np.uint8)
            self.gpu.call("cuMemcpyDtoH_v2", host.ctypes.data, address, nbytes)
            found.append(host.tobytes())
        return found

    def compare(self) -> bool:
        """Find the candidates whose outputs are not those of most, the cost model's among equals; False: the outputs
        tell nothing apart.
        """
        digests: dict[int, str] = {}
        varied = False
        for i in self.right():

            def note(i: int = i) -> None:
                nonlocal varied
                outputs = self.result(i)
                varied = varied or any(len(set(o[:65536])) > 1 for o in outputs)
                digests[i] = hashlib.sha256(b"".join(outputs)).hexdigest()

            self.attempt(i, note)
        votes = Counter(digests.values())  # the first candidate's come first among equals
        expected = votes.most_common(1)[0][0] if votes else ""
        self.wrong = [i for i, d in digests.items() if d != expected]
        return varied

    # -- times --------------------------------------------------------------------------------------------------

    def times(self, until: float) -> tuple[dict[int, float], dict[str, int]]:
        """The median seconds of one launch of every right candidate, and how they were measured; until:
        `time.monotonic` to be done by.
        """
        gpu, right = self.gpu, self.right()
        flushed = 2 * gpu.l2
        once = self.graphs(right[:1], 1)
        first = min(gpu.seconds(once[right[0]], lambda: None, self.events) for _ in range(WARM_UP))
        gpu.call("cuGraphExecDestroy", once[right[0]])
        launches = int(min(LAUNCHES[1], max(LAUNCHES[0], GRAPH_SECONDS / max(first, 1e-7))))
        self.drop()
        # Every launch of a graph finds its data where no launch has touched it, unless the memory is too small for so
        # many copies.
        each = {
            json.dumps(a, sort_keys=True): aligned(size(a))
            for i in right
            for a in self.candidates[i]["arguments"]
            if a["kind"] != "constant"
        }
        self.copies = max(1, min(launches, (gpu.free_bytes() // 2 - flushed) // sum(each.values())))
        scratch = self.hold(flushed)
        graphs = self.graphs(right, launches)

        def flush() -> None:
            gpu.call("cuMemsetD8Async", scratch, 0, flushed, gpu.stream)

        heats: dict[int, list[float]] = {i: [] for i in right}
        order = random.Random(0)

        def rounds(who: list[int], count: int, least: int) -> int:
            for number in range(count):
                if number >= least and time.monotonic() > until:
                    return number
                order.shuffle(who)
                for i in who:
                    heats[i].append(gpu.seconds(graphs[i], flush, self.events) / launches)
            return count

        rounds(list(right), WARM_UP, 1)
        heats = {i: [] for i in right}
        done = rounds(list(right), ROUNDS, LEAST)
        medians = {i: statistics.median(t) for i, t in heats.items()}
        finalists = sorted({*right[:1], *sorted(right, key=lambda i: medians[i])[:FINALISTS]})
        for i in finalists:
            heats[i] = []
        final = rounds(list(finalists), FINAL, LEAST)
        medians.update({i: statistics.median(heats[i]) for i in finalists})
        for graph in graphs.values():
            gpu.call("cuGraphExecDestroy", graph)
        return medians, {"launches": launches, "copies": self.copies, "rounds": done, "final_rounds": final}

    def graphs(self, who: list[int], launches: int) -> dict[int, int]:
        """For every candidate a graph of launches, each on the next copy of the data."""
        for i in who:  # what allocates and copies must not be in a capture
            for a in self.candidates[i]["arguments"]:
                self.address(a, 0)
        made = {}
        for i in who:
            self.gpu.begin_capture()
            for n in range(launches):
                self.launch(i, n % self.copies)
            made[i] = self.gpu.end_capture()
        return made
