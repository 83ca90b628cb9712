"""The kernels behind `limits`: many independent sums, so that an instruction's throughput and not its latency is
seen.
"""

# No postponed annotations here: TVMScript reads the buffer types from them, which mypy cannot.
# mypy: disable-error-code="valid-type"
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T

from hawq_tvm.compiler import tir_pipeline

Array = np.ndarray[Any, Any]

# Of the operands before they repeat: half of the smallest first-level cache, so that all of them stay there.
OPERAND_BYTES = 16 << 10
READ_LANES = 16  # int32 numbers of one read
READS = 8  # sums of one block, each its own chain of additions
BLOCK_BYTES = 4 * READ_LANES * READS


@dataclass(frozen=True)
class Kind:
    """One instruction: sums[p, v] += data[step, p] . weights[step, v], for `rows` p and `columns` v.

    name: mnemonic and bits of a vector.  features: what the CPU must have (LLVM's names).  intrinsic: LLVM's function.
    lanes: int32 sums of a vector.  data, weights: types of the operands.  depth: products per lane.
    rows x columns vectors of sums, and one row's and all columns' operands, fit into the register file, and are as many
    independent sums as hide the instruction's latency.
    """

    name: str
    features: tuple[str, ...]
    intrinsic: str
    lanes: int
    data: str
    weights: str
    depth: int
    rows: int
    columns: int

    @property
    def operand(self) -> int:
        """The bytes of one row's operand of a step, or of one column's."""
        return self.lanes * self.depth * np.dtype(self.data).itemsize

    @property
    def steps(self) -> int:
        """The steps before the operands repeat."""
        return OPERAND_BYTES // ((self.rows + self.columns) * self.operand)

    @property
    def products(self) -> int:
        """The multiplications of one repeat."""
        return self.steps * self.rows * self.columns * self.lanes * self.depth

    @property
    def sums(self) -> int:
        """The number of int32 sums."""
        return self.rows * self.columns * self.lanes

    def operands(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """Random data and weights, of 8 bits whatever their type."""
        size, unsigned = self.lanes * self.depth, self.data == "uint8"
        low, high = (0, 255) if unsigned else (-128, 127)
        data = rng.integers(low, high, (self.steps * self.rows * size,), endpoint=True).astype(self.data)
        return data, rng.integers(-128, 127, (self.steps * self.columns * size,), endpoint=True).astype(self.weights)

    def expected(self, data: Array, weights: Array, repeats: int) -> Array:
        """The sums in NumPy: what the kernel means."""
        shape = (self.lanes, self.depth)
        a = data.astype(np.int64).reshape(self.steps, self.rows, *shape)
        w = weights.astype(np.int64).reshape(self.steps, self.columns, *shape)
        return repeats * np.einsum("spld,svld->pvl", a, w).reshape(-1)

    def func(self) -> tirx.PrimFunc:
        """The kernel main(data, weights, sums, repeats)."""
        return _vectors(self)


@dataclass(frozen=True)
class TileKind(Kind):
    """AMX: `rows` x `columns` tiles of 16 x 16 sums; a step multiplies 16 x 64 data with 64 x 16 weights, four by
    four.
    """

    @property
    def operand(self) -> int:
        """The bytes of a tile."""
        return 1024

    @property
    def products(self) -> int:
        """The multiplications of one repeat."""
        return self.steps * self.rows * self.columns * 16 * 16 * 64

    @property
    def sums(self) -> int:
        """The number of int32 sums."""
        return self.rows * self.columns * 16 * 16

    def operands(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """Random data [step, row tile, 16, 64] and weights [step, column tile, 16, 16, 4], flat."""
        data = rng.integers(0, 255, (self.steps * self.rows * 1024,), endpoint=True).astype(np.uint8)
        return data, rng.integers(-128, 127, (self.steps * self.columns * 1024,), endpoint=True).astype(np.int8)

    def expected(self, data: Array, weights: Array, repeats: int) -> Array:
        """The sums in NumPy: what the kernel means."""
        a = data.astype(np.int64).reshape(self.steps, self.rows, 16, 16, 4)
        w = weights.astype(np.int64).reshape(self.steps, self.columns, 16, 16, 4)
        return repeats * np.einsum("spikd,svkjd->pvij", a, w).reshape(-1)

    def func(self) -> tirx.PrimFunc:
        """The kernel main(data, weights, sums, repeats)."""
        return _tiles(self)


_AVX512 = ("avx512f", "avx512bw")
KINDS: tuple[Kind, ...] = (
    TileKind("tdpbusd tiles", ("amx-tile", "amx-int8", "avx512f"), "", 16, "uint8", "int8", 4, 2, 2),
    Kind("vpdpbusd 512", (*_AVX512, "avx512vnni"), "llvm.x86.avx512.vpdpbusd.512", 16, "uint8", "int8", 4, 4, 3),
    Kind("vpdpbusd 256", ("avx2", "avxvnni"), "llvm.x86.avx512.vpdpbusd.256", 8, "uint8", "int8", 4, 6, 2),
    Kind("pmaddwd 512", _AVX512, "llvm.x86.avx512.pmaddw.d.512", 16, "int16", "int16", 2, 6, 4),
    Kind("pmaddwd 256", ("avx2",), "llvm.x86.avx2.pmadd.wd", 8, "int16", "int16", 2, 6, 2),
)


def _vectors(kind: Kind) -> tirx.PrimFunc:
    rows, columns, lanes, size = kind.rows, kind.columns, kind.lanes, kind.lanes * kind.depth
    count, vector, adds, steps = rows * columns, f"int32x{lanes}", kind.data == "uint8", kind.steps
    a_type, w_type, intrinsic = kind.data, kind.weights, kind.intrinsic

    def step(acc: Any, a: Any, w: Any) -> Any:
        """One instruction: vpdpbusd adds to its sums itself, pmaddwd only multiplies."""
        if adds:
            return tirx.call_llvm_pure_intrin(vector, intrinsic, acc, a, w)
        return acc + tirx.call_llvm_pure_intrin(vector, intrinsic, a, w)

    @T.prim_func
    def main(
        A: T.Buffer((steps * rows * size,), a_type),
        W: T.Buffer((steps * columns * size,), w_type),
        C: T.Buffer((count * lanes,), "int32"),
        repeats: T.int32,
    ) -> None:
        T.func_attr({"global_symbol": "main"})
        acc = T.alloc_buffer((count * lanes,), "int32", scope="local")
        for i in T.unroll(count):
            acc[T.ramp(i * lanes, 1, lanes)] = T.broadcast(0, lanes)
        for _r in T.serial(repeats):
            for s in T.serial(steps):
                for p in T.unroll(rows):
                    for v in T.unroll(columns):
                        acc[T.ramp((p * columns + v) * lanes, 1, lanes)] = step(
                            acc[T.ramp((p * columns + v) * lanes, 1, lanes)],
                            A[T.ramp((s * rows + p) * size, 1, size)],
                            W[T.ramp((s * columns + v) * size, 1, size)],
                        )
        for i in T.unroll(count):
            C[T.ramp(i * lanes, 1, lanes)] = acc[T.ramp(i * lanes, 1, lanes)]

    return main


def _tiles(kind: Kind) -> tirx.PrimFunc:
    rows, columns, steps = kind.rows, kind.columns, kind.steps
    count = rows * columns

    @T.prim_func
    def main(
        A: T.Buffer((steps * rows * 1024,), "uint8"),
        W: T.Buffer((steps * columns * 1024,), "int8"),
        C: T.Buffer((count * 256,), "int32"),
        repeats: T.int32,
    ) -> None:
        T.func_attr({"global_symbol": "main"})
        # Palette 1; eight tiles of 16 rows of 64 bytes: the sums, then the data, then the weights.
        config = T.alloc_buffer((64,), "uint8", scope="local")
        for i in T.serial(64):
            config[i] = T.uint8(0)
        config[0] = T.uint8(1)
        for t in T.serial(8):
            config[16 + 2 * t] = T.uint8(64)
            config[48 + t] = T.uint8(16)
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.ldtilecfg", config.access_ptr("r")))
        for i in T.unroll(count):
            T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilezero", T.Cast("int8", i)))
        for _r in T.serial(repeats):
            for s in T.serial(steps):
                for v in T.unroll(columns):
                    T.evaluate(
                        T.call_llvm_intrin(
                            "void",
                            "llvm.x86.tileloadd64",
                            T.Cast("int8", count + rows + v),
                            W.access_ptr("r", offset=(s * columns + v) * 1024),
                            T.int64(64),
                        )
                    )
                for p in T.unroll(rows):
                    T.evaluate(
                        T.call_llvm_intrin(
                            "void",
                            "llvm.x86.tileloadd64",
                            T.Cast("int8", count + p),
                            A.access_ptr("r", offset=(s * rows + p) * 1024),
                            T.int64(64),
                        )
                    )
                    for v in T.unroll(columns):
                        T.evaluate(
                            T.call_llvm_intrin(
                                "void",
                                "llvm.x86.tdpbusd",
                                T.Cast("int8", p * columns + v),
                                T.Cast("int8", count + p),
                                T.Cast("int8", count + rows + v),
                            )
                        )
        for i in T.unroll(count):
            T.evaluate(
                T.call_llvm_intrin(
                    "void", "llvm.x86.tilestored64", T.Cast("int8", i), C.access_ptr("w", offset=i * 256), T.int64(64)
                )
            )
        T.evaluate(T.call_llvm_intrin("void", "llvm.x86.tilerelease"))

    return main


def reader() -> tirx.PrimFunc:
    """The kernel main(buffer, sums, blocks, repeats): the buffer's sum, lane by lane and `repeats` times over."""

    @T.prim_func
    def main(a: T.handle, C: T.Buffer((READ_LANES,), "int32"), blocks: T.int32, repeats: T.int32) -> None:
        T.func_attr({"global_symbol": "main"})
        n = T.int32()
        A = T.match_buffer(a, (n,), "int32")
        acc = T.alloc_buffer((READS * READ_LANES,), "int32", scope="local")
        for i in T.unroll(READS):
            acc[T.ramp(i * READ_LANES, 1, READ_LANES)] = T.broadcast(0, READ_LANES)
        for r in T.serial(repeats):
            for b in T.serial(blocks):
                for i in T.unroll(READS):
                    # `xor r` makes every repeat a sum of its own: LLVM cannot compute one and multiply.
                    acc[T.ramp(i * READ_LANES, 1, READ_LANES)] = acc[T.ramp(i * READ_LANES, 1, READ_LANES)] + (
                        A[T.ramp((b * READS + i) * READ_LANES, 1, READ_LANES)] ^ T.broadcast(r, READ_LANES)
                    )
        C[T.ramp(0, 1, READ_LANES)] = T.broadcast(0, READ_LANES)
        for i in T.unroll(READS):
            C[T.ramp(0, 1, READ_LANES)] = C[T.ramp(0, 1, READ_LANES)] + acc[T.ramp(i * READ_LANES, 1, READ_LANES)]

    return main


def build(func: tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., Any]:
    """The compiled `main`."""
    return tirx.build(func, target=target, pipeline=tir_pipeline.CPU)["main"]
