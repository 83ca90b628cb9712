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
from schedules.spelling.lookup_intrinsics import BYTES, WORDS, looked_up

from .one_layer import layer_of, packed, run

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
    xs, t = te.placeholder((256,), dtype, "x"), te.placeholder((256,), out, "t")
    found = te.compute((256,), lambda i: t[xs[i].astype("int32") - low], name="lookup")
    sch = s_tir.Schedule(te.create_prim_func([xs, t, found]))
    (element,) = sch.get_loops(sch.get_sblock("lookup"))
    lane = sch.get(sch.split(element, [None, size])[-1])
    func = spelled(sch.mod["main"], [lane], lambda x, t: looked_up(x[0], t[0], size, permutes))
    tensors = [tvm.runtime.tensor(a) for a in (x, table, np.zeros(256, out))]
    tvm.tirx.build(func.with_attr("global_symbol", "main"), target=HOST)["main"](*tensors)
    np.testing.assert_array_equal(tensors[-1].numpy(), table[x.astype(np.int64) - low], strict=True)


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
