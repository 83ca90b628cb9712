"""Disassembly of a built library: which machine instructions the integer kernels consist of.

Every function in the library is inspected, except what only the other exported functions (the border kernels, a
float tail) reach. So a reference that this file fails to see leads to more being inspected, never to less.
"""

from __future__ import annotations

import io
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

from hawq_tvm.core.errors import PackageError

# What counts as computing with floating point numbers: arithmetic, comparison, rounding and conversion. What does not,
# on purpose: moves, loads, shuffles, blends, broadcasts, masks and bitwise logic (movaps, shufps, vblendvps,
# vbroadcastss, vpermilps, unpcklps, xorps, vmovmskps, vtestps; fmov, fcsel on Arm), which compilers use on integer data
# because they carry bits unchanged. Each line is matched against the whole mnemonic.
_X86_FLOAT = (
    # SSE to AVX-512, FP16 and BF16: packed or scalar.
    r"v?(add|sub|mul|div|sqrt|rsqrt|rsqrt14|rsqrt28|rcp|rcp14|rcp28|max|min|minmax|round|rndscale|hadd|hsub|addsub|fixupimm|"
    r"getexp|getmant|range|reduce|scalef|exp2|fpclass|frcz)(ne)?(p?bf16|[ps][sdh])",
    r"v?cmp\w*[ps][sdh]",
    r"v?u?comi(s[sdh]|sbf16)",
    # Fused multiply-add in every operand order, complex FP16 included.
    r"v4?fn?m(add|sub|addsub|subadd)\d*(nepbf16|bf16|[ps][sdh])",
    r"vfc?(madd|mul)c[ps]h",
    # Dot products and tiles of floats.
    r"v?dpp[sd]|vdp(bf16|ph)ps|tdp(bf16|fp16|b?hf8|b?bf8)\w*|tcmm\w+",
    # Conversions; the narrowing moves of integers are called vpmov*.
    r"v?cvt\w+|vbcstne\w+",
    # x87 and 3DNow!, whole: their loads convert, and nobody moves integers with them.
    r"f(?!xsave|xrstor)\w+|pf\w+|pi2f[dw]",
)
_ARM_FLOAT = (r"f(?!mov$|csel$|cpy$|dup$)\w+", r"[su]cvtf\w*", r"bf(?!i$|m$|c$|xil$)\w+")
_FLOAT = {
    "x86_64": re.compile("|".join(f"(?:{p})$" for p in _X86_FLOAT)),
    "aarch64": re.compile("|".join(f"(?:{p})$" for p in _ARM_FLOAT)),
}

# What a kernel may refer to outside its library: memory functions that LLVM makes of loops, and TVM's runtime
# interface.
_ALLOWED_OUTSIDE = re.compile(
    r"(mem(set|cpy|move|cmp)|bcmp|bzero|TVM\w+|__TVM\w+|__tvm\w+|__cxa_finalize|__gmon_start__|_ITM_\w+)?$"
)

_PADDING = frozenset({"nop", "int3", "udf"})
_ADDRESS = re.compile(r"#?0x([0-9a-f]+)$")
_ARM_BRANCH = re.compile(r"b$|b\.|bl|br|cb|tb|ret")
_ARM_VECTOR = re.compile(r"\b[vqdshb](\d+)\b")
# Instructions whose first operand is no result; of the others it is one, and of loads of pairs the second is, too.
_ARM_WRITES_NOTHING = re.compile(rf"st|cmp|cmn|tst|ccm|prfm|nop|{_ARM_BRANCH.pattern}")
_PAGE_OFFSET = re.compile(r"^[xw]\d+, \[?(x\d+)(?:, #(0x[0-9a-f]+|\d+))?\]?$")


@dataclass(frozen=True)
class FloatInstruction:
    """A floating point instruction, or a call out of the library that could hide one, where none may be."""

    function: str
    address: int
    instruction: str


@dataclass(frozen=True)
class CodeReport:
    """What was inspected: functions, instructions, and the floating point instructions among them."""

    functions: int
    instructions: int
    offenders: tuple[FloatInstruction, ...]


def is_float_instruction(mnemonic: str, machine: str) -> bool:
    """Whether a mnemonic computes with floating point numbers; machine is "x86_64" or "aarch64"."""
    return _FLOAT[machine].match(mnemonic) is not None


def inspect_library(library: Path | bytes, kernels: Iterable[str]) -> CodeReport:
    """Disassemble the code of `kernels` in a shared library, helpers and bodies of parallel loops included.

    Raises PackageError when it is no ELF library for x86-64 or AArch64, a kernel's code is not in it, or a byte of
    it cannot be decoded.
    """
    data = library if isinstance(library, bytes) else library.read_bytes()
    where = "the library" if isinstance(library, bytes) else str(library)
    if not data.startswith(b"\x7fELF"):
        raise PackageError(
            "cannot be disassembled", where=where, expected="an ELF shared library", found=repr(data[:4])
        )
    try:
        image = _Image(ELFFile(io.BytesIO(data)), where)
    except ELFError as e:
        raise PackageError("cannot be read", where=where, expected="an ELF shared library", found=str(e)) from e
    return image.inspect([f"__tvm_ffi_{k}" for k in kernels])


@dataclass(frozen=True)
class _Instruction:
    """One decoded instruction; text writes it out."""

    at: int
    length: int
    mnemonic: str
    references: tuple[int, ...]
    is_jump: bool
    text: Callable[[], str]


@dataclass(frozen=True)
class _Line:
    """One instruction that refers to an address or must not be there; the others are only counted."""

    at: int
    references: tuple[int, ...]
    is_jump: bool
    offence: str


@dataclass(frozen=True)
class _Function:
    name: str
    start: int
    end: int
    exported: bool
    instructions: tuple[int, ...]
    lines: tuple[_Line, ...]


class _Image:
    """A library taken apart into functions: those with a symbol, and code between them that other code refers to.

    LLVM gives the bodies of parallel loops no symbol: their address is all that the thread pool is handed.
    """

    def __init__(self, elf: Any, where: str) -> None:
        machine = {"x64": "x86_64", "AArch64": "aarch64"}.get(elf.get_machine_arch())
        if machine is None:
            raise PackageError(
                "cannot be disassembled", where=where, expected="x86-64 or AArch64", found=elf.get_machine_arch()
            )
        if elf["e_type"] != "ET_DYN":
            raise PackageError(
                "cannot be disassembled before it is linked",
                where=where,
                expected="a shared library",
                found=str(elf["e_type"]),
            )
        self.machine, self.where = machine, where
        symtab = elf.get_section_by_name(".symtab")
        if symtab is None:
            raise PackageError(
                "has no symbol table", where=where, remedy="compile the package again and do not strip it"
            )
        executable = [s for s in elf.iter_sections() if int(s["sh_flags"]) & 4]  # SHF_EXECINSTR
        self.code = {int(s["sh_addr"]): s.data() for s in executable}
        self.stubs = [
            (int(s["sh_addr"]), int(s["sh_addr"] + s["sh_size"])) for s in executable if s.name.startswith(".plt")
        ]
        self.imports = _imports(elf)
        self.decode: Callable[[bytes, int], Iterator[_Instruction]] = (
            _decode_x86 if machine == "x86_64" else _decode_arm
        )
        named = {
            int(s["st_value"]): self._decoded(
                s.name, int(s["st_value"]), int(s["st_value"] + s["st_size"]), s["st_info"]["bind"] != "STB_LOCAL"
            )
            for s in symtab.iter_symbols()
            if s["st_info"]["type"] == "STT_FUNC" and s["st_size"] > 0
        }
        text = [(int(s["sh_addr"]), int(s["sh_addr"] + s["sh_size"])) for s in executable if s.name.startswith(".text")]
        gaps = [self._decoded(f"code at {a:#x}", a, b, False) for a, b in _gaps(text, list(named.values()))]
        self.functions = named | {f.start: f for f in _split(gaps, list(named.values()))}

    def inspect(self, entries: list[str]) -> CodeReport:
        by_name = {f.name: f.start for f in self.functions.values()}
        missing = [e for e in entries if e not in by_name]
        if missing:
            raise PackageError(
                "a kernel's code is missing",
                where=self.where,
                expected=f"function {missing[0]}",
                remedy="compile the package again",
            )
        kernels = self._reached([by_name[e] for e in entries])
        outside = self._reached([f.start for f in self.functions.values() if f.exported and f.name not in entries])
        inspected = [f for a, f in sorted(self.functions.items()) if a in kernels or a not in outside]
        offenders = [
            FloatInstruction(f.name, line.at, line.offence) for f in inspected for line in f.lines if line.offence
        ]
        return CodeReport(len(inspected), sum(len(f.instructions) for f in inspected), tuple(offenders))

    def _reached(self, roots: list[int]) -> set[int]:
        """The functions that code starting at `roots` refers to, directly or not."""
        seen: set[int] = set()
        pending = list(roots)
        while pending:
            address = pending.pop()
            if address not in seen:
                seen.add(address)
                pending += [r for line in self.functions[address].lines for r in line.references if r in self.functions]
        return seen

    def _decoded(self, name: str, start: int, end: int, exported: bool) -> _Function:
        code, decoded = self._bytes(start, end - start), 0
        instructions: list[int] = []
        lines: list[_Line] = []
        for i in self.decode(code, start):
            decoded = i.at + i.length - start
            if i.mnemonic in _PADDING:
                continue
            instructions.append(i.at)
            outward = [n for n in map(self._imported, i.references) if n is not None and not _ALLOWED_OUTSIDE.match(n)]
            offence = (
                i.text() + "".join(f"  ({n})" for n in outward)
                if outward or is_float_instruction(i.mnemonic, self.machine)
                else ""
            )
            if i.references or offence:
                lines.append(_Line(i.at, i.references, i.is_jump, offence))
        # Zeros at the end are padding, not code.
        if not code or any(code[decoded:]):
            raise PackageError(
                "contains bytes that are no known instruction",
                where=self.where,
                found=f"{name} at {start + decoded:#x}",
                remedy="install a newer disassembler (iced-x86, capstone)",
            )
        return _Function(name, start, end, exported, tuple(instructions), tuple(lines))

    def _bytes(self, address: int, size: int) -> bytes:
        for base, data in self.code.items():
            if base <= address < base + len(data):
                return data[address - base : address - base + size]
        return b""

    def _imported(self, address: int) -> str | None:
        """The outside name that a relocated slot, or a stub in .plt, stands for; None for an address inside the
        library.
        """
        if address in self.imports:
            return self.imports[address]
        if not any(base <= address < end for base, end in self.stubs):
            return None
        references = (r for i in self.decode(self._bytes(address, 32), address) for r in i.references)
        return next((self.imports[r] for r in references if r in self.imports), "a stub of unknown target")


def _imports(elf: Any) -> dict[int, str]:
    """The slots that the loader fills, by address, with the symbol that each will point to ("" for the library's
    own).
    """
    slots = {}
    for section in elf.iter_sections():
        if isinstance(section, RelocationSection):
            symbols = elf.get_section(section["sh_link"])
            for r in section.iter_relocations():
                slots[int(r["r_offset"])] = symbols.get_symbol(r["r_info_sym"]).name if r["r_info_sym"] else ""
    return slots


def _gaps(sections: list[tuple[int, int]], functions: list[_Function]) -> Iterator[tuple[int, int]]:
    """The ranges of code that no symbol covers."""
    for start, end in sections:
        at = start
        for f in sorted((f for f in functions if start <= f.start < end), key=lambda f: f.start):
            if f.start > at:
                yield at, f.start
            at = max(at, f.end)
        if at < end:
            yield at, end


def _split(gaps: list[_Function], named: list[_Function]) -> Iterator[_Function]:
    """Nameless code cut where calls, address computations, or jumps from elsewhere refer to: functions without a
    symbol.
    """
    callers: dict[int, str] = {}
    for f in [*named, *gaps]:
        for line in f.lines:
            for r in line.references:
                if not (line.is_jump and f.start <= r < f.end):
                    callers.setdefault(r, f.name)
    for gap in gaps:
        for start, end in pairwise([gap.start, *sorted(r for r in callers if gap.start < r < gap.end), gap.end]):
            inside = gap.instructions[bisect_left(gap.instructions, start) : bisect_left(gap.instructions, end)]
            first, last = (bisect_left(gap.lines, edge, key=lambda line: line.at) for edge in (start, end))
            if inside:
                name = f"{callers[start]} at {start:#x}" if start in callers else f"code at {start:#x}"
                yield _Function(name, start, end, False, inside, gap.lines[first:last])


@cache
def _iced() -> tuple[Any, dict[int, str]]:
    """The disassembler for x86-64, and the names of its mnemonics."""
    # Not capstone: its version 5 does not know AMX, AVX-VNNI and AVX512-FP16.
    try:
        import iced_x86 as iced
    except ImportError as e:
        raise PackageError("x86-64 code cannot be decoded on this machine", remedy="pip install iced-x86") from e
    return iced, {v: k.lower() for k, v in vars(iced.Mnemonic).items() if isinstance(v, int)}


def _decode_x86(code: bytes, start: int) -> Iterator[_Instruction]:
    """Refers to: targets of direct calls and jumps, and addresses relative to the instruction pointer."""
    iced, names = _iced()
    jumps = {iced.FlowControl.UNCONDITIONAL_BRANCH, iced.FlowControl.CONDITIONAL_BRANCH}
    branches = jumps | {iced.FlowControl.CALL}
    formatter = iced.Formatter(iced.FormatterSyntax.INTEL)
    for i in iced.Decoder(64, code, ip=start):
        if i.is_invalid:
            return
        if i.is_ip_rel_memory_operand:
            references: tuple[int, ...] = (i.ip_rel_memory_address,)
        elif i.flow_control in branches and i.op0_kind == iced.OpKind.NEAR_BRANCH64:
            references = (i.near_branch_target,)
        else:
            references = ()
        text = partial(formatter.format, i.copy())
        yield _Instruction(i.ip, i.len, names[i.mnemonic], references, i.flow_control in jumps, text)


def _decode_arm(code: bytes, start: int) -> Iterator[_Instruction]:
    """Refers to: targets of branches, and addresses made of a page (adrp) and an offset in it (add, ldr), until its
    register is written.
    """
    import capstone

    decoded = list(capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM).disasm_lite(code, start))
    targets = {
        int(m[1], 16) for *_, name, operands in decoded if _ARM_BRANCH.match(name) and (m := _ADDRESS.search(operands))
    }
    pages: dict[str, int] = {}
    constants: set[str] = set()
    for at, length, mnemonic, operands in decoded:
        references: tuple[int, ...] = ()
        if at in targets or _ARM_BRANCH.match(mnemonic):
            constants.clear()
        mnemonic = _constant_or_not(mnemonic, operands, constants)
        if mnemonic == "adrp":
            register, page = operands.split(", ")
            pages[register] = int(page.removeprefix("#"), 0)
        elif mnemonic in ("add", "ldr") and (m := _PAGE_OFFSET.match(operands)):
            references = (pages[m[1]] + int(m[2] or "0", 0),) if m[1] in pages else ()
        elif (mnemonic == "adr" or _ARM_BRANCH.match(mnemonic)) and (m := _ADDRESS.search(operands)):
            references = (int(m[1], 16),)
        if mnemonic != "adrp" and not _ARM_WRITES_NOTHING.match(mnemonic):
            for operand in operands.split(", ")[: 2 if mnemonic.startswith("ldp") else 1]:
                pages.pop(operand.replace("w", "x"), None)
        is_jump = mnemonic == "b" or mnemonic.startswith(("b.", "cb", "tb"))
        yield _Instruction(at, length, mnemonic, references, is_jump, partial(" ".join, (mnemonic, operands)))


def _constant_or_not(mnemonic: str, operands: str, constants: set[str]) -> str:
    """The mnemonic, but fneg as "fneg-constant" where its operand is a constant of the straight-line code before it.

    LLVM makes constants such as 2^31 in 64-bit lanes of two instructions: movi, and fneg to flip the highest bits.
    Nothing is computed at run time. constants: the vector registers that hold one, kept up to date.
    """
    if mnemonic == "fneg" and (m := _ARM_VECTOR.findall(operands)) and m[1:] and m[1] in constants:
        constants.add(m[0])
        return "fneg-constant"
    written = (
        operands.split("[")[0]
        if mnemonic.startswith("ld")
        else ""
        if mnemonic.startswith("st")
        else operands.split(",")[0]
    )
    registers = _ARM_VECTOR.findall(written)
    constants.difference_update(registers)
    if mnemonic in ("movi", "mvni"):
        constants.update(registers)
    return mnemonic
