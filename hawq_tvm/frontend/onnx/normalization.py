"""Normalisation by statistics of the tensor itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .node import Node, expression, handles
from .values import Constant


def _parameter(node: Node, index: int, name: str, shape: Sequence[int]) -> relax.Expr:
    """A scale or bias of exactly this shape; a constant may broadcast to it."""
    value = node.value(index)
    if isinstance(value, Constant) and value.shape != tuple(shape):
        array = value.array.astype(np.float32)
        if array.ndim <= len(shape) and all(
            a in (1, b) for a, b in zip(array.shape[::-1], tuple(shape)[::-1], strict=False)
        ):
            return ops.const(np.broadcast_to(array, shape), "float32")
    node.need(
        value.shape == tuple(shape), f"has a {name} that does not fit", expected=list(shape), found=list(value.shape)
    )
    return expression(value)


@handles("LayerNormalization")
def layer_normalization(node: Node) -> relax.Expr:
    """(x - mean) / sqrt(variance + epsilon) scale + bias over the axes from `axis` on."""
    shape = node.shape()
    axis = node.axis(node.attr("axis", -1), len(shape))
    node.need(
        len([o for o in node.outputs if o]) == 1, "gives its statistics", expected="one output", found=len(node.outputs)
    )
    scale = _parameter(node, 1, "scale", shape[axis:])
    bias = _parameter(node, 2, "bias", shape[axis:]) if node.given(2) else ops.const(np.zeros(shape[axis:]), "float32")
    return relax.op.nn.layer_norm(node.expr(0), scale, bias, list(range(axis, len(shape))), node.attr("epsilon", 1e-5))


@handles("RMSNormalization")
def rms_normalization(node: Node) -> relax.Expr:
    """x / sqrt(mean square + epsilon) scale over the axes from `axis` on."""
    shape = node.shape()
    axis = node.axis(node.attr("axis", -1), len(shape))
    scale = _parameter(node, 1, "scale", shape[axis:])
    return relax.op.nn.rms_norm(node.expr(0), scale, list(range(axis, len(shape))), node.attr("epsilon", 1e-5))


@handles("InstanceNormalization")
def instance_normalization(node: Node) -> relax.Expr:
    """The same over the pixels of each channel."""
    shape = node.shape()
    node.need(len(shape) >= 3, "needs pixels", expected="rank 3 or more", found=list(shape))
    scale, bias = (_parameter(node, i, name, shape[1:2]) for i, name in ((1, "scale"), (2, "bias")))
    return relax.op.nn.instance_norm(
        node.expr(0), scale, bias, 1, list(range(2, len(shape))), node.attr("epsilon", 1e-5)
    )


@handles("GroupNormalization")
def group_normalization(node: Node) -> relax.Expr:
    """The same over groups of channels; before opset 21 scale and bias are one number per group."""
    shape, groups = node.shape(), node.attr("num_groups", 1)
    node.need(len(shape) >= 3, "needs pixels", expected="rank 3 or more", found=list(shape))
    node.need(
        groups > 0 and shape[1] % groups == 0,
        "has groups that do not divide its channels",
        found=f"{groups} groups of {shape[1]} channels",
    )
    if node.opset < 21:
        parameters = [_parameter(node, i, name, (groups,)) for i, name in ((1, "scale"), (2, "bias"))]
        scale, bias = (node.emit(relax.op.repeat(p, shape[1] // groups, 0), "per_channel") for p in parameters)
    else:
        scale, bias = (_parameter(node, i, name, shape[1:2]) for i, name in ((1, "scale"), (2, "bias")))
    axes = list(range(2, len(shape)))
    return relax.op.nn.group_norm(node.expr(0), scale, bias, groups, 1, axes, node.attr("epsilon", 1e-5))
