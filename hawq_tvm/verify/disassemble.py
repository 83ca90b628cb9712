"""Disassembly of a built library: which machine instructions the integer kernels consist of.

A kernel's code is followed from its entry symbol: direct calls and jumps, and addresses taken relative to the instruction
pointer (that is how a parallel loop's body is handed to the thread pool).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import capstone
from elftools.elf.elffile import ELFFile

from ..errors import PackageError

# Floating point arithmetic, comparison and conversion on x86 (SSE, AVX, AVX-512, FMA, x87 alike, with or without the v
# prefix). Not here, on purpose: moves, shuffles, blends, broadcasts and bitwise logic (movaps, shufps, blendps, xorps ...),
# which compilers use on integer data because they only carry bits.
_X86_STEMS = (
    "add|sub|mul|div|sqrt|rsqrt|rsqrt14|rsqrt28|rcp|rcp14|rcp28|max|min|round|rndscale|cmp|cmpeq|cmplt|cmple|cmpunord|cmpneq|"
    "cmpnlt|cmpnle|cmpord|hadd|hsub|addsub|dp|fixupimm|getexp|getmant|range|reduce|scalef|exp2"
)
_X86_FLOAT = re.compile(
    rf"^v?({_X86_STEMS})[ps][sdh]$|^vf(n?m)(add|sub|addsub|subadd)\d*[ps][sdh]$|^v?u?comis[sdh]$|^v?cvt|^vdpbf16ps$|^tdp(bf16|fp16)ps$|"
    r"^vcmp\w*[ps][sdh]$|^f(add|sub|mul|div|sqrt|sin|cos|com|ucom|ist|ild|bld|bst|abs|chs|rnd|scale|xtract|prem|2xm1|yl2x|patan|ptan)"
)
# vcvt* includes vcvtdq2ps and friends; the integer narrowing moves are named vpmov*, so nothing integer is caught.
_ARM_FLOAT = re.compile(
    r"^f(add|sub|mul|div|sqrt|madd|msub|nmadd|nmsub|mla|mls|max|min|maxnm|minnm|abd|cmp|cmpe|ccmp|cmeq|cmge|cmgt|cmle|cmlt|rint|recp|rsqrt|cvt|neg|abs|"
    r"nmul|mulx|add[pv]|max[pv]|min[pv])|^[su]cvtf|^bf(dot|mmla|cvt)"
)


@dataclass(frozen=True)
class FloatInstruction:
    """A floating point instruction found where none may be."""

    function: str
    address: int
    instruction: str


@dataclass(frozen=True)
class CodeReport:
    """What was inspected: kernels, instructions, and the floating point instructions among them."""

    functions: int
    instructions: int
    offenders: tuple[FloatInstruction, ...]


def is_float_instruction(mnemonic: str, machine: str) -> bool:
    """Whether a mnemonic computes with floating point numbers; machine is "x86_64" or "aarch64"."""
    pattern = _X86_FLOAT if machine == "x86_64" else _ARM_FLOAT
    return pattern.match(mnemonic) is not None


def inspect_library(path: Path, kernels: Iterable[str]) -> CodeReport:
    """Disassemble every function reachable from the entry points of `kernels` in the shared library at `path`.

    Raises PackageError when the file is no ELF library for x86-64 or AArch64, or a kernel's code is not in it.
    """
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        image = _Image(elf, path)
    return image.inspect(list(kernels))


class _Image:
    def __init__(self, elf: Any, path: Path) -> None:
        machine = elf.get_machine_arch()
        names = {"x64": "x86_64", "AArch64": "aarch64"}
        if machine not in names:
            raise PackageError("cannot be disassembled", where=str(path), expected="x86-64 or AArch64", found=machine)
        self.machine, self.path = names[machine], path
        text, symtab = elf.get_section_by_name(".text"), elf.get_section_by_name(".symtab")
        if text is None or symtab is None:
            raise PackageError("has no code or no symbol table", where=str(path), remedy="compile the package again")
        self.base, self.code = int(text["sh_addr"]), text.data()
        self.names: dict[int, str] = {}
        self.addresses: dict[str, int] = {}
        for symbol in symtab.iter_symbols():
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_size"] > 0:
                self.names[int(symbol["st_value"])] = symbol.name
                self.addresses[symbol.name] = int(symbol["st_value"])
        mode = (capstone.CS_ARCH_X86, capstone.CS_MODE_64) if self.machine == "x86_64" else (capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
        self.disassembler = capstone.Cs(*mode)
        self.disassembler.skipdata = True  # padding between functions; inside one it is an error, see inspect
        self.starts = self._function_starts()

    def _function_starts(self) -> list[int]:
        """Where functions begin: symbols, and addresses that are called or taken (a parallel loop's body has no symbol)."""
        starts = set(self.names)
        end = self.base + len(self.code)
        for at, length, mnemonic, operands in self.disassembler.disasm_lite(self.code, self.base):
            if mnemonic in ("call", "lea", "bl", "adr", "adrp"):
                starts.update(t for t in self._targets(at + length, operands) if self.base <= t < end)
        return sorted(starts)

    def inspect(self, kernels: list[str]) -> CodeReport:
        pending: list[int] = []
        for kernel in kernels:
            entry = self.addresses.get(f"__tvm_ffi_{kernel}")
            if entry is None:
                raise PackageError("a kernel's code is missing", where=str(self.path), expected=f"function {kernel}", remedy="compile the package again")
            pending.append(entry)
        seen: set[int] = set()
        instructions, offenders = 0, []
        known = set(self.starts)
        while pending:
            start = pending.pop()
            if start in seen:
                continue
            seen.add(start)
            following = bisect.bisect_right(self.starts, start)
            end = self.starts[following] if following < len(self.starts) else self.base + len(self.code)
            name = self.names.get(start, f"function at {start:#x}")
            for at, length, mnemonic, operands in self.disassembler.disasm_lite(self.code[start - self.base : end - self.base], start):
                if mnemonic == ".byte":
                    raise PackageError(
                        "contains bytes that are no known instruction", where=str(self.path), found=f"{name} at {at:#x}",
                        remedy="install a newer capstone",
                    )  # fmt: skip
                instructions += 1
                if is_float_instruction(mnemonic, self.machine):
                    offenders.append(FloatInstruction(name, at, f"{mnemonic} {operands}".strip()))
                pending += [t for t in self._targets(at + length, operands) if t in known]
        return CodeReport(len(seen), instructions, tuple(offenders))

    def _targets(self, following: int, operands: str) -> list[int]:
        """Addresses an instruction refers to: absolute branch targets, and [rip + offset] on x86."""
        targets = [int(t, 16) for t in re.findall(r"(?<![\w+*-] )#?\b0x([0-9a-f]+)\b", operands)]
        for sign, offset in re.findall(r"\[rip ([+-]) (0x[0-9a-f]+|\d+)\]", operands):
            targets.append(following + int(offset, 0) * (1 if sign == "+" else -1))
        return targets
