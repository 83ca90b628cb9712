"""TIR to an executable: the few Relax passes that turn `main` into virtual machine instructions, then LLVM, and nvcc
for GPUs.
"""

from __future__ import annotations

import tempfile
import weakref
from concurrent.futures import Future
from operator import itemgetter
from pathlib import Path

import tvm
from tvm import relax, te, tirx
from tvm.relax import vm_build
from tvm.s_tir import dlight
from tvm.target import codegen

from hawq_tvm.core import stages
from hawq_tvm.core.threads import in_threads, started
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.targets.target import describe
from schedules.spelling.cuda_prelude import PRELUDE

from . import tir_pipeline
from .cache import Cache
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
    """What `relax.build` does, with LLVM at work on several kernels at once."""
    builder, parts = _parts(module, target)
    library, *others = in_threads(lambda part: _compiled(part, target), parts)
    for other in others:
        library.import_module(other)
    return relax.VMExecutable(vm_build._ffi_api.VMLink(builder, target, library, [], {}))


Part = dict[str, tirx.PrimFunc]


def _parts(module: tvm.IRModule, target: tvm.target.Target) -> tuple[relax.ExecBuilder, list[Part]]:
    """The instructions of `main`, and the kernels of each LLVM module.

    Which kernels share an LLVM module never depends on the machine: a library's bytes must not.
    """
    with target:
        module = tvm.transform.Sequential(list(LOWERING))(module)
    builder = relax.ExecBuilder()
    left = vm_build._vmcodegen(builder, module)
    functions = sorted(
        ((gv.name_hint, f) for gv, f in left.functions_items() if isinstance(f, tirx.PrimFunc)), key=itemgetter(0)
    )
    return builder, [dict(functions[i : i + TOGETHER]) for i in range(0, len(functions), TOGETHER)]


def _compiled(part: Part, target: tvm.target.Target) -> tvm.runtime.Module:
    return tvm.tirx.build(tvm.IRModule(part), target=tuned(target), pipeline=tir_pipeline.CPU)


def tuned(target: tvm.target.Target) -> tvm.target.Target:
    """A CPU's target as LLVM is to tune code for it, with the same instructions.

    Unless told that vpdpwssd is fast, LLVM takes it apart to shorten a chain: an instruction more for every 16 sums
    with a residual, of which there are many beside each other.
    """
    features = set(codegen.llvm_get_cpu_features(target))
    if not features & {"avx512vnni", "avxvnni"} or "fast-dpwssd" in features:
        return target
    fields = describe(target)
    return tvm.target.Target({**fields, "mattr": [*fields.get("mattr", []), "+fast-dpwssd"]})


class Objects:
    """The object files of a CPU's kernels, while threads compile them or find them in a cache.

    executable: what TVM's virtual machine is to know of `main`, without the kernels.
    """

    def __init__(self, module: tvm.IRModule, target: tvm.target.Target, cache: Cache) -> None:
        builder, parts = _parts(module, target)
        empty = _compiled({"nothing": _nothing()}, target)
        self.executable = relax.VMExecutable(vm_build._ffi_api.VMLink(builder, target, empty, [], {}))
        self._cache = cache
        sources = ["\n".join(tvm.ir.save_json(f) for f in part.values()) for part in parts]
        # The longest first, so that no thread is left alone with one at the end.
        order = sorted(range(len(parts)), key=lambda i: -len(sources[i]))
        futures = started(lambda i: _object(parts[i], sources[i], target, cache), order)
        self._futures = [futures[order.index(i)] for i in range(len(parts))]
        # Nor do threads go on when nobody waits any more: a proof failed meanwhile, or somebody interrupted it.
        self._cancel = weakref.finalize(self, _cancel, self._futures)

    def wait(self) -> list[bytes]:
        """The files, in the order of the kernels' names."""
        try:
            found = [f.result() for f in self._futures]
        finally:
            self._cancel()
        self._cache.prune()
        return found


def _object(part: Part, source: str, target: tvm.target.Target, cache: Cache) -> bytes:
    key = cache.key(source, target)
    found = cache.get(key)
    if found is None:
        with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
            path = Path(folder) / "kernels.o"
            _compiled(part, target).write_to_file(str(path), "o")
            found = path.read_bytes()
        cache.put(key, found)
    return found


def _cancel(futures: list[Future[bytes]]) -> None:
    for future in futures:
        future.cancel()


def _nothing() -> tirx.PrimFunc:
    """A kernel that nobody calls."""
    copied = te.placeholder((1,), "int8", name="read")
    func = te.create_prim_func([copied, te.compute((1,), lambda i: copied[i], name="written")])
    return func.with_attr({"global_symbol": "nothing", "tirx.noalias": True, "tirx.is_scheduled": True})
