"""Writing a quantized network: QuantizeLinear and DequantizeLinear around what a prepared float model computes, with
true 4-bit types; weights of 2 and 3 bits are in those, because ONNX Runtime 1.31 refuses INT2, and of 6 in 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from hawq_tvm.core.version import __version__
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer
from hawq_tvm.quantize.network.prepare import names_of

from .observers import LEAST, Grid
from .points import CLAMPS, Points, clip_bounds
from .tables import columns
from .weights import Rounded

Array = np.ndarray[Any, Any]
TYPES: dict[tuple[int, bool], Any] = {
    (4, True): ml_dtypes.int4,
    (4, False): ml_dtypes.uint4,
    (8, True): np.int8,
    (8, False): np.uint8,
    (16, True): np.int16,
    (16, False): np.uint16,
}


def write(
    model: onnx.ModelProto,
    graph: FloatGraph,
    points: Points,
    grids: Mapping[str, Grid],
    narrow: Mapping[str, Grid],
    rounded: Mapping[str, Rounded],
    taken: Set[str] = frozenset(),
) -> onnx.ModelProto:
    """The quantized model of a prepared one; grids: by tensor; narrow: of layers that read fewer bits; rounded: by
    layer; taken: names for no tensor of it.
    """
    return _Writer(model, graph, points, grids, narrow, rounded, taken).run()


def kind_of(grid: Grid) -> Any:
    """The element type that holds a grid's integers."""
    return TYPES[(grid.high - grid.low).bit_length(), grid.low < 0]


class _Writer:
    def __init__(
        self,
        model: onnx.ModelProto,
        graph: FloatGraph,
        points: Points,
        grids: Mapping[str, Grid],
        narrow: Mapping[str, Grid],
        rounded: Mapping[str, Rounded],
        taken: Set[str],
    ) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.roles = points.roles
        self.graph, self.points, self.grids, self.narrow, self.rounded = graph, points, grids, narrow, rounded
        self.layers: dict[str, Layer] = {layer.node: layer for layer in graph.layers}
        self.makers = {name: node for node in graph.nodes for name in node.outputs}
        self.taken = names_of(model.graph) | taken
        self.nodes: list[onnx.NodeProto] = []
        self.renamed: dict[str, str] = {}
        self.narrowed: dict[tuple[str, Grid], str] = {}  # one for all layers that read a tensor alike

    def run(self) -> onnx.ModelProto:
        proto = self.model.graph
        nodes = list(proto.node)
        outputs = {o.name for o in proto.output}
        for value in proto.input:
            if value.name in self.points.source:
                self._quantize(value.name, value.name)
        for node in nodes:
            if self._saturates(node):
                self._quantize(node.output[0], self.renamed.get(node.input[0], node.input[0]))
                continue
            self._node(node)
            for i, name in enumerate(node.output):
                if name in self.points.source or name in self.points.joined:
                    if name in outputs:
                        node.output[i] = self._fresh(f"{name}_float")
                    quantize = self._quantize if name in self.points.source else self._joined
                    quantize(name, node.output[i], name if name in outputs else None)
        del proto.node[:]
        proto.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        for tensor in [t for t in proto.initializer if t.name not in used]:
            proto.initializer.remove(tensor)
        self.model.producer_name, self.model.producer_version = "hawq-tvm", __version__
        return self.model

    def _saturates(self, node: onnx.NodeProto) -> bool:
        """Whether a clip does nothing that the saturation of the quantization after it does not do (A12), so that it
        need not be written.

        ONNX Runtime 1.31 refuses files with a Clip before a 4-bit QuantizeLinear.
        """
        name = node.output[0]
        if node.op_type not in CLAMPS or name not in self.points.source or name in self.graph.outputs:
            return False
        low, high = clip_bounds(self.makers[name], self.graph)
        grid = self.grids[name]

        def code(bound: float) -> float:
            return float(np.rint(np.float32(bound) / np.float32(grid.scale))) + grid.zero

        return (low is None or code(low) <= grid.low) and (high is None or code(high) >= grid.high)

    def _fresh(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self.taken:
            name, number = f"{wanted}_{number}", number + 1
        self.taken.add(name)
        return name

    def _constant(self, wanted: str, value: Array) -> str:
        name = self._fresh(wanted)
        self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def _pair(self, tensor: str, stem: str, grid: Grid, result: str | None = None) -> str:
        """Q and DQ of a tensor; the name of what they make."""
        zero = np.array(grid.zero).astype(kind_of(grid))
        return self._scaled(tensor, stem, np.array(grid.scale, np.float32), zero, result)

    def _scaled(self, tensor: str, stem: str, scales: Array, zeros: Array, result: str | None, **axis: Any) -> str:
        scale, zero = self._constant(f"{stem}_scale", scales), self._constant(f"{stem}_zero_point", zeros)
        middle, end = self._fresh(f"{stem}_quantized"), result or self._fresh(f"{stem}_dequantized")
        for op, source, made in (("QuantizeLinear", tensor, middle), ("DequantizeLinear", middle, end)):
            self.nodes.append(helper.make_node(op, [source, scale, zero], [made], name=f"{stem}_{op}", **axis))
        return end

    def _joined(self, name: str, tensor: str, result: str | None = None) -> None:
        """A concatenation each of whose parts keeps its scale: unsigned integers, where a zero point 128 higher stands
        for signed ones. Of 16 bits, because ONNX Runtime 1.31 makes one of 8 an operator that knows one scale only.
        """
        grids = [(self.grids[part], count) for part, count in self.points.joined[name]]
        scales = np.array([g.scale for g, count in grids for _ in range(count)], np.float32)
        zeros = np.array([g.zero - g.low for g, count in grids for _ in range(count)], np.uint16)
        axis = self.makers[name].attributes["axis"]
        self.renamed[name] = self._scaled(tensor, name, scales, zeros, result, axis=axis)

    def _quantize(self, name: str, tensor: str, result: str | None = None) -> None:
        self.renamed[name] = self._pair(tensor, name, self.grids[name], result)

    def _node(self, node: onnx.NodeProto) -> None:
        for i, name in enumerate(node.input):
            node.input[i] = self.renamed.get(name, name)
        layer = self.layers.get(node.name)
        if layer is not None:
            self._layer(node, layer)
        elif node.input and node.input[0] in self.points.tables:
            node.input[0] = self._table(node.input[0])
        elif self.roles.products(node.name):
            for i, name in enumerate(node.input[:2]):
                if name in self.graph.parameters and self.graph.parameters[name].ndim:
                    node.input[i] = self._factor(f"{node.name}_input{i}", self.graph.parameters[name].numpy())
        self.nodes.append(node)

    def _table(self, name: str) -> str:
        """A table of embeddings in 8 bits, dequantized by columns: one for all that choose from it."""
        if name not in self.renamed:
            codes, scale = columns(self.graph.parameters[name].numpy())
            self.renamed[name] = self._dequantized(self._constant(f"{name}_quantized", codes), name, scale, 1)
        return self.renamed[name]

    def _factor(self, stem: str, value: Array) -> str:
        """A constant factor that is no layer's weight, in 8 bits, dequantized."""
        scale = np.asarray(max(float(np.abs(value).max(initial=0)) / 127, LEAST), np.float32)
        codes = self._constant(f"{stem}_quantized", np.rint(value / scale).astype(np.int8))
        return self._dequantized(codes, stem, scale, 0)

    def _layer(self, node: onnx.NodeProto, layer: Layer) -> None:
        ours = self.rounded[layer.name]
        if layer.name in self.narrow:
            key = node.input[0], self.narrow[layer.name]
            if key not in self.narrowed:
                self.narrowed[key] = self._pair(node.input[0], f"{layer.name}_input", self.narrow[layer.name])
            node.input[0] = self.narrowed[key]
        grid = self.narrow.get(layer.name) or self.grids[layer.input]
        scale = ours.scale.numpy()
        codes = self._constant(
            f"{layer.name}_weight_quantized", ours.codes.numpy().astype(TYPES[4 if ours.bits <= 4 else 8, True])
        )
        node.input[1] = self._dequantized(codes, f"{layer.name}_weight", scale, layer.channel_axis)
        if ours.bias is not None:
            unit = np.float32(grid.scale) * np.tile(scale, layer.repeats)
            counts = np.clip(np.rint(ours.bias.numpy().astype(np.float64) / unit), -(2**31), 2**31 - 1).astype(np.int32)
            bias = self._dequantized(
                self._constant(f"{layer.name}_bias_quantized", counts), f"{layer.name}_bias", unit, 0
            )
            while len(node.input) < 3:
                node.input.append("")
            node.input[2] = bias

    def _dequantized(self, codes: str, stem: str, scale: Array, axis: int) -> str:
        end = self._fresh(f"{stem}_dequantized")
        name = self._constant(f"{stem}_scale", scale.astype(np.float32))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [codes, name], [end], name=f"{stem}_DequantizeLinear", axis=axis)
        )
        return end
