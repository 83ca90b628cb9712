"""Products of two activations: bytes of any sign and zero point are multiplied as they are stored."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import arith, ops, stages
from hawq_tvm.targets import target
from schedules import report

from ..models import Graph, float_output
from ..schedules.one_layer import run

VNNI = target.parse("x86-vnni")
rng = np.random.default_rng(2)


def product(left: tuple[str, int], right: tuple[str, int]) -> onnx.ModelProto:
    g = Graph()
    a = g.qdq(g.input("a", [2, 5, 16]), 0.02, left[1], left[0])
    b = g.qdq(g.input("b", [2, 16, 7]), 0.03, right[1], right[0])
    return g.model([float_output(g.qdq(g.node("MatMul", [a, b]), 0.5, 120))])


@pytest.mark.parametrize(
    ("left", "right", "types", "rule"),
    [
        (("uint8", 0), ("int8", 0), ("uint8", "int8"), "x86.vnni"),
        (("uint8", 0), ("uint8", 128), ("uint8", "int16"), "x86.vnni"),
        (("uint8", 7), ("uint8", 127), ("int16", "int16"), "x86.vnni"),
        (("int8", 0), ("int8", 0), ("int8", "int8"), "x86.vnni"),
        (("int8", 1), ("int16", 0), ("int16", "int16"), "cpu.contract"),
    ],
    ids=str,
)
def test_types_and_rule(left, right, types, rule):
    annotated = pipeline.import_annotated(product(left, right).SerializeToString())
    integer = pipeline.until(annotated, None)
    calls = [b.value for f in stages.private_functions(integer).values() for b in stages.bindings(f)]
    (call,) = (c for c in calls if ops.op_name(c) == "relax.matmul")
    assert tuple(ops.dtype_of(a) for a in call.args) == types
    tir, _ = pipeline.to_tir(integer, VNNI)
    assert [r["rule"] for r in report(tir) if "matmul" in r["function"]] == [rule]


@pytest.mark.parametrize("shapes", [((3, 7, 130), (3, 130, 33)), ((2, 2, 64, 64), (2, 2, 64, 32))], ids=str)
@pytest.mark.parametrize(("left", "right"), [("uint8", "int8"), ("int8", "int8"), ("int8", "int16")])
def test_the_extremes_are_exact(shapes, left, right):
    a, b = (rng.choice(np.array(arith.RANGES[t], t), s) for t, s in zip((left, right), shapes, strict=True))
    a[0], b[0] = arith.RANGES[left][1], arith.RANGES[right][0]
    (out,) = run(lambda e, x, y: relax.op.matmul(x, y, out_dtype="int32"), a, b, target=target.host())
    np.testing.assert_array_equal(out, (a.astype(np.int64) @ b.astype(np.int64)).astype(np.int32), strict=True)
