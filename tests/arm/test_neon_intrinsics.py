"""Every spelling of a NEON intrinsic against its meaning, at the extremes of its operands, run by QEMU."""

from __future__ import annotations

import numpy as np
import pytest
import tvm.script
from tvm import s_tir
from tvm.script import tirx as T

from hawq_tvm.core import arith
from schedules.cpu.arm_neon import DOTS, MATRICES, MIXED_DOTS, PAIRS
from schedules.spelling.intrinsics import multiply_high
from schedules.spelling.neon_intrinsics import LANES, Inner, inner_product

from .on_arm import DOTPROD, I8MM, NEON, call, needs_emulator

rng = np.random.default_rng(12)
ROWS = 512


def forms(family):
    """Every intrinsic that a family may ask for."""
    found = []
    for (_, weight), m in family.multipliers.items():
        for inner in family.inners:
            found.append(Inner(m.name, m.registers, weight, family.depth, inner, family.together))
            for width in (4, 2):
                if inner * width % 8 == 0:
                    found.append(Inner(m.name, m.registers, "uint8", family.depth, inner, family.together, width))
    return list(dict.fromkeys(f for f in found if f.width == 8 or f.name not in ("udot", "ummla")))


CASES = [
    *((NEON, f) for f in forms(PAIRS)),
    *((DOTPROD, f) for f in forms(DOTS)),
    *((I8MM, f) for f in forms(MIXED_DOTS)),
    *((I8MM, f) for f in forms(MATRICES)),
]


def extremes(dtype: str, *shape: int) -> np.ndarray:
    """Mostly the ends of a type, 0 and their neighbours."""
    low, high = arith.RANGES[dtype]
    ends = np.array([low, low, low + 1, -1 if low else 1, 0, high - 1, high, high]).astype(dtype)
    return np.where(
        rng.random(shape) < 0.8, rng.choice(ends, shape), rng.integers(low, high, shape, dtype, endpoint=True)
    )


def around(f: Inner) -> str:
    """A function of rows of operands that are loaded into registers, multiplied and stored, with the intrinsic's
    meaning inside.
    """
    weights = [*([f.stored] if f.inner > 1 else []), LANES, f.depth]
    channel, pixel = ("e", "0") if f.together == 1 else ("e // 4 * 2 + e % 2", "e // 2 % 2")
    q, index = ("q", f"q % {f.stored}, " if f.width < 8 else "q, ") if f.inner > 1 else ("0", "")
    weight = f"W[r, {index}{channel}, p]"
    if f.width < 8:
        left = f'T.cast({8 - f.width} - q // {f.stored} * {f.width}, "uint8")'
        mask = 256 - 2 ** (8 - f.width)
        weight = f'T.cast(T.bitwise_and(T.shift_left({weight}, {left}), T.uint8({mask})), "int8")'
    data = f"a[r, {pixel}, {q} * {f.depth} + p]" if f.together > 1 else f"a[r, {q} * {f.depth} + p]"
    shape = f"{f.together}, {f.length}" if f.together > 1 else f"{f.length}"
    reduced, kinds, sizes = ("q, p", "SSRR", f"{f.inner}, {f.depth}") if f.inner > 1 else ("p", "SSR", f"{f.depth}")
    load = ", ".join("xyz"[: 2 + (f.together > 1)])
    return f"""
@T.prim_func(s_tir=True)
def main(A: T.Buffer(({ROWS}, {shape}), "{f.data}"),
         W: T.Buffer(({ROWS}, {", ".join(map(str, weights))}), "{f.weight}"),
         C: T.Buffer(({ROWS}, {f.sums}), "int32")):
    with T.sblock("root"):
        a = T.sblock_alloc_buffer(({ROWS}, {shape}), "{f.data}", scope="local")
        c = T.sblock_alloc_buffer(({ROWS}, {f.sums}), "int32", scope="local")
        for i{load.replace(", ", ", i")} in T.grid({ROWS}, {shape}):
            with T.sblock("data"):
                {load} = T.axis.remap("{"S" * len(load.split(", "))}", [i{load.replace(", ", ", i")}])
                a[{load}] = A[{load}]
        for ir, ie in T.grid({ROWS}, {f.sums}):
            with T.sblock("load"):
                r, e = T.axis.remap("SS", [ir, ie])
                c[r, e] = C[r, e]
        for ir, ie, i{reduced.replace(", ", ", i")} in T.grid({ROWS}, {f.sums}, {sizes}):
            with T.sblock("dot"):
                r, e, {reduced} = T.axis.remap("{kinds}", [ir, ie, i{reduced.replace(", ", ", i")}])
                c[r, e] = c[r, e] + T.cast({data}, "int32") * T.cast({weight}, "int32")
        for ir, ie in T.grid({ROWS}, {f.sums}):
            with T.sblock("store"):
                r, e = T.axis.remap("SS", [ir, ie])
                C[r, e] = c[r, e]
"""


@needs_emulator
@pytest.mark.parametrize(
    ("target", "form"),
    CASES,
    ids=[
        f"{t.attrs['mcpu']}-{f.name}-{f.data}-{f.weight}-{f.inner}{f'-{f.width}' if f.width < 8 else ''}"
        for t, f in CASES
    ],
)
def test_inner_products_at_the_extremes(target, form):
    f = form
    sch = s_tir.Schedule(tvm.script.from_source(around(f), extra_vars={"T": T}))
    sch.tensorize(sch.get_loops(sch.get_sblock("dot"))[1], inner_product(f))
    a = extremes(f.data, ROWS, f.together, f.length)
    stored = [f.stored] if f.inner > 1 else []
    w = extremes(f.weight, ROWS, *stored, LANES, f.depth)
    start = rng.integers(-(2**31), 2**31, (ROWS, f.sums)).astype(np.int32)
    _, _, out = call(sch.mod["main"], target, a if f.together > 1 else a[:, 0], w, start)

    values = w.reshape(ROWS, f.stored, LANES, f.depth).astype(np.int64)
    if f.width < 8:
        own = [values << left & 256 - 2 ** (8 - f.width) for left in range(8 - f.width, -1, -f.width)]
        values = np.concatenate(own, axis=1).astype(np.uint8).view(np.int8).astype(np.int64)
    sums = np.einsum("rxqp,rqop->rxo", a.reshape(ROWS, f.together, f.inner, f.depth).astype(np.int64), values)
    if f.together > 1:
        sums = sums.reshape(ROWS, 2, 2, 2).transpose(0, 2, 1, 3)
    # Sums wrap around.
    np.testing.assert_array_equal(out, (start + sums.reshape(ROWS, -1)).astype(np.int32), strict=True)


@needs_emulator
@pytest.mark.parametrize("lanes", [4, 8])
def test_multiply_high_at_the_extremes(lanes):
    values = np.array([-(2**31), -(2**31) + 1, -65536, -1, 0, 1, 65535, 2**31 - 1], np.int32)

    @T.prim_func(s_tir=True)
    def main(
        A: T.Buffer((ROWS, lanes), "int32"),
        M: T.Buffer((ROWS, lanes), "int32"),
        B: T.Buffer((ROWS, lanes), "int64"),
        C: T.Buffer((ROWS, lanes), "int32"),
    ):
        for r, i in T.grid(ROWS, lanes):
            with T.sblock("high"):
                vr, vi = T.axis.remap("SS", [r, i])
                C[vr, vi] = T.cast(
                    T.shift_right(T.cast(A[vr, vi], "int64") * T.cast(M[vr, vi], "int64") + B[vr, vi], T.int64(32)),
                    "int32",
                )

    sch = s_tir.Schedule(main)
    sch.tensorize(sch.get_loops(sch.get_sblock("high"))[1], multiply_high(lanes, neon=True))
    a, m = (rng.choice(values, (ROWS, lanes)) for _ in range(2))
    b = rng.choice(np.array([-(2**61), -1, 0, 1, 2**32 - 1, 2**61]), (ROWS, lanes))
    *_, out = call(sch.mod["main"], NEON, a, m, b, np.zeros((ROWS, lanes), np.int32))
    expected = (a.astype(object) * m.astype(object) + b.astype(object)) // 2**32
    np.testing.assert_array_equal(out, expected.astype(np.int64).astype(np.int32), strict=True)
