"""Disassembly of the GPU code in a built library: which instructions the integer kernels consist of, on every architecture.

Every device function is inspected, except those of host functions that are no integer kernel (the border, a float tail). So a
function whose owner this file fails to see leads to more being inspected, never to less.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from .. import processes
from ..errors import PackageError
from .disassemble import FloatInstruction

# What counts as computing with floating point numbers: arithmetic, comparison, rounding, conversion, matrix products. Each is
# matched against the whole operation, the mnemonic up to its first dot. I2I and I2IP convert between integers.
_FLOAT = re.compile(
    r"U?F(ADD|MUL|FMA|CMP|CHK|MNMX|SET|SETP|SWZADD|SEL|RND|ABS|NEG)\d*(_?32I)?"
    r"|D(ADD|MUL|FMA|MNMX|SET|SETP|MMA)"
    r"|H(ADD|MUL|FMA|MNMX|SET|SETP|MMA|GMMA)\w*"
    r"|(BF|Q|O|HG|QG)\w*MMA\w*"
    r"|U?(F2F|F2I|F2IP|F2FP|I2F|I2FP|F2HP|H2I|I2H)\w*"
    r"|MUFU|RRO|FRND"
)
# nvcc loads constants with the half-precision unit too: -0 times 0 plus the constant is the constant, bit by bit.
_CONSTANT = re.compile(r"HFMA2(\.MMA)?(\.F32)? R\d+, -RZ, RZ, [^R]+$")
_INSTRUCTION = re.compile(r"^\s*/\*(?P<at>[0-9a-f]+)\*/\s+(?P<text>.*?)\s*;\s*/\* 0x")
_ARCH = re.compile(r"^arch = (sm_\d+)")
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_MAGIC = (0xBA55ED50).to_bytes(4, "little")


@dataclass(frozen=True)
class DeviceReport:
    """What was inspected: instructions by architecture, functions on all of them, and the floating point instructions among them."""

    functions: int
    instructions: dict[str, int]
    offenders: tuple[FloatInstruction, ...]


def is_float_instruction(text: str) -> bool:
    """Whether an instruction as the disassembler writes it, without its predicate, computes with floating point numbers."""
    return _FLOAT.fullmatch(re.split(r"[.\s]", text, maxsplit=1)[0]) is not None and _CONSTANT.match(text) is None


def inspect_device_code(library: Path | bytes, kernels: Iterable[str], architectures: Sequence[str]) -> DeviceReport:
    """Disassemble the GPU code of a library.

    kernels: the host functions whose device functions must all be integer.  architectures: for which there must be code, and no other.
    Raises PackageError when a tool is missing, the code cannot be read, is not for these architectures, or lacks a kernel.
    """
    data = library if isinstance(library, bytes) else library.read_bytes()
    where = "the library" if isinstance(library, bytes) else str(library)
    images = list(fat_binaries(data))
    found: dict[str, dict[str, list[tuple[int, str]]]] = {}
    for arch, function, at, text in (line for image in images for line in listing(image, where)):
        found.setdefault(arch, {}).setdefault(function, []).append((at, text))
    names = list(kernels)
    if set(found) != set(architectures) and (names or found):  # a graph without kernels needs no code
        raise PackageError(
            "holds GPU code for other architectures", where=where, expected=", ".join(architectures) or "none", found=", ".join(sorted(found)) or "none",
            remedy="compile the package again",
        )  # fmt: skip
    outside = host_functions(data) - set(names)
    for arch, functions in found.items():
        missing = [k for k in names if not _owned(functions, [k])]
        if missing:
            raise PackageError("a kernel's GPU code is missing", where=where, expected=f"{missing[0]} for {arch}", remedy="compile the package again")
    counts = dict.fromkeys(architectures, 0)
    offenders: list[FloatInstruction] = []
    inspected = 0
    for arch, functions in sorted(found.items()):
        excluded = _owned(functions, outside) - _owned(functions, names)
        for function in sorted(set(functions) - excluded):
            inspected += 1
            counts[arch] += len(functions[function])
            offenders += [FloatInstruction(f"{arch} {function}", at, text) for at, text in functions[function] if is_float_instruction(text)]
    return DeviceReport(inspected, counts, tuple(offenders))


def host_functions(data: bytes) -> set[str]:
    """The functions of a library that TVM's virtual machine can call."""
    table: Any = ELFFile(io.BytesIO(data)).get_section_by_name(".symtab")
    prefix = "__tvm_ffi_"
    return {s.name.removeprefix(prefix) for s in table.iter_symbols() if s.name.startswith(prefix)}


def _owned(functions: Iterable[str], owners: Iterable[str]) -> set[str]:
    """The device functions that TVM made of some host functions: it adds _kernel, and a number from the second on."""
    known = set(owners)
    return {f for f in functions if (m := re.fullmatch(r"(.+)_kernel(_\d+)?", f)) and m[1] in known}


def fat_binaries(data: bytes) -> Iterator[bytes]:
    """The containers of GPU code inside a library; each begins with a magic number, a version and its two sizes."""
    at = data.find(_MAGIC)
    while at >= 0:
        header = int.from_bytes(data[at + 6 : at + 8], "little")
        size = header + int.from_bytes(data[at + 8 : at + 16], "little")
        if header >= 16 and at + size <= len(data):
            yield data[at : at + size]
            at += size
        else:
            at += len(_MAGIC)
        at = data.find(_MAGIC, at)


def listing(image: bytes, where: str) -> Iterator[tuple[str, str, int, str]]:
    """(architecture, function, address, instruction without predicate) of everything in a container of GPU code.

    Raises PackageError when it cannot be disassembled, or holds code that is not the GPU's own.
    """
    return _parse(_disassembled(image, where))


def _disassembled(image: bytes, where: str) -> list[str]:
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        file = Path(folder) / "image.fatbin"
        file.write_bytes(image)
        # It calls nvdisasm by its name.
        done = subprocess.run([str(cuobjdump), "-sass", str(file)], capture_output=True, text=True, env={"PATH": str(nvdisasm.parent)})
    lines = done.stdout.splitlines()
    if done.returncode or "code for" not in done.stdout:
        raise PackageError("its GPU code cannot be disassembled", where=where, **processes.failure(done, "compile the package again"))
    if any(line.startswith("Fatbin ptx code") for line in lines):
        raise PackageError("holds GPU code that a driver would still have to compile", where=where, found="PTX", remedy="compile the package again")
    return lines


def tool(name: str) -> Path:
    """A program of the CUDA toolkit: from Python's packages, beside the interpreter's own programs, or from PATH.

    Raises PackageError naming the package to install.
    """
    spec = find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or () if spec else ())]
    packaged = [p for root in roots for p in sorted(root.glob(f"*/bin/{name}"))]
    beside = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    for path in [*packaged, *([Path(beside)] if beside else [])]:
        return path
    raise PackageError("GPU code cannot be certified without its disassembler", expected=name, remedy="pip install 'hawq-tvm[cuda]', or install the CUDA toolkit")


def _parse(lines: Iterable[str]) -> Iterator[tuple[str, str, int, str]]:
    """(architecture, function, address, instruction without predicate) of a listing."""
    arch = function = ""
    for line in lines:
        if m := _ARCH.match(line):
            arch, function = m[1], ""
        elif m := _FUNCTION.match(line):
            function = m[1]
        elif (m := _INSTRUCTION.match(line)) and function:
            yield arch, function, int(m["at"], 16), _PREDICATE.sub("", m["text"])
