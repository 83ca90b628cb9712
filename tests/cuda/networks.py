"""A small network with every kind of layer that CUDA rules are for."""

from __future__ import annotations

import onnx

from ..models import Graph, float_output


def every_rule() -> onnx.ModelProto:
    """Convolution, depthwise, pools, residual addition, table, concat, global pooling, product, softmax."""
    g = Graph(5)
    x = g.qdq(g.input("x", [1, 3, 12, 12]), 0.02, 128)
    y = g.qdq(g.node("Relu", [g.conv(x, g.weight([16, 3, 3, 3]), pads=[1, 1, 1, 1])]), 0.05)
    d = g.qdq(g.conv(y, g.weight([16, 1, 3, 3]), pads=[1, 1, 1, 1], group=16), 0.07, 110)
    r = g.qdq(g.node("Add", [d, y]), 0.08, 60)
    s = g.qdq(g.node("Sigmoid", [r]), 1 / 255)
    p = g.qdq(g.node("MaxPool", [s], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), 1 / 255)
    a = g.qdq(g.node("AveragePool", [p], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1), 0.0041)
    c = g.qdq(g.node("Concat", [g.qdq(g.conv(a, g.weight([8, 16, 1, 1])), 0.01, 100), p], axis=1), 0.01, 100)
    f = g.node("Flatten", [g.qdq(g.node("GlobalAveragePool", [c]), 0.007, 90)])
    z = g.qdq(g.node("Gemm", [f, g.weight([100, 24])], transB=1), 0.03, 120)
    return g.model([float_output(g.qdq(g.node("Softmax", [z], axis=1), 1 / 256))])
