"""A prepared model without the channels that go."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray

from hawq_tvm.quantize.network.prepare import constants, set_constant

from .channels import Channels

Kept = NDArray[np.bool_]


def without_channels(model: onnx.ModelProto, channels: Channels, stays: Kept) -> onnx.ModelProto:
    """A copy of a model whose constants, counts and depthwise groups have only what stays; stays: by group."""
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    values = constants(cut.graph)
    for place in channels.places:
        values[place.parameter] = np.compress(stays[place.groups], values[place.parameter], place.axis)
    for name, entry, groups in channels.sizes:
        values[name] = np.where(np.arange(len(values[name])) == entry, stays[groups].sum(), values[name])
    for name in {p.parameter for p in channels.places} | {name for name, _, _ in channels.sizes}:
        set_constant(cut.graph, name, values[name])
    for node in cut.graph.node:
        if node.name in channels.depthwise:
            group = next(a for a in node.attribute if a.name == "group")
            group.i = int(stays[channels.depthwise[node.name]].sum())
    return cut
