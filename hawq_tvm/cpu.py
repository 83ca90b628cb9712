"""The processor of this machine: its instruction set extensions, and whether it runs a package. Needs no TVM where Linux tells them."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import PackageError

# LLVM's name of an instruction set extension -> the Linux kernel's (/proc/cpuinfo): all that LLVM may use in code that does not ask for them
# by name, and those that kernels ask for. What neither does (AES, locks, system instructions, hints for tuning) is left out: no code depends on it.
CPUINFO_NAMES = {
    "x86_64": {
        "sse3": "pni", "ssse3": "ssse3", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sse4a": "sse4a", "popcnt": "popcnt", "avx": "avx", "avx2": "avx2",
        "fma": "fma", "fma4": "fma4", "xop": "xop", "tbm": "tbm", "f16c": "f16c", "bmi": "bmi1", "bmi2": "bmi2", "lzcnt": "abm", "movbe": "movbe",
        "avxvnni": "avx_vnni",
        "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl",
        "avx512ifma": "avx512ifma", "avx512vbmi": "avx512vbmi", "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni",
        "avx512bitalg": "avx512_bitalg", "avx512vpopcntdq": "avx512_vpopcntdq", "avx512bf16": "avx512_bf16",
        "avx512fp16": "avx512_fp16", "gfni": "gfni", "vaes": "vaes", "vpclmulqdq": "vpclmulqdq", "amx-tile": "amx_tile",
        "amx-int8": "amx_int8", "amx-bf16": "amx_bf16",
        **dict.fromkeys(("egpr", "ndd", "ccmp", "nf", "zu", "ppx", "push2pop2"), "apx"),
    },
    "aarch64": {
        "neon": "asimd", "lse": "atomics", "fullfp16": "asimdhp", "rdm": "asimdrdm", "complxnum": "fcma", "rcpc": "lrcpc", "sha3": "sha3",
        "dotprod": "asimddp", "sve": "sve", "fp16fml": "asimdfhm", "sve2": "sve2", "i8mm": "i8mm", "bf16": "bf16", "cssc": "cssc",
        "sve2p1": "sve2p1", "mops": "mops", "faminmax": "faminmax",
    },
}  # fmt: skip
# Extensions that LLVM may use just so and that Linux has no word for: whether a processor has them cannot be asked, so no code has them.
UNREPORTED = frozenset({"avxifma", "avxvnniint8", "avxvnniint16", "avxneconvert", "avx10.1", "avx10.2"})

TILE_FEATURES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})  # registers that a process must ask for
CPUINFO = Path("/proc/cpuinfo")


def host_features() -> set[str]:
    """The instruction set extensions (LLVM's names) that this machine's kernel reports."""
    if CPUINFO.exists():
        return features_of(CPUINFO.read_text(errors="replace"), platform.machine())
    import tvm
    from tvm.target import codegen

    known = CPUINFO_NAMES.get(platform.machine(), {})
    return set(codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}))) & set(known)


def features_of(cpuinfo: str, architecture: str) -> set[str]:
    """The extensions (LLVM's names) that every processor of a /proc/cpuinfo has; none for an architecture that is not known."""
    lines = [line.partition(":") for line in cpuinfo.splitlines()]
    flags = [set(words.split()) for name, _, words in lines if name.strip() in ("flags", "Features")]
    everywhere = set.intersection(*flags) if flags else set()
    return {llvm for llvm, kernel in CPUINFO_NAMES.get(architecture, {}).items() if kernel in everywhere}


def permit_tiles() -> str | None:
    """Ask Linux for the tile registers of AMX, for this process and all its threads: None when granted, else a sentence."""
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); without it the first tile instruction kills the process.
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "only Linux on x86-64 grants the tile registers"
    if ctypes.CDLL(None, use_errno=True).syscall(158, 0x1023, 18) == 0:
        return None
    return f"Linux does not grant the tile registers ({os.strerror(ctypes.get_errno())})"


@dataclass(frozen=True)
class Refusal:
    """Why this machine does not run some code; the fields of an error, remedy where the machine itself can be mended."""

    message: str
    expected: str
    found: str
    remedy: str = ""


def prepare(architecture: str, features: Iterable[str]) -> Refusal | None:
    """Make this process, all its threads and the children that it forks ready to run code with these extensions: None, or why it cannot.

    Whoever calls a kernel calls this first: a processor's tile registers are there only for processes that have asked for them.
    """
    if architecture != platform.machine():
        return Refusal("was built for another architecture", platform.machine(), architecture)
    needed = set(features)
    missing = sorted(needed - host_features())
    if missing:
        return Refusal("needs CPU features that this machine lacks", "", f"missing {', '.join(missing)}")
    if TILE_FEATURES & needed and (refused := permit_tiles()) is not None:
        allow = "allow them (Linux 5.16 or newer, no seccomp filter on arch_prctl), or compile with --target host here"
        return Refusal("needs the tile registers of AMX", "", refused, allow)
    return None


def runs_here(features: list[str]) -> bool:
    """Whether this CPU has all of its architecture's features that code needs, and Linux grants them."""
    return prepare(platform.machine(), features) is None


def check_host(arch: str, features: list[str], where: str) -> None:
    """Prepare this process for a package's code.

    Raises PackageError for code of another architecture, and naming what is missing or not granted.
    """
    refused = prepare(arch, features)
    if refused is not None:
        foreign, lacking = "compile it for this machine; bench and run reach others with --rpc", "compile with --target host on this machine, or with --target x86-64-v3 for any recent x86-64"
        remedy = refused.remedy or (foreign if refused.expected else lacking)
        raise PackageError(refused.message, where=where, expected=refused.expected, found=refused.found, remedy=remedy)
