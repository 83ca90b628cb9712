"""Small quantized ONNX models for the tests, built by hand: a writer of QDQ graphs and a few ready networks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

TYPES = {
    "uint8": (TensorProto.UINT8, 0, 255),
    "int8": (TensorProto.INT8, -128, 127),
    "uint4": (TensorProto.UINT4, 0, 15),
    "int4": (TensorProto.INT4, -8, 7),
    "int16": (TensorProto.INT16, -32768, 32767),
    "uint16": (TensorProto.UINT16, 0, 65535),
    "int32": (TensorProto.INT32, -(2**31), 2**31 - 1),
}


def needs_time(usual: bool) -> None:
    """Skip the calling test, one of many whole networks, unless it is a usual one or all are asked for."""
    if not usual and os.environ.get("HAWQ_TVM_EVERY_NETWORK") != "1":
        pytest.skip("a whole network more: set HAWQ_TVM_EVERY_NETWORK=1")


class Graph:
    """Writes a QDQ graph node by node; every method returns the name of the tensor it made."""

    def __init__(self, seed: int = 0, opset: int = 21) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def input(self, name: str, shape: Sequence[Any], kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, values: Any, kind: int, shape: Sequence[int] | None = None) -> str:
        array = np.asarray(values)
        name = f"c{len(self.initializers)}"
        self.initializers.append(
            helper.make_tensor(name, kind, array.shape if shape is None else shape, array.ravel().tolist())
        )
        return name

    def node(self, op: str, inputs: Sequence[str], domain: str = "", outputs: int = 1, **attrs: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        made = [name if i == 0 else f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=name, domain=domain, **attrs))
        return name

    def q(self, x: str, scale: Any, zero: Any = 0, kind: str = "uint8", **attrs: Any) -> str:
        proto = TYPES[kind][0]
        return self.node(
            "QuantizeLinear", [x, self.constant(scale, TensorProto.FLOAT), self.constant(zero, proto)], **attrs
        )

    def dq(self, x: str, scale: Any, zero: Any = 0, kind: str = "uint8", **attrs: Any) -> str:
        proto = TYPES[kind][0]
        return self.node(
            "DequantizeLinear", [x, self.constant(scale, TensorProto.FLOAT), self.constant(zero, proto)], **attrs
        )

    def qdq(self, x: str, scale: Any, zero: Any = 0, kind: str = "uint8") -> str:
        return self.dq(self.q(x, scale, zero, kind), scale, zero, kind)

    def weight(
        self, shape: Sequence[int], kind: str = "int8", axis: int | None = 0, zero: int = 0, scale: float = 0.01
    ) -> str:
        proto, low, high = TYPES[kind]
        values = self.rng.integers(low, high, size=shape, endpoint=True)
        flat = values.reshape(-1)
        flat[0], flat[-1] = low, high
        data = self.constant(values, proto)
        if axis is None:
            return self.dq(data, np.float32(scale), zero, kind)
        scales = (scale * self.rng.uniform(0.3, 1, shape[axis])).astype(np.float32)
        return self.dq(data, scales, np.full(shape[axis], zero), kind, axis=axis)

    def conv(self, x: str, w: str, bias: str | None = None, **attrs: Any) -> str:
        return self.node("Conv", [x, w] + ([bias] if bias else []), **attrs)

    def model(self, outputs: Sequence[str | tuple[str, int]], ir_version: int = 10) -> onnx.ModelProto:
        infos = [
            helper.make_empty_tensor_value_info(o)
            if isinstance(o, str)
            else helper.make_tensor_value_info(o[0], o[1], None)
            for o in outputs
        ]
        graph = helper.make_graph(self.nodes, "g", self.inputs, infos, self.initializers)
        domains = {n.domain for n in self.nodes} - {""}
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def float_output(name: str) -> tuple[str, int]:
    return name, TensorProto.FLOAT


def residual_net(weights: str = "int8", activations: str = "uint8", size: int = 8) -> onnx.ModelProto:
    """Three convolutions, a residual addition, pooling and a classifier: the tiny end-to-end network."""
    g = Graph(1)
    wide = {"uint8": 1.0, "int8": 1.0, "uint4": 16.0, "int4": 16.0, "int16": 1 / 256}[activations]
    zero = {"uint8": 120, "int8": -3, "uint4": 7, "int4": 0, "int16": 5}[activations]
    positive = 0 if activations.startswith("u") else zero
    step = 0.04 * wide
    scale = 0.01 if weights == "int8" else 0.1
    x = g.qdq(g.input("x", [2, 3, size, size]), 0.0247 * wide, zero, activations)
    y = g.conv(x, g.weight([8, 3, 3, 3], weights, scale=scale), pads=[1, 1, 1, 1])
    y = g.qdq(g.node("Relu", [y]), step * 1.13, positive, activations)
    z = g.conv(y, g.weight([8, 8, 3, 3], weights, scale=scale), pads=[1, 1, 1, 1])
    z = g.qdq(z, step * 1.71, zero, activations)
    r = g.qdq(g.node("Relu", [g.node("Add", [z, y])]), step * 1.91, positive, activations)
    p = g.qdq(g.node("GlobalAveragePool", [r]), step * 0.93, positive, activations)
    f = g.node("Flatten", [p])
    w = g.weight([10, 8], weights, axis=0, scale=scale)
    return g.model([float_output(g.qdq(g.node("Gemm", [f, w], transB=1), step * 2.07, zero, activations))])
