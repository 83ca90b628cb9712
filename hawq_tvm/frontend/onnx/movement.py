"""Operators that select, join, repeat and pad elements: the same on floats and on integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm.frontend.common.movement import joined, joint_axis, padded, parts, sliced, take

from .node import Node, handles
from .values import Result, Tensor


def concat_axis(node: Node, shapes: Sequence[tuple[int, ...]]) -> int:
    """The axis along which a node joins tensors of these shapes."""
    return joint_axis(node, node.attr("axis", 0), shapes)


@handles("Concat")
def concat(node: Node) -> Result:
    """Tensors joined along an axis."""
    return joined(node, node.attr("axis", 0))


@handles("Split")
def split(node: Node) -> list[Result]:
    """Consecutive parts along an axis."""
    dims, axis = node.shape(), node.axis(node.attr("axis", 0), len(node.shape()))
    total, count = dims[axis], len(node.outputs)
    sizes = node.attr("split", []) if node.opset < 13 else node.ints(1, "split") if node.given(1) else []
    if not sizes:
        declared = node.attr("num_outputs", count)
        node.need(
            declared == count, "has a num_outputs that is not its number of outputs", expected=count, found=declared
        )
        node.need(
            node.opset >= 18 or total % count == 0,
            "cannot split evenly",
            expected=f"a multiple of {count}",
            found=total,
        )
        part = -(-total // count)
        sizes = [part] * (count - 1) + [total - part * (count - 1)]
    node.need(len(sizes) == count, "has parts that do not fit", expected=f"{count} sizes", found=str(sizes))
    return parts(node, axis, sizes)


@handles("Slice")
def slice_(node: Node) -> Result:
    """Every step-th element between starts and ends along axes, attributes before opset 10; ONNX clamps both to the
    data.
    """
    dims = node.shape()
    if node.opset < 10:
        begins, ends = node.attr("starts", []), node.attr("ends", [])
        axes, steps = node.axes(node.attr("axes", list(range(len(begins)))), len(dims)), [1] * len(begins)
    else:
        begins, ends = node.ints(1, "start"), node.ints(2, "end")
        axes = node.axes(node.ints(3, "list of axes") if node.given(3) else list(range(len(begins))), len(dims))
        steps = node.ints(4, "step") if node.given(4) else [1] * len(begins)
    if not len(begins) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise node.fail(
            "has starts, ends, axes and steps that do not fit",
            expected="as many of each, steps other than 0",
            found=f"{begins}, {ends}, {axes}, {steps}",
        )
    ranges = {a: range(dims[a])[slice(b, e, s)] for a, b, e, s in zip(axes, begins, ends, steps, strict=True)}
    return sliced(node, ranges)


@handles("Gather")
def gather(node: Node) -> Result:
    """Elements at indices along an axis; a scalar index removes the axis.  Run-time indices count from the end when
    negative, as constant ones do.
    """
    dims = node.shape()
    axis, index = node.axis(node.attr("axis", 0), len(dims)), node.value(1)
    if isinstance(index, Tensor) and index.known is None:
        return node.like(relax.op.take(node.expr(0), index.expr, axis, mode="wrap"))
    indices = node.constant(1, "index").astype(np.int64)
    low, high = -dims[axis], dims[axis] - 1
    if indices.size == 0 or indices.min() < low or indices.max() > high:
        raise node.fail(
            "has an index out of range", expected=f"{low} to {high}", found=str(indices.ravel()[:8].tolist())
        )
    indices = np.where(indices < 0, indices + dims[axis], indices)
    flat = take(node.expr(0), indices.ravel(), axis)
    if indices.ndim == 1:
        return node.like(flat)
    shape = dims[:axis] + indices.shape + dims[axis + 1 :]
    return node.like(relax.op.reshape(node.emit(flat, "taken"), shape))


@handles("Expand")
def expand(node: Node) -> Result:
    """Dimensions of size 1 repeated; the shape broadcasts both ways."""
    wanted = node.ints(1, "shape")
    node.need(all(d >= 1 for d in wanted), "has a shape that does not fit", expected="positive sizes", found=wanted)
    try:
        shape = np.broadcast_shapes(node.shape(), tuple(wanted))
    except ValueError:
        raise node.fail(
            "has a shape that does not broadcast", expected=f"sizes that fit {list(node.shape())}", found=str(wanted)
        ) from None
    return node.value(0) if shape == node.shape() else node.like(relax.op.broadcast_to(node.expr(0), shape))


@handles("Tile")
def tile(node: Node) -> Result:
    """The tensor repeated along each axis."""
    repeats = node.ints(1, "repeats")
    if len(repeats) != len(node.shape()) or any(r < 1 for r in repeats):
        raise node.fail(
            "has repeats that do not fit", expected=f"{len(node.shape())} positive integers", found=str(repeats)
        )
    return node.value(0) if all(r == 1 for r in repeats) else node.like(relax.op.tile(node.expr(0), repeats))


def _pads(node: Node) -> tuple[list[int], list[int]]:
    """Begins and ends for every axis, from the attribute (before opset 11) or the inputs."""
    rank = len(node.shape())
    if node.opset < 11:
        pads, axes = node.attr("pads", []), list(range(rank))
    else:
        pads = node.ints(1, "padding")
        axes = node.axes(node.ints(3, "list of axes"), rank) if node.given(3) else list(range(rank))
    if len(pads) != 2 * len(axes):
        raise node.fail("has pads that do not fit", expected=f"{2 * len(axes)} integers", found=str(pads))
    begin, end = [0] * rank, [0] * rank
    for i, axis in enumerate(axes):
        begin[axis], end[axis] = pads[i], pads[len(axes) + i]
    return begin, end


@handles("Pad")
def pad(node: Node) -> Result:
    """Borders of a constant, or of the data itself (reflect, edge, wrap); negative pads cut away."""
    (begin, end), mode = _pads(node), node.attr("mode", "constant")
    node.need(
        mode in ("constant", "reflect", "edge", "wrap"),
        "has an unknown mode",
        expected="constant, reflect, edge or wrap",
        found=mode,
    )
    return padded(node, begin, end, mode, _pad_value(node) if mode == "constant" else 0.0)


def _pad_value(node: Node) -> float:
    if node.opset < 11:
        value = node.attr("value", 0.0)
    elif node.given(2):
        array = node.constant(2, "pad value")
        node.need(array.size == 1, "has a pad value that is not a scalar", found=list(array.shape))
        value = float(array.astype(np.float64).item())
    else:
        value = 0.0
    node.need(
        math.isfinite(value),
        "pads with a number that is not finite",
        expected="a finite value",
        found=value,
        remedy="use the pads of the MaxPool that follows",
    )
    return value
