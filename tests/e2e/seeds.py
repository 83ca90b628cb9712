"""What mutants are made of: networks in every format that ONNX files hold quantized models in, and the table of
cases.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..cases import builders as cases
from ..frontend.onnx_models import graph_model, normal
from ..models import Graph, float_output, residual_net

F = np.float32
MICROSOFT, QONNX = "com.microsoft", "qonnx.custom_op.general"


def many_handlers(opset: int) -> onnx.ModelProto:
    """A small network that touches most of the importer's handlers; its tail is float."""
    pairs = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"),
        helper.make_node("MaxPool", ["xq"], ["p"], name="pool", kernel_shape=[2, 2], pads=[1, 0, 0, 1]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["xd"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="dqw", axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[2, 1], group=2),
        helper.make_node("BatchNormalization", ["c", "one", "b", "b", "one"], ["n"], name="bn"),
        helper.make_node("Clip", ["n", "lo", "hi"], ["r"], name="clip"),
        helper.make_node("Resize", ["r", "", "scales"], ["u"], name="up", mode="linear"),
        helper.make_node("Slice", ["u", "begin", "end", "axes"], ["cut"], name="cut"),
        helper.make_node("Pad", ["cut", "pads", ""], ["padded"], name="pad", mode="edge"),
        helper.make_node("Concat", ["padded", "padded"], ["cat"], name="cat", axis=1),
        helper.make_node("AveragePool", ["cat"], ["avg"], name="avg", kernel_shape=[2, 2], ceil_mode=1, strides=[2, 2]),
        helper.make_node("Shape", ["avg"], ["shape"], name="shape"),
        helper.make_node("Gather", ["shape", "first"], ["batch"], name="batch"),
        helper.make_node("Concat", ["batch", "rest"], ["to"], name="to", axis=0),
        helper.make_node("Reshape", ["avg", "to"], ["flat"], name="flat"),
        helper.make_node("QuantizeLinear", ["flat", "s", "z"], ["fq"], name="fq"),
        helper.make_node(
            "QGemm",
            ["fq", "s", "z", "g", "s", "gz", "", "s", "z"],
            ["y8"],
            name="gemm",
            domain="com.microsoft",
            transB=1,
        ),
        helper.make_node("QLinearSigmoid", ["y8", "s", "z", "s", "z"], ["sig"], name="sig", domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["sig", "s", "z"], ["real"], name="out"),
        helper.make_node("Split", ["real"], ["y", "y2"], name="split", axis=1),
        helper.make_node("ArgMax", ["y"], ["best"], name="best", axis=1),
        helper.make_node("ReduceMean", ["y2"], ["mean"], name="mean", keepdims=0),
    ]
    rng = np.random.default_rng(0)
    constants = {
        "s": F(0.05),
        "z": np.uint8(7),
        "w": rng.integers(-99, 99, (4, 2, 3, 3)).astype(np.int8),
        "ws": np.asarray([0.01, 0.02, 0.03, 0.04], F),
        "b": normal(4),
        "one": np.ones(4, F),
        "lo": F(0),
        "hi": F(6),
        "scales": np.asarray([1, 1, 2, 1.5], F),
        "begin": np.asarray([1]),
        "end": np.asarray([9]),
        "axes": np.asarray([2]),
        "pads": np.asarray([0, 0, 1, 0, 0, 0, 0, 1]),
        "first": np.asarray([0]),
        "rest": np.asarray([-1]),
        "g": rng.integers(-99, 99, (6, 224)).astype(np.int8),
        "gz": np.int8(0),
    }
    return graph_model(pairs, {"x": normal(1, 4, 8, 8)}, ["y", "best", "mean", "to"], constants, opset=opset)


def qoperator() -> onnx.ModelProto:
    """A convolution, a sum, a pool and a product, all QLinear."""
    g = Graph(11, opset=13)

    def scaled(scale: float, zero: int, kind: int = TensorProto.UINT8) -> list[str]:
        return [g.constant(F(scale), TensorProto.FLOAT, ()), g.constant(zero, kind, ())]

    x = g.input("x", [1, 4, 6, 6], TensorProto.UINT8)
    weight = [
        g.constant(g.rng.integers(-128, 128, (4, 2, 3, 3)), TensorProto.INT8),
        *scaled(0.004, 0, TensorProto.INT8),
    ]
    bias = g.constant(g.rng.integers(-900, 900, 4), TensorProto.INT32)
    y = g.node("QLinearConv", [x, *scaled(0.03, 100), *weight, *scaled(0.19, 130), bias], pads=[1, 1, 1, 1], group=2)
    y = g.node("QLinearAdd", [y, *scaled(0.19, 130), x, *scaled(0.03, 100), *scaled(0.2, 128)], MICROSOFT)
    y = g.node("QLinearGlobalAveragePool", [y, *scaled(0.2, 128), *scaled(0.15, 110)], MICROSOFT)
    y = g.node("Flatten", [y])
    second = [g.constant(g.rng.integers(0, 256, (4, 5)), TensorProto.UINT8), *scaled(0.008, 130)]
    return g.model(
        [(g.node("QLinearMatMul", [y, *scaled(0.15, 110), *second, *scaled(0.4, 120)]), TensorProto.UINT8)],
        ir_version=8,
    )


def qonnx() -> onnx.ModelProto:
    """Weights and data by Quant nodes, an average cut to fewer bits by Trunc."""
    g = Graph(12)

    def real(values: object) -> str:
        return g.constant(np.asarray(values, F), TensorProto.FLOAT)

    def quant(x: str, scale: object, bits: int, **attributes: object) -> str:
        return g.node(
            "Quant",
            [x, real(scale), real(0), real(bits)],
            QONNX,
            **{"signed": 1, "narrow": 0, "rounding_mode": "ROUND", **attributes},
        )

    x = quant(g.input("x", [1, 3, 6, 6]), 0.04, 8)
    w = quant(real(g.rng.normal(size=(4, 3, 3, 3)) / 9), np.full((4, 1, 1, 1), 0.03), 4, narrow=1)
    y = quant(g.node("Relu", [g.conv(x, w, pads=[1, 1, 1, 1])]), 0.0625, 6, signed=0)
    y = g.node(
        "Trunc",
        [g.node("AveragePool", [y], kernel_shape=[2, 2], strides=[2, 2]), *map(real, (0.0625 / 4, 0, 8, 6))],
        QONNX,
        rounding_mode="FLOOR",
    )
    return g.model([float_output(quant(g.node("Flatten", [y]), 0.1, 5))])


def attention() -> onnx.ModelProto:
    """Two products of run-time operands around a Softmax, transposes and reshapes."""
    g = Graph(13)
    x = g.qdq(g.input("x", [1, 5, 8]), F(0.03), 120)
    q, k, v = (g.qdq(g.node("MatMul", [x, g.weight([8, 8], axis=1)]), F(0.05), z) for z in (128, 110, 140))
    shape = g.constant(np.array([1, 5, 2, 4]), TensorProto.INT64)
    heads = [
        g.node("Transpose", [g.node("Reshape", [t, shape])], perm=perm)
        for t, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
    ]
    weights = g.qdq(g.node("Softmax", [g.qdq(g.node("MatMul", heads[:2]), F(0.02), 128)], axis=-1), F(1 / 256), 0)
    return g.model([float_output(g.qdq(g.node("MatMul", [weights, heads[2]]), F(0.04), 128))])


def tables() -> onnx.ModelProto:
    """Functions of one tensor, sums and products of two, joins of different scales."""
    g = Graph(14)
    x = g.qdq(g.input("x", [1, 4, 5, 6]), F(0.04), 128)
    s = g.qdq(g.node("Sigmoid", [x]), F(1 / 256), 0)
    m = g.qdq(g.node("Mul", [x, s]), F(0.03), 30)
    j = g.qdq(g.node("Concat", [m, x], axis=1), F(0.035), 100)
    up = g.qdq(g.node("Resize", [j, "", g.constant(F([1, 1, 2, 2]), TensorProto.FLOAT)], mode="linear"), F(0.035), 100)
    r = g.qdq(g.node("LeakyRelu", [up], alpha=0.1), F(0.03), 20)
    return g.model([float_output(g.qdq(g.node("MaxPool", [r], kernel_shape=[2, 2], strides=[2, 2]), F(0.03), 20))])


SEEDS: dict[str, Callable[[], onnx.ModelProto]] = {
    "residual": lambda: residual_net(size=5),
    "residual, 4 bits": lambda: residual_net("int4", "uint4", size=5),
    "residual, 16 bits": lambda: residual_net("int8", "int16", size=5),
    "handlers, opset 13": lambda: many_handlers(13),
    "handlers, opset 18": lambda: many_handlers(18),
    "qoperator": qoperator,
    "qonnx": qonnx,
    "attention": attention,
    "tables": tables,
    "means": cases.mean_network,
    "conv1d": lambda: cases.conv1d("Conv"),
    "transpose1d": lambda: cases.conv1d("ConvTranspose", 2),
    "chain": lambda: cases.doubled(6),
    "leaky": lambda: cases.leaky_gemm(3),
    "pad": lambda: cases.padded(1.0, "uint8"),
    "resize": cases.resized,
    "slice": lambda: cases.sliced(-1),
    "functions": lambda: cases.nested_functions(2),
    "constant": lambda: cases.without_kernels("both"),
    "bias": lambda: cases.float_bias(0.5, 0.01),
    "float": cases.dead_layer,
}
