"""Blocks that quantizers leave in float between two quantizes compile to integers, and state how far they are off."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.verify.distances import distances
from hawq_tvm.verify.reference import evaluate

from ..models import Graph, float_output


def squeeze_and_excite() -> onnx.ModelProto:
    """A convolution, HardSwish, and a gate whose pool, float convolutions and HardSigmoid nothing quantizes."""
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 3, 12, 12]), 0.0247, 120)
    y = g.qdq(g.node("HardSwish", [g.conv(x, g.weight([8, 3, 3, 3]), pads=[1, 1, 1, 1])]), 0.0113, 31)
    gate = g.node("GlobalAveragePool", [y])
    for outputs, inputs in ((4, 8), (8, 4)):
        weight = g.constant(g.rng.normal(0, 0.4, (outputs, inputs, 1, 1)).astype(np.float32), TensorProto.FLOAT)
        bias = g.constant(g.rng.normal(0, 0.3, outputs).astype(np.float32), TensorProto.FLOAT)
        gate = g.node("Conv", [gate, weight, bias])
        gate = g.node("Relu" if outputs == 4 else "HardSigmoid", [gate])
    return g.model([float_output(g.qdq(g.node("Mul", [y, gate]), 0.0107, 29))])


def test_a_gate_in_float_is_computed_in_integers() -> None:
    model = squeeze_and_excite()
    module = pipeline.import_annotated(model)
    packed = pipeline.to_packed(module)
    assert not stages.float_tail(packed["main"])
    found = distances(packed)
    assert len(found) == 2 and max(found.values()) < 0.5
    x = np.random.default_rng(1).normal(0, 1.5, (1, 3, 12, 12)).astype(np.float32)
    (wanted,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    (got,) = evaluate(packed, {"x": x}).values()
    steps = np.rint(np.abs(got - wanted) / np.float32(0.0107))
    # One step of the first quantize, which float32 takes at another side, is at most one of the product.
    assert steps.max() <= 2 and (steps > 0).mean() < 0.02


def test_a_function_of_sums_is_counted() -> None:
    g = Graph(5)
    x = g.qdq(g.input("x", [1, 3, 8, 8]), 0.0247, 120)
    y = g.node("Sigmoid", [g.conv(x, g.weight([8, 3, 3, 3]))])
    model = g.model([float_output(g.qdq(y, 1 / 256, 0))])
    certificate = ht.compile(model).certificate()
    (distance,), (counted,) = certificate["distances"].values(), certificate["functions"].values()
    assert certificate["ok"] and not certificate["float_tail"] and 0 < distance < 0.05
    assert 0 < counted["differing"] < counted["thresholds"] <= 8 * 255
