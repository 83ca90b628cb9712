"""Pools over windows, in one to three dimensions, on floats and (maxima) on integers; one over three is one over the
depth and then one over every image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import relax

from hawq_tvm.core import arith, ops

from .node import Operation
from .values import Tensor
from .window import Window


def _ceil_mode(node: Operation, window: Window, spatial: tuple[int, ...]) -> tuple[Window, bool]:
    """The window and Relax's ceil_mode that round outputs up: no window may start in the padding at the end.

    Relax takes one flag for all axes; on an axis where it must not apply, padding that no window reaches is cut off.
    """
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


def _padded(node: Operation, data: relax.Expr, options: dict[str, Any]) -> relax.Expr:
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


def pooled(
    node: Operation, x: relax.Expr, window: Window, kind: str, *, ceil_mode: bool, count_include_pad: bool = False
) -> relax.Expr:
    """max_pool2d (kind "max") or avg_pool2d (kind "average") of data of rank 3 to 5; a 1-D pool runs as a 2-D one of
    height 1.

    ceil_mode: a last window may be partial.  count_include_pad: padding counts in a mean.
    """
    shape = ops.shape_of(x)
    if any(p >= r for p, r in zip((*window.before, *window.after), window.reach * 2, strict=True)):
        raise node.fail(
            "has pads as large as its kernel",
            expected=f"below {list(window.reach)}",
            found=str(list(window.before + window.after)),
        )
    if len(shape) == 5:
        return _pooled_in_depth(
            lambda x, window: pooled(node, x, window, kind, ceil_mode=ceil_mode, count_include_pad=count_include_pad),
            node,
            x,
            window,
        )
    data = node.emit(relax.op.expand_dims(x, [2]), "x2d") if len(shape) == 3 else x
    window, partial = _ceil_mode(node, window, shape[2:]) if ceil_mode else (window, False)
    options = {
        "pool_size": window.flat(window.kernel, 1),
        "strides": window.flat(window.strides, 1),
        "padding": window.padding,
        "dilation": window.flat(window.dilations, 1),
        "ceil_mode": partial,
    }
    if kind == "max" and not node.is_float():
        data = _padded(node, data, options)
        y = relax.op.nn.max_pool2d(data, **{**options, "padding": (0, 0), "ceil_mode": False})
    elif kind == "max":
        y = relax.op.nn.max_pool2d(data, **options)
    else:
        y = relax.op.nn.avg_pool2d(data, count_include_pad=count_include_pad, **options)
    return relax.op.squeeze(node.emit(y, "flat"), [2]) if len(shape) == 3 else y


def _pooled_in_depth(
    pool: Callable[[relax.Expr, Window], relax.Expr], node: Operation, x: relax.Expr, window: Window
) -> relax.Expr:
    """First along the depth: the divisors of a mean without padding may differ there, and do not within an image."""
    batch, channels, depth, *image = ops.shape_of(x)
    columns = node.emit(relax.op.reshape(x, (batch, channels, depth, math.prod(image))), "columns")
    columns = node.emit(pool(columns, window.along(0, 1).beside()), "columns.y")
    depth = ops.shape_of(columns)[2]
    images = node.emit(relax.op.reshape(columns, (batch, channels * depth, *image)), "images")
    images = node.emit(pool(images, window.along(1, 3)), "images.y")
    return relax.op.reshape(images, (batch, channels, depth, *ops.shape_of(images)[2:]))


def check_rank(node: Operation, shape: tuple[int, ...]) -> None:
    """Raise ModelError unless data of this shape has one to three spatial dimensions."""
    node.need(
        len(shape) in (3, 4, 5),
        "works on data of 1 to 3 dimensions",
        expected="data of rank 3 to 5",
        found=f"rank {len(shape)}",
    )
