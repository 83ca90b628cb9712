"""From scheduled TIR to what LLVM compiles: TVM's passes for PrimFuncs, and registers that stay registers.

TVM takes a buffer in scope "local" from the heap at run time, where LLVM must store whatever is written to it: sums
of a block when they are cleared, and again when they are complete. On the stack LLVM keeps them in registers.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline

CPU = "hawq_tvm.cpu"  # the pipeline's name, for `tvm.tirx.build` and `relax.build`


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


def _cpu() -> tuple[tvm.transform.Pass, object, object]:
    lower, host, device = default_s_tir_pipeline()
    return tvm.transform.Sequential([lower, keep_registers]), host, device


tirx.compilation_pipeline.register_tir_pipeline(CPU, _cpu)
