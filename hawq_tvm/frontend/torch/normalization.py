"""Normalisation by statistics of the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .node import Node, expression, handles

EPSILON = float(np.finfo(np.float32).eps)  # of rms_norm, where none is given


def _parameter(node: Node, name: str, shape: Sequence[int], default: float) -> relax.Expr:
    """A weight or bias of exactly this shape; all the same number where it is left out."""
    value = node.tensor(name)
    if value is None:
        return ops.const(np.full(shape, default), "float32")
    node.need(
        value.shape == tuple(shape), f"has a {name} that does not fit", expected=list(shape), found=list(value.shape)
    )
    return expression(value)


def _axes(node: Node) -> tuple[list[int], tuple[int, ...]]:
    """The last axes, which `normalized_shape` names by their sizes, and these sizes."""
    shape, sizes = node.shape(), tuple(node.integers("normalized_shape"))
    node.need(
        0 < len(sizes) <= len(shape) and shape[len(shape) - len(sizes) :] == sizes,
        "has a normalized_shape that does not fit",
        expected=f"the last sizes of {list(shape)}",
        found=list(sizes),
    )
    return list(range(len(shape) - len(sizes), len(shape))), sizes


@handles("aten.layer_norm")
def layer_norm(node: Node) -> relax.Expr:
    """(x - mean) / sqrt(variance + eps) weight + bias over the last axes."""
    axes, sizes = _axes(node)
    weight, bias = _parameter(node, "weight", sizes, 1), _parameter(node, "bias", sizes, 0)
    return relax.op.nn.layer_norm(node.x(), weight, bias, axes, node.number("eps", 1e-5))


@handles("aten.rms_norm")
def rms_norm(node: Node) -> relax.Expr:
    """x / sqrt(mean square + eps) weight over the last axes."""
    axes, sizes = _axes(node)
    return relax.op.nn.rms_norm(node.x(), _parameter(node, "weight", sizes, 1), axes, node.number("eps", EPSILON))


@handles("aten.group_norm")
def group_norm(node: Node) -> relax.Expr:
    """The same as layer_norm over groups of channels and all pixels."""
    shape, groups = node.shape(), node.integer("num_groups")
    node.need(
        len(shape) >= 3 and groups > 0 and shape[1] % groups == 0,
        "has groups that do not divide its channels",
        found=f"{groups} groups of {list(shape)}",
    )
    weight, bias = _parameter(node, "weight", shape[1:2], 1), _parameter(node, "bias", shape[1:2], 0)
    axes = list(range(2, len(shape)))
    return relax.op.nn.group_norm(node.x(), weight, bias, groups, 1, axes, node.number("eps", 1e-5))


@handles("aten.instance_norm")
def instance_norm(node: Node) -> relax.Expr:
    """The same over the pixels of each channel."""
    shape = node.shape()
    node.need(node.flag("use_input_stats", True), "uses stored statistics", remedy="use a BatchNorm")
    node.need(len(shape) >= 3, "needs pixels", expected="rank 3 or more", found=list(shape))
    weight, bias = _parameter(node, "weight", shape[1:2], 1), _parameter(node, "bias", shape[1:2], 0)
    return relax.op.nn.instance_norm(node.x(), weight, bias, 1, list(range(2, len(shape))), node.number("eps", 1e-5))
