"""Blocks that quantizers leave in float between two quantizes compile to integers, and state how far they are off."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.verify.distances import distances
from hawq_tvm.verify.reference import evaluate

from ..frontend.onnx_models import onnxruntime as simulated
from ..models import TYPES, Graph, float_output


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


def by_channel(g: Graph, y: str, channels: int) -> onnx.ModelProto:
    """The model whose output is y, quantized with a scale for every channel."""
    scale = g.constant(np.linspace(0.01, 0.05, channels).astype(np.float32), TensorProto.FLOAT)
    zero = g.constant(np.zeros(channels, np.int64), TensorProto.INT8)
    g.nodes.append(onnx.helper.make_node("QuantizeLinear", [y, scale, zero], ["y"], axis=1))
    return g.model([("y", TensorProto.INT8)])


@pytest.mark.parametrize("case", ["exp", "exp of sums", "log", "softmax", "joined", "largest"])
def test_a_result_with_a_scale_for_every_channel(case: str) -> None:
    """Functions are infinite or beyond every scale somewhere, where the integers saturate."""
    g = Graph(8)
    x = g.dq(g.input("x", [3, 5], TYPES["int8"][0]), np.float32(3 if case.startswith("exp") else 0.05), 3, "int8")
    weight = g.dq(g.constant(g.rng.integers(-20, 20, (5, 4)), TensorProto.INT8), np.float32(0.5), 0, "int8")
    p = g.node("Softmax", [x], axis=-1)
    made = {
        "exp": lambda: g.node("Exp", [x]),
        "exp of sums": lambda: g.node("Exp", [g.node("MatMul", [x, weight])]),
        "log": lambda: g.node("Log", [g.node("Relu", [x])]),
        "softmax": lambda: p,
        "joined": lambda: g.node("Concat", [x, p], axis=1),
        "largest": lambda: g.node("Max", [x, p]),
    }[case]()
    model = by_channel(g, made, {"joined": 10, "exp of sums": 4}.get(case, 5))
    package = ht.compile(model)
    feed = {"x": g.rng.integers(-128, 128, (3, 5)).astype(np.int8)}
    # Optimized, ONNX Runtime 1.31 takes the first scale of a softmax for all channels.
    np.testing.assert_array_equal(package.run(feed)["y"], simulated(model, feed)["y"])
    assert package.verify(random=1, seed=0).ok


FALLING = {
    "largest": ("ReduceMax", {"axes": [1]}),
    "least": ("ReduceMin", {"axes": [1]}),
    "windows": ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    "slope": ("LeakyRelu", {"alpha": 0.25}),
    "magnitude": ("Abs", {}),
}


@pytest.mark.parametrize("case", FALLING)
def test_integers_that_fall_where_real_values_rise(case: str) -> None:
    """Channels times negative numbers: all powers of two, so that float32 is exact."""
    g, (op, attributes) = Graph(9, opset=17), FALLING[case]
    x = g.dq(g.input("x", [2, 3, 6, 6], TYPES["int8"][0]), np.float32(1 / 16), 3, "int8")
    factors = np.full(3, -1) if op.startswith("Reduce") else np.array([-1, 1, -0.5])
    y = g.node("Mul", [x, g.constant(factors.reshape(3, 1, 1).astype(np.float32), TensorProto.FLOAT)])
    model = g.model([float_output(g.qdq(g.node(op, [y], **attributes), np.float32(1 / 8), 1, "int8"))])
    package = ht.compile(model)
    feed = {"x": g.rng.integers(-128, 128, (2, 3, 6, 6)).astype(np.int8)}
    (got,), (wanted,) = package.run(feed).values(), simulated(model, feed).values()
    np.testing.assert_array_equal(got, wanted)
    assert package.verify(random=1, seed=0).ok
