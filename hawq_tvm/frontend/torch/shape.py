"""Operators that give the same elements another shape."""

from __future__ import annotations

import math

from tvm import relax

from hawq_tvm.frontend.common.values import Constant, Result

from .node import Node, handles


def reshaped(node: Node, shape: list[int]) -> Result:
    """Input 0 in another shape of as many elements, of which one size may be -1."""
    old = node.shape()
    if shape.count(-1) == 1:
        known = math.prod(d for d in shape if d != -1)
        shape = [math.prod(old) // known if d == -1 and known > 0 else d for d in shape]
    if math.prod(shape) != math.prod(old) or any(d < 1 for d in shape):
        raise node.fail(
            "has a shape that does not fit", expected=f"{math.prod(old)} elements as in {list(old)}", found=str(shape)
        )
    value = node.value(0)
    if tuple(shape) == old:
        return value
    return (
        Constant(value.array.reshape(shape))
        if isinstance(value, Constant)
        else node.like(relax.op.reshape(value.expr, tuple(shape)))
    )


def permuted(node: Node, order: list[int]) -> Result:
    """Input 0 with its axes in another order."""
    value = node.value(0)
    if order == list(range(len(order))):
        return value
    return (
        Constant(value.array.transpose(order))
        if isinstance(value, Constant)
        else node.like(relax.op.permute_dims(value.expr, order))
    )


@handles("aten.view", "aten._unsafe_view", "aten.reshape")
def view(node: Node) -> Result:
    """A new shape; -1 is what remains."""
    return reshaped(node, node.integers("size" if node.has("size") else "shape"))


@handles("aten.flatten")
def flatten(node: Node) -> Result:
    """Consecutive axes joined into one."""
    dims = node.shape() or (1,)
    start, end = (node.axis(node.integer(f"{w}_dim", d), len(dims)) for w, d in (("start", 0), ("end", -1)))
    node.need(start <= end, "ends before it starts", found=f"{start} to {end}")
    return reshaped(node, [*dims[:start], math.prod(dims[start : end + 1]), *dims[end + 1 :]])


@handles("aten.unflatten")
def unflatten(node: Node) -> Result:
    """One axis split into several."""
    dims = node.shape()
    axis, sizes = node.axis(node.integer("dim"), len(dims)), node.integers("sizes")
    return reshaped(node, [*dims[:axis], *sizes, *dims[axis + 1 :]])


@handles("aten.squeeze")
def squeeze(node: Node) -> Result:
    """Axes of size 1 taken away: of the named ones those that are, or all."""
    dims = node.shape()
    named = node.axes(node.integers("dim"), len(dims)) if node.has("dim") else range(len(dims))
    return reshaped(node, [d for i, d in enumerate(dims) if d != 1 or i not in named])


@handles("aten.unsqueeze")
def unsqueeze(node: Node) -> Result:
    """An axis of size 1 put in."""
    dims = list(node.shape())
    dims.insert(node.axis(node.integer("dim"), len(dims) + 1), 1)
    return reshaped(node, dims)


@handles("aten.permute")
def permute(node: Node) -> Result:
    """The axes in another order."""
    rank = len(node.shape())
    order = node.axes(node.integers("dims"), rank)
    node.need(
        len(order) == rank,
        "has dims that are no permutation of its axes",
        expected=f"each of 0 to {rank - 1} once",
        found=order,
    )
    return permuted(node, order)


@handles("aten.transpose", "aten.t", "aten.swapaxes")
def transpose(node: Node) -> Result:
    """Two axes exchanged."""
    rank = len(node.shape())
    if node.op == "aten.t":
        node.need(rank <= 2, "transposes matrices", expected="rank 2 or less", found=rank)
        return permuted(node, list(range(rank))[::-1])
    names = ("dim0", "dim1") if node.op == "aten.transpose" else ("axis0", "axis1")
    a, b = (node.axis(node.integer(n), rank) for n in names)
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return permuted(node, order)


def _image(node: Node) -> tuple[int, int, int, int]:
    node.need(len(node.shape()) == 4, "works on images", expected="rank 4", found=list(node.shape()))
    n, c, h, w = node.shape()
    return n, c, h, w


@handles("aten.pixel_shuffle")
def pixel_shuffle(node: Node) -> Result:
    """Channels moved into blocks of pixels."""
    (n, c, h, w), b = _image(node), node.integer("upscale_factor")
    node.need(
        b > 0 and c % (b * b) == 0,
        "has channels that its factor does not divide",
        expected=f"a multiple of {b * b}",
        found=c,
    )
    apart = node.emit(relax.op.reshape(node.expr(0), (n, c // (b * b), b, b, h, w)), "split")
    moved = node.emit(relax.op.permute_dims(apart, [0, 1, 4, 2, 5, 3]), "move")
    return node.like(relax.op.reshape(moved, (n, c // (b * b), h * b, w * b)))


@handles("aten.pixel_unshuffle")
def pixel_unshuffle(node: Node) -> Result:
    """Blocks of pixels moved into channels."""
    (n, c, h, w), b = _image(node), node.integer("downscale_factor")
    node.need(
        b > 0 and h % b == 0 and w % b == 0,
        "has an image that its factor does not divide",
        expected=f"multiples of {b}",
        found=[h, w],
    )
    apart = node.emit(relax.op.reshape(node.expr(0), (n, c, h // b, b, w // b, b)), "split")
    moved = node.emit(relax.op.permute_dims(apart, [0, 1, 3, 5, 2, 4]), "move")
    return node.like(relax.op.reshape(moved, (n, c * b * b, h // b, w // b)))


@handles("aten.channel_shuffle")
def channel_shuffle(node: Node) -> Result:
    """The channels of several groups interleaved."""
    (n, c, h, w), groups = _image(node), node.integer("groups")
    node.need(
        groups > 0 and c % groups == 0,
        "has channels that its groups do not divide",
        expected=f"a multiple of {groups}",
        found=c,
    )
    apart = node.emit(relax.op.reshape(node.expr(0), (n, groups, c // groups, h, w)), "split")
    moved = node.emit(relax.op.permute_dims(apart, [0, 2, 1, 3, 4]), "move")
    return node.like(relax.op.reshape(moved, (n, c, h, w)))
