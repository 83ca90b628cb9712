"""Small quantized models whose layers have odd shapes: what a GPU must compute exactly before a network is looked at.

One model holds many layers, each with an input and an output of its own, because every library costs a run of nvcc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

CHANNELS, WIDTHS, BATCH = (1, 3, 17, 65), (1, 7, 31), 3
# The forms of tensor-core products that the schedules know, as (activations, weights, whether activations are packed in
# memory).
FORMS = {
    "u8s8": ("uint8", "int8"),
    "s8s8": ("int8", "int8"),
    "u8s4": ("uint8", "int4"),
    "s8s4": ("int8", "int4"),
    "u4s4": ("uint4", "int4"),
    "s4s4": ("int4", "int4"),
}
RANGES = {
    "uint8": (TensorProto.UINT8, 0, 255),
    "int8": (TensorProto.INT8, -128, 127),
    "uint4": (TensorProto.UINT4, 0, 15),
    "int4": (TensorProto.INT4, -8, 7),
}
REACH = 1.74  # the images' largest magnitude, a little less


class _Writer:
    """A QDQ model, node by node; every method returns the name of what it made."""

    def __init__(self, seed: int, kind: str = "uint8") -> None:
        self.rng = np.random.default_rng(seed)
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def constant(self, values: Any, kind: int) -> str:
        array, name = np.asarray(values), f"c{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, kind, array.shape, array.ravel().tolist()))
        return name

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def quantized(self, x: str, reach: float) -> str:
        """x with the model's type, values of magnitude `reach` at the ends of its range."""
        proto, low, high = RANGES[self.kind]
        scale = self.constant(2 * reach / (high - low), TensorProto.FLOAT)
        zero = self.constant((low + high + 1) // 2, proto)
        return self.node("DequantizeLinear", [self.node("QuantizeLinear", [x, scale, zero]), scale, zero])

    def input(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *shape]))
        return self.quantized(name, REACH)

    def weights(self, shape: Sequence[int], kind: str, axis: int = 0) -> tuple[str, float]:
        """Weights over their whole range, and the deviation that a sum of products with them has."""
        proto, low, high = RANGES[kind]
        values = self.rng.integers(low, high, size=shape, endpoint=True)
        scales = (self.rng.uniform(0.3, 1, shape[axis]) / high).astype(np.float32)
        zeros = np.zeros(shape[axis], np.int64)
        name = self.node(
            "DequantizeLinear",
            [self.constant(values, proto), self.constant(scales, TensorProto.FLOAT), self.constant(zeros, proto)],
            axis=axis,
        )
        return name, 0.4 * float(np.prod(shape) / shape[axis]) ** 0.5

    def convolution(self, x: str, shape: Sequence[int], kind: str, **attributes: Any) -> str:
        weight, deviation = self.weights(shape, kind)
        return self.quantized(self.node("Conv", [x, weight], **attributes), 2 * deviation)

    def output(self, x: str) -> None:
        self.outputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "cases", self.inputs, self.outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def form(name: str) -> onnx.ModelProto:
    """Convolutions of one form at odd channels and widths: 1x1, 3x3, with stride and dilation; a grouped one; a
    product.
    """
    data, weight = FORMS[name]
    w = _Writer(sorted(FORMS).index(name), data)
    for i, channels in enumerate(CHANNELS):
        for j, width in enumerate(WIDTHS):
            out = CHANNELS[(i + j + 1) % len(CHANNELS)]
            window, options = [
                ((1, 1), {}),
                ((3, 3), {"pads": [1, 1, 1, 1]}),
                ((3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2], "strides": [2, 2]}),
            ][(i + j) % 3]
            # In the middle of a network 4-bit data is packed in memory: a layer before the one that is meant.
            x = w.convolution(w.input(channels, 5, width), (channels + 1, channels, 1, 1), weight)
            w.output(w.convolution(x, (out, channels + 1, *window), weight, **options))
    for channels in (16, 64):  # 4-bit data of such channels stays packed between layers
        x = w.convolution(w.input(channels, 7, 7), (channels, channels, 1, 1), weight)
        w.output(
            w.convolution(
                w.convolution(x, (2 * channels, channels, 3, 3), weight, pads=[1, 1, 1, 1]),
                (channels, 2 * channels, 1, 1),
                weight,
            )
        )
    w.output(w.convolution(w.input(24, 7, 7), (36, 12, 3, 3), weight, group=2, pads=[1, 1, 1, 1]))
    w.output(w.convolution(w.input(64, 14, 14), (128, 64, 3, 3), weight, pads=[1, 1, 1, 1]))
    flat = w.node("Flatten", [w.input(65, 1, 1)])
    matrix, deviation = w.weights((33, 65), weight)
    w.output(w.quantized(w.node("Gemm", [flat, matrix], transB=1), 2 * deviation))
    return w.model()


def others() -> onnx.ModelProto:
    """Depthwise convolutions, pools, tables, concatenations, residual additions, resizes and softmax at odd shapes."""
    w = _Writer(7)
    for channels in CHANNELS:
        for width in WIDTHS:
            x = w.input(channels, 7, width)
            if channels > 1:
                w.output(
                    w.convolution(
                        x, (channels, 1, 3, 3), "int8", group=channels, pads=[1, 1, 1, 1], strides=[1 + channels % 2, 1]
                    )
                )
            w.output(w.quantized(w.node("Sigmoid", [x]), 1))
            w.output(w.quantized(w.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), REACH))
            w.output(
                w.quantized(w.node("AveragePool", [x], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1), 1)
            )
            y = w.input(channels, 7, width)
            w.output(w.quantized(w.node("Add", [x, y]), 3))
            w.output(w.quantized(w.node("Concat", [x, y, x], axis=1), 1.5))
            w.output(w.quantized(w.node("GlobalAveragePool", [x]), 0.5))
            weight, deviation = w.weights((channels, channels, 1, 1), "int8")
            residual = w.node("Add", [w.quantized(w.node("Conv", [x, weight]), 2 * deviation), y])
            w.output(w.quantized(w.node("Relu", [residual]), 3))
    for size in (3, 65, 1000):
        flat = w.node("Flatten", [w.input(size, 1, 1)])
        w.output(w.quantized(w.node("Softmax", [flat], axis=1), 0.5))
    return w.model()


CASES: dict[str, Callable[[], onnx.ModelProto]] = {
    "others": others,
    **{f"form-{name}": partial(form, name) for name in FORMS},
}
