"""Conv and ConvTranspose, in one or two dimensions; also the convolution that QLinearConv and ConvInteger expand to."""

from __future__ import annotations

import math

from tvm import relax

from hawq_tvm import ops

from .node import Node, handles
from .values import Constant, Value
from .window import Window, auto_pad, explicit_pads, positive, read_window, split_padding


def channel_bias(node: Node, bias: Value, channels: int) -> relax.Expr:
    """A bias of one value per channel as (1, C, 1, 1)."""
    if tuple(bias.shape) not in ((channels,), (1,) if channels == 1 else (channels,)):
        raise node.fail("has a bias that does not fit", expected=f"shape [{channels}]", found=str(list(bias.shape)))
    shape = (1, channels, 1, 1)
    if isinstance(bias, Constant):
        return ops.const(bias.stored().reshape(shape), str(bias.stored().dtype))
    return node.emit(relax.op.reshape(bias.expr, shape), "bias")


def _check(node: Node, x: relax.Expr, w: relax.Expr, channel_axis: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shapes of data and weight and the group count, checked; channel_axis: where the weight has its input channels."""
    data, weight, group = ops.shape_of(x), ops.shape_of(w), node.attr("group", 1)
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
    return data, weight, group


def _to_2d(node: Node, expr: relax.Expr, suffix: str) -> relax.Expr:
    return node.emit(relax.op.expand_dims(expr, [2]), suffix) if len(ops.shape_of(expr)) == 3 else expr


def _finish(node: Node, y: relax.Expr, bias: Value | None, channels: int, rank: int) -> relax.Expr:
    """The bias added and the helper dimension of a 1-D operator removed; the last expression is not yet bound."""
    if bias is not None:
        y = relax.op.add(node.emit(y, "acc"), channel_bias(node, bias, channels))
    return relax.op.squeeze(node.emit(y, "flat"), [2]) if rank == 3 else y


def convolve(node: Node, x: relax.Expr, w: relax.Expr, bias: Value | None) -> relax.Expr:
    """The float convolution of a node's attributes: x (N, C, spatial), w (O, C / group, spatial), bias (O)."""
    data, weight, group = _check(node, x, w, 1)
    window = read_window(node, data[2:], weight[2:])
    y = relax.op.nn.conv2d(
        _to_2d(node, x, "x2d"), _to_2d(node, w, "w2d"), strides=window.flat(window.strides, 1), padding=window.padding,
        dilation=window.flat(window.dilations, 1), groups=group,
    )  # fmt: skip
    return _finish(node, y, bias, weight[0], len(data))


@handles("Conv")
def conv(node: Node) -> relax.Expr:
    """Convolution of float tensors."""
    return convolve(node, node.expr(0), node.expr(1), node.optional(2))


@handles("ConvTranspose")
def conv_transpose(node: Node) -> relax.Expr:
    """Transposed convolution; output_shape and auto_pad become explicit padding."""
    x, w = node.expr(0), node.expr(1)
    data, weight, group = _check(node, x, w, 0)
    window, extra = _transposed_window(node, data[2:], weight[2:])
    y = relax.op.nn.conv2d_transpose(
        _to_2d(node, x, "x2d"), _to_2d(node, w, "w2d"), strides=window.flat(window.strides, 1), padding=window.padding,
        output_padding=window.flat(extra, 0), dilation=window.flat(window.dilations, 1), groups=group,
    )  # fmt: skip
    return _finish(node, y, node.optional(2), weight[1] * group, len(data))


def _transposed_window(node: Node, spatial: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[Window, tuple[int, ...]]:
    count = len(spatial)
    if node.has("kernel_shape"):
        declared = positive(node, "kernel_shape", count)
        node.need(
            declared == kernel,
            "has a kernel_shape that is not its weight's",
            expected=list(kernel),
            found=list(declared),
        )
    strides, dilations = positive(node, "strides", count), positive(node, "dilations", count)
    extra = node.attr("output_padding", [0] * count)
    if len(extra) != count or any(not isinstance(e, int) or e < 0 for e in extra):
        raise node.fail(
            "has an output_padding that does not fit", expected=f"{count} integers of at least 0", found=str(extra)
        )
    mode = auto_pad(node)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    full = [s * (d - 1) + e + r for s, d, e, r in zip(strides, spatial, extra, reach, strict=True)]
    if node.has("output_shape") or mode.startswith("SAME"):
        wanted = node.attr("output_shape", [d * s for d, s in zip(spatial, strides, strict=True)])
        wanted = wanted[2:] if len(wanted) == count + 2 else wanted
        if len(wanted) != count or any(
            not isinstance(o, int) or o < 1 or o > f for o, f in zip(wanted, full, strict=False)
        ):
            raise node.fail(
                "has an output_shape that does not fit",
                expected=f"at most {full} (or more output_padding)",
                found=str(wanted),
            )
        before, after = split_padding([f - o for f, o in zip(full, wanted, strict=True)], upper=mode == "SAME_UPPER")
    elif mode == "VALID":
        before, after = (0,) * count, (0,) * count
    else:
        before, after = explicit_pads(node, count)
    if any(e >= max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        raise node.fail(
            "has an output_padding that its strides cannot leave open",
            expected=f"below {list(strides)}",
            found=str(extra),
        )
    sizes = [f - b - a for f, b, a in zip(full, before, after, strict=True)]
    node.need(
        math.prod(max(0, s) for s in sizes) > 0,
        "has pads larger than its output",
        expected="an output of positive size",
        found=sizes,
    )
    return Window(kernel, strides, dilations, before, after), tuple(extra)
