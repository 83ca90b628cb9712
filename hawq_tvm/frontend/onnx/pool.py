"""Pools over windows and over whole images, in one or two dimensions, on floats and (maxima) on integers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import relax

from hawq_tvm import arith, ops

from .node import Node, handles
from .values import Result, Tensor
from .window import Window, auto_pad, read_window


def _ceil_mode(node: Node, window: Window, spatial: tuple[int, ...]) -> tuple[Window, bool]:
    """The window and Relax's ceil_mode that give ONNX's output: no window may start in the padding at the end.

    Relax takes one flag for all axes; on an axis where it must not apply, padding that no window reaches is cut off.
    """
    if not node.flag("ceil_mode", 0) or auto_pad(node).startswith("SAME"):
        return window, False
    axes = list(zip(spatial, window.before, window.after, window.reach, window.strides, strict=True))
    rest = [(d + b + a - r) % s for d, b, a, r, s in axes]
    partial = [e > 0 and d + b + a - r - e + s < d + b for (d, b, a, r, s), e in zip(axes, rest, strict=True)]
    if not any(partial):
        return window, False
    after = [a if p else a - e for a, p, e in zip(window.after, partial, rest, strict=True)]
    node.need(
        min(after) >= 0, "has a ceil_mode that applies to one axis only", remedy="use explicit pads and ceil_mode 0"
    )
    return replace(window, after=tuple(after)), True


def _padded(node: Node, data: relax.Expr, options: dict[str, Any]) -> relax.Expr:
    """Integers with the padding of their pool made explicit: the lowest value the data can hold never wins."""
    value = node.value(0)
    lowest = value.range[0] if isinstance(value, Tensor) else arith.RANGES[value.kind][0]
    begin, end = options["padding"][:2], list(options["padding"][2:])
    for i, size in enumerate(ops.shape_of(data)[2:]):
        reach = (options["pool_size"][i] - 1) * options["dilation"][i] + 1
        rest = (size + begin[i] + end[i] - reach) % options["strides"][i]
        end[i] += options["strides"][i] - rest if options["ceil_mode"] and rest else 0
    if not any((*begin, *end)):
        return data
    width = [0, 0, 0, 0, begin[0], end[0], begin[1], end[1]]
    return node.emit(relax.op.nn.pad(data, width, "constant", lowest), "pad")


def pool2d(node: Node, x: relax.Expr, kind: str) -> relax.Expr:
    """max_pool2d or avg_pool2d of the node's window; a 1-D pool runs as a 2-D one of height 1."""
    shape = ops.shape_of(x)
    node.need(
        len(shape) in (3, 4), "works on 1-D and 2-D data", expected="data of rank 3 or 4", found=f"rank {len(shape)}"
    )
    window = read_window(node, shape[2:])
    if any(p >= r for p, r in zip((*window.before, *window.after), window.reach * 2, strict=True)):
        raise node.fail(
            "has pads as large as its kernel",
            expected=f"below {list(window.reach)}",
            found=str(list(window.before + window.after)),
        )
    data = node.emit(relax.op.expand_dims(x, [2]), "x2d") if len(shape) == 3 else x
    window, ceil_mode = _ceil_mode(node, window, shape[2:])
    options = {
        "pool_size": window.flat(window.kernel, 1), "strides": window.flat(window.strides, 1),
        "padding": window.padding,
        "dilation": window.flat(window.dilations, 1), "ceil_mode": ceil_mode,
    }  # fmt: skip
    if kind == "max" and not node.is_float():
        data = _padded(node, data, options)
        y = relax.op.nn.max_pool2d(data, **{**options, "padding": (0, 0), "ceil_mode": False})
    elif kind == "max":
        y = relax.op.nn.max_pool2d(data, **options)
    else:
        y = relax.op.nn.avg_pool2d(data, count_include_pad=node.flag("count_include_pad", 0), **options)
    return relax.op.squeeze(node.emit(y, "flat"), [2]) if len(shape) == 3 else y


@handles("MaxPool")
def max_pool(node: Node) -> Result:
    """The maximum of each window."""
    node.need(len([o for o in node.outputs if o]) == 1, "gives the indices of its maxima", expected="one output")
    return node.like(pool2d(node, node.expr(0), "max"))


@handles("AveragePool")
def average_pool(node: Node) -> relax.Expr:
    """The mean of each window; padding counts only when count_include_pad says so."""
    return pool2d(node, node.expr(0), "average")


def _spatial_axes(node: Node, rank: int) -> list[int]:
    node.need(rank >= 3, "needs spatial axes", expected="rank 3 or more", found=rank)
    return list(range(2, rank))


@handles("GlobalAveragePool")
def global_average_pool(node: Node) -> relax.Expr:
    """The mean over all spatial axes."""
    return relax.op.mean(node.expr(0), _spatial_axes(node, len(node.shape())), keepdims=True)


@handles("GlobalMaxPool")
def global_max_pool(node: Node) -> Result:
    """The maximum over all spatial axes."""
    return node.like(relax.op.max(node.expr(0), _spatial_axes(node, len(node.shape())), keepdims=True))
