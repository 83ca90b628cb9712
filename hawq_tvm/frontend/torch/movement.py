"""Operators that select, join, repeat and pad elements: the same on floats and on integers."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.frontend.common.movement import joined, padded, parts, sliced
from hawq_tvm.frontend.common.values import Result

from .node import Node, handles


@handles("aten.cat", "aten.concat", "aten.concatenate")
def cat(node: Node) -> Result:
    """Tensors joined along an axis."""
    return joined(node, node.integer("dim", 0))


@handles("aten.stack")
def stack(node: Node) -> relax.Expr:
    """Tensors joined along a new axis."""
    axis = node.axis(node.integer("dim", 0), len(node.shape()) + 1)
    shapes = [node.shape(i) for i in range(len(node.inputs))]
    node.need(
        len(set(shapes)) == 1,
        "has operands of different shapes",
        expected=list(shapes[0]),
        found=[list(s) for s in shapes],
    )
    raised = [node.emit(relax.op.expand_dims(e, [axis]), f"part{i}") for i, e in enumerate(node.exprs())]
    return relax.op.concat(raised, axis)


@handles("aten.slice")
def slice_(node: Node) -> Result:
    """Every step-th element between start and end along an axis."""
    dims = node.shape()
    axis = node.axis(node.integer("dim", 0), len(dims))
    start, end = (node.integer(n) if node.has(n) else None for n in ("start", "end"))
    return sliced(node, {axis: range(dims[axis])[slice(start, end, node.integer("step", 1))]})


@handles("aten.narrow")
def narrow(node: Node) -> Result:
    """So many elements from a start on."""
    dims = node.shape()
    axis = node.axis(node.integer("dim"), len(dims))
    start = node.integer("start") % dims[axis]
    return sliced(node, {axis: range(dims[axis])[start : start + node.integer("length")]})


def _selected(node: Node, axis: int, index: int, suffix: str) -> relax.Expr:
    dims = node.shape()
    row = node.emit(relax.op.strided_slice(node.expr(0), [axis], [index], [index + 1], [1]), suffix)
    return relax.op.reshape(row, dims[:axis] + dims[axis + 1 :])


@handles("aten.embedding")
def embedding(node: Node) -> Result:
    """Rows of a table at run-time positions."""
    node.need(len(node.shape(0)) == 2, "needs a table of rows", expected="rank 2", found=list(node.shape(0)))
    return node.like(relax.op.take(node.expr(0), node.expr(1), 0))


@handles("aten.select")
def select(node: Node) -> Result:
    """One position of an axis, which disappears."""
    dims = node.shape()
    axis, index = node.axis(node.integer("dim"), len(dims)), node.integer("index")
    node.need(
        -dims[axis] <= index < dims[axis],
        "has an index out of range",
        expected=f"{-dims[axis]} to {dims[axis] - 1}",
        found=index,
    )
    return node.like(_selected(node, axis, index % dims[axis], "row"))


@handles("aten.unbind")
def unbind(node: Node) -> list[Result]:
    """Every position of an axis."""
    axis = node.axis(node.integer("dim", 0), len(node.shape()))
    return [node.like(_selected(node, axis, i, f"row{i}")) for i in range(node.shape()[axis])]


@handles("aten.chunk", "aten.split", "aten.split_with_sizes")
def split(node: Node) -> list[Result]:
    """Consecutive parts along an axis: so many, of one size, or of several."""
    axis = node.axis(node.integer("dim", 0), len(node.shape()))
    total = node.shape()[axis]
    if node.op == "aten.chunk":
        count = node.integer("chunks")
        node.need(count > 0, "asks for no chunks", found=count)
        size = -(-total // count)
    else:
        given = node.integers(next(n for n in ("split_size", "split_sizes") if node.has(n)))
        if len(given) > 1 or node.overload == "sizes" or node.op == "aten.split_with_sizes":
            return parts(node, axis, given)
        size = given[0]
    node.need(size > 0, "has parts of no size", found=size)
    return parts(node, axis, [min(size, total - start) for start in range(0, total, size)])


@handles("aten.expand", "aten.expand_as")
def expand(node: Node) -> Result:
    """Axes of size 1 repeated; -1 keeps a size."""
    old = node.shape()
    wanted = list(node.shape(1)) if node.op == "aten.expand_as" else node.integers("size")
    full = (1,) * (len(wanted) - len(old)) + old
    shape = tuple(f if w == -1 else w for w, f in zip(wanted, full, strict=False))
    if len(wanted) < len(old) or any(f not in (1, s) for f, s in zip(full, shape, strict=True)):
        raise node.fail(
            "has a size that does not fit", expected=f"sizes that {list(old)} broadcasts to", found=str(wanted)
        )
    return node.value(0) if shape == old else node.like(relax.op.broadcast_to(node.expr(0), shape))


@handles("aten.repeat")
def repeat(node: Node) -> Result:
    """The tensor repeated along each axis."""
    repeats = node.integers("repeats")
    node.need(
        len(repeats) >= len(node.shape()) and min(repeats, default=0) > 0, "has repeats that do not fit", found=repeats
    )
    return node.like(relax.op.tile(node.expr(0), repeats))


@handles("aten.flip")
def flip(node: Node) -> Result:
    """Axes backwards."""
    dims = node.shape()
    return sliced(node, {a: range(dims[a])[::-1] for a in node.axes(node.integers("dims"), len(dims))})


MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
NAMED = {"reflection": "reflect", "replication": "replicate", "constant": "constant"}


@handles(
    "aten.pad",
    "aten.constant_pad_nd",
    "aten.reflection_pad1d",
    "aten.reflection_pad2d",
    "aten.replication_pad1d",
    "aten.replication_pad2d",
)
def pad(node: Node) -> Result:
    """Borders of a constant, or of the data itself; pads come in pairs from the last axis on, negative ones cut
    away.
    """
    rank, pads = len(node.shape()), node.integers("pad" if node.has("pad") else "padding")
    mode = node.arguments.get("mode") or NAMED.get(node.op.removeprefix("aten.").split("_")[0], "constant")
    node.need(mode in MODES, "has an unknown mode", expected=", ".join(MODES), found=mode)
    node.need(
        len(pads) % 2 == 0 and len(pads) <= 2 * rank,
        "has pads that do not fit",
        expected=f"at most {rank} pairs",
        found=pads,
    )
    begin, end = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        begin[rank - 1 - i], end[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    return padded(node, begin, end, MODES[mode], float(node.number("value", 0)))
