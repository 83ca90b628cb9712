"""Loops of few steps that store narrow numbers: LLVM's masks for the last of them must not write behind it."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from hawq_tvm.compiler import tir_pipeline
from hawq_tvm.core import arith, ops
from hawq_tvm.targets import target
from hawq_tvm.verify.reference import evaluate
from schedules.cpu.loops import nodes

from .one_layer import packed, run

HOST = target.host()
rng = np.random.default_rng(16)


@pytest.mark.parametrize("kind", ["uint8", "int16"])
@pytest.mark.parametrize("rows", [3, 5, 8])
def test_few_channels_behind_a_product(rows, kind):
    x = rng.integers(0, 256, (rows, 20), np.uint8)
    for channels in (3, 5, 7, 9, 11, 13, 15):
        w, m = rng.integers(-128, 128, (20, channels), np.int8), rng.integers(1 << 20, 1 << 30, channels)

        def body(emit, v, w=w, m=m):
            sums = emit(relax.op.matmul(v, ops.const(w, "int8"), out_dtype="int32"))
            how = {"qtype": arith.QType.of(kind), "zero_point": 3, "rounding": "half_up"}
            return ops.requantize([sums], [m], 12345, 42, **how)

        (out,) = run(body, x, target=HOST)
        expected = evaluate(packed(body, [(x.shape, "uint8")]), {"x0": x})["output0"]
        np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("kind", ["int8", "int16"])
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 9), (2, 13), (5, 5, 5), (6, 9, 4)], ids=str)
def test_few_elements(shape, kind):
    x = rng.integers(-(2**20), 2**20, shape).astype(np.int32)

    def body(emit, v):
        return ops.requantize([v], [987654321], 7, 42, qtype=arith.QType.of(kind), zero_point=0, rounding="half_even")

    (out,) = run(body, x, target=HOST)
    expected = evaluate(packed(body, [(shape, "int32")]), {"x0": x})["output0"]
    np.testing.assert_array_equal(out, expected, strict=True)


LOOPS = """
@T.prim_func(s_tir=True)
def main(x: T.Buffer((256, 9), "int32"), y: T.Buffer((256, 9), "int8")):
    for j in range(9):
        for i in range({steps}):
            y[i, j] = T.Cast("int8", x[i, j] + {j})
        for i in range(9):
            y[i + 9, j] = {value}
"""


@pytest.mark.parametrize(
    ("steps", "value", "unrolled"),
    [
        (8, 'T.Cast("int8", x[i, j])', True),
        (9, 'T.Cast("int8", x[i, j])', True),  # nests beside each other are unrolled each on its own
        (81, "y[i, j]", True),
        (256, "y[i, j]", False),  # more than LLVM unrolls: the outer loop stays an outer one
    ],
)
def test_which_loops_are_unrolled(steps, value, unrolled):
    func = tvm.script.from_source(LOOPS.format(steps=steps, value=value, j="j"))
    marked = tir_pipeline.unroll_masked(tvm.IRModule({"main": func}))["main"]
    outer = next(loop for loop in nodes(tirx.For, marked) if loop.loop_var.name == "j")
    assert (outer.kind == tirx.ForKind.UNROLLED) == unrolled
