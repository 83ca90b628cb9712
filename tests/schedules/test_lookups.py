"""Tables of 8 bits that registers hold: every byte, type and number of lanes, alone and behind a contraction."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, s_tir, te

from hawq_tvm.core import arith, ops
from hawq_tvm.targets import target as targets
from schedules.cpu.vector_unit import VectorUnit
from schedules.cpu.vectors import spelled
from schedules.rule import choose
from schedules.rules import rules_for
from schedules.spelling.lookup_intrinsics import BYTES, WORDS, joined, looked_up, planes, wide_looked_up

from .one_layer import layer_of, lower, packed, run

R = relax.op
PRESETS = [p for p in ("host", "x86-vnni") if targets.runs_here(targets.required_features(targets.parse(p)))]
HOST = targets.host()
HAS = {BYTES: ("avx512vbmi",), WORDS: ("avx512bw",)}
ROUNDED: dict = {"rounding": "half_up", "zero_point": 3}
rng = np.random.default_rng(16)


@pytest.mark.parametrize("out", ["uint8", "int8"])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("permutes", [BYTES, WORDS])
def test_every_byte(permutes, size, dtype, out):
    if not targets.runs_here(list(HAS[permutes])):
        pytest.skip(f"this CPU has no {HAS[permutes][0]}")
    low, high = arith.RANGES[dtype]
    x = rng.permutation(np.arange(low, high + 1)).astype(dtype)
    table = rng.integers(*arith.RANGES[out], 256, endpoint=True).astype(out)
    got = in_registers(
        x,
        table,
        out,
        lambda t, at: t(at),
        size,
        lambda x, t: [looked_up(x[0], t[0], size, permutes)],
    )
    np.testing.assert_array_equal(got, table[x.astype(np.int64) - low], strict=True)


@pytest.mark.parametrize("out", ["uint16", "int16", "uint32", "int32"])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("permutes", [BYTES, WORDS])
def test_every_byte_of_a_wide_table(permutes, size, dtype, out):
    if not targets.runs_here(list(HAS[permutes])):
        pytest.skip(f"this CPU has no {HAS[permutes][0]}")
    low, high = arith.RANGES[dtype]
    x, ends = rng.permutation(np.arange(low, high + 1)).astype(dtype), np.iinfo(out)
    table = rng.integers(ends.min, ends.max, 256, endpoint=True).astype(out)
    table[[0, 127, 128, 255]] = ends.min, ends.max, ends.min, ends.max
    parts = planes(table, permutes)
    got = in_registers(
        x,
        parts,
        out,
        lambda t, at: joined([t(k, at) for k in range(len(parts))], out),
        size,
        lambda x, t: wide_looked_up(x[0], t[0], size, permutes, out),
    )
    np.testing.assert_array_equal(got, table[x.astype(np.int64) - low], strict=True)


def in_registers(x, table, out, meaning, size, spelling):
    """A table of all bytes: meaning(table, place), spelled."""
    xs, t = (te.placeholder(a.shape, str(a.dtype), name) for a, name in ((x, "x"), (table, "t")))
    low = np.iinfo(x.dtype).min
    found = te.compute(x.shape, lambda i: meaning(t, xs[i].astype("int32") - low), name="lookup")
    sch = s_tir.Schedule(te.create_prim_func([xs, t, found]))
    (element,) = sch.get_loops(sch.get_sblock("lookup"))
    lane = sch.get(sch.split(element, [None, size])[-1])
    func = spelled(sch.mod["main"], [lane], spelling)
    tensors = [tvm.runtime.tensor(a) for a in (x, table, np.zeros(256, out))]
    tvm.tirx.build(func.with_attr("global_symbol", "main"), target=HOST)["main"](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize("shape", [(9, 40, 64), (16, 64, 96), (7, 33, 160), (5, 16, 48)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "out"), [("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int8"), ("uint8", "int16")]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_behind_a_contraction(preset, dtype, out, shape):
    rows, depth, channels = shape
    w = rng.integers(-127, 128, (depth, channels)).astype(np.int8)
    table = rng.integers(*arith.RANGES[out], 256, endpoint=True).astype(out)
    qtype, on = arith.QType.of(dtype), targets.parse(preset)

    def body(e, x):
        sums = e(R.matmul(x, ops.const(w, "int8"), out_dtype="int32"))
        return ops.lookup(e(ops.requantize([sums], [1417339207], 0, 40, qtype=qtype, **ROUNDED)), table)

    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    (got,) = run(body, x, target=on, rule="x86.vnni" if VectorUnit.of(on).quads else "cpu.contract")
    sums = x.astype(np.int64) @ w.astype(np.int64)
    codes = arith.requantize([sums], [1417339207], 0, 40, qmin=qtype.qmin, qmax=qtype.qmax, **ROUNDED)
    assert len(np.unique(codes)) > 50
    np.testing.assert_array_equal(got, table[codes.astype(np.int64) - qtype.qmin], strict=True)


@pytest.mark.parametrize("shape", [(9, 40, 64), (16, 64, 96), (7, 33, 160), (5, 16, 48)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("shift", [39, 46])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_wide_table_between_two_requantizes(preset, shift, dtype, shape):
    """What a smoothed GELU becomes: a fixed-point value of 24 bits, and a scale for every channel of the result."""
    rows, depth, channels = shape
    w = rng.integers(-127, 128, (depth, channels)).astype(np.int8)
    qtype, on = arith.QType.of(dtype), targets.parse(preset)
    table = rng.integers(-(2 ** (shift - 24)), 2 ** (shift - 22), 256).astype(np.int32)
    m, b = rng.integers(2**30, 2**31, channels), rng.integers(-(2**30), 2**30, channels)

    def body(e, x):
        sums = e(R.matmul(x, ops.const(w, "int8"), out_dtype="int32"))
        codes = e(ops.requantize([sums], [1417339207], 0, 40, qtype=qtype, **ROUNDED))
        return ops.requantize([e(ops.lookup(codes, table))], [m], b, shift, qtype=qtype, **ROUNDED)

    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    module = packed(body, [(x.shape, "uint8")])
    (got,) = run(body, x, target=on)
    sums, ends = x.astype(np.int64) @ w.astype(np.int64), {"qmin": qtype.qmin, "qmax": qtype.qmax}
    values = table[arith.requantize([sums], [1417339207], 0, 40, **ends, **ROUNDED).astype(np.int64) - qtype.qmin]
    expected = arith.requantize([values.astype(np.int64)], [m], b, shift, **ends, **ROUNDED)
    assert len(np.unique(expected)) > 30
    np.testing.assert_array_equal(got, expected.astype(dtype), strict=True)
    if VectorUnit.of(on).permutes and channels % 32 == 0:
        assert "vpermi2var" in lower(module, on).script()


def test_a_kernel_says_it_looks_up_in_registers():
    if VectorUnit.of(HOST).permutes == "":
        pytest.skip("this CPU has no AVX-512")

    def body(e, x):
        sums = e(R.matmul(x, ops.const(np.ones((40, 64), np.int8), "int8"), out_dtype="int32"))
        codes = ops.requantize([sums], [1417339207], 0, 40, qtype=arith.QType.of("uint8"), **ROUNDED)
        return ops.lookup(e(codes), np.arange(256).astype(np.uint8))

    layer = layer_of(packed(body, [((8, 40), "uint8")]))
    kernel = choose(rules_for(HOST), layer, HOST).rule.build(layer, HOST)
    assert "vpermi2var" in kernel.func.script()
