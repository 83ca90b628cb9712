"""Convolutions, plain in one to three dimensions and transposed in one or two.

One dimension runs as two of height 1. Three run as two: every place along the depth is an image whose channels are all
that its window holds along the depth, and the sum over a window stays one sum.
"""

from __future__ import annotations

import math

import numpy as np
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


def check_channels(
    node: Operation, x: relax.Expr, w: relax.Expr, group: int, channel_axis: int, dimensions: int = 2
) -> tuple[Ints, Ints]:
    """Shapes of data and weight, checked; channel_axis: where the weight has its input channels.  dimensions: the
    most that there may be.
    """
    data, weight = ops.shape_of(x), ops.shape_of(w)
    node.need(
        1 <= len(data) - 2 <= dimensions,
        f"works on data of 1 to {dimensions} dimensions",
        expected=f"data of rank 3 to {dimensions + 2}",
        found=f"rank {len(data)}",
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
    if len(ops.shape_of(x)) == 5:
        return _convolved_in_depth(node, x, w, bias, window, group)
    y = relax.op.nn.conv2d(
        _to_2d(node, x, "x2d"),
        _to_2d(node, w, "w2d"),
        strides=window.flat(window.strides, 1),
        padding=window.padding,
        dilation=window.flat(window.dilations, 1),
        groups=group,
    )
    return _finish(node, y, bias, ops.shape_of(w)[0], len(ops.shape_of(x)))


def _convolved_in_depth(
    node: Operation, x: relax.Expr, w: relax.Expr, bias: Value | None, window: Window, group: int
) -> relax.Expr:
    batch, channels, *_ = ops.shape_of(x)
    outputs, inputs, taps, *kernel = ops.shape_of(w)
    if window.before[0] or window.after[0]:
        around = [0, 0, 0, 0, window.before[0], window.after[0], 0, 0, 0, 0]
        x = node.emit(relax.op.nn.pad(x, around, "constant", 0.0), "deep")
    depth, *image = ops.shape_of(x)[2:]
    places = range(0, depth - window.reach[0] + 1, window.strides[0])
    reached = [p + k * window.dilations[0] for p in places for k in range(taps)]
    if reached != list(range(depth)):
        x = node.emit(relax.op.take(x, ops.const(np.array(reached), "int64"), 2), "taps")
    x = node.emit(relax.op.reshape(x, (batch, channels, len(places), taps, *image)), "windows")
    x = node.emit(relax.op.permute_dims(x, [0, 2, 1, 3, 4, 5]), "places")
    x = node.emit(relax.op.reshape(x, (batch * len(places), channels * taps, *image)), "images")
    w = node.emit(relax.op.reshape(w, (outputs, inputs * taps, *kernel)), "w2d")
    y = node.emit(convolved(node, x, w, bias, window.along(1, 3), group), "images.y")
    shape = (batch, len(places), *ops.shape_of(y)[1:])
    return relax.op.permute_dims(node.emit(relax.op.reshape(y, shape), "places.y"), [0, 2, 1, 3, 4])


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
