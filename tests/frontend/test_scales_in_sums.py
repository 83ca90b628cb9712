"""Scales that differ along what a convolution or product sums: per-channel data, blocked weights, and what reads both.

Every model is compared with ONNX Runtime by the fixture of this folder, and here with exact rationals.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.ops import op_name
from hawq_tvm.frontend.onnx import import_onnx
from hawq_tvm.verify.reference import evaluate

from ..models import TYPES, Graph

F = np.float32
FLOAT, I8, U8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.UINT8
exactly = np.vectorize(Fraction, otypes=[object])
nearest = np.vectorize(round, otypes=[object])


def scales(rng: Any, n: int | tuple[int, ...], size: float) -> np.ndarray:
    return (size * rng.uniform(0.3, 1, n)).astype(F)


def dequantized(q: np.ndarray, scale: np.ndarray, zero: Any, axis: int) -> np.ndarray:
    """The exact real numbers of integers with one scale (and zero) for each place along an axis."""
    shape = [-1 if i == axis else 1 for i in range(q.ndim)]
    step, level = (np.asarray(v).reshape(shape) if np.size(v) > 1 else np.asarray(v) for v in (scale, zero))
    return (q.astype(object) - level.astype(object)) * exactly(step)


def requantized(real: np.ndarray, scale: Any, zero: Any, kind: str) -> np.ndarray:
    """(A2) of exact numbers: half to even, one scale and zero for each channel."""
    shape = (1, -1) + (1,) * (real.ndim - 2)
    step, level = (np.asarray(v).reshape(shape) if np.size(v) > 1 else np.asarray(v) for v in (scale, zero))
    return np.clip(nearest(real / exactly(step)) + level, *TYPES[kind][1:]).astype(np.int64)


def convolution(x: np.ndarray, w: np.ndarray, pads: int = 0, stride: int = 1, groups: int = 1) -> np.ndarray:
    """An exact convolution of rank 4."""
    x = np.pad(x, ((0, 0), (0, 0), (pads, pads), (pads, pads)), constant_values=Fraction(0))
    windows = sliding_window_view(x, w.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]  # type: ignore[call-overload]
    inputs, outputs = w.shape[1], w.shape[0] // groups
    parts = [
        np.einsum("nchwij,ocij->nohw", windows[:, g * inputs : (g + 1) * inputs], w[g * outputs : (g + 1) * outputs])
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)


def transposed(x: np.ndarray, w: np.ndarray, pads: int, stride: int, groups: int) -> np.ndarray:
    """An exact transposed convolution: every element of the data spreads the kernel over the result."""
    n, c, height, width = x.shape
    outputs, reach = w.shape[1], w.shape[2]
    size = [(d - 1) * stride + reach for d in (height, width)]
    y = np.full((n, outputs * groups, *size), Fraction(0), object)
    for i in range(c):
        first = i // (c // groups) * outputs
        for h in range(height):
            for v in range(width):
                part = x[:, i, h, v][:, None, None, None] * w[i][None]
                top, left = h * stride, v * stride
                y[:, first : first + outputs, top : top + reach, left : left + reach] += part
    return y[:, :, pads : size[0] - pads, pads : size[1] - pads]


def run(model: onnx.ModelProto, **feed: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """The only output of the packed module, and the operators of the integer module."""
    module = import_onnx(model)
    integer = pipeline.until(module, pipeline.choose_layout)
    names = [op_name(b.value).split(".")[-1] for b in stages.bindings(integer["main"])]
    (result,) = evaluate(pipeline.to_packed(module), feed).values()
    return result.astype(np.int64), names


def ending(g: Graph, real: str, scale: Any, zero: Any, kind: str = "uint8", **attrs: Any) -> onnx.ModelProto:
    y = g.q(real, scale, zero, kind, **attrs)
    return g.model([(y, TYPES[kind][0])])


@pytest.mark.parametrize("zeros", ["one", "many"])
@pytest.mark.parametrize(
    "outputs, groups, pads, parts", [(6, 6, 1, 1), (12, 6, 0, 1), (6, 1, 1, 4), (6, 3, 0, 4), (4, 2, 1, 4)]
)
def test_data_with_a_scale_for_each_channel(outputs: int, groups: int, pads: int, parts: int, zeros: str) -> None:
    """Depthwise it is a scale of the sum; elsewhere the weights take it, as digits of base 256."""
    g, channels = Graph(3), 6
    rng = np.random.default_rng(4)
    s = scales(rng, channels, 0.05)
    z = np.full(channels, 7) if zeros == "one" else rng.integers(0, 200, channels)
    w, ws = rng.integers(-127, 128, (outputs, channels // groups, 3, 3)), scales(rng, outputs, 0.01)
    weight = g.dq(g.constant(w, I8), ws, np.zeros(outputs, int), "int8", axis=0)
    x = g.dq(g.input("x", [2, channels, 5, 6], U8), s, z, axis=1)
    model = ending(g, g.conv(x, weight, group=groups, pads=[pads] * 4), F(0.31), 90)
    q = rng.integers(0, 256, (2, channels, 5, 6))
    got, names = run(model, x=q.astype(np.uint8))
    exact = convolution(dequantized(q, s, z, 1), dequantized(w, ws, 0, 0), pads, 1, groups)
    np.testing.assert_array_equal(got, requantized(exact, F(0.31), 90, "uint8"))
    assert names.count("conv2d") == parts


def test_scales_that_are_powers_of_two_apart_make_one_wider_weight() -> None:
    g, rng = Graph(1), np.random.default_rng(1)
    s = (0.03 * 2.0 ** np.array([0, -3, -1, -7])).astype(F)
    w = rng.integers(-127, 128, (5, 4, 1, 1))
    x = g.dq(g.input("x", [1, 4, 3, 3], I8), s, np.zeros(4, int), "int8", axis=1)
    model = ending(g, g.conv(x, g.dq(g.constant(w, I8), F(0.02), 0, "int8")), F(0.2), 4, "int8")
    q = rng.integers(-128, 128, (1, 4, 3, 3))
    got, names = run(model, x=q.astype(np.int8))
    exact = convolution(dequantized(q, s, 0, 1), dequantized(w, F(0.02), 0, 0))
    np.testing.assert_array_equal(got, requantized(exact, F(0.2), 4, "int8"))
    assert names.count("conv2d") == 1


@pytest.mark.parametrize("stride, pads", [(2, 1), (3, 0)])
@pytest.mark.parametrize("groups, outputs", [(1, 3), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_transposed_convolution(stride: int, pads: int, groups: int, outputs: int, axis: int) -> None:
    """Scales along the weight's first axis belong to the data's channels, which depthwise are the outputs, too."""
    g, rng = Graph(2), np.random.default_rng(7)
    w = rng.integers(-127, 128, (4, outputs, 3, 3))
    ws = scales(rng, w.shape[axis], 0.01)
    bias = rng.normal(size=groups * outputs).astype(F)
    x = g.dq(g.input("x", [1, 4, 4, 3], U8), F(0.02), 120)
    weight = g.dq(g.constant(w, I8), ws, np.zeros(len(ws), int), "int8", axis=axis)
    deconv = g.node(
        "ConvTranspose", [x, weight, g.constant(bias, FLOAT)], group=groups, strides=[stride] * 2, pads=[pads] * 4
    )
    q = rng.integers(0, 256, (1, 4, 4, 3))
    got, names = run(ending(g, deconv, F(0.05), 131), x=q.astype(np.uint8))
    exact = transposed(dequantized(q, F(0.02), 120, 1), dequantized(w, ws, 0, axis), pads, stride, groups)
    exact = exact + exactly(bias).reshape(1, -1, 1, 1)
    np.testing.assert_array_equal(got, requantized(exact, F(0.05), 131, "uint8"))
    assert names.count("conv2d") == (4 if axis == 0 and groups < 4 else 1)


@pytest.mark.parametrize("kind, parts", [("int8", 4), ("int4", 4), ("uint4", 4)])
@pytest.mark.parametrize("block", [2, 6])
def test_blocked_weights_of_a_convolution(kind: str, parts: int, block: int) -> None:
    g, rng = Graph(5), np.random.default_rng(block)
    low, high = TYPES[kind][1:]
    w = rng.integers(low, high + 1, (5, 6, 3, 3))
    blocks = -(-6 // block)
    ws = scales(rng, (5, blocks, 3, 3), 0.01)
    wz = rng.integers(low, high + 1, ws.shape)
    weight = g.dq(g.constant(w, TYPES[kind][0]), ws, wz, kind, axis=1, block_size=block)
    x = g.dq(g.input("x", [1, 6, 5, 5], I8), F(0.03), -5, "int8")
    got, names = run(
        ending(g, g.conv(x, weight), F(0.1), 0, "int8"), x=(q := rng.integers(-128, 128, (1, 6, 5, 5))).astype(np.int8)
    )
    spread = [np.repeat(a, block, 1)[:, :6] for a in (ws, wz)]
    exact = convolution(dequantized(q, F(0.03), -5, 1), (w - spread[1]).astype(object) * exactly(spread[0]))
    np.testing.assert_array_equal(got, requantized(exact, F(0.1), 0, "int8"))
    assert names.count("conv2d") == parts


@pytest.mark.parametrize("depth, block, products", [(64, 32, 2), (96, 32, 3), (256, 32, 4), (1024, 32, 4)])
def test_blocked_weights_of_a_product(depth: int, block: int, products: int) -> None:
    """Few blocks are a product each; many, as digits of the weights, no more than five."""
    g, rng = Graph(6), np.random.default_rng(depth)
    w = rng.integers(-8, 8, (depth, 7))
    ws = scales(rng, (depth // block, 7), 0.02)
    weight = g.dq(g.constant(w, TYPES["int4"][0]), ws, np.zeros(ws.shape, int), "int4", axis=0, block_size=block)
    x = g.dq(g.input("x", [3, depth], U8), F(0.01), 130)
    q = rng.integers(0, 256, (3, depth))
    got, names = run(ending(g, g.node("MatMul", [x, weight]), F(0.11), 100), x=q.astype(np.uint8))
    exact = dequantized(q, F(0.01), 130, 1) @ (w.astype(object) * exactly(np.repeat(ws, block, 0)))
    np.testing.assert_array_equal(got, requantized(exact, F(0.11), 100, "uint8"))
    assert names.count("matmul") == products


@pytest.mark.parametrize("depth, block", [(64, 32), (256, 32)])
def test_an_output_that_nothing_quantizes(depth: int, block: int) -> None:
    """(A1b): several products and a float bias, and a ReLU, exact but for the rounding to float32."""
    g, rng = Graph(6), np.random.default_rng(depth)
    w, bias = rng.integers(-8, 8, (depth, 7)), rng.normal(size=7).astype(F)
    ws = scales(rng, (depth // block, 7), 0.02)
    weight = g.dq(g.constant(w, TYPES["int4"][0]), ws, np.zeros(ws.shape, int), "int4", axis=0, block_size=block)
    x = g.dq(g.input("x", [3, depth], U8), F(0.01), 130)
    real = g.node("Relu", [g.node("Add", [g.node("MatMul", [x, weight]), g.constant(bias, FLOAT)])])
    q = rng.integers(0, 256, (3, depth))
    (got,) = evaluate(pipeline.to_packed(import_onnx(g.model([(real, FLOAT)]))), {"x": q.astype(np.uint8)}).values()
    exact = dequantized(q, F(0.01), 130, 1) @ (w.astype(object) * exactly(np.repeat(ws, block, 0))) + exactly(bias)
    np.testing.assert_array_equal(got, np.maximum(exact, Fraction(0)).astype(np.float64).astype(F))


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool", "Pad", "Flatten", "Concat", "Reshape"])
@pytest.mark.parametrize("kind", ["uint8", "int16"])
def test_what_reads_data_with_a_scale_and_a_zero_for_each_channel(op: str, kind: str) -> None:
    """Pools, padding and movement, then a product or a quantize by channel; ONNX Runtime's are compared."""
    g = Graph(4)
    size = F(0.04 if kind == "uint8" else 0.0004)

    def by_channel(x: str, n: int) -> str:
        s, z = scales(g.rng, n, size), g.rng.integers(*TYPES[kind][1:], n) // (1 if kind == "uint8" else 4)
        return g.dq(g.q(x, s, z, kind, axis=1), s, z, kind, axis=1)

    x = by_channel(g.input("x", [2, 4, 6, 6]), 4)
    window = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}
    if op in ("AveragePool", "MaxPool"):
        y = by_channel(g.node(op, [x], **window), 4)
        y = g.conv(y, g.weight([4, 1, 3, 3]), group=4)
    elif op == "Pad":
        y = g.node(op, [x, g.constant([0, 1, 1, 0, 0, 2, 0, 1], onnx.TensorProto.INT64)])
    elif op == "Concat":
        other = g.qdq(g.conv(x, g.weight([3, 4, 1, 1])), F(0.05), 9)
        y = g.conv(by_channel(g.node(op, [x, other], axis=1), 7), g.weight([7, 1, 3, 3]), group=7)
    elif op == "Flatten":
        y = g.node("Gemm", [g.node(op, [x]), g.weight([3, 144])], transB=1)
    else:  # a channel shuffle
        y = g.node(op, [x, g.constant([2, 2, 2, 6, 6], onnx.TensorProto.INT64)])
        y = g.node("Transpose", [y], perm=[0, 2, 1, 3, 4])
        y = by_channel(g.node(op, [y, g.constant([2, 4, 6, 6], onnx.TensorProto.INT64)]), 4)
        y = g.conv(y, g.weight([4, 1, 3, 3]), group=4)
    module = import_onnx(g.model([(g.qdq(y, F(0.1), 120), FLOAT)]))
    assert "requantize" in [
        op_name(b.value).split(".")[-1] for b in stages.bindings(pipeline.until(module, pipeline.choose_layout)["main"])
    ]


def test_a_shuffled_concatenation_quantized_by_channel_is_refused() -> None:
    g = Graph(4)
    x = g.qdq(g.input("x", [1, 2, 4, 4]), F(0.04), 9)
    other = g.qdq(g.conv(x, g.weight([2, 2, 1, 1])), F(0.05), 9)
    y = g.node("Reshape", [g.node("Concat", [x, other], axis=1), g.constant([1, 2, 2, 4, 4], onnx.TensorProto.INT64)])
    y = g.node(
        "Reshape", [g.node("Transpose", [y], perm=[0, 2, 1, 3, 4]), g.constant([1, 4, 4, 4], onnx.TensorProto.INT64)]
    )
    with pytest.raises(ModelError, match=r"differ between channels of a moved concatenation.*one scale"):
        pipeline.to_packed(import_onnx(ending(g, y, F([0.1, 0.2, 0.3, 0.4]), np.zeros(4, int), axis=1)))


def test_run_time_weights_want_one_scale_for_the_data() -> None:
    g = Graph(4)
    s = F([0.1, 0.2])
    x = g.dq(g.input("x", [1, 2, 4, 4], U8), s, np.zeros(2, int), axis=1)
    y = g.conv(x, g.dq(g.input("w", [3, 2, 1, 1], I8), F(0.1), 0, "int8"))
    with pytest.raises(ModelError, match="one scale per channel and its weight is not constant"):
        pipeline.to_packed(import_onnx(ending(g, y, F(0.1), 0)))


def test_data_with_a_scale_for_each_column_of_a_product() -> None:
    g, rng = Graph(8), np.random.default_rng(8)
    s, z = scales(rng, 10, 0.05), rng.integers(0, 256, 10)
    w = rng.integers(-127, 128, (10, 4))
    x = g.dq(g.input("x", [3, 10], U8), s, z, axis=1)
    q = rng.integers(0, 256, (3, 10))
    got, _ = run(
        ending(g, g.node("MatMul", [x, g.dq(g.constant(w, I8), F(0.01), 0, "int8")]), F(0.2), 128),
        x=q.astype(np.uint8),
    )
    exact = dequantized(q, s, z, 1) @ dequantized(w, F(0.01), 0, 0)
    np.testing.assert_array_equal(got, requantized(exact, F(0.2), 128, "uint8"))


@pytest.mark.parametrize("zeros", ["one", "many"])
@pytest.mark.parametrize("clip", [None, (0.0, 6.0), (0.0, 1.3)])
def test_quantize_by_channel(zeros: str, clip: tuple[float, float] | None) -> None:
    """What NNCF writes in front of a depthwise convolution: a clip, then a scale (and zero point) for each channel."""
    g, rng = Graph(9), np.random.default_rng(9)
    s = scales(rng, 5, 0.04)
    z = np.full(5, 0) if zeros == "one" else rng.integers(0, 256, 5)
    w = rng.integers(-127, 128, (5, 3, 1, 1))
    x = g.dq(g.input("x", [1, 3, 6, 6], I8), F(0.03), 3, "int8")
    real = g.conv(x, g.dq(g.constant(w, I8), F(0.011), 0, "int8"))
    if clip:
        real = g.node("Clip", [real, *(g.constant(F(v), FLOAT, ()) for v in clip)])
    q = rng.integers(-128, 128, (1, 3, 6, 6))
    got, _ = run(ending(g, real, s, z, axis=1), x=q.astype(np.int8))
    exact = convolution(dequantized(q, F(0.03), 3, 1), dequantized(w, F(0.011), 0, 0))
    if clip:
        exact = np.minimum(np.maximum(exact, Fraction(clip[0])), Fraction(clip[1]))
    np.testing.assert_array_equal(got, requantized(exact, s, z, "uint8"))
