"""Which channels of a float network must stay or go together, found by experiment.

A channel that a layer makes is a row of its weight; everything that computes with it, up to the layers whose weights
have a column for it, lives by it: the other operand of a sum, the channel of a depthwise convolution, a slope. No list
of operators says how channels pass through a node: NaN in some of an operand's channels is seen in the results, and
two experiments for every bit of a channel's number tell which channel each element of a result comes from. Where it
is more than one (a normalization over channels, a grouped convolution), or where elements are not whole slices along
an axis (a shuffle), what was read there stays.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node, computed

Numbers = NDArray[np.int64]
# What may be left out of one of these leaves the others where they were, one after the other.
ORDERED = ("Concat", "Flatten", "Reshape")
# Nodes with an operand of whole numbers that counts channels.
COUNTING = ("Expand", "Reshape", "Resize")
NONE, SEVERAL = -1, -2
KEPT = 0


@dataclass(frozen=True)
class Place:
    """The group (of channels that hang together) of every entry along an axis of a constant."""

    parameter: str
    axis: int
    groups: Numbers


@dataclass(frozen=True)
class Channels:
    """The groups of channels of a network, numbered from 0; group 0 is what cannot go.

    count: how many groups.  places: what goes of the constants.  rows, columns: by layer, the groups of its output and
    input channels; a depthwise layer has rows only.  sizes: entry i of a constant of whole numbers counts channels of
    these groups.  depthwise: the groups of the channels that a convolution has, one in each of its own groups.
    """

    count: int
    places: tuple[Place, ...]
    rows: Mapping[str, Place]
    columns: Mapping[str, Place]
    sizes: tuple[tuple[str, int, Numbers], ...]
    depthwise: Mapping[str, Numbers]

    def alike(self) -> list[Numbers]:
        """The groups that are in the same places the same number of times, together: group 0 left out."""
        held = np.zeros((len(self.places), self.count), np.int32)
        for i, place in enumerate(self.places):
            held[i] = np.bincount(place.groups, minlength=self.count)
        found: dict[bytes, list[int]] = defaultdict(list)
        for group in range(1, self.count):
            if held[:, group].any():
                found[held[:, group].tobytes()].append(group)
        return [np.array(groups) for groups in found.values()]


def find_channels(graph: FloatGraph, example: Mapping[str, Any], keep: Sequence[str] = ()) -> Channels:
    """Find what hangs together, by experiments on one example; keep: layers whose output channels all stay.

    Raises UsageError for a layer that there is not, ModelError where a node cannot be computed on the example.
    """
    kept = {graph.layer(name).node for name in keep}
    with torch.no_grad():
        return _Finder(graph, example, kept).found()


@dataclass(frozen=True)
class _Axis:
    """The axis of a tensor that counts channels, and the channel of every entry."""

    axis: int
    channels: Numbers


class _Finder:
    def __init__(self, graph: FloatGraph, example: Mapping[str, Any], kept: Set[str]) -> None:
        self.graph, self.kept = graph, kept
        self.layers = {layer.node: layer for layer in graph.layers}
        self.values: dict[str, Any] = {**graph.parameters, **{k: torch.as_tensor(v) for k, v in example.items()}}
        self.parents = [KEPT]
        self.axes: dict[str, _Axis] = {}
        self.places: dict[tuple[str, int], Numbers] = {}
        self.readings: dict[str, set[tuple[str, int]]] = defaultdict(set)
        self.rows: dict[str, tuple[str, int]] = {}
        self.columns: dict[str, tuple[str, int]] = {}
        self.sizes: list[tuple[str, int, Numbers]] = []
        self.depthwise: dict[str, Numbers] = {}

    def found(self) -> Channels:
        for node in self.graph.nodes:
            operands = [self.values[n] if n else None for n in node.inputs]
            results = _listed(computed(node, operands))
            layer = self.layers.get(node.name)
            if layer is not None and layer.group == 1:
                self._mixed(node, layer, operands, results[0])
            else:
                self._passed(node, operands, results)
            if layer is not None and node.name in self.kept:
                self._keep(layer.output)
            self.values.update((n, v) for n, v in zip(node.outputs, results, strict=False) if n)
        for name in self.graph.outputs:
            self._keep(name)
        times = Counter(n for node in self.graph.nodes for n in node.inputs)
        for (name, _), channels in self.places.items():
            if times[name] != len(self.readings[name]):  # something else reads this constant whole
                self._join(channels, KEPT)
        for name, _, channels in self.sizes:
            if times[name] != 1:
                self._join(channels, KEPT)
        return self._numbered()

    # -- sets of channels that hang together

    def _root(self, channel: int) -> int:
        while self.parents[channel] != channel:
            self.parents[channel] = channel = self.parents[self.parents[channel]]
        return channel

    def _join(self, channels: Numbers, others: Numbers | int) -> None:
        for one, other in zip(channels.tolist(), np.broadcast_to(others, channels.shape).tolist(), strict=True):
            low, high = sorted((self._root(one), self._root(other)))
            self.parents[high] = low

    def _keep(self, tensor: str) -> None:
        if tensor in self.axes:
            self._join(self.axes.pop(tensor).channels, KEPT)

    def _new(self, count: int) -> Numbers:
        first = len(self.parents)
        self.parents += range(first, first + count)
        return np.arange(first, first + count)

    def _place(self, node: Node, operand: int, axis: int, channels: Numbers) -> tuple[str, int]:
        name = node.inputs[operand]
        known = self.places.setdefault((name, axis), channels)
        self._join(known, channels)
        self.readings[name].add((node.name, operand))
        return name, axis

    def _numbered(self) -> Channels:
        roots = {KEPT: 0}

        def groups(channels: Numbers) -> Numbers:
            return np.array([roots.setdefault(self._root(int(c)), len(roots)) for c in channels], np.int64)

        places = {key: Place(*key, groups(channels)) for key, channels in self.places.items()}
        sizes = tuple((name, entry, groups(channels)) for name, entry, channels in self.sizes)
        return Channels(
            len(roots),
            tuple(places.values()),
            {layer: places[key] for layer, key in self.rows.items()},
            {layer: places[key] for layer, key in self.columns.items()},
            sizes,
            {node: groups(channels) for node, channels in self.depthwise.items()},
        )

    # -- nodes

    def _mixed(self, node: Node, layer: Layer, operands: Sequence[Any], result: torch.Tensor) -> None:
        """A layer whose every output channel sums all input channels."""
        weight, matmul = self.graph.parameters[layer.weight], layer.kind == "matmul"
        position, out = node.inputs.index(layer.weight), result.ndim - 1 if matmul else 1
        if matmul and (weight.ndim != 2 or node.attributes.get("transA")):
            self._keep(layer.input)
            return
        read = self.axes.get(layer.input)
        if read is not None and read.axis == (operands[0].ndim - 1 if matmul else 1):
            self.columns[layer.name] = self._place(node, position, 1 - layer.channel_axis, read.channels)
        else:
            self._keep(layer.input)
        made = self._new(weight.shape[layer.channel_axis])
        self.rows[layer.name] = self._place(node, position, layer.channel_axis, made)
        if layer.bias:
            bias = self.graph.parameters[layer.bias]
            if bias.ndim and bias.shape[-1] == len(made) > 1:
                self._place(node, node.inputs.index(layer.bias), bias.ndim - 1, made)
        self.axes[layer.output] = _Axis(out, made)

    def _passed(self, node: Node, operands: Sequence[Any], results: Sequence[Any]) -> None:
        """Any other node: its results have the channels that they come from."""
        for name in node.inputs:  # a single channel is spread over those of the others
            if name in self.axes and len(self.axes[name].channels) == 1:
                self._keep(name)
        given = [k for k, name in enumerate(node.inputs) if name in self.axes]
        if not given:
            return
        sources = {k: _sources(node, operands, k, self.axes[node.inputs[k]].axis, results) for k in given}
        made = [
            self._result(node, operands, {k: sources[k][i] for k in given}, value) if _real(value) else None
            for i, value in enumerate(results)
        ]
        whole = all(axis is not None for axis, value in zip(made, results, strict=True) if _real(value))
        if not whole or not self._constants(node, operands, results, made):
            for axis in filter(None, made):
                self._join(axis.channels, KEPT)
            for k in given:
                self._keep(node.inputs[k])
            return
        self.axes.update((n, axis) for n, axis in zip(node.outputs, made, strict=False) if n and axis is not None)

    def _result(
        self, node: Node, operands: Sequence[Any], sources: Mapping[int, Numbers | None], value: torch.Tensor
    ) -> _Axis | None:
        """The channels of one result, joined where it comes from several operands; None where they are mixed."""
        axis, channels = -1, _none(0)
        for k, codes in sources.items():
            read = self.axes[node.inputs[k]]
            if codes is not None and (codes == NONE).all():
                continue
            lines = None if codes is None else _lines(codes, read.axis)
            if lines is None or axis not in (-1, lines.axis):
                return None
            if axis == -1:
                axis, channels = lines.axis, _none(len(lines.channels))
            from_here = lines.channels >= 0
            here = np.where(from_here, read.channels[lines.channels], NONE)
            if node.op not in ORDERED and not np.array_equal(lines.channels, np.arange(len(read.channels))):
                return None
            both = from_here & (channels >= 0)
            self._join(channels[both], here[both])
            channels = np.where(channels >= 0, channels, here)
        if axis == -1:
            return None
        for name, operand in zip(node.inputs, operands, strict=True):
            if name and name not in self.axes and name not in self.graph.parameters and torch.is_tensor(operand):
                place = axis - value.ndim + operand.ndim
                if node.op != "Concat" and place >= 0 and operand.shape[place] > 1:
                    self._join(channels[channels >= 0], KEPT)
        return _Axis(axis, np.where(channels >= 0, channels, KEPT))

    def _constants(
        self, node: Node, operands: Sequence[Any], results: Sequence[Any], made: Sequence[_Axis | None]
    ) -> bool:
        """Whether it is known what goes of a node's constants; that is noted."""
        for k, (name, operand) in enumerate(zip(node.inputs, operands, strict=True)):
            if name not in self.graph.parameters:
                continue
            for axis in (a for a in range(operand.ndim) if operand.shape[a] > 1 and _real(operand)):
                codes = _sources(node, operands, k, axis, results)
                for result, channels in zip(codes, made, strict=True):
                    if channels is not None and not self._indexed(node, k, axis, result, channels):
                        return False
            if not _real(operand) and node.op in COUNTING and operand.ndim == 1:
                for result, channels in zip(results, made, strict=True):
                    if channels is None or len(operand) != result.ndim:
                        continue
                    if int(operand[channels.axis]) == len(channels.channels):
                        self.sizes.append((name, channels.axis, channels.channels))
        layer = self.layers.get(node.name)
        if layer is not None:
            read = self.axes[layer.input].channels
            if layer.group != len(read) or (layer.weight, 0) not in self.places:
                return False
            self.depthwise[node.name] = read
            self.rows[layer.name] = layer.weight, 0
        return True

    def _indexed(self, node: Node, operand: int, axis: int, codes: Numbers | None, made: _Axis) -> bool:
        """Whether a constant has one entry for a channel along an axis (which is noted), or all channels read the
        same.
        """
        if codes is None:
            return False
        by_channel = np.moveaxis(codes, made.axis, 0).reshape(len(made.channels), -1)
        if (by_channel == by_channel[:1]).all():
            return True
        # A slope is read by negative elements alone: a channel without any is taken to have the entry of its number.
        numbers, known = by_channel.max(1), np.any(by_channel >= 0, axis=1)
        if (by_channel == SEVERAL).any() or ((by_channel >= 0) & (by_channel != numbers[:, None])).any():
            return False
        size, count = self.graph.parameters[node.inputs[operand]].shape[axis], len(made.channels)
        if not known.all() and (size != count or (numbers != np.arange(size))[known].any()):
            return False
        entries = np.full(size, KEPT)
        for channel, entry in zip(made.channels, np.where(known, numbers, np.arange(count)), strict=True):
            if entries[entry] != KEPT:
                self._join(entries[entry : entry + 1], int(channel))
            entries[entry] = channel
        self._place(node, operand, axis, entries)
        return True


def _listed(results: Any) -> list[Any]:
    return list(results) if isinstance(results, tuple) else [results]


def _real(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _sources(
    node: Node, operands: Sequence[Any], operand: int, axis: int, results: Sequence[Any]
) -> list[Numbers | None]:
    """For every result which entry of an operand's axis each of its elements comes from, NONE or SEVERAL; None for a
    result that is no real numbers, or has NaN by itself.
    """
    value, seen = operands[operand], []
    entries = torch.arange(value.shape[axis])
    for bit in range(max(1, (value.shape[axis] - 1).bit_length())):
        for side in (0, 1):
            poisoned = value.clone().index_fill_(axis, entries[(entries >> bit & 1) == side], float("nan"))
            spoiled = _listed(computed(node, [poisoned if k == operand else v for k, v in enumerate(operands)]))
            seen.append([s.isnan().numpy() if _real(s) else None for s in spoiled])
    return [_source([s[i] for s in seen]) if _real(r) and not r.isnan().any() else None for i, r in enumerate(results)]


def _source(seen: Sequence[Any]) -> Numbers:
    """The entry that each element comes from; seen: where NaN was, for entries without and with every bit."""
    code = sum((seen[i + 1].astype(np.int64) << i // 2 for i in range(0, len(seen), 2)), np.int64(0))
    pairs = [(seen[i], seen[i + 1]) for i in range(0, len(seen), 2)]
    lone = np.logical_and.reduce([one ^ other for one, other in pairs])
    none = np.logical_and.reduce([~(one | other) for one, other in pairs])
    return np.where(lone, code, np.where(none, NONE, SEVERAL))


def _none(count: int) -> Numbers:
    return np.full(count, NONE, np.int64)


def _lines(codes: Numbers, preferred: int) -> _Axis | None:
    """The axis along which every slice comes from one channel, or from none, and those channels; None where there is
    no such axis.
    """
    if (codes == SEVERAL).any():
        return None
    for axis in sorted(range(codes.ndim), key=lambda a: a != preferred):
        by_entry = np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)
        if by_entry.size and (by_entry == by_entry[:, :1]).all():
            return _Axis(axis, by_entry[:, 0])
    return None
