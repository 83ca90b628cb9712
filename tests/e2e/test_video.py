"""A network over three dimensions: its convolutions and pools run as those of images, exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht

from ..frontend.onnx_models import onnxruntime
from ..models import Graph, float_output

F = np.float32


def video(unfolded: bool) -> onnx.ModelProto:
    """A residual block with strides, a depthwise convolution, pools and a classifier; unfolded: BatchNormalization
    behind every convolution.
    """
    g = Graph(7)

    def conv(x: str, outputs: int, inputs: int, kernel: int, stride: int = 1, relu: bool = True, group: int = 1) -> str:
        w = g.weight([outputs, inputs // group, *[kernel] * 3])
        y = g.conv(x, w, pads=[kernel // 2] * 6, strides=[stride] * 3, group=group)
        if unfolded:
            parameters = [g.constant(g.rng.uniform(0.5, 1.5, outputs).astype(F), TensorProto.FLOAT) for _ in range(4)]
            y = g.node("BatchNormalization", [y, *parameters])
        return g.qdq(g.node("Relu", [y]) if relu else y, F(0.06), 0 if relu else 128)

    x = conv(g.qdq(g.input("x", [1, 3, 4, 6, 6]), F(0.05), 128), 8, 3, 3, 2)
    y = g.qdq(g.node("Relu", [g.node("Add", [conv(x, 8, 8, 3, relu=False), x])]), F(0.08), 0)
    y = conv(y, 8, 8, 3, group=8)
    y = g.node("MaxPool", [y], kernel_shape=[2, 2, 2])
    y = g.qdq(g.node("AveragePool", [y], kernel_shape=[1, 2, 2], pads=[0, 1, 0, 0, 0, 0]), F(0.03), 0)
    y = g.node("Flatten", [g.qdq(g.node("GlobalAveragePool", [y]), F(0.03), 0)])
    return g.model([float_output(g.qdq(g.node("Gemm", [y, g.weight([10, 8])], transB=1), F(0.05), 128))])


@pytest.mark.parametrize("unfolded", [False, True])
def test_a_network_of_three_dimensions(unfolded: bool) -> None:
    model = video(unfolded)
    package = ht.compile(model)
    assert package.verify(random=2).ok and package.prove().ok
    feed = {"x": np.random.default_rng(0).normal(0, 2, (1, 3, 4, 6, 6)).astype(F)}
    (got,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.051)  # a step of 0.05: ONNX Runtime computes in float32
