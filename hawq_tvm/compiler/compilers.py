"""The compilers that a target needs beside TVM: whether they are here, and their versions."""

from __future__ import annotations

import tvm

from hawq_tvm.compiler.cuda import nvcc
from hawq_tvm.compiler.native import toolchain
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.targets.target import architecture


def check_compiler(target: tvm.target.Target) -> None:
    """Refuse a target that this machine cannot compile for.

    Raises UsageError when nvcc, which CUDA targets need, is missing or does not know an architecture, or when a
    CPU's C compiler is missing.
    """
    if cuda.is_cuda(target):
        nvcc.check(cuda.architectures(target))
    else:
        toolchain.compiler(architecture(target))


def compiler_versions(target: tvm.target.Target) -> dict[str, str]:
    """The versions of what compiles for `target`, beside TVM and its LLVM."""
    return {"cuda": nvcc.release(nvcc.find())} if cuda.is_cuda(target) else {}
