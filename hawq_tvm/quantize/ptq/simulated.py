"""A block as it is deployed, in float32: weights, biases and tensors on their grids.

What a package computes differs from it by the rounding of biases to units of their layer's sums, by float32's own
rounding of sums, and where a softmax, a normalization or a function of sums is near its real formula (`prove`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, computed

from .blocks import Block
from .observers import Grid
from .points import Points

Tensor = torch.Tensor
Values = Mapping[str, Any]
# A tensor on the grid of a key: of its source, or of its source and the bits that a layer reads it with.
Key = tuple[str, int]
OnGrid = Callable[[Tensor, Key], Tensor]


@dataclass
class Grids:
    """The grids of a network, by key, as they are learned.

    tensors: the key of every quantized tensor.  reads: that of layers which read fewer bits than the tensor has.
    """

    by_key: dict[Key, Grid]
    tensors: Mapping[str, Key]
    reads: Mapping[str, Key]

    def on(self, value: Tensor, key: Key) -> Tensor:
        """The nearest numbers that a grid has, in float32 (A2)."""
        return fake(value, self.by_key[key])

    def read(self, layer: Layer) -> Grid:
        """The grid of what a layer reads."""
        return self.by_key[self.reads.get(layer.name) or self.tensors[layer.input]]

    def split(self) -> tuple[dict[str, Grid], dict[str, Grid]]:
        """Grids by tensor, and those of layers that read fewer bits by layer."""
        tensors = {name: self.by_key[key] for name, key in self.tensors.items()}
        return tensors, {name: self.by_key[key] for name, key in self.reads.items()}


def grids_of(graph: FloatGraph, points: Points, grids: Mapping[str, Grid], narrow: Mapping[str, Grid]) -> Grids:
    """The grids that calibration chose; what reads a tensor with the same bits has one in common."""
    tensors = {name: (source, points.bits[name]) for name, source in points.source.items()}
    reads = {x.name: (points.source[x.input], points.narrow[x.name]) for x in graph.layers if x.name in narrow}
    known = {key: grids[name] for name, key in tensors.items()} | {key: narrow[name] for name, key in reads.items()}
    return Grids(known, tensors, reads)


def fake(value: Tensor, grid: Grid) -> Tensor:
    """The nearest numbers that a grid has, in float32 (A2); without a gradient."""
    return (value / grid.scale).round_().clamp_(grid.low - grid.zero, grid.high - grid.zero).mul_(grid.scale)


def through(
    block: Block,
    graph: FloatGraph,
    inputs: Values,
    weights: Values | None = None,
    biases: Values | None = None,
    grids: Grids | None = None,
    on: OnGrid | None = None,
    record: Callable[[Layer, Tensor], None] | None = None,
    until: Layer | None = None,
) -> dict[str, Any]:
    """The outputs of a block.

    inputs: at least its own, already on their grids.  weights, biases: by layer instead of the network's.  grids: none
    for the float network.  on: puts a tensor on a grid (default: the nearest numbers).  record: called with every
    layer's result.  until: a layer in front of which to stop; what it reads is returned instead.
    """
    layers, values = {layer.node: layer for layer in block.layers}, dict(inputs)
    put = on or (grids.on if grids else None)
    for node in block.nodes:
        operands = [graph.parameters.get(n, values.get(n)) if n else None for n in node.inputs]
        layer = layers.get(node.name)
        if layer is not None:
            x = values[layer.input]
            if grids and put and layer.name in grids.reads:
                x = put(x, grids.reads[layer.name])
            if layer is until:
                return {layer.input: x}
        if layer is not None and weights is not None and biases is not None:
            bias = biases[layer.name]
            operands = [x, weights[layer.name], *([bias] if bias is not None else [])]
        found = computed(node, operands)
        results = found if isinstance(found, tuple) else (found,)
        if layer is not None and record is not None:
            record(layer, results[0])
        for name, value in zip(node.outputs, results, strict=False):
            if name:
                key = grids.tensors.get(name) if grids else None
                values[name] = put(value, key) if put and key is not None else value
    return {name: values[name] for name in block.outputs}
