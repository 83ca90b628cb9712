"""Convolutions in one or two dimensions, plain and transposed; one dimension runs as two of height 1."""

from __future__ import annotations

import math

from tvm import relax

from hawq_tvm.core import ops

from .node import Operation
from .values import Constant, Value
from .window import Ints, Window


def channel_bias(node: Operation, bias: Value, channels: int) -> relax.Expr:
    """A bias of one value per channel as (1, C, 1, 1)."""
    if tuple(bias.shape) != (channels,):
        raise node.fail("has a bias that does not fit", expected=f"shape [{channels}]", found=str(list(bias.shape)))
    shape = (1, channels, 1, 1)
    if isinstance(bias, Constant):
        return ops.const(bias.stored().reshape(shape), str(bias.stored().dtype))
    return node.emit(relax.op.reshape(bias.expr, shape), "bias")


def check_channels(node: Operation, x: relax.Expr, w: relax.Expr, group: int, channel_axis: int) -> tuple[Ints, Ints]:
    """Shapes of data and weight, checked; channel_axis: where the weight has its input channels."""
    data, weight = ops.shape_of(x), ops.shape_of(w)
    node.need(
        len(data) in (3, 4), "works on 1-D and 2-D data", expected="data of rank 3 or 4", found=f"rank {len(data)}"
    )
    node.need(
        len(weight) == len(data), "has a weight of another rank than its data", expected=len(data), found=list(weight)
    )
    node.need(group >= 1, "has a group that is not positive", expected="1 or more", found=group)
    inputs = weight[1] * group if channel_axis == 1 else weight[0]
    if inputs != data[1]:
        raise node.fail(
            "has a weight that does not fit its data",
            expected=f"{data[1]} input channels",
            found=f"{inputs} (weight {list(weight)}, group {group})",
        )
    node.need(
        weight[0] % group == 0,
        "has channels that its group does not divide",
        expected=f"a multiple of {group}",
        found=weight[0],
    )
    return data, weight


def _to_2d(node: Operation, expr: relax.Expr, suffix: str) -> relax.Expr:
    return node.emit(relax.op.expand_dims(expr, [2]), suffix) if len(ops.shape_of(expr)) == 3 else expr


def _finish(node: Operation, y: relax.Expr, bias: Value | None, channels: int, rank: int) -> relax.Expr:
    """The bias added and the helper dimension of a 1-D operator removed; the last expression is not yet bound."""
    if bias is not None:
        y = relax.op.add(node.emit(y, "acc"), channel_bias(node, bias, channels))
    return relax.op.squeeze(node.emit(y, "flat"), [2]) if rank == 3 else y


def convolved(
    node: Operation, x: relax.Expr, w: relax.Expr, bias: Value | None, window: Window, group: int
) -> relax.Expr:
    """The float convolution: x (N, C, spatial), w (O, C / group, spatial), bias (O)."""
    y = relax.op.nn.conv2d(
        _to_2d(node, x, "x2d"),
        _to_2d(node, w, "w2d"),
        strides=window.flat(window.strides, 1),
        padding=window.padding,
        dilation=window.flat(window.dilations, 1),
        groups=group,
    )
    return _finish(node, y, bias, ops.shape_of(w)[0], len(ops.shape_of(x)))


def convolved_transposed(
    node: Operation, x: relax.Expr, w: relax.Expr, bias: Value | None, window: Window, extra: Ints, group: int
) -> relax.Expr:
    """The transposed convolution: w (C, O / group, spatial); extra: the output padding."""
    y = relax.op.nn.conv2d_transpose(
        _to_2d(node, x, "x2d"),
        _to_2d(node, w, "w2d"),
        strides=window.flat(window.strides, 1),
        padding=window.padding,
        output_padding=window.flat(extra, 0),
        dilation=window.flat(window.dilations, 1),
        groups=group,
    )
    return _finish(node, y, bias, ops.shape_of(w)[1] * group, len(ops.shape_of(x)))


def check_transposed(node: Operation, spatial: Ints, window: Window, extra: Ints) -> None:
    """Raise ModelError when the output padding or the pads leave no output."""
    if any(e >= max(s, d) for e, s, d in zip(extra, window.strides, window.dilations, strict=True)):
        raise node.fail(
            "has an output_padding that its strides cannot leave open",
            expected=f"below {list(window.strides)}",
            found=str(extra),
        )
    sizes = [
        s * (d - 1) + e + r - b - a
        for s, d, e, r, b, a in zip(
            window.strides, spatial, extra, window.reach, window.before, window.after, strict=True
        )
    ]
    node.need(
        math.prod(max(0, s) for s in sizes) > 0,
        "has pads larger than its output",
        expected="an output of positive size",
        found=sizes,
    )
