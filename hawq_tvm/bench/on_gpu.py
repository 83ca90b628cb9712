"""A package's times on a GPU: events of the driver, every kernel launched and the whole as one graph, inputs rotated past the second-level cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray

from deploy.gpu_runner import driver, peers, timing
from deploy.gpu_runner.refusal import Refusal

from ..cuda import device as gpu
from ..errors import PackageError
from ..package import Package
from . import machine
from .measure import checked_threads

Array = NDArray[Any]


class _Machine:
    """A package as `deploy.gpu_runner.timing` sees a library."""

    ffi = tvm_ffi

    def __init__(self, package: Package) -> None:
        self.main = package.vm["main"]
        self.device = tvm.cuda(0)

    def tensor(self, array: Array) -> tvm.runtime.Tensor:
        return tvm.runtime.tensor(np.asarray(array, order="C"), self.device)

    @staticmethod
    def numpy(tensor: tvm.runtime.Tensor) -> Array:
        array: Array = tensor.numpy()
        return array


def alone(
    package: Package, inputs: Mapping[str, Array] | None = None, *, warmup_ms: float = 200, duration: float = 3, iterations: int = 10, threads: int | None = None
) -> dict[str, Any]:
    """The times of a package on the first GPU, JSON-ready; latency_ms is the graph's, or where there is none the launched kernels'.

    inputs: None rotates random ones.  duration: seconds of timed launches of each way.  threads: means nothing here.
    Raises PackageError when this machine cannot run it, UsageError for numbers that make no sense.
    """
    checked_threads(warmup_ms, duration, iterations, threads)
    with gpu.one_sentence(package.name):
        ours = _Machine(package)  # a machine that cannot run it says so here
        try:
            cuda = driver.Driver()
            stream = cuda.stream()
            names = [i.name for i in package.inputs]
            first = package.random_inputs(1, 0)[0] if inputs is None else package.prepare(inputs)
            count = timing.rotation(sum(a.nbytes for a in first.values()), cuda.gpu.l2)
            given = [first] if inputs is not None else [first, *package.random_inputs(count - 1, 1)]
            fields = timing.ours(ours, [[one[n] for n in names] for one in given], stream, duration, warmup_ms / 1000, iterations)
        except Refusal as e:
            raise PackageError("cannot be timed", where=package.name, found=str(e), remedy="see what nvidia-smi says") from e
        try:
            limits: dict[str, Any] | None = peers.limits(stream)
        except Refusal as e:
            limits = {"int8_tops": None, "why": str(e)}
    best = fields["graph"] or fields["launched"]
    products = package.products
    tops = 2e-9 * products / best["median_ms"]
    limit = limits.get("int8_tops") if limits else None
    return {
        "name": package.name, "machine": {**machine.describe(), **driver.describe(cuda.gpu)}, "warmup_ms": warmup_ms, **fields,
        "iterations": best["iterations"], "latency_ms": {k.removesuffix("_ms"): best[k] for k in ("min_ms", "p10_ms", "median_ms", "p90_ms")},
        "throughput_per_s": round(1000 / best["median_ms"], 2), "products": products, "tops": round(tops, 5),
        "share_of_limit": None if not limit else round(tops / limit, 4), "limits": limits,
    }  # fmt: skip
