"""Operators that give the same elements another shape, and the shape itself."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from .node import Node, handles
from .values import Constant, Result


@handles("Shape")
def shape(node: Node) -> Result:
    """The shape, or a part of it, as a constant: every shape is static here."""
    dims = node.shape()
    end = node.attr("end", len(dims))
    return Constant(np.asarray(dims[slice(node.attr("start", 0), end)], np.int64))


@handles("Size")
def size(node: Node) -> Result:
    """The number of elements as a constant."""
    return Constant(np.asarray(math.prod(node.shape()), np.int64))


def reshaped(node: Node, shape: list[int]) -> Result:
    """Input 0 in another shape of as many elements."""
    if math.prod(shape) != math.prod(node.shape()) or any(d < 1 for d in shape):
        raise node.fail(
            "has a shape that does not fit",
            expected=f"{math.prod(node.shape())} elements as in {list(node.shape())}",
            found=str(shape),
        )
    return node.value(0) if tuple(shape) == node.shape() else node.like(relax.op.reshape(node.expr(0), tuple(shape)))


@handles("Reshape")
def reshape(node: Node) -> Result:
    """A new shape: 0 keeps a dimension (unless allowzero), -1 is what remains."""
    old, new = node.shape(), node.ints(1, "shape")
    if not node.flag("allowzero", 0):
        if any(d == 0 and i >= len(old) for i, d in enumerate(new)):
            raise node.fail(
                "keeps a dimension that its input does not have", expected=f"rank {len(old)}", found=str(new)
            )
        new = [old[i] if d == 0 else d for i, d in enumerate(new)]
    if new.count(-1) == 1:
        known = math.prod(d for d in new if d != -1)
        if known < 1 or math.prod(old) % known:
            raise node.fail(
                "has a shape that does not fit", expected=f"{math.prod(old)} elements as in {list(old)}", found=str(new)
            )
        new = [math.prod(old) // known if d == -1 else d for d in new]
    return reshaped(node, new)


@handles("Flatten")
def flatten(node: Node) -> Result:
    """Two dimensions: the axes before `axis`, and the rest."""
    dims, axis = node.shape(), node.attr("axis", 1)
    axis = axis if axis == len(dims) else node.axis(axis, len(dims))
    return reshaped(node, [math.prod(dims[:axis]), math.prod(dims[axis:])])


def _axes(node: Node, what: str = "list of axes") -> list[int] | None:
    """The axes of Squeeze and Unsqueeze: an attribute before opset 13, then an input."""
    if node.opset < 13:
        return node.attr("axes", []) if node.has("axes") else None
    return node.ints(1, what) if node.given(1) else None


@handles("Squeeze")
def squeeze(node: Node) -> Result:
    """Dimensions of size 1 taken away: the named ones, or all."""
    dims, axes = node.shape(), _axes(node)
    chosen = [i for i, d in enumerate(dims) if d == 1] if axes is None else node.axes(axes, len(dims))
    if any(dims[i] != 1 for i in chosen):
        raise node.fail(
            "removes a dimension that is not 1",
            expected="size 1 along the named axes",
            found=f"axes {chosen} of {list(dims)}",
        )
    return node.like(relax.op.squeeze(node.expr(0), chosen)) if chosen else node.value(0)


@handles("Unsqueeze")
def unsqueeze(node: Node) -> Result:
    """Dimensions of size 1 put in at the named axes of the result."""
    axes = _axes(node)
    node.need(axes is not None, "lacks its axes")
    places = node.axes(axes or [], len(node.shape()) + len(axes or []))
    return node.like(relax.op.expand_dims(node.expr(0), sorted(places))) if places else node.value(0)


@handles("Transpose")
def transpose(node: Node) -> Result:
    """The axes in another order, reversed when none is given."""
    rank = len(node.shape())
    order = node.attr("perm", list(range(rank))[::-1])
    if sorted(order) != list(range(rank)):
        raise node.fail(
            "has a perm that is no permutation of its axes", expected=f"each of 0 to {rank - 1} once", found=str(order)
        )
    return node.value(0) if order == list(range(rank)) else node.like(relax.op.permute_dims(node.expr(0), order))


def _blocks(node: Node) -> tuple[int, int, int, int, int]:
    node.need(len(node.shape()) == 4, "works on images", expected="rank 4", found=list(node.shape()))
    block = node.attr("blocksize", 0)
    node.need(block >= 1, "has a blocksize that is not positive", found=block)
    n, c, h, w = node.shape()
    return n, c, h, w, block


def _mode(node: Node) -> str:
    mode = node.attr("mode", "DCR")
    node.need(mode in ("DCR", "CRD"), "has an unknown mode", expected="DCR or CRD", found=mode)
    return mode


@handles("DepthToSpace")
def depth_to_space(node: Node) -> Result:
    """Channels moved into blocks of pixels (pixel shuffle when mode is CRD)."""
    n, c, h, w, b = _blocks(node)
    node.need(
        c % (b * b) == 0, "has channels that its blocksize does not divide", expected=f"a multiple of {b * b}", found=c
    )
    rest = c // (b * b)
    if _mode(node) == "DCR":
        split, order = (n, b, b, rest, h, w), [0, 3, 4, 1, 5, 2]
    else:
        split, order = (n, rest, b, b, h, w), [0, 1, 4, 2, 5, 3]
    apart = node.emit(relax.op.reshape(node.expr(0), split), "split")
    return node.like(relax.op.reshape(node.emit(relax.op.permute_dims(apart, order), "move"), (n, rest, h * b, w * b)))


@handles("SpaceToDepth")
def space_to_depth(node: Node) -> Result:
    """Blocks of pixels moved into channels, the inverse of DepthToSpace in the same mode."""
    n, c, h, w, b = _blocks(node)
    node.need(
        h % b == 0 and w % b == 0,
        "has an image that its blocksize does not divide",
        expected=f"multiples of {b}",
        found=[h, w],
    )
    order = [0, 3, 5, 1, 2, 4] if _mode(node) == "DCR" else [0, 1, 3, 5, 2, 4]
    apart = node.emit(relax.op.reshape(node.expr(0), (n, c, h // b, b, w // b, b)), "split")
    return node.like(
        relax.op.reshape(node.emit(relax.op.permute_dims(apart, order), "move"), (n, c * b * b, h // b, w // b))
    )
