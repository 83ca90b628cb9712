"""What stays makes up for what went: every layer's weights are fitted by least squares, in the order of computation.

A layer of the smaller network reads what its fitted predecessors make of the calibration data, and its output shall be
that of the full network's same channels (He et al., "Channel Pruning for Accelerating Very Deep Neural Networks",
2017, section 3); where it is added to a shortcut, the sum shall be, so that later layers repair what earlier ones
lost. The fit is ridge regression around the weights that stayed, biases free.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node, computed
from hawq_tvm.quantize.network.prepare import set_constant

from .channels import Channels

Tensor = torch.Tensor
Values = dict[str, Any]
# The weight of staying what it was, as a part of the inputs' mean square; rows per unknown that are enough, and rows
# below which all are taken.
RIDGE, ROWS_EACH, ROWS_LEAST = 1e-4, 4, 16_384


class Refit:
    """The fit of a cut model's weights, in place.

    full, cut: the graphs of both; the cut one's parameters change with the model.  stays: by group of channels.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        full: FloatGraph,
        cut: FloatGraph,
        channels: Channels,
        stays: NDArray[np.bool_],
        batches: Sequence[Mapping[str, Any]],
        seed: int,
    ) -> None:
        self.model, self.full, self.cut, self.channels, self.stays = model, full, cut, channels, stays
        self.random = torch.Generator().manual_seed(seed)
        self.real: list[Values] = [{k: torch.as_tensor(v) for k, v in b.items()} for b in batches]
        self.less: list[Values] = [dict(values) for values in self.real]
        self.layers = {layer.node: layer for layer in full.layers}
        self.readers = Counter(n for node in full.nodes for n in node.inputs) + Counter(full.outputs)
        self.after = {n: node for node in full.nodes for n in node.inputs}

    def run(self, progress: Progress) -> dict[str, dict[str, float]]:
        """Fit all layers; squared errors of what each makes, before and after, as parts of the full one's square."""
        found: dict[str, dict[str, float]] = {}
        last = {name: i for i, node in enumerate(self.full.nodes) for name in node.inputs}
        smaller = {node.name: node for node in self.cut.nodes}
        with torch.no_grad():
            for i, node in enumerate(self.full.nodes):
                self._compute(node, self.full, self.real)
                layer = self.layers.get(node.name)
                if layer is not None:
                    found[layer.name] = self._layer(smaller[node.name], layer)
                    progress(Step("fitting layers", len(found), len(self.layers)))
                self._compute(smaller[node.name], self.cut, self.less)
                for values in (*self.real, *self.less):
                    for name in node.inputs:
                        if last[name] == i:
                            values.pop(name, None)
        return found

    def _compute(self, node: Node, graph: FloatGraph, held: Sequence[Values]) -> None:
        for values in held:
            known = [(graph.parameters[n] if n in graph.parameters else values[n]) if n else None for n in node.inputs]
            results = computed(node, known)
            results = results if isinstance(results, tuple) else (results,)
            values.update((n, v) for n, v in zip(node.outputs, results, strict=False) if n)

    def _layer(self, node: Node, layer: Layer) -> dict[str, float]:
        """Fit one layer, if what it reads has changed and its weight is its own."""
        wanted = [self._wanted(layer, real, less) for real, less in zip(self.real, self.less, strict=True)]
        before = self._error(node, wanted)
        same = all(torch.equal(r[layer.input], c[layer.input]) for r, c in zip(self.real, self.less, strict=True))
        alone = self.readers[layer.weight] == 1 and (not layer.bias or self.readers[layer.bias] == 1)
        depthwise = layer.group == 1 or node.name in self.channels.depthwise
        if same or not alone or not depthwise or layer.kind == "deconv" or len(layer.strides) > 2:
            return {"before": before, "after": before}
        weight = self.cut.parameters[layer.weight]
        rows = _as_rows(weight, layer)
        bias = self.cut.parameters[layer.bias] if layer.bias else None
        free = bias is not None and bias.numel() == rows.shape[0] * rows.shape[1]
        fitted, shift = _solved(rows, bias, self._samples(layer, wanted, rows), free)
        self._set(layer.weight, _as_weight(fitted, weight, layer))
        if free and bias is not None:
            self._set(layer.bias, shift.reshape(bias.shape))
        return {"before": before, "after": self._error(node, wanted)}

    def _wanted(self, layer: Layer, real: Values, less: Values) -> Tensor:
        """What a layer's output should be: the full one's, and what a shortcut that it is added to lacks."""
        wanted = self._stayed(layer, real, layer.output)
        reader = self.after.get(layer.output)
        if reader is not None and reader.op == "Add" and self.readers[layer.output] == 1:
            other = next((n for n in reader.inputs if n != layer.output), "")
            if other in real and other in less and real[other].shape == real[layer.output].shape:
                wanted = wanted + self._stayed(layer, real, other) - less[other]
        return wanted

    def _stayed(self, layer: Layer, values: Values, name: str) -> Tensor:
        """The channels of a tensor that stay, as those of the layer's output do."""
        if layer.name not in self.channels.rows:
            return values[name]
        stays = torch.from_numpy(self.stays[self.channels.rows[layer.name].groups])
        axis = values[name].ndim - 1 if layer.kind == "matmul" else 1
        return values[name].index_select(axis, stays.nonzero().ravel())

    def _error(self, node: Node, wanted: Sequence[Tensor]) -> float:
        """The squared error of what a layer makes now, as a part of what is wanted, squared."""
        noise = power = 0.0
        for values, target in zip(self.less, wanted, strict=True):
            operands = [self.cut.parameters.get(n, values.get(n)) if n else None for n in node.inputs]
            noise += float((computed(node, operands) - target).double().square().sum())
            power += float(target.double().square().sum())
        return noise / max(power, 1e-30)

    def _samples(self, layer: Layer, wanted: Sequence[Tensor], weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of what a layer reads (parts, rows, unknowns) and should make (parts, rows, outputs), taken at random
        where there are more than enough; weight: as rows.
        """
        unknowns = weight.shape[2]
        enough = max(ROWS_LEAST, ROWS_EACH * unknowns) // len(wanted) + 1
        for values, target in zip(self.less, wanted, strict=True):
            read = values[layer.input]
            if layer.kind == "matmul":
                rows, made = read.reshape(1, -1, unknowns), target.reshape(1, -1, target.shape[-1])
            else:
                rows, made = (
                    _windows(read, layer, self.cut.parameters[layer.weight]),
                    target.flatten(2).transpose(0, 1).flatten(1),
                )
                made = made[:, :, None] if layer.group > 1 else made.T[None]
            if rows.shape[1] > enough:
                chosen = torch.randperm(rows.shape[1], generator=self.random)[:enough]
                rows, made = rows[:, chosen], made[:, chosen]
            yield rows, made

    def _set(self, name: str, value: Tensor) -> None:
        self.cut.parameters[name] = value.contiguous()
        set_constant(self.model.graph, name, value.numpy())


def _as_rows(weight: Tensor, layer: Layer) -> Tensor:
    """A weight as (parts, outputs of a part, unknowns): a depthwise layer has a part for every channel."""
    if layer.kind == "matmul" and layer.channel_axis == 1:
        weight = weight.T
    outputs = weight.shape[0]
    return weight.reshape((outputs, 1, -1) if layer.group > 1 else (1, outputs, -1))


def _as_weight(rows: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `_as_rows`."""
    if layer.kind == "matmul" and layer.channel_axis == 1:
        return rows.reshape(like.shape[1], like.shape[0]).T
    return rows.reshape(like.shape)


def _windows(read: Tensor, layer: Layer, weight: Tensor) -> Tensor:
    """What every output position of a convolution reads: (1, rows, unknowns), or (channels, rows, unknowns) of a
    depthwise one.
    """
    pads = [p for pair in zip(reversed(layer.before), reversed(layer.after), strict=True) for p in pair]
    read, window = F.pad(read, pads), tuple(weight.shape[2:])
    strides, dilations = layer.strides, layer.dilations
    if len(window) == 1:  # a signal is a picture of one row
        read, window, strides, dilations = read[:, :, None], (1, *window), (1, *strides), (1, *dilations)
    seen = F.unfold(read, window, dilations, 0, strides)  # (images, channels x window, positions)
    if layer.group == 1:
        return seen.transpose(1, 2).flatten(0, 1)[None]
    split = seen.reshape(len(seen), read.shape[1], -1, seen.shape[2])
    return split.permute(1, 0, 3, 2).flatten(1, 2)


def _solved(
    weight: Tensor, bias: Tensor | None, samples: Iterator[tuple[Tensor, Tensor]], free: bool
) -> tuple[Tensor, Tensor]:
    """The weights (parts, outputs, unknowns) near those given that fit the samples best, and the biases (parts,
    outputs); free: biases are fitted, else they are those given.
    """
    parts, outputs, unknowns = weight.shape
    square = torch.zeros(parts, unknowns, unknowns, dtype=torch.float64)
    product = torch.zeros(parts, unknowns, outputs, dtype=torch.float64)
    sum_read = torch.zeros(parts, unknowns, dtype=torch.float64)
    sum_made = torch.zeros(parts, outputs, dtype=torch.float64)
    count = 0
    given = torch.zeros(1) if bias is None or free else bias.reshape(-1, 1, 1) if parts > 1 else bias.reshape(1, 1, -1)
    for read, made in samples:
        missing = made - given - read @ weight.mT
        square += read.mT @ read  # of float32 numbers, summed in float64: the fit needs no more digits
        product += read.mT @ missing
        sum_read += read.sum(1)
        sum_made += missing.sum(1)
        count += read.shape[1]
    mean_read, mean_made = sum_read / count, sum_made / count
    if free:
        square -= count * mean_read[:, :, None] * mean_read[:, None]
        product -= count * mean_read[:, :, None] * mean_made[:, None]
    diagonal = torch.diagonal(square, dim1=1, dim2=2)
    ridge = (RIDGE * diagonal.mean(1).clamp_min(0) + 1e-12)[:, None].expand(parts, unknowns)
    step = torch.linalg.solve(square + torch.diag_embed(ridge), product).mT
    shift = mean_made - (step @ mean_read[:, :, None])[:, :, 0]
    return (weight + step).float(), shift.float()
