"""Convolutions, plain in one to three dimensions, transposed in one or two."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax

from hawq_tvm.frontend.common.conv import check_channels, check_transposed, convolved, convolved_transposed
from hawq_tvm.frontend.common.window import Ints, Window, fitting, split_padding

from .node import Node, handles


def _padding(node: Node, count: int, reach: Sequence[int]) -> tuple[Ints, Ints]:
    """Padding before and after, from numbers or from "same" and "valid"."""
    mode = node.arguments.get("padding")
    if not isinstance(mode, str):
        pads = node.sizes("padding", count, 0)
        return pads, pads
    node.need(mode in ("same", "valid"), "has an unknown padding", expected="same or valid", found=mode)
    totals = [r - 1 if mode == "same" else 0 for r in reach]
    return split_padding(totals, upper=True)


def _window(node: Node, kernel: Ints) -> Window:
    count = len(kernel)
    strides, dilations = node.sizes("stride", count, 1), node.sizes("dilation", count, 1)
    node.need(min(*strides, *dilations) > 0, "has a stride or dilation of 0", found=f"{strides}, {dilations}")
    bare = Window(kernel, strides, dilations, (0,) * count, (0,) * count)
    return Window(kernel, strides, dilations, *_padding(node, count, bare.reach))


@handles("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(node: Node) -> relax.Expr:
    """Convolution of float tensors."""
    x, w = node.x(), node.expr(1)
    group = node.integer("groups", 1)
    data, weight = check_channels(node, x, w, group, 1, dimensions=3)
    return convolved(node, x, w, node.tensor("bias"), fitting(node, _window(node, weight[2:]), data[2:]), group)


@handles("aten.conv_transpose1d", "aten.conv_transpose2d")
def transposed_convolution(node: Node) -> relax.Expr:
    """Transposed convolution of float tensors."""
    x, w = node.x(), node.expr(1)
    group = node.integer("groups", 1)
    data, weight = check_channels(node, x, w, group, 0)
    window = _window(node, weight[2:])
    extra = node.sizes("output_padding", len(weight) - 2, 0)
    check_transposed(node, data[2:], window, extra)
    return convolved_transposed(node, x, w, node.tensor("bias"), window, extra, group)


@handles("aten.convolution")
def any_convolution(node: Node) -> relax.Expr:
    """Either of them, as decomposed programs spell it."""
    return transposed_convolution(node) if node.flag("transposed") else convolution(node)
