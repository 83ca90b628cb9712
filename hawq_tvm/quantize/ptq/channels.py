"""Where factors of a tensor's channels can go: the constants that, divided by them, divide the tensor.

From the tensor backwards, through what is linear in one operand or only moves elements, to a layer's weights and
bias, the scale and bias of a normalization, or a factor by channel. Labels say which channel's factor an element is
divided by, so that heads, transposes and slices need no rules of their own: movement takes its labels along.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node
from hawq_tvm.quantize.network.roles import Roles

Tensor = torch.Tensor
HOMOGENEOUS = ("LeakyRelu", "Neg", "Relu")  # f(x / s) = f(x) / s for s > 0
NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")
FREE = -1  # the label of an element that nobody reads


@dataclass(frozen=True)
class Part:
    """A constant, one of its axes, and the channel whose factor divides each slice along it (FREE: none does).

    reader: the node that reads it, shared: as others do, which keep what they have.
    """

    constant: str
    axis: int
    channels: Tensor
    reader: str
    shared: bool

    def divided(self, value: Tensor, factors: Tensor) -> Tensor:
        """The constant with the factors taken out."""
        given = torch.where(self.channels == FREE, torch.ones(()), factors[self.channels.clamp_min(0)])
        return value / given.reshape([-1 if d == self.axis % value.ndim else 1 for d in range(value.ndim)])


class Channels:
    """The paths of one graph, and what one run showed: the shapes of computed float tensors, and other tensors."""

    def __init__(
        self, graph: FloatGraph, roles: Roles, shapes: Mapping[str, Sequence[int]], others: Mapping[str, Tensor]
    ) -> None:
        self._constants, self._roles, self._shapes = {**others, **graph.parameters}, roles, shapes
        self._makers = {name: node for node in graph.nodes for name in node.outputs if name}
        self._layers: dict[str, Layer] = {layer.node: layer for layer in graph.layers}
        self._readers = Counter(n for node in graph.nodes if node.op != "Shape" for n in node.inputs)
        self._readers += Counter(graph.outputs)

    def before(self, name: str) -> list[Part] | None:
        """What to divide so that every channel of a tensor, its last axis, is divided by its factor; None where that
        cannot be. The tensor's readers are the caller's to look at.
        """
        shape = self._shapes[name]
        return self._divided(name, torch.arange(shape[-1]).expand(*shape))

    def _divided(self, name: str, labels: Tensor) -> list[Part] | None:
        maker = self._makers.get(name)
        if maker is None:
            return None
        if maker.name in self._layers:
            return self._layer(self._layers[maker.name], labels)
        data = [n for n in maker.inputs if n and n not in self._constants]
        constants = [n for n in maker.inputs if n in self._constants]
        if maker.op in NORMALIZATIONS:
            last = maker.attributes.get("axis", -1) in (-1, labels.ndim - 1) and name == maker.outputs[0]
            return self._vectors(maker, constants, labels) if last else None
        if maker.op == "MatMul" and len(data) == 2:
            return self._product(data[1], labels)
        if maker.op == "Mul" and len(data) == 2 and data[0] != data[1]:
            return self._first([n for n in data if tuple(self._shapes[n]) == tuple(labels.shape)], labels)
        if len(data) != 1:
            return None
        if self._roles.moves(maker):
            return self._moved(maker, data[0], labels)
        if maker.op in ("Div", "Mul") and len(constants) == 1:
            if self._constants[constants[0]].numel() == 1:
                return self._alone(data[0], labels) if maker.op == "Mul" or data[0] == maker.inputs[0] else None
            return self._vectors(maker, constants, labels) if maker.op == "Mul" else None
        if maker.op in ("Add", "Sub") and len(constants) == 1:
            added, rest = self._vectors(maker, constants, labels), self._alone(data[0], labels)
            return None if added is None or rest is None else added + rest
        return self._alone(data[0], labels) if maker.op in HOMOGENEOUS else None

    def _alone(self, name: str, labels: Tensor) -> list[Part] | None:
        """The same for a tensor that has one reader."""
        return self._divided(name, labels) if self._readers[name] == 1 else None

    def _first(self, names: Sequence[str], labels: Tensor) -> list[Part] | None:
        return next((found for n in names if (found := self._alone(n, labels)) is not None), None)

    def _layer(self, layer: Layer, labels: Tensor) -> list[Part] | None:
        if layer.kind == "deconv":
            return None
        channels = _along(labels, labels.ndim - 1 if layer.kind == "matmul" else 1)
        given = [(layer.weight, layer.channel_axis), *([(layer.bias, -1)] if layer.bias else [])]
        if channels is None or self._readers[layer.weight] != 1:
            return None
        sizes = [self._constants[n].shape[axis] if self._constants[n].ndim else 1 for n, axis in given]
        fit = set(sizes) == {len(channels)}
        return [self._part(layer.node, n, axis, channels) for n, axis in given] if fit else None

    def _part(self, reader: str, name: str, axis: int, channels: Tensor) -> Part:
        return Part(name, axis, channels, reader, self._readers[name] > 1)

    def _vectors(self, maker: Node, names: Sequence[str], labels: Tensor) -> list[Part] | None:
        """Constants of one number per channel of the last axis."""
        channels = _along(labels, labels.ndim - 1)
        values = [self._constants[n] for n in names]
        if channels is None or not all(v.ndim and v.shape[-1] == v.numel() == len(channels) for v in values):
            return None
        return [self._part(maker.name, n, -1, channels) for n in names]

    def _product(self, right: str, labels: Tensor) -> list[Part] | None:
        """Through a product of two computed tensors to its right side, whose columns its own are."""
        shape = tuple(self._shapes[right])
        columns = _along(labels.movedim(-2, 0), *range(1, labels.ndim))
        if columns is None or shape[:-2] != tuple(labels.shape[:-2]):
            return None
        return self._alone(right, columns.unsqueeze(-2).expand(shape))

    def _moved(self, maker: Node, source: str, labels: Tensor) -> list[Part] | None:
        shape = self._shapes[source]
        places = torch.arange(math.prod(shape)).reshape(*shape)
        came = maker.compute(*(places if n == source else self._constants[n] if n else None for n in maker.inputs))
        if not isinstance(came, Tensor) or came.shape != labels.shape or came.dtype != torch.int64:
            return None
        given = torch.full((places.numel(),), FREE)
        given[came.flatten()] = labels.flatten()
        same = bool((given[came] == labels).all())  # an element that is read twice has one factor
        return self._alone(source, given.reshape(*shape)) if same else None


def _along(labels: Tensor, *axes: int) -> Tensor | None:
    """The labels along some axes, None where they differ along others."""
    others = [d for d in range(labels.ndim) if d not in axes]
    found = labels.amax(others) if others else labels
    wide = found.reshape([labels.shape[d] if d in axes else 1 for d in range(labels.ndim)])
    return found if bool(((labels == wide) | (labels == FREE)).all()) else None
