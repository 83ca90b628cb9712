"""What AMX kernels of ResNet-50's kinds of layers execute, counted: python -m tests.schedules.amx_counts [BATCH].

Tile instructions are counted as the emulator executes them, those of an epilogue in the code for AMX.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import iced_x86 as iced
import numpy as np
import tvm
from elftools.elf.elffile import ELFFile
from tvm import relax

from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops
from hawq_tvm.targets import target as targets
from schedules import rules
from schedules.cpu.amx_model import product
from schedules.cpu.generic import Generic
from schedules.cpu.x86_amx import Amx

from .one_layer import lower, packed
from .test_cpu_contract import HOST, Conv, accumulate, full, rng

AMX = targets.parse("x86-amx")


@dataclass(frozen=True)
class Counts:
    """Of one call of a kernel: products of tiles and the rows of data in them, loads and those whose rows cross cache
    lines, stores and those, loads of weights.
    """

    products: int
    rows: int
    loads: int
    crossing: int
    stores: int
    unaligned: int
    weights: int


def emulator(folder: Path) -> ctypes.CDLL:
    """The tile instructions as functions that kernels compiled in this process find."""
    library, source = folder / "emulator.so", Path(__file__).parent / "amx_emulator.cpp"
    subprocess.run(["g++", "-O3", "-shared", "-fPIC", "-o", library, source], check=True)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def counted(library: ctypes.CDLL, module: tvm.IRModule, arrays: Sequence[np.ndarray]) -> Counts:
    """What the kernel of a PACKED module's one layer executes."""
    with mock.patch.object(rules, "CPU_RULES", (Amx(emulated=True), Generic())):
        vm = relax.VirtualMachine(build.build(lower(module, HOST), HOST), tvm.cpu())
    taken = (ctypes.c_int64 * 7)()
    library.hawq_emulated_counts(taken)
    vm["main"](*(tvm.runtime.tensor(a) for a in arrays))
    library.hawq_emulated_counts(taken)
    return Counts(*taken)


def vector_instructions(module: tvm.IRModule, packs: int, folder: Path) -> float:
    """Those with registers of 512 bits that do not only load or store, for 16 results, where bytes are packed.

    packs: the instructions that pack 64 results.
    """
    build.build(lower(module, AMX), AMX).export_library(str(folder / "layer.so"))
    with (folder / "layer.so").open("rb") as f:
        code = ELFFile(f).get_section_by_name(".text").data()
    formatter = iced.Formatter(iced.FormatterSyntax.INTEL)
    found = packed = run = own = 0
    for instruction in iced.Decoder(64, code):
        text = formatter.format(instruction)
        if instruction.flow_control != iced.FlowControl.NEXT:
            found, packed, run, own = found + (run if own else 0), packed + own, 0, 0
        elif "zmm" in text and not text.startswith(("vmov", "vpbroadcast")):
            run, own = run + 1, own + text.startswith("vpackuswb")
    return found / (4 * packed / packs)


KINDS = {
    "7x7 stem, 3 to 64, 112x112": (Conv(1, 224, 224, 3, 64, (7, 7), (2, 2), pad=(3, 3, 3, 3)), False),
    "1x1 64 to 256 + residual, 56x56": (Conv(1, 56, 56, 64, 256, (1, 1)), True),
    "1x1 256 to 64, 56x56": (Conv(1, 56, 56, 256, 64, (1, 1)), False),
    "3x3 64, 56x56": (Conv(1, 56, 56, 64, 64, pad=(1, 1, 1, 1)), False),
    "3x3 256, 14x14": (Conv(1, 14, 14, 256, 256, pad=(1, 1, 1, 1)), False),
    "1x1 256 to 1024 + residual, 14x14": (Conv(1, 14, 14, 256, 1024, (1, 1)), True),
    "3x3 512, 7x7": (Conv(1, 7, 7, 512, 512, pad=(1, 1, 1, 1)), False),
    "1x1 2048 to 512, 7x7": (Conv(1, 7, 7, 2048, 512, (1, 1)), False),
    "1x1 512 to 2048 + residual, 7x7": (Conv(1, 7, 7, 512, 2048, (1, 1)), True),
}


def _layer(c: Conv, w: np.ndarray, emit: Callable[..., Any], p: relax.Expr, *others: relax.Expr) -> relax.Expr:
    """Sums rounded to bytes of (A9c), and with a residual by (A9d)."""
    to_bytes = {"qtype": arith.QType.of("uint8"), "rounding": "half_up"}
    m, shift = rng.integers(2**27, 2**31, (1, 1, 1, c.co)), rng.integers(33, 40, (1, 1, 1, c.co))
    sums = emit(accumulate(emit, c, p, relax.const(w), 0, "int32"))
    result = ops.requantize([sums], [m], 0, shift, zero_point=100, **to_bytes)
    for other in others:
        result = ops.requantize([emit(result), other], [2**29 + 77, 2**28 + 3], 5, 30, zero_point=7, **to_bytes)
    return result


def main() -> None:
    """Print a line of counts for every kind."""
    library = emulator(folder := Path(tempfile.mkdtemp()))
    library.hawq_emulated_failure.restype = ctypes.c_char_p
    print(
        "products, thousands of their cycles, loads for one, that cross lines, times weights are read, vectors for 16"
    )
    for name, (one, adds) in KINDS.items():
        c = replace(one, n=int(sys.argv[1]) if len(sys.argv) > 1 else 1)
        x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
        out = [(size + sum(c.pad[k::2]) - c.k[k]) // c.stride[k] + 1 for k, size in enumerate((c.h, c.w))]
        arrays = [x, full("uint8", c.n, *out, c.co)] if adds else [x]
        module = packed(partial(_layer, c, w), [(a.shape, str(a.dtype)) for a in arrays])
        n, vectors = counted(library, module, arrays), vector_instructions(module, len(arrays), folder)
        cycles, tiles = n.products * product(n.rows / n.products), w.size / 1024
        print(
            f"{name:34} {n.products:8} {cycles / 1e3:8.1f} {n.loads / n.products:5.2f} {n.crossing / n.loads:5.2f} "
            f"{n.weights / tiles:5.1f} {vectors:6.2f}"
        )


if __name__ == "__main__":
    main()
