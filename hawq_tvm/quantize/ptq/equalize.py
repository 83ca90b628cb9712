"""Cross-layer equalisation: channels between two layers are scaled so that both layers' weights use their ranges alike.

Of a layer's output channel i, divided by f_i, the next layer's input channel i is multiplied by f_i, f_i = sqrt(r1_i
/ r2_i) with the largest magnitudes r1_i and r2_i of their weights (Nagel et al., "Data-Free Quantization", 2019).
That changes nothing in real numbers where only a ReLU or nothing stands between them. ReLU6 is replaced by ReLU, as
that paper does, where `relu6` allows it: the function then changes wherever a 6 was reached.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper

from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node
from hawq_tvm.quantize.network.prepare import Array, constants, set_constant

from .points import clip_bounds

ROUNDS, CLOSE = 20, 1e-3


def equalize(model: onnx.ModelProto, graph: FloatGraph, relu6: bool) -> tuple[list[str], list[str]]:
    """Equalise a prepared model in place; the layers whose outputs were scaled, and the clips that became ReLU."""
    pairs, clips = _pairs(graph, relu6)
    for node in model.graph.node:
        if node.name in clips:
            node.CopyFrom(helper.make_node("Relu", [node.input[0]], [node.output[0]], name=node.name))
    values = constants(model.graph)
    changed: set[str] = set()
    for _ in range(ROUNDS):
        furthest = max((_balance(values, first, second, changed) for first, second in pairs), default=0.0)
        if furthest < CLOSE:
            break
    for name in sorted(changed):
        set_constant(model.graph, name, values[name])
    return [first.name for first, _ in pairs], sorted(clips)


def _pairs(graph: FloatGraph, relu6: bool) -> tuple[list[tuple[Layer, Layer]], set[str]]:
    """Convolutions and the convolution that alone reads each, with a clip in between at most."""
    readers = Counter(n for node in graph.nodes for n in node.inputs) + Counter(graph.outputs)
    after = {n: node for node in graph.nodes for n in node.inputs}
    layers = {layer.node: layer for layer in graph.layers if layer.kind == "conv"}
    pairs, clips = [], set()
    for first in layers.values():
        tensor, passed = first.output, list[Node]()
        while readers[tensor] == 1 and tensor in after and _homogeneous(after[tensor], graph, relu6):
            passed.append(after[tensor])
            tensor = passed[-1].outputs[0]
        reader = after.get(tensor)
        second = layers.get(reader.name) if reader is not None and readers[tensor] == 1 else None
        alone = readers[first.weight] == 1 and (not first.bias or readers[first.bias] == 1)
        if second is not None and second.input == tensor and alone and readers[second.weight] == 1:
            pairs.append((first, second))
            clips |= {node.name for node in passed if node.op == "Clip"}
    return pairs, clips


def _homogeneous(node: Node, graph: FloatGraph, relu6: bool) -> bool:
    low, high = clip_bounds(node, graph)
    return low == 0 and (high is None or relu6)


def _balance(values: dict[str, Array], first: Layer, second: Layer, changed: set[str]) -> float:
    """One step for one pair; how far the furthest factor is from 1."""
    one, other = values[first.weight], values[second.weight]
    group, channels = second.group, one.shape[0]
    ranges = np.abs(one).reshape(channels, -1).max(1)
    # (outputs, inputs of a group, ...) as (groups, outputs of a group, inputs of a group, ...): inputs are numbered
    # group by group.
    split = other.reshape(group, -1, *other.shape[1:])
    reading = np.abs(split).reshape(group, split.shape[1], split.shape[2], -1).max((1, 3)).ravel()
    used = (ranges > 0) & (reading > 0)
    factor = np.where(used, np.sqrt(np.where(used, ranges, 1) / np.where(used, reading, 1)), 1.0).astype(np.float32)
    values[first.weight] = one / factor.reshape(-1, *[1] * (one.ndim - 1))
    if first.bias:
        values[first.bias] = values[first.bias] / factor
    values[second.weight] = (split * factor.reshape(group, 1, -1, *[1] * (other.ndim - 2))).reshape(other.shape)
    changed |= {n for n in (first.weight, first.bias, second.weight) if n}
    return float(np.abs(factor - 1).max())
