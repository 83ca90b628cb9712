"""From scheduled TIR to what LLVM compiles: TVM's passes for PrimFuncs, registers that stay registers, and short loops
that LLVM compiles wrongly.

TVM takes a buffer in scope "local" from the heap at run time, where LLVM must store whatever is written to it: sums
of a block when they are cleared, and again when they are complete. On the stack LLVM keeps them in registers.

A loop of fewer than 16 steps becomes vectors with a mask for the last of them, with AVX-512. Where that mask leaves one
lane, as for 5, 9 and 13 steps, and the lanes are narrowed to 8 or 16 bits on their way to memory, LLVM's back end for
x86 stores the whole 32 bits of the lane, over what lies behind it. Unrolled, such a loop has no mask.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline

from schedules.cpu.loops import nodes

CPU = "hawq_tvm.cpu"  # the pipeline's name, for `tvm.tirx.build` and `relax.build`
# LLVM masks loops of fewer steps; how many steps a nest inside of one may have that LLVM unrolls.
MASKED, INNER = 16, 128
NARROW = ("int8", "uint8", "int16", "uint16")


def _on_stack(buffer: tirx.AllocBuffer) -> tirx.AllocBuffer:
    if buffer.buffer.scope() != "local":
        return buffer
    return tirx.AllocBuffer(
        buffer.buffer, {**buffer.annotations, "disable_lower_builtin": tirx.const(1, "int32")}, buffer.span
    )


@tirx.transform.prim_func_pass(opt_level=0, name="KeepRegisters")
def keep_registers(func: tirx.PrimFunc, _module: tvm.IRModule, _context: tvm.transform.PassContext) -> tirx.PrimFunc:
    """Allocate buffers in scope "local" on the stack."""
    return tvm_ffi.structural_map(func, [(tirx.AllocBuffer, _on_stack)])


def _unrolled(loop: tirx.For) -> tirx.For:
    """A loop as it is, or to be unrolled where LLVM may mask its last step and narrow what it stores."""
    steps = loop.extent.value if isinstance(loop.extent, tirx.IntImm) else 0
    if loop.kind != tirx.ForKind.SERIAL or steps % 2 == 0 or not 1 < steps < MASKED or not _stores_narrow(loop.body):
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.UNROLLED, loop.body)


def _stores_narrow(body: tirx.Stmt) -> bool:
    """Whether a body, whose nests of loops are so short that LLVM may unroll them, stores a single number of 8 or 16
    bits that it has computed.
    """
    nests: dict[Any, int] = {}
    for loop in nodes(tirx.For, body):  # the inner ones first
        inside = max((nests[inner.loop_var] for inner in nodes(tirx.For, loop.body)), default=1)
        nests[loop.loop_var] = inside * (loop.extent.value if isinstance(loop.extent, tirx.IntImm) else INNER + 1)
    return max(nests.values(), default=1) <= INNER and any(
        str(store.buffer.dtype) in NARROW
        and not isinstance(store.value, tvm.ir.TensorLoad)
        and not any(isinstance(i, tirx.Ramp) for i in store.indices)
        for store in nodes(tirx.BufferStore, body)
    )


@tirx.transform.prim_func_pass(opt_level=0, name="UnrollMasked")
def unroll_masked(func: tirx.PrimFunc, _module: tvm.IRModule, _context: tvm.transform.PassContext) -> tirx.PrimFunc:
    """Mark the short loops that LLVM would compile wrongly, for UnrollLoop."""
    return tvm_ffi.structural_map(func, [(tirx.For, _unrolled)])


def _cpu() -> tuple[tvm.transform.Pass, object, object]:
    lower, host, device = default_s_tir_pipeline()
    passes = [lower, keep_registers, unroll_masked, tirx.transform.UnrollLoop()]
    return tvm.transform.Sequential(passes), host, device


tirx.compilation_pipeline.register_tir_pipeline(CPU, _cpu)
