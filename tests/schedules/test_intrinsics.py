"""Every spelling of an intrinsic against its meaning, at the extremes of its operands."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import tvm
from tvm import s_tir, te, tirx
from tvm.script import tirx as T

from hawq_tvm.core import arith
from hawq_tvm.targets import target as targets
from schedules.cpu.vector_unit import VectorUnit
from schedules.narrow import PLANES, in_high_bits, split
from schedules.spelling import byte_intrinsics, intrinsics

HOST = targets.host()
UNIT = VectorUnit.of(HOST)
rng = np.random.default_rng(6)


def run(function, *arrays: np.ndarray, target=HOST) -> None:
    tensors = [tvm.runtime.tensor(a) for a in arrays]
    tvm.tirx.build(function, target=target)["main"](*tensors)
    for a, t in zip(arrays, tensors, strict=True):
        a[...] = t.numpy()


def tensorized(function, block: str, intrinsic: str, outer: int):
    sch = s_tir.Schedule(function.with_attr("global_symbol", "main"))
    sch.tensorize(sch.get_loops(sch.get_sblock(block))[outer], intrinsic)
    return sch.mod["main"]


@pytest.mark.skipif(not UNIT.quads, reason="this CPU has no VNNI")
@pytest.mark.parametrize("data", ["uint8", "int8"])
@pytest.mark.parametrize("lanes", [8, 16])
def test_dot_u8s8_at_the_extremes(lanes, data):
    if lanes > UNIT.lanes:
        pytest.skip("this CPU has no vectors of 512 bits")
    offset = 128 if data == "int8" else 0
    ends = [np.iinfo(data).min, -1, 0, 1, np.iinfo(data).max]
    quads = np.array(
        list(product([e for e in ends if np.iinfo(data).min <= e <= np.iinfo(data).max], repeat=4))
    ).astype(data)
    rows = len(quads)

    @T.prim_func(s_tir=True)
    def main(A: T.Buffer((rows, 4), data), W: T.Buffer((rows, lanes, 4), "int8"), C: T.Buffer((rows, lanes), "int32")):
        with T.sblock("root"):
            acc = T.sblock_alloc_buffer((rows, lanes), "int32", scope="local")
            for r in range(rows):
                for i in range(lanes):
                    with T.sblock("load"):
                        vr, vi = T.axis.remap("SS", [r, i])
                        acc[vr, vi] = C[vr, vi]
                for i, k in T.grid(lanes, 4):
                    with T.sblock("dot"):
                        vr, vi, vk = T.axis.remap("SSR", [r, i, k])
                        acc[vr, vi] = acc[vr, vi] + (T.cast(A[vr, vk], "int32") + offset) * T.cast(
                            W[vr, vi, vk], "int32"
                        )
                for i in range(lanes):
                    with T.sblock("store"):
                        vr, vi = T.axis.remap("SS", [r, i])
                        C[vr, vi] = acc[vr, vi]

    w = rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (rows, lanes, 4))
    start = rng.integers(-(2**30), 2**30, (rows, lanes)).astype(np.int32)
    expected = start + np.einsum("rk,rik->ri", quads.astype(np.int64) + offset, w.astype(np.int64))
    out = start.copy()
    run(tensorized(main, "dot", intrinsics.dot_u8s8(lanes, data), 1), quads, w, out)
    np.testing.assert_array_equal(out, expected.astype(np.int32), strict=True)


@pytest.mark.parametrize("target", [HOST, tvm.target.Target({"kind": "llvm"})], ids=["host", "portable"])
@pytest.mark.parametrize("lanes", [8, 16])
def test_multiply_high_at_the_extremes(lanes, target):
    values = [-(2**31), -(2**31) + 1, -65536, -1, 0, 1, 65535, 2**31 - 1]
    pairs = np.array(list(product(values, repeat=2)), np.int64)
    rows = len(pairs)

    @T.prim_func(s_tir=True)
    def main(
        A: T.Buffer((rows, lanes), "int32"),
        M: T.Buffer((lanes,), "int32"),
        B: T.Buffer((lanes,), "int64"),
        C: T.Buffer((rows, lanes), "int32"),
    ):
        for r, i in T.grid(rows, lanes):
            with T.sblock("high"):
                vr, vi = T.axis.remap("SS", [r, i])
                C[vr, vi] = T.cast(
                    T.shift_right(T.cast(A[vr, vi], "int64") * T.cast(M[vi], "int64") + B[vi], T.int64(32)), "int32"
                )

    function = tensorized(main, "high", intrinsics.multiply_high(lanes), 1)
    a = np.repeat(pairs[:, :1], lanes, axis=1).astype(np.int32)
    for m in (2**31 - 1, 2**30, 1, -(2**31)):
        ms = np.full(lanes, m, np.int32)
        ms[1::2] = rng.integers(-(2**31), 2**31, lanes // 2)
        b = rng.choice(np.array([-(2**61), -1, 0, 1, 2**32 - 1, 2**61]), lanes)
        out = np.zeros((rows, lanes), np.int32)
        run(function, a, ms, b, out, target=target)
        expected = (a.astype(object) * ms.astype(object) + b.astype(object)) // 2**32
        np.testing.assert_array_equal(out, expected.astype(np.int64).astype(np.int32), strict=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("vectors", [2, 4])
@pytest.mark.parametrize("lanes", [8, 16])
def test_narrow_at_the_extremes(lanes, vectors, dtype):
    if lanes > UNIT.packs:
        pytest.skip(f"this CPU has no registers of {lanes} int32 to pack")
    rows, size = 64, lanes * vectors
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    ends = [v + d for v in (-(2**31) + 1, -65536, -32768, low, 0, high, 32767, 65535, 2**31 - 2) for d in (-1, 0, 1)]

    @T.prim_func(s_tir=True)
    def main(A: T.Buffer((rows, size), "int32"), C: T.Buffer((rows, size), dtype)):
        for r, i in T.grid(rows, size):
            with T.sblock("narrow"):
                vr, vi = T.axis.remap("SS", [r, i])
                C[vr, vi] = T.cast(T.min(T.max(A[vr, vi], low), high), dtype)

    a = np.where(
        rng.random((rows, size)) < 0.5,
        rng.choice(np.array(ends), (rows, size)),
        rng.integers(low - 300, high + 300, (rows, size)),
    ).astype(np.int32)
    out = np.zeros((rows, size), dtype)
    run(tensorized(main, "narrow", byte_intrinsics.narrow(lanes, vectors, dtype), 1), a, out)
    np.testing.assert_array_equal(out, np.clip(a, low, high).astype(dtype), strict=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("vectors", [2, 4])
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("short", [True, False])
def test_requantize_at_the_extremes(short, stored, lanes, vectors, dtype):
    """(A9c), and (A9a) with shifts that it does not take: on both sides of every threshold, at the ends of 32 bits, and
    with the least and the largest multipliers.
    """
    if lanes > UNIT.packs:
        pytest.skip(f"this CPU has no registers of {lanes} int32 to pack")
    size, (low, high) = lanes * vectors, arith.RANGES[dtype]
    most = arith.PACKED_SHIFTS[dtype] - 32 if short else 31
    t = np.arange(size, dtype=np.int32) % (most + 1)
    m = rng.choice(np.array([1, -1, 2**31 - 1, -(2**31) + 1, 2**30, 1234567891, -(2**25), 2**27 + 1]), size)
    b = rng.choice(np.array([-(2**61), 2**61, 0, -1, 2**39 - 1, 100 << 39]), size)
    shifts = (t + 32).astype(object)
    ks = np.arange(low - 1, high + 3).astype(object)
    # The sums around which (x m + b) >> s steps to k, where there are such.
    steps = ((ks[:, None] << shifts) - b.astype(object)) // m.astype(object)
    near = np.concatenate([steps - 1, steps, steps + 1])
    ends = np.array([-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 1], object)[:, None] + np.zeros(size, object)
    x = np.clip(np.concatenate([near, ends]), -(2**31), 2**31 - 1).astype(np.int32)
    rows = len(x)
    kind, at = byte_intrinsics.shift_form(lanes, short)

    @T.prim_func(s_tir=True)
    def main(
        X: T.Buffer((rows, size), "int32"),
        M: T.Buffer((size,), "int64"),
        B: T.Buffer((size,), "int64"),
        S: T.Buffer((size,), kind),
        C: T.Buffer((rows, size), dtype),
    ):
        for r, i in T.grid(rows, size):
            with T.sblock("requantize"):
                vr, vi = T.axis.remap("SS", [r, i])
                C[vr, vi] = T.cast(
                    T.min(
                        T.max(
                            T.shift_right(
                                T.cast(
                                    T.shift_right(
                                        T.cast(X[vr, vi], "int64") * M[byte_intrinsics.apart(vi, lanes)]
                                        + B[byte_intrinsics.apart(vi, lanes)],
                                        T.int64(32),
                                    ),
                                    "int32",
                                ),
                                T.cast(S[at(vi, lanes)], "int32"),
                            ),
                            low,
                        ),
                        high,
                    ),
                    dtype,
                )

    out = np.zeros((rows, size), dtype)
    function = tensorized(main, "requantize", byte_intrinsics.requantize(lanes, vectors, dtype, short, stored), 1)

    def placed(values, dtype, place):
        array = np.empty(size, dtype)
        array[place(np.arange(size), lanes)] = values
        return array

    run(
        function,
        x,
        placed(m, "int64", byte_intrinsics.apart),
        placed(b, "int64", byte_intrinsics.apart),
        placed(t, kind, at),
        out,
    )
    total = x.astype(object) * m.astype(object) + b.astype(object)
    np.testing.assert_array_equal(out, np.clip(total >> shifts, low, high).astype(dtype), strict=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("vectors", [2, 4])
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("woven", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_requantize_of_woven_sums_and_of_sums_that_began(begun, woven, lanes, vectors, dtype):
    """(A9c) and (A9e) at random sums and the ends of 32 bits, channels one after another and woven."""
    if lanes > UNIT.packs:
        pytest.skip(f"this CPU has no registers of {lanes} int32 to pack")
    size, rows, (low, high) = lanes * vectors, 64, arith.RANGES[dtype]
    order = byte_intrinsics.Order(lanes, vectors if woven else 0)
    t = 1 + np.arange(size) % (arith.PACKED_SHIFTS[dtype] - 32)
    m = rng.choice(np.array([1, 2**31 - 1, 2**30, 1234567891, 2**27 + 1]), size)
    h = (1 << t - 1) + (rng.integers(0, 256, size) << t if dtype == "uint8" else 0)
    b = (h << 32) + rng.integers(-(2**31), 2**31, size)
    x = rng.integers(-(2**31), 2**31, (rows, size)) >> rng.integers(0, 24, (rows, size))
    x[0], x[1] = -(2**31), 2**31 - 1
    kind = byte_intrinsics.shift_form(lanes, True)[0]
    data = te.placeholder((rows, vectors, lanes) if woven else (rows, size), "int32", "x")
    constants = [
        te.placeholder((size,), d, n) for d, n in (("int64", "m"), (kind if begun else "int64", "b"), (kind, "t"))
    ]

    def element(r, i):
        ms, bs, ts = constants
        product = (data(r, *order.in_register(i)) if woven else data(r, i)).astype("int64") * ms(order.apart(i))
        number = ((product if begun else product + bs(order.apart(i))) >> tirx.const(32, "int64")).astype("int32")
        number = number + bs(order.shift(i, True)).astype("int32") if begun else number
        return tirx.min(tirx.max(number >> ts(order.shift(i, True)).astype("int32"), low), high).astype(dtype)

    main = te.create_prim_func([data, *constants, te.compute((rows, size), element, name="requantize")])
    name = byte_intrinsics.requantize(lanes, vectors, dtype, True, woven=woven, begun=begun)
    channels, out = np.arange(size), np.zeros((rows, size), dtype)

    def placed(values, dtype, place):
        array = np.empty(size, dtype)
        array[place] = values
        return array

    sums = np.stack([placed(row, "int32", order.flat(channels)) for row in x]).reshape([int(d) for d in data.shape])
    apart, shift = order.apart(channels), order.shift(channels, True)
    offsets = placed(h, kind, shift) if begun else placed(b, "int64", apart)
    run(tensorized(main, "requantize", name, 1), sums, placed(m, "int64", apart), offsets, placed(t, kind, shift), out)
    total = x.astype(object) * m.astype(object)
    number = (total >> 32) + h.astype(object) if begun else (total + b.astype(object)) >> 32
    np.testing.assert_array_equal(out, np.clip(number >> t.astype(object), low, high).astype(dtype), strict=True)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_requantize_rows_of_two_pixels(dtype):
    """(A9e) of vectors of two pixels, which are not one after another in memory."""
    if UNIT.packs < 16:
        pytest.skip("this CPU has no registers of 16 int32 to pack")
    lanes, rows, wide, (low, high) = 16, 64, 48, arith.RANGES[dtype]
    order = byte_intrinsics.Order(lanes, rows=True)
    t = 1 + np.arange(lanes) % (arith.PACKED_SHIFTS[dtype] - 32)
    m = rng.choice(np.array([1, 2**31 - 1, 2**30, 1234567891, 2**27 + 1]), lanes)
    h = (1 << t - 1) + (rng.integers(0, 256, lanes) << t if dtype == "uint8" else 0)
    x = (rng.integers(-(2**31), 2**31, (rows, 2, wide)) >> rng.integers(0, 24, (rows, 2, wide))).astype(np.int32)
    x[0], x[1] = -(2**31), 2**31 - 1
    data = te.placeholder((rows, 2, wide), "int32", "x")
    ms, hs, ts = (
        te.placeholder((n,), d, name) for n, d, name in ((16, "int64", "m"), (32, "int16", "h"), (32, "int16", "t"))
    )

    def element(r, p, i):
        number = ((data(r, p, i).astype("int64") * ms(order.apart(i))) >> tirx.const(32, "int64")).astype("int32")
        number = number + hs(order.shift(i, True)).astype("int32")
        return tirx.min(tirx.max(number >> ts(order.shift(i, True)).astype("int32"), low), high).astype(dtype)

    main = te.create_prim_func([data, ms, hs, ts, te.compute((rows, 2, lanes), element, name="requantize")])
    channels, out = np.arange(lanes), np.zeros((rows, 2, lanes), dtype)
    apart, shift = order.apart(channels), order.shift(channels, True)
    factors, added, shifts = np.empty(16, np.int64), np.empty(32, np.int16), np.empty(32, np.int16)
    factors[apart] = m
    for other in (0, 4):
        added[shift ^ other], shifts[shift ^ other] = h, t
    name = byte_intrinsics.requantize_rows(lanes, dtype)
    run(tensorized(main, "requantize", name, 1), x, factors, added, shifts, out)
    total = ((x[..., :lanes].astype(object) * m.astype(object)) >> 32) + h.astype(object)
    np.testing.assert_array_equal(out, np.clip(total >> t.astype(object), low, high).astype(dtype), strict=True)


BIG = 2**31 - 2**15 - 1  # the largest multiplier whose high half has 16 bits
SUMS = {
    1: [((2**16, 2**15), 2**16), ((2**23 + 77, 5 - 2**22), 1 << 24)],  # the first has ties
    15: [((BIG, 2**16 - BIG), (1 << 30) - 1), ((BIG, BIG), -(1 << 43)), ((2**30 + 12345, 2**29 + 999), 77 << 30)],
}


@pytest.mark.parametrize("t", SUMS)
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("data", [("uint8", "int8"), ("int8", "uint8")])
@pytest.mark.parametrize("vectors", [2, 4])
@pytest.mark.parametrize("lanes", [8, 16])
def test_pair_sum_of_every_pair(lanes, vectors, data, dot, t):
    """(A9d) of all 65,536 pairs of bytes, with constants that give ties and with the largest."""
    if lanes > UNIT.packs or (dot and not UNIT.quads):
        pytest.skip(f"this CPU has no registers of {lanes} int32 to pack, or no VNNI")
    size, dtype = lanes * vectors, data[0]
    rows, (low, high) = 2**16 // size, arith.RANGES[dtype]
    ends = [arith.RANGES[d] for d in data]
    pairs = np.array(np.meshgrid(*(np.arange(a, b + 1) for a, b in ends), indexing="ij")).reshape(2, rows, size)

    @T.prim_func(s_tir=True)
    def main(
        A: T.Buffer((rows, size), data[0]),
        L: T.Buffer((2,), "int16"),
        R: T.Buffer((rows, size), data[1]),
        Q: T.Buffer((1,), "int32"),
        H: T.Buffer((2,), "int16"),
        Z: T.Buffer((1,), "int16"),
        C: T.Buffer((rows, size), dtype),
    ):
        for r, i in T.grid(rows, size):
            with T.sblock("sum"):
                vr, vi = T.axis.remap("SS", [r, i])
                C[vr, vi] = T.cast(byte_intrinsics.pair_sum_of(A[vr, vi], R[vr, vi], (L, Q, H, Z), t, low, high), dtype)

    function = tensorized(main, "sum", byte_intrinsics.pair_sum(lanes, vectors, t, data, dtype, dot), 1)
    built = tvm.tirx.build(function, target=HOST)["main"]
    for multipliers, offset in SUMS[t]:
        half, shift = 1 << t + 15, t + 16
        signed = sum(128 * m for m, d in zip(multipliers, data, strict=True) if d == "int8")
        z, q = divmod(offset - signed + half, 2 * half)
        lows = [(m + 2**15) % 2**16 - 2**15 for m in multipliers]
        highs = [(m - part) >> 16 for m, part in zip(multipliers, lows, strict=True)]
        assert abs(z) <= 2**14 and max(map(abs, highs)) < 2**15
        a, r = (p.astype(d) for p, d in zip(pairs, data, strict=True))
        constants = [
            np.array(v, k) for v, k in ((lows, "int16"), ([q - half], "int32"), (highs, "int16"), ([z], "int16"))
        ]
        operands = [a, constants[0], r, *constants[1:], np.zeros((rows, size), dtype)]
        tensors = [tvm.runtime.tensor(x) for x in operands]
        built(*tensors)
        total = pairs[0] * multipliers[0] + pairs[1] * multipliers[1] + offset
        np.testing.assert_array_equal(
            tensors[-1].numpy(), np.clip(total >> shift, low, high).astype(dtype), strict=True
        )


@pytest.mark.skipif(not UNIT.quads, reason="this CPU has no VNNI")
def test_dot_quads_at_the_extremes():
    lanes, ends = UNIT.lanes, np.array(list(product([0, 1, 127, 128, 255], repeat=4)), np.uint8)
    rows = len(ends)

    @T.prim_func(s_tir=True)
    def main(
        Q: T.Buffer((rows, lanes), "int32"), W: T.Buffer((rows, lanes, 4), "int8"), C: T.Buffer((rows, lanes), "int32")
    ):
        with T.sblock("root"):
            acc = T.sblock_alloc_buffer((rows, lanes), "int32", scope="local")
            for r in range(rows):
                for i in range(lanes):
                    with T.sblock("load"):
                        vr, vi = T.axis.remap("SS", [r, i])
                        acc[vr, vi] = C[vr, vi]
                for i, k in T.grid(lanes, 4):
                    with T.sblock("dot"):
                        vr, vi, vk = T.axis.remap("SSR", [r, i, k])
                        acc[vr, vi] = acc[vr, vi] + T.bitwise_and(T.shift_right(Q[vr, vi], vk * 8), 255) * T.cast(
                            W[vr, vi, vk], "int32"
                        )
                for i in range(lanes):
                    with T.sblock("store"):
                        vr, vi = T.axis.remap("SS", [r, i])
                        C[vr, vi] = acc[vr, vi]

    data = ends[rng.integers(0, rows, (rows, lanes))]
    w = rng.choice(np.array([-128, -127, -1, 0, 1, 127], np.int8), (rows, lanes, 4))
    out = rng.integers(-(2**30), 2**30, (rows, lanes)).astype(np.int32)
    expected = out + np.einsum("rik,rik->ri", data.astype(np.int64), w.astype(np.int64))
    run(tensorized(main, "dot", intrinsics.dot_quads(lanes), 1), data.copy().view(np.int32)[..., 0], w, out)
    np.testing.assert_array_equal(out, expected.astype(np.int32), strict=True)


@pytest.mark.skipif(not UNIT.quads, reason="this CPU has no VNNI")
@pytest.mark.parametrize("width", PLANES)
@pytest.mark.parametrize("data", ["uint8", "int8"])
def test_dot_narrow_at_the_extremes(data, width):
    lanes, rows, offset = UNIT.lanes, 600, 128 if data == "int8" else 0
    info, depth = np.iinfo(data), intrinsics.depth_of(width)
    vectors = depth * width // 32
    place = (lambda at: (at // 4, at % 4)) if vectors > 1 else (lambda at: (at,))

    def weight(held, r, i, k):
        def byte(at):
            first, *rest = place(at)
            return held[(r, first, i, *rest)] if rest else held[r, i, first]

        return in_high_bits(byte, k, depth, width)

    a, w, c = (
        te.placeholder(shape, dtype)
        for shape, dtype in (
            ((rows, depth), data),
            ((rows, *([vectors] if vectors > 1 else []), lanes, 4), "uint8"),
            ((rows, lanes), "int32"),
        )
    )
    k = te.reduce_axis((0, depth), "k")
    dot = te.compute(
        (rows, lanes),
        lambda r, i: te.sum((a[r, k].astype("int32") + offset) * weight(w, r, i, k).astype("int32"), axis=k),
        name="dot",
    )
    out = te.compute((rows, lanes), lambda r, i: dot[r, i] + c[r, i], name="out")
    sch = s_tir.Schedule(te.create_prim_func([a, w, c, out]))
    block = sch.get_sblock("dot")
    sch.set_scope(block, 0, "local")
    sch.decompose_reduction(block, sch.get_loops(block)[1])
    sch.tensorize(sch.get_loops(sch.get_sblock("dot_update"))[1], intrinsics.dot_narrow(lanes, data, width))
    data_values = rng.choice(np.array([info.min, info.min + 1, 0, info.max], data), (rows, depth))
    values = rng.choice(np.array([-(2 ** (width - 1)), -1, 0, 1, 2 ** (width - 1) - 1]), (rows, lanes, depth))
    packed_weights = split(values, -1, width)
    if vectors > 1:
        packed_weights = np.swapaxes(packed_weights.reshape(rows, lanes, vectors, 4), 1, 2)
    start = rng.integers(-(2**30), 2**30, (rows, lanes)).astype(np.int32)
    expected = start + 2 ** (8 - width) * np.einsum("rk,rik->ri", data_values.astype(np.int64) + offset, values)
    found = np.empty_like(start)
    run(sch.mod["main"], data_values, np.ascontiguousarray(packed_weights), start, found)
    np.testing.assert_array_equal(found, expected.astype(np.int32), strict=True)
