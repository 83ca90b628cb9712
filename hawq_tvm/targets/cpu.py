"""The processor of this machine: its instruction set extensions, and whether it runs a package. Needs no TVM where Linux tells them."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from hawq_tvm.core.errors import PackageError

# LLVM's name of an instruction set extension -> the Linux kernel's (/proc/cpuinfo). Tuning hints and system instructions
# that no compiled kernel uses are left out.
CPUINFO_NAMES = {
    "x86_64": {
        "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "popcnt": "popcnt", "avx": "avx", "avx2": "avx2",
        "fma": "fma", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2", "lzcnt": "abm", "movbe": "movbe", "avxvnni": "avx_vnni",
        "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
        "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni",
        "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq", "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16", "gfni": "gfni", "vaes": "vaes", "vpclmulqdq": "vpclmulqdq", "amx-tile": "amx_tile",
        "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
    },
    "aarch64": {
        "neon": "asimd", "lse": "atomics", "fullfp16": "asimdhp", "rdm": "asimdrdm", "complxnum": "fcma", "rcpc": "lrcpc", "sha3": "sha3",
        "dotprod": "asimddp", "sve": "sve", "fp16fml": "asimdfhm", "sve2": "sve2", "i8mm": "i8mm", "bf16": "bf16",
    },
}  # fmt: skip


TILE_FEATURES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})  # registers that a process must ask for


def host_features() -> set[str]:
    """The instruction set extensions (LLVM's names) that this machine's kernel reports."""
    known = CPUINFO_NAMES.get(platform.machine(), {})
    info = Path("/proc/cpuinfo")
    if not info.exists():
        import tvm
        from tvm.target import codegen

        return set(codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}))) & set(known)
    lines = info.read_text().splitlines()
    flags = {w for line in lines if line.startswith(("flags", "Features")) for w in line.partition(":")[2].split()}
    return {llvm for llvm, kernel in known.items() if kernel in flags}


def permit_tiles() -> str | None:
    """Ask Linux for the tile registers of AMX, for this process and all its threads: None when granted, else a sentence."""
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); without it the first tile instruction kills the process.
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "only Linux on x86-64 grants the tile registers"
    if ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0:
        return None
    return f"Linux does not grant the tile registers ({os.strerror(ctypes.get_errno())})"


def runs_here(features: list[str]) -> bool:
    """Whether this CPU has all of its architecture's features that code needs, and Linux grants them."""
    return set(features) <= host_features() and (not TILE_FEATURES & set(features) or permit_tiles() is None)


def check_host(arch: str, features: list[str], where: str) -> None:
    """Refuse code for another architecture, or for instructions that this CPU lacks or that the kernel does not grant.

    Asks for the tile registers when the code needs them.  Raises PackageError naming what is missing.
    """
    if arch != platform.machine():
        raise PackageError("was built for another architecture", where=where, expected=platform.machine(), found=arch, remedy="compile it for this machine; bench and run reach others with --rpc")
    missing = sorted(set(features) - host_features())
    if missing:
        raise PackageError(
            "needs CPU features that this machine lacks", where=where, found=f"missing {', '.join(missing)}",
            remedy="compile with --target host on this machine, or with --target x86-64-v3 for any recent x86-64",
        )  # fmt: skip
    if TILE_FEATURES & set(features) and (refused := permit_tiles()) is not None:
        raise PackageError(
            "needs the tile registers of AMX", where=where, found=refused,
            remedy="allow them (Linux 5.16 or newer, no seccomp filter on arch_prctl), or compile with --target host here",
        )  # fmt: skip
