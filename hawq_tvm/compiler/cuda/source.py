"""CUDA source of scheduled PrimFuncs with what launches them, as TVM's host code would; neither nvcc nor a driver is
needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import split_host_device_mods

from hawq_tvm.core.errors import ScheduleError

from . import nvcc

DYNAMIC = "tirx.use_dyn_shared_memory"


@dataclass(frozen=True)
class Launch:
    """How one PrimFunc is launched.

    kernel: the name of its only kernel.  grid, block: x, y, z.  shared: bytes of dynamic shared memory of a block.
    arguments: for every argument of the kernel, the position of the PrimFunc's parameter whose data it points to.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    arguments: tuple[int, ...]


def kernels(
    functions: Mapping[str, tirx.PrimFunc], target: tvm.target.Target, prelude: str = ""
) -> tuple[str, dict[str, Launch]]:
    """One source with the kernels of PrimFuncs for a CUDA target, and every PrimFunc's launch, by name.

    prelude: source that goes before the kernels.
    Raises ScheduleError for a PrimFunc that is not one kernel over its parameters.
    """
    named = {
        n: f.with_attr({"global_symbol": n, "tirx.noalias": True, "tirx.is_scheduled": True})
        for n, f in functions.items()
    }
    module = tvm.tirx.transform.BindTarget(target)(tvm.IRModule(named))
    lower, _, finalize = tvm.tirx.get_tir_pipeline("s_tir")
    with target:
        host, devices = split_host_device_mods(lower(module))
        ((device_target, device),) = devices.items()
        code = nvcc.source(finalize()(device), device_target)
    launches = {n: _launch(n, [p.name for p in f.params], host[n]) for n, f in named.items()}
    return prelude + code, launches


def _launch(name: str, params: list[str], host: tirx.PrimFunc) -> Launch:
    """The only launch in a host function."""
    calls: list[Any] = []
    tvm_ffi.structural_walk(
        host.body,
        (tvm.ir.Call, lambda c: calls.append(c) if str(getattr(c.op, "name", "")) == "tirx.call_ffi_kernel" else None),
        order="pre",
    )
    if len(calls) != 1:
        raise ScheduleError("is not one kernel", where=name, expected="1 launch", found=str(len(calls)))
    call, places = calls[0], [str(p) for p in calls[0].attrs.launch_params]
    kernel, *arguments = call.args[: len(call.args) - len(places)]
    sizes = {p: int(v) for p, v in zip(places, call.args[len(call.args) - len(places) :], strict=True)}
    shared = sizes.pop(DYNAMIC, 0)
    names = [str(a.args[0].name) for a in arguments]
    odd = sorted(set(names) - set(params)) + sorted(
        p for p in sizes if p.split(".")[0] not in ("blockIdx", "threadIdx")
    )
    if odd:
        raise ScheduleError("its kernel is launched with more than its parameters", where=name, found=", ".join(odd))
    grid, block = (tuple(sizes.get(f"{kind}.{d}", 1) for d in "xyz") for kind in ("blockIdx", "threadIdx"))
    return Launch(str(kernel.value), grid, block, shared, tuple(params.index(n) for n in names))  # type: ignore[arg-type]
