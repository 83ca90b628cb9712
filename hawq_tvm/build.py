"""TIR to an executable: the few Relax passes that turn `main` into virtual machine instructions, then LLVM."""

from __future__ import annotations

import tvm
from tvm import relax

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


def build(module: tvm.IRModule, target: tvm.target.Target, exec_mode: str = "bytecode") -> relax.VMExecutable:
    """The executable of a TIR-stage module for `target`.

    exec_mode: "bytecode", or "compiled" for a `main` in machine code.
    """
    return relax.build(
        module, target=target, relax_pipeline=tvm.transform.Sequential(list(LOWERING)), tir_pipeline="s_tir",
        exec_mode=exec_mode,
    )  # fmt: skip
