"""TIR to an executable: the few Relax passes that turn `main` into virtual machine instructions, then LLVM, and nvcc for GPUs."""

from __future__ import annotations

import tvm
from tvm import relax, te, tirx
from tvm.s_tir import dlight

from schedules.cuda_prelude import PRELUDE

from . import tir_pipeline
from .cuda import nvcc
from .cuda import target as cuda

# Not TVM's default pipeline: nothing here fuses, folds or reorders, so the library calls exactly what was verified.
# LegalizeOps only meets the float operators of an allowed float head or tail.
LOWERING: tuple[tvm.transform.Pass, ...] = (
    relax.transform.LegalizeOps(),
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    relax.transform.StaticPlanBlockMemory(),
    relax.transform.LowerAllocTensor(),
    relax.transform.KillAfterLastUse(),
    relax.transform.LowerRuntimeBuiltin(),
    relax.transform.ComputePrimValue(),
    relax.transform.VMShapeLower(),
    relax.transform.AttachGlobalSymbol(),
)


# The kernels of a float head or tail have no schedule of ours, and a GPU runs none without one.
ON_GPU: tuple[tvm.transform.Pass, ...] = (LOWERING[0], dlight.ApplyDefaultSchedule(dlight.gpu.Fallback()), *LOWERING[1:])


def build(module: tvm.IRModule, target: tvm.target.Target, exec_mode: str = "bytecode") -> relax.VMExecutable:
    """The executable of a TIR-stage module for `target`; see `build_reported` for the errors.

    exec_mode: "bytecode", or "compiled" for a `main` in machine code.
    """
    return build_reported(module, target, exec_mode)[0]


def build_reported(module: tvm.IRModule, target: tvm.target.Target, exec_mode: str = "bytecode") -> tuple[relax.VMExecutable, list[nvcc.Usage]]:
    """The executable, and for a GPU the registers, spills and shared memory of every kernel.

    Raises UsageError when a GPU's code is wanted where nvcc is missing, PackageError when nvcc refuses a kernel.
    """
    if not cuda.is_cuda(target):
        return _build(module, target, LOWERING, tir_pipeline.CPU, exec_mode), []
    with nvcc.compiling(cuda.architectures(target), PRELUDE) as job, target:
        return _build(module, target, ON_GPU, "s_tir", exec_mode), job.usage


def _build(module: tvm.IRModule, target: tvm.target.Target, passes: tuple[tvm.transform.Pass, ...], tir: str, exec_mode: str) -> relax.VMExecutable:
    if not any(isinstance(f, tirx.PrimFunc) for _, f in module.functions_items()):
        # Inputs or constants alone are returned; but what holds no code is no library.
        module = tvm.IRModule({**dict(module.functions_items()), "nothing": _nothing()})
    return relax.build(
        module, target=target, relax_pipeline=tvm.transform.Sequential(list(passes)), tir_pipeline=tir, exec_mode=exec_mode,
    )  # fmt: skip


def _nothing() -> tirx.PrimFunc:
    """A kernel that nobody calls."""
    copied = te.placeholder((1,), "int8", name="read")
    func = te.create_prim_func([copied, te.compute((1,), lambda i: copied[i], name="written")])
    return func.with_attr({"global_symbol": "nothing", "tirx.noalias": True, "tirx.is_scheduled": True})
