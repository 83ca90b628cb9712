"""The ordered lists of rules, by kind of target."""

from __future__ import annotations

import tvm

from hawq_tvm.errors import UsageError
from hawq_tvm.target import architecture

from .arm_neon import Neon
from .cpu_contract import Contract
from .cpu_depthwise import Depthwise
from .cpu_elementwise import Elementwise
from .cpu_window import Window
from .cuda_depthwise import CudaDepthwise
from .cuda_elementwise import CudaElementwise
from .cuda_generic import CudaGeneric
from .cuda_mma import Mma
from .cuda_window import CudaWindow
from .generic import Generic
from .rule import Rule
from .x86_amx import Amx
from .x86_vnni import Vnni
from .x86_vnni_depthwise import VnniDepthwise

# Tried in order; a faster kernel for some CPU goes before the portable ones.
_PORTABLE: tuple[Rule, ...] = (Contract(), Window(), Elementwise(), Generic())
CPU_RULES: tuple[Rule, ...] = (VnniDepthwise(), Depthwise(), Amx(), Vnni(), *_PORTABLE)
ARM_RULES: tuple[Rule, ...] = (Depthwise(), Neon("i8mm"), Neon("dotprod"), Neon("neon"), *_PORTABLE)
CUDA_RULES: tuple[Rule, ...] = (CudaDepthwise(), Mma(), CudaWindow(), CudaElementwise(), CudaGeneric())


def rules_for(target: tvm.target.Target) -> tuple[Rule, ...]:
    """The rules for a target.

    Raises UsageError for a kind of target without rules.
    """
    if str(target.kind.name) == "llvm":
        return ARM_RULES if architecture(target) == "aarch64" else CPU_RULES
    if str(target.kind.name) == "cuda":
        return CUDA_RULES
    raise UsageError(
        "no kernels for this kind of target", where="--target", expected="an LLVM CPU target or a CUDA target",
        found=str(target.kind.name), remedy="compile for a CPU, for example --target host",
    )  # fmt: skip
