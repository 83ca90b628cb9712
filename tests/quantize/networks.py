"""Small float networks for the quantization tests, in ONNX and in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]


class FloatNet:
    """Writes a float ONNX graph node by node; every method returns the name of the tensor it made."""

    def __init__(self, shape: Sequence[Any], seed: int = 0, opset: int = 18) -> None:
        self.rng, self.opset = np.random.default_rng(seed), opset
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def random(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant(scale * self.rng.standard_normal(shape))

    def node(self, op: str, *inputs: str, name: str | None = None, **attrs: Any) -> str:
        output = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=name if name is not None else f"n_{output}", **attrs)
        )
        return output

    def several(self, op: str, count: int, *inputs: str, **attrs: Any) -> list[str]:
        """The results of a node that has several."""
        outputs = [f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"n_{outputs[0]}", **attrs))
        return outputs

    def conv(self, x: str, out: int, into: int, kernel: int, name: str, **attrs: Any) -> str:
        group = attrs.get("group", 1)
        scale = float((into // group * kernel * kernel) ** -0.5)
        return self.node(
            "Conv",
            x,
            self.random(out, into // group, kernel, kernel, scale=scale),
            self.random(out, scale=0.1),
            name=name,
            **attrs,
        )

    def norm(self, x: str, channels: int) -> str:
        low, high = self.rng.uniform(0.5, 1.5, channels), self.rng.uniform(0.5, 1.5, channels)
        return self.node(
            "BatchNormalization",
            x,
            self.constant(low),
            self.random(channels, scale=0.1),
            self.random(channels, scale=0.1),
            self.constant(high),
        )

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "net", self.inputs, [helper.make_empty_tensor_value_info(output)], self.initializers
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def residual_net(batch: Any = "n", size: int = 8, classes: int = 5) -> onnx.ModelProto:
    """A stem, a residual block with a strided shortcut, a second block, a classifier; layers stem, a1, a2, short,
    b1, b2, fc.
    """
    g = FloatNet([batch, 3, size, size])
    y = g.node("Relu", g.norm(g.conv("x", 4, 3, 3, "stem", pads=[1] * 4), 4))
    z = g.node("Relu", g.conv(y, 6, 4, 3, "a1", pads=[1] * 4, strides=[2, 2]))
    z = g.norm(g.conv(z, 6, 6, 3, "a2", pads=[1] * 4), 6)
    y = g.node("Relu", g.node("Add", z, g.conv(y, 6, 4, 1, "short", strides=[2, 2])))
    z = g.node("Relu", g.conv(y, 6, 6, 3, "b1", pads=[1] * 4))
    y = g.node("Relu", g.node("Add", g.conv(z, 6, 6, 3, "b2", pads=[1] * 4), y))
    f = g.node("Flatten", g.node("GlobalAveragePool", y))
    return g.model(g.node("Gemm", f, g.random(classes, 6), g.random(classes, scale=0.1), name="fc", transB=1))


def one_number(flat: bool) -> onnx.ModelProto:
    """A network that says one number of every image, (n) or (n, 1): no class to be compared with others."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Relu", g.conv(g.node("Relu", g.conv("x", 4, 3, 3, "one")), 5, 4, 3, "two"))
    y = g.node("Gemm", g.node("Flatten", g.node("GlobalAveragePool", y)), g.random(5, 1), g.random(1), name="fc")
    return g.model(g.node("Squeeze", y, g.constant([1], np.int64)) if flat else y)


class TorchNet(torch.nn.Module):
    """The same kind of network as a torch module: stem, block, classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = torch.nn.Conv2d(3, 4, 3, padding=1, stride=2), torch.nn.BatchNorm2d(4)
        self.deep, self.fc = torch.nn.Conv2d(4, 4, 3, padding=1, groups=2), torch.nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = y + torch.nn.functional.relu_(self.deep(y))
        return self.fc(y.mean((2, 3)))


def images(count: int, size: int = 8, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32)
