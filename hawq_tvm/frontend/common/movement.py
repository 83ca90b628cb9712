"""Operators that select, join and pad elements: the same on floats and on integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .node import Operation
from .values import Array, Result, Tensor


def take(x: relax.Expr, indices: Array, axis: int) -> relax.Call:
    """Elements at constant positions along an axis."""
    return relax.op.take(x, ops.const(indices, "int64"), axis)


def joint_axis(node: Operation, axis: int, shapes: Sequence[tuple[int, ...]]) -> int:
    """The axis along which tensors of these shapes are joined, counted from the front.

    Raises ModelError when they differ along another.
    """
    axis = node.axis(axis, len(shapes[0]))
    if any(
        len(s) != len(shapes[0]) or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes
    ):
        raise node.fail(
            "has operands that do not fit",
            expected=f"equal sizes along every axis but {axis}",
            found=str([list(s) for s in shapes]),
        )
    return axis


def joined(node: Operation, axis: int) -> Result:
    """All inputs joined along an axis."""
    shapes = [node.shape(i) for i in range(len(node.inputs))]
    axis = joint_axis(node, axis, shapes)
    kept = [i for i in range(len(shapes)) if shapes[i][axis] > 0]
    node.need(bool(kept), "joins nothing", expected="at least one element")
    if len(kept) == 1:
        return node.value(kept[0])
    values = [node.value(i) for i in kept]
    ranges = {v.bounds if isinstance(v, Tensor) else None for v in values}
    joined = relax.op.concat([node.expr(i) for i in kept], axis)
    return Tensor(joined, values[0].kind, ranges.pop() if len(ranges) == 1 else None)


def parts(node: Operation, axis: int, sizes: Sequence[int]) -> list[Result]:
    """Input 0 in consecutive parts of these sizes."""
    total = node.shape()[axis]
    if sum(sizes) != total or any(s < 1 for s in sizes):
        raise node.fail(
            "has parts that do not fit", expected=f"positive sizes that add up to {total}", found=str(list(sizes))
        )
    if len(sizes) == 1:
        return [node.value(0)]
    starts = np.cumsum([0, *sizes]).tolist()
    return [node.like(_slice(node.expr(0), [axis], [starts[i]], [starts[i + 1]])) for i in range(len(sizes))]


def sliced(node: Operation, ranges: Mapping[int, range]) -> Result:
    """The elements of input 0 at these positions of each axis; axes that are not named stay whole."""
    dims = node.shape()
    if any(len(r) == 0 for r in ranges.values()):
        found = ", ".join(f"{r.start}:{r.stop}:{r.step} along axis {a}" for a, r in ranges.items())
        raise node.fail("leaves no element", expected="at least one along every axis", found=f"{found} of {list(dims)}")
    kept = [(a, r) for a, r in ranges.items() if r != range(dims[a])]
    if not kept:
        return node.value(0)
    kept = [(a, r if len(r) > 1 else range(r[0], r[0] + 1)) for a, r in kept]
    # One element is reached by any step, however large.
    kept = [(a, r if len(r) > 1 else range(r[0], r[0] + 1)) for a, r in kept]
    stops = [r[-1] + (1 if r.step > 0 else -1) for _, r in kept]
    # A backward slice that reaches the first element ends below it, which only a number beyond the front expresses.
    ends = [s if s >= 0 else -dims[a] - 1 for s, (a, _) in zip(stops, kept, strict=True)]
    return node.like(
        _slice(node.expr(0), [a for a, _ in kept], [r[0] for _, r in kept], ends, [r.step for _, r in kept])
    )


def _slice(
    x: relax.Expr, axes: list[int], begin: list[int], end: list[int], steps: list[int] | None = None
) -> relax.Call:
    return relax.op.strided_slice(x, axes, begin, end, steps or [1] * len(axes))


def padded(node: Operation, begin: Sequence[int], end: Sequence[int], mode: str, value: float = 0.0) -> Result:
    """Input 0 with borders of `value`, or of the data itself (mode reflect, edge, wrap); negative pads cut away."""
    left = [d + min(b, 0) + min(e, 0) for d, b, e in zip(node.shape(), begin, end, strict=True)]
    node.need(
        all(d > 0 for d in left), "cuts away everything", expected="at least one element along every axis", found=left
    )
    x = node.expr(0)
    cut = [i for i, (b, e) in enumerate(zip(begin, end, strict=True)) if b < 0 or e < 0]
    if cut:
        starts, stops = [max(0, -begin[i]) for i in cut], [max(0, -begin[i]) + left[i] for i in cut]
        x = node.emit(_slice(x, cut, starts, stops), "crop")
    widths = [(max(0, b), max(0, e)) for b, e in zip(begin, end, strict=True)]
    if not any(b or e for b, e in widths):
        return node.like(x) if cut else node.value(0)
    if mode != "constant":
        return node.like(_pad_with_data(node, x, widths, mode))
    return Tensor(
        relax.op.nn.pad(x, [w for pair in widths for w in pair], "constant", value),
        node.value(0).kind,
        _with(node, value),
    )


def _with(node: Operation, value: float) -> tuple[int, int] | None:
    data = node.value(0)
    if not isinstance(data, Tensor) or data.bounds is None:
        return None
    return min(data.bounds[0], int(value)), max(data.bounds[1], int(value))


def _pad_with_data(node: Operation, x: relax.Expr, widths: list[tuple[int, int]], mode: str) -> relax.Expr:
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
