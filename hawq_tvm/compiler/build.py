"""TIR to an executable: the few Relax passes that turn `main` into virtual machine instructions, then LLVM, and nvcc
for GPUs.
"""

from __future__ import annotations

from operator import itemgetter

import tvm
from tvm import relax, te, tirx
from tvm.relax import vm_build
from tvm.s_tir import dlight

from hawq_tvm.core import stages
from hawq_tvm.core.threads import in_threads
from hawq_tvm.targets import gpu as cuda
from schedules.spelling.cuda_prelude import PRELUDE

from . import tir_pipeline
from .cuda import nvcc

TOGETHER = 4  # kernels of an LLVM module


@tvm.transform.module_pass(opt_level=0, name="KeepCalled")
def keep_called(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """Without the kernels that `main` does not call, because equal ones stand in for them, but with one at least: what
    holds no code is no library.

    Only now, so that no kernel of a float head or tail gets the name of a layer's.
    """
    kernels = set(stages.called_kernels(module))
    kept = {gv: f for gv, f in module.functions_items() if not isinstance(f, tirx.PrimFunc) or gv.name_hint in kernels}
    return tvm.IRModule(kept if kernels else {**kept, "nothing": _nothing()})


# Not TVM's default pipeline: nothing here fuses, folds or reorders, so the library calls exactly what was verified.
# LegalizeOps only meets the float operators of an allowed float head or tail.
LOWERING: tuple[tvm.transform.Pass, ...] = (
    relax.transform.LegalizeOps(),
    keep_called,
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
ON_GPU: tuple[tvm.transform.Pass, ...] = (
    LOWERING[0],
    dlight.ApplyDefaultSchedule(dlight.gpu.Fallback()),
    *LOWERING[1:],
)


def build(module: tvm.IRModule, target: tvm.target.Target) -> relax.VMExecutable:
    """The executable of a TIR-stage module for `target`; see `build_reported` for the errors."""
    return build_reported(module, target)[0]


def build_reported(module: tvm.IRModule, target: tvm.target.Target) -> tuple[relax.VMExecutable, list[nvcc.Usage]]:
    """The executable, and for a GPU the registers, spills and shared memory of every kernel.

    Raises UsageError when a GPU's code is wanted where nvcc is missing, PackageError when nvcc refuses a kernel.
    """
    if not cuda.is_cuda(target):
        return _for_cpu(module, target), []
    with nvcc.compiling(cuda.architectures(target), PRELUDE) as job, target:
        executable = relax.build(
            module,
            target=target,
            relax_pipeline=tvm.transform.Sequential(list(ON_GPU)),
            tir_pipeline="s_tir",
        )
        return executable, job.usage


def _for_cpu(module: tvm.IRModule, target: tvm.target.Target) -> relax.VMExecutable:
    """What `relax.build` does, with LLVM at work on several kernels at once.

    Which kernels share an LLVM module never depends on the machine: a library's bytes must not.
    """
    with target:
        module = tvm.transform.Sequential(list(LOWERING))(module)
    builder = relax.ExecBuilder()
    left = vm_build._vmcodegen(builder, module)
    functions = sorted(
        ((gv.name_hint, f) for gv, f in left.functions_items() if isinstance(f, tirx.PrimFunc)), key=itemgetter(0)
    )
    parts = [dict(functions[i : i + TOGETHER]) for i in range(0, len(functions), TOGETHER)]

    def compiled(part: dict[str, tirx.PrimFunc]) -> tvm.runtime.Module:
        return tvm.tirx.build(tvm.IRModule(part), target=target, pipeline=tir_pipeline.CPU)

    library, *others = in_threads(compiled, parts)
    for other in others:
        library.import_module(other)
    return relax.VMExecutable(vm_build._ffi_api.VMLink(builder, target, library, [], {}))


def _nothing() -> tirx.PrimFunc:
    """A kernel that nobody calls."""
    copied = te.placeholder((1,), "int8", name="read")
    func = te.create_prim_func([copied, te.compute((1,), lambda i: copied[i], name="written")])
    return func.with_attr({"global_symbol": "nothing", "tirx.noalias": True, "tirx.is_scheduled": True})
