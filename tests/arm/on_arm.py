"""Kernels for Arm run by QEMU: a scheduled PrimFunc compiled for a target, linked with a C program that calls it
once.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import capstone
import numpy as np
import pytest
import tvm
from elftools.elf.elffile import ELFFile
from tvm import tirx

from hawq_tvm.compiler import tir_pipeline
from hawq_tvm.compiler.native import toolchain
from hawq_tvm.package import emulated
from hawq_tvm.targets import target
from hawq_tvm.verify.reference import evaluate
from schedules.layer import Layer
from schedules.rule import Kernel, choose
from schedules.rules import rules_for

from ..schedules.one_layer import Array, Body, layer_of, packed, zeros_for

ARCHITECTURE = "aarch64"
NEON, DOTPROD, I8MM = (target.parse(name) for name in ("arm-neon", "arm-dotprod", "arm-i8mm"))
TARGETS = {"arm-neon": NEON, "arm-dotprod": DOTPROD, "arm-i8mm": I8MM}
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}

MISSING = [p for p in (toolchain.CROSS[ARCHITECTURE][0], emulated.QEMU[ARCHITECTURE][0]) if shutil.which(p) is None]
needs_emulator = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@lru_cache
def _main() -> bytes:
    """The program's object code."""
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        out = Path(folder) / "main.o"
        source = str(Path(__file__).with_name("main.c"))
        toolchain.run(
            [*toolchain.compiler(ARCHITECTURE), *toolchain.options(ARCHITECTURE), "-c", source, "-o", str(out)],
            "the test program",
        )
        return out.read_bytes()


def built(func: tirx.PrimFunc, on: tvm.target.Target) -> tvm.runtime.Module:
    """A kernel's machine code."""
    return tvm.tirx.build(func.with_attr("global_symbol", "main"), target=on, pipeline=tir_pipeline.CPU)


def call(func: tirx.PrimFunc, on: tvm.target.Target, *arrays: Array) -> list[Array]:
    """The arrays after a call of the kernel by an emulated processor that has every extension."""
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        objects = [Path(folder) / name for name in ("kernel.o", "main.o")]
        built(func, on).write_to_file(str(objects[0]))
        objects[1].write_bytes(_main())
        program = Path(folder) / "program"
        toolchain.run(
            [*toolchain.compiler(ARCHITECTURE), "-static", *map(str, objects), "-o", str(program)], "the test program"
        )
        heads = [
            struct.pack(f"<3i{a.ndim}q", CODES[a.dtype.kind], 8 * a.itemsize, a.ndim, *a.shape) + a.tobytes()
            for a in arrays
        ]
        command = [*emulated.command(ARCHITECTURE, None, "the test"), str(program)]
        done = subprocess.run(
            command, input=struct.pack("<i", len(arrays)) + b"".join(heads), capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
    results, at = [], 0
    for a in arrays:
        results.append(np.frombuffer(done.stdout, a.dtype, a.size, at).reshape(a.shape))
        at += a.nbytes
    return results


def kernel_of(module: tvm.IRModule, on: tvm.target.Target, rule: str = "") -> tuple[Kernel, Layer]:
    """The kernel of a PACKED module of one layer, and the layer; rule: the name of the rule that must make it."""
    layer = layer_of(module)
    choice = choose(rules_for(on), layer, on)
    assert rule in ("", choice.rule.name), choice.sentence()
    return choice.rule.build(layer, on), layer


def run(module: tvm.IRModule, on: tvm.target.Target, *arrays: Array, rule: str = "") -> list[Array]:
    """The results of the kernel of a PACKED module of one layer."""
    kernel, layer = kernel_of(module, on, rule)
    results = zeros_for(layer)
    return call(kernel.func, on, *(np.asarray(a, order="C") for a in (*arrays, *kernel.arguments)), *results)[
        -len(results) :
    ]


def check(body: Body, on: tvm.target.Target, *arrays: Array, rule: str = "") -> None:
    """One layer's kernel gives what the reference says."""
    module = packed(body, [(a.shape, str(a.dtype)) for a in arrays])
    wanted = evaluate(module, {f"x{i}": a for i, a in enumerate(arrays)}).values()
    for found, expected in zip(run(module, on, *arrays, rule=rule), wanted, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


def assembly(module: tvm.IRModule, on: tvm.target.Target, rule: str = "") -> str:
    """The assembly of the kernel of a PACKED module of one layer."""
    return str(built(kernel_of(module, on, rule)[0].func, on).inspect_source("asm"))


PRODUCT = re.compile(r"(smlal2?|smull2?|[su]dot|usdot|sudot|u?s?u?mmla)\b")


@dataclass(frozen=True)
class InnerLoop:
    """What the innermost loop with the most products consists of; spills: loads and stores of the stack."""

    instructions: int
    vector: int
    products: int
    loads: int
    spills: int

    def __str__(self) -> str:
        of_vectors = f"{self.products} products of {self.vector} on vectors"
        return f"{self.instructions} instructions, {of_vectors}, {self.loads} vectors loaded, {self.spills} spilled"


def inner_loop(text: str) -> InnerLoop:
    """The innermost loop of some assembly that has the most products."""
    lines = [line.split("//")[0].strip().replace("\t", " ") for line in text.splitlines()]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L\w+):", line))}
    jumps = [
        (i, m[1]) for i, line in enumerate(lines) if (m := re.match(r"(?:b\.\w+|cbn?z|tbn?z|b) .*?(\.L\w+)$", line))
    ]
    loops = [(labels[label], end) for end, label in jumps if labels.get(label, end) < end]
    innermost = [lp for lp in loops if not any(o != lp and lp[0] <= o[0] and o[1] <= lp[1] for o in loops)]
    bodies = [
        [x for x in lines[a : b + 1] if x and not x.startswith(".") and not x.endswith(":")] for a, b in innermost
    ]
    body = max(bodies, key=lambda body: sum(bool(PRODUCT.match(x)) for x in body))
    vectors = [x for x in body if re.search(r"\b[vqd]\d+\b", x)]
    memory = [x for x in vectors if re.match(r"(ld|st)", x)]
    spills = [x for x in memory if "[sp" in x]
    loads = sum(2 if x.startswith("ldp") else 1 for x in memory if x.startswith("ld") and x not in spills)
    return InnerLoop(
        len(body), len(vectors) - len(memory), sum(bool(PRODUCT.match(x)) for x in body), loads, len(spills)
    )


def mnemonics(library: Path) -> set[str]:
    """The instructions in a library's code, without what compilers put between functions."""
    with library.open("rb") as file:
        text = ELFFile(file).get_section_by_name(".text")
        code, start = text.data(), int(text["sh_addr"])
    disassembler = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    disassembler.skipdata = True
    return {mnemonic for _, _, mnemonic, _ in disassembler.disasm_lite(code, start)}
