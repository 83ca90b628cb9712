"""Operators that select, join, repeat and pad elements: the same on floats and on integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm import ops

from .node import Node, handles
from .values import Array, Result, Tensor


def take(x: relax.Expr, indices: np.ndarray, axis: int) -> relax.Call:
    """Elements at constant positions along an axis."""
    return relax.op.take(x, ops.const(indices, "int64"), axis)


def concat_axis(node: Node, shapes: Sequence[tuple[int, ...]]) -> int:
    """The axis along which tensors of these shapes are joined.

    Raises ModelError when they differ along another.
    """
    axis = node.axis(node.attr("axis", 0), len(shapes[0]))
    if any(
        len(s) != len(shapes[0]) or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes
    ):
        raise node.fail(
            "has operands that do not fit",
            expected=f"equal sizes along every axis but {axis}",
            found=str([list(s) for s in shapes]),
        )
    return axis


@handles("Concat")
def concat(node: Node) -> Result:
    """Tensors joined along an axis."""
    shapes = [node.shape(i) for i in range(len(node.inputs))]
    axis = concat_axis(node, shapes)
    kept = [i for i in range(len(shapes)) if shapes[i][axis] > 0]
    node.need(bool(kept), "joins nothing", expected="at least one element")
    if len(kept) == 1:
        return node.value(kept[0])
    values = [node.value(i) for i in kept]
    ranges = {v.bounds if isinstance(v, Tensor) else None for v in values}
    joined = relax.op.concat([node.expr(i) for i in kept], axis)
    return Tensor(joined, values[0].kind, ranges.pop() if len(ranges) == 1 else None)


def _slice(
    node: Node, x: relax.Expr, axes: list[int], begin: list[int], end: list[int], steps: list[int] | None = None
) -> relax.Call:
    return relax.op.strided_slice(x, axes, begin, end, steps or [1] * len(axes))


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
    if len(sizes) != count or sum(sizes) != total or any(s < 1 for s in sizes):
        raise node.fail(
            "has parts that do not fit", expected=f"{count} positive sizes that add up to {total}", found=str(sizes)
        )
    if count == 1:
        return [node.value(0)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [node.like(_slice(node, node.expr(0), [axis], [starts[i]], [starts[i + 1]])) for i in range(count)]


@handles("Slice")
def slice_(node: Node) -> Result:
    """Every step-th element between starts and ends along axes; ONNX clamps both to the data."""
    dims = node.shape()
    begins, ends = node.ints(1, "start"), node.ints(2, "end")
    axes = node.axes(node.ints(3, "list of axes") if node.given(3) else list(range(len(begins))), len(dims))
    steps = node.ints(4, "step") if node.given(4) else [1] * len(begins)
    if not len(begins) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise node.fail(
            "has starts, ends, axes and steps that do not fit",
            expected="as many of each, steps other than 0",
            found=f"{begins}, {ends}, {axes}, {steps}",
        )
    ranges = [range(dims[a])[slice(b, e, s)] for a, b, e, s in zip(axes, begins, ends, steps, strict=True)]
    if any(len(r) == 0 for r in ranges):
        raise node.fail(
            "leaves no element",
            expected="at least one along every axis",
            found=f"starts {begins}, ends {ends} of {list(dims)}",
        )
    kept = [(a, r) for a, r in zip(axes, ranges, strict=True) if r != range(dims[a])]
    if not kept:
        return node.value(0)
    stops = [r[-1] + (1 if r.step > 0 else -1) for _, r in kept]
    # A backward slice that reaches the first element ends below it, which only a number beyond the front expresses.
    ends = [s if s >= 0 else -dims[a] - 1 for s, (a, _) in zip(stops, kept, strict=True)]
    return node.like(
        _slice(node, node.expr(0), [a for a, _ in kept], [r[0] for _, r in kept], ends, [r.step for _, r in kept])
    )


@handles("Gather")
def gather(node: Node) -> Result:
    """Elements at constant indices along an axis; a scalar index removes the axis."""
    dims = node.shape()
    axis, indices = node.axis(node.attr("axis", 0), len(dims)), node.constant(1, "index").astype(np.int64)
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
    left = [d + min(b, 0) + min(e, 0) for d, b, e in zip(node.shape(), begin, end, strict=True)]
    node.need(
        all(d > 0 for d in left), "cuts away everything", expected="at least one element along every axis", found=left
    )
    x = node.expr(0)
    cut = [i for i, (b, e) in enumerate(zip(begin, end, strict=True)) if b < 0 or e < 0]
    if cut:
        starts, stops = [max(0, -begin[i]) for i in cut], [max(0, -begin[i]) + left[i] for i in cut]
        x = node.emit(_slice(node, x, cut, starts, stops), "crop")
    widths = [(max(0, b), max(0, e)) for b, e in zip(begin, end, strict=True)]
    if not any(b or e for b, e in widths):
        return node.like(x) if cut else node.value(0)
    if mode != "constant":
        return node.like(_pad_with_data(node, x, widths, mode))
    value = _pad_value(node)
    return Tensor(
        relax.op.nn.pad(x, [w for pair in widths for w in pair], "constant", value),
        node.value(0).kind,
        _with(node, value),
    )


def _with(node: Node, value: float) -> tuple[int, int] | None:
    data = node.value(0)
    if not isinstance(data, Tensor) or data.bounds is None:
        return None
    return min(data.bounds[0], int(value)), max(data.bounds[1], int(value))


def _pad_value(node: Node) -> float:
    if node.opset < 11:
        value = node.attr("value", 0.0)
    elif node.given(2):
        array = node.constant(2, "pad value")
        node.need(array.size == 1, "has a pad value that is not a scalar", found=list(array.shape))
        value = float(array.astype(np.float64).item())
    else:
        value = 0.0
    node.need(math.isfinite(value), "pads with a number that is not finite", expected="a finite value", found=value,
              remedy="use the pads of the MaxPool that follows")  # fmt: skip
    return value


def _pad_with_data(node: Node, x: relax.Expr, widths: list[tuple[int, int]], mode: str) -> relax.Expr:
    """Padding as a gather of constant positions, axis by axis."""
    sizes = ops.shape_of(x)
    chosen = [i for i, pair in enumerate(widths) if any(pair)]
    for axis in chosen:
        size, (before, after) = sizes[axis], widths[axis]
        if (mode == "reflect" and max(before, after) > size - 1) or (mode == "wrap" and max(before, after) > size):
            raise node.fail(
                "has pads larger than its data",
                expected=f"at most {size - (mode == 'reflect')} along axis {axis}",
                found=str((before, after)),
            )
        node.need(
            size + before + after <= 1 << 24,
            "has very large pads",
            expected=f"at most {1 << 24}",
            found=str((before, after)),
        )
        place: Array = np.arange(-before, size + after)
        if mode == "edge":
            place = np.clip(place, 0, size - 1)
        elif mode == "wrap":
            place = place % size
        else:
            place = np.where(place < 0, -place, np.where(place >= size, 2 * (size - 1) - place, place))
        x = take(x, place, axis)
        x = x if axis == chosen[-1] else node.emit(x, f"axis{axis}")
    return x
