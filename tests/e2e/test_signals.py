"""Networks of one-dimensional convolutions: one kernel for each product, nothing moved between them."""

from __future__ import annotations

import numpy as np
import onnx

import hawq_tvm as ht

from ..frontend.onnx_models import onnxruntime
from ..models import Graph, float_output


def speech(blocks: int, channels: int, length: int) -> onnx.ModelProto:
    """Depthwise and pointwise convolutions with residual sums, a pool, a head and a mean over time."""
    g = Graph(4)

    def convolution(x: str, outputs: int, kernel: int, relu: bool = True, **window: int) -> str:
        groups = window.pop("group", 1)
        w = g.weight([outputs, channels // groups, kernel])
        pads = [window.get("dilations", 1) * (kernel // 2)] * 2
        y = g.conv(x, w, pads=pads, group=groups, **{k: [v] for k, v in window.items()})
        return g.qdq(g.node("Relu", [y]) if relu else y, np.float32(0.05), 0 if relu else 128)

    x = g.qdq(g.input("x", [1, channels, length]), np.float32(0.03), 125)
    for i in range(blocks):
        y = convolution(x, channels, 5 + 2 * i, relu=False, group=channels, dilations=1 + i % 2)
        y = convolution(y, channels, 1, relu=False)
        x = g.qdq(g.node("Relu", [g.node("Add", [y, x])]), np.float32(0.06), 0)
    x = g.node("MaxPool", [x], kernel_shape=[2], strides=[2])
    mean = g.node("GlobalAveragePool", [convolution(x, 7, 1, relu=False)])
    return g.model([float_output(g.qdq(mean, np.float32(0.05), 128))])


def test_a_product_is_one_kernel_and_only_the_borders_move() -> None:
    """Seven products; beside them two borders, two kernels to give the input its layout, a pool and a mean, what the
    pool leaves out, and the form of the output.
    """
    model = speech(3, 32, 33)
    package = ht.compile(model)
    report = package.report()
    products = [r for r in report if r["rule"] not in ("cpu.elementwise", "cpu.window", "cpu.generic")]
    assert len(products) == 7 and len(report) <= len(products) + 8
    assert package.verify(random=2, seed=0).ok and package.prove().ok
    feed = {"x": np.random.default_rng(0).normal(size=(1, 32, 33)).astype(np.float32)}
    (found,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
    assert found.shape == wanted.shape == (1, 7, 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.051)  # a step of 0.05: ONNX Runtime sums in float32
