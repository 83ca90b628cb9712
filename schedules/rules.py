"""The ordered lists of rules, by kind of target."""

from __future__ import annotations

import tvm

from hawq_tvm.core.errors import UsageError
from hawq_tvm.targets.target import architecture
from schedules.cpu.arm_neon import Neon
from schedules.cpu.cpu_attention import CpuAttention
from schedules.cpu.cpu_contract import Contract
from schedules.cpu.cpu_depthwise import Depthwise
from schedules.cpu.cpu_elementwise import Elementwise
from schedules.cpu.cpu_rows import Rows
from schedules.cpu.cpu_window import Window
from schedules.cpu.generic import Generic
from schedules.cpu.x86_amx import Amx
from schedules.cpu.x86_vnni import Vnni
from schedules.cpu.x86_vnni_depthwise import VnniDepthwise
from schedules.gpu.cuda_depthwise import CudaDepthwise
from schedules.gpu.cuda_elementwise import CudaElementwise
from schedules.gpu.cuda_generic import CudaGeneric
from schedules.gpu.cuda_mma import Mma
from schedules.gpu.cuda_products import CudaProducts
from schedules.gpu.cuda_window import CudaWindow

from .rule import Rule

# Tried in order; a faster kernel for some CPU goes before the portable ones.
_PORTABLE: tuple[Rule, ...] = (Contract(), CpuAttention(), Window(), Rows(), Elementwise(), Generic())
CPU_RULES: tuple[Rule, ...] = (VnniDepthwise(), Depthwise(), Amx(), Vnni(), *_PORTABLE)
ARM_RULES: tuple[Rule, ...] = (Depthwise(), Neon("i8mm"), Neon("dotprod"), Neon("neon"), *_PORTABLE)
CUDA_RULES: tuple[Rule, ...] = (CudaDepthwise(), Mma(), CudaProducts(), CudaWindow(), CudaElementwise(), CudaGeneric())


def rules_for(target: tvm.target.Target) -> tuple[Rule, ...]:
    """The rules for a target.

    Raises UsageError for a kind of target without rules.
    """
    if str(target.kind.name) == "llvm":
        return ARM_RULES if architecture(target) == "aarch64" else CPU_RULES
    if str(target.kind.name) == "cuda":
        return CUDA_RULES
    raise UsageError(
        "no kernels for this kind of target",
        where="--target",
        expected="an LLVM CPU target or a CUDA target",
        found=str(target.kind.name),
        remedy="compile for a CPU, for example --target host",
    )
