"""Small networks of every kind that the C interface must carry."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from ..models import Graph, float_output, residual_net


def tiny() -> onnx.ModelProto:
    """One convolution with odd sizes everywhere."""
    g = Graph(5)
    y = g.conv(g.qdq(g.input("picture", [1, 3, 7, 5]), 0.03, 128), g.weight([5, 3, 3, 3]), pads=[1, 1, 1, 1])
    return g.model([float_output(g.qdq(y, 0.07, 100))])


def concat() -> onnx.ModelProto:
    """Two branches of different widths joined."""
    g = Graph(6)
    x = g.qdq(g.input("x", [1, 6, 9, 9]), 0.05, 3, "int8")
    a = g.qdq(g.conv(x, g.weight([7, 6, 1, 1])), 0.2, 0, "int8")
    b = g.qdq(g.conv(x, g.weight([17, 6, 3, 3]), pads=[1, 1, 1, 1]), 0.1, -5, "int8")
    return g.model([float_output(g.qdq(g.node("Concat", [a, b], axis=1), 0.2, 1, "int8"))])


def several() -> onnx.ModelProto:
    """Two inputs of different types, three outputs of different types, one of them read again by a layer."""
    g = Graph(7)
    x = g.qdq(g.input("x", [2, 4, 6, 6]), 0.05, 120)
    y = g.dq(g.input("y", [2, 4, 6, 6], TensorProto.INT8), 0.02, -7, "int8")
    total = g.q(g.node("Add", [x, y]), 0.06, 100)
    z = g.q(g.conv(g.dq(total, 0.06, 100), g.weight([3, 4, 3, 3])), 0.3, 9)
    return g.model([(total, TensorProto.UINT8), (z, TensorProto.UINT8), float_output(g.dq(z, 0.3, 9))])


def split() -> onnx.ModelProto:
    """A layer with several results."""
    g = Graph(8)
    x = g.qdq(g.input("x", [1, 8, 5, 5]), 0.05, 7)
    parts = g.node("Split", [x], outputs=2, axis=1, num_outputs=2)
    other = parts + "_1"
    a = g.qdq(g.conv(parts, g.weight([4, 4, 1, 1])), 0.1, 3)
    return g.model([float_output(g.qdq(g.node("Add", [a, other]), 0.2, 5))])


def sub_byte() -> onnx.ModelProto:
    """4-bit inputs, weights and outputs, each element in a byte."""
    g = Graph(3)
    x = g.dq(g.input("x", [2, 6], TensorProto.INT4), 0.5, 0, "int4")
    return g.model([(g.q(g.node("MatMul", [x, g.weight([6, 4], "int4", axis=1)]), 0.07, 0, "int4"), TensorProto.INT4)])


def dynamic() -> onnx.ModelProto:
    """A kernel with three results, two of them scalars."""
    g = Graph(10)
    y = g.node("DynamicQuantizeLinear", [g.input("x", [3, 5])], outputs=3)
    return g.model([(y, TensorProto.UINT8), float_output(y + "_1"), (y + "_2", TensorProto.UINT8)])


def float_ends() -> onnx.ModelProto:
    """A float head and a float tail with functions of the mathematical library."""
    g = Graph(9)
    half = g.constant(np.float32(0.5), TensorProto.FLOAT)
    x = g.qdq(g.node("Mul", [g.input("x", [1, 3, 6, 6]), half]), 0.1, 3)
    y = g.qdq(g.conv(x, g.weight([4, 3, 1, 1])), 0.2)
    return g.model([float_output(g.node("Softmax", [y], axis=1))])


NETWORKS = {
    "tiny": tiny,
    "concat": concat,
    "several": several,
    "split": split,
    "sub_byte": sub_byte,
    "dynamic": dynamic,
    "float_ends": float_ends,
    "residual": residual_net,
    "residual_int8": lambda: residual_net("int8", "int8"),
    "residual_4": lambda: residual_net("int4", "uint4", 20),
    "residual_16": lambda: residual_net("int8", "int16"),
}
FLOAT = frozenset({"float_ends"})
