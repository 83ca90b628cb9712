"""Pools over windows, adaptive pools, and reductions."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.frontend.common.pool import check_rank, pooled
from hawq_tvm.frontend.common.values import Result
from hawq_tvm.frontend.common.window import Window, fitting

from .node import Node, handles


def _window(node: Node) -> Window:
    shape = node.shape()
    count = len(shape) - 2
    kernel = node.sizes("kernel_size", count)
    node.need(min(kernel) > 0, "has an empty kernel", found=list(kernel))
    strides = node.sizes("stride", count) if node.has("stride") and node.integers("stride") else kernel
    dilations, pads = node.sizes("dilation", count, 1), node.sizes("padding", count, 0)
    node.need(min(*strides, *dilations) > 0, "has a stride or dilation of 0", found=f"{strides}, {dilations}")
    return fitting(node, Window(kernel, strides, dilations, pads, pads), shape[2:])


@handles("aten.max_pool1d", "aten.max_pool2d", "aten.max_pool3d")
def max_pool(node: Node) -> Result:
    """The maximum of each window."""
    check_rank(node, node.shape())
    return node.like(pooled(node, node.expr(0), _window(node), "max", ceil_mode=node.flag("ceil_mode")))


@handles("aten.max_pool2d_with_indices", "aten.max_pool1d_with_indices", "aten.max_pool3d_with_indices")
def max_pool_with_indices(node: Node) -> list[Result]:
    """The same; what reads the indices is refused."""
    return [max_pool(node)]


@handles("aten.avg_pool1d", "aten.avg_pool2d", "aten.avg_pool3d")
def average_pool(node: Node) -> relax.Expr:
    """The mean of each window."""
    check_rank(node, node.shape())
    node.need(not node.has("divisor_override"), "divides by a number of its own", expected="divisor_override None")
    return pooled(
        node,
        node.x(),
        _window(node),
        "average",
        ceil_mode=node.flag("ceil_mode"),
        count_include_pad=node.flag("count_include_pad", True),
    )


def _adaptive(node: Node, kind: str) -> Result:
    shape = node.shape()
    check_rank(node, shape)
    spatial = shape[2:]
    outputs = node.sizes("output_size", len(spatial))
    node.need(
        all(o > 0 and s % o == 0 for s, o in zip(spatial, outputs, strict=True)),
        "has windows of unequal sizes",
        expected=f"output sizes that divide {list(spatial)}",
        found=list(outputs),
        remedy="choose an image size that they divide",
    )
    axes = list(range(2, len(shape)))
    if all(o == 1 for o in outputs):
        return (
            relax.op.mean(node.x(), axes, keepdims=True)
            if kind == "average"
            else node.like(relax.op.max(node.expr(0), axes, keepdims=True))
        )
    kernel = tuple(s // o for s, o in zip(spatial, outputs, strict=True))
    nothing = (0,) * len(kernel)
    window = Window(kernel, kernel, (1,) * len(kernel), nothing, nothing)
    result = pooled(node, node.expr(0), window, kind, ceil_mode=False)
    return result if kind == "average" else node.like(result)


@handles(
    "aten.adaptive_avg_pool1d",
    "aten.adaptive_avg_pool2d",
    "aten._adaptive_avg_pool2d",
    "aten.adaptive_avg_pool3d",
    "aten._adaptive_avg_pool3d",
)
def adaptive_average_pool(node: Node) -> Result:
    """The mean of as many windows as the output has, where they are of one size."""
    node.x()
    return _adaptive(node, "average")


@handles("aten.adaptive_max_pool1d", "aten.adaptive_max_pool2d", "aten.adaptive_max_pool3d")
def adaptive_max_pool(node: Node) -> list[Result]:
    """The maximum of such windows; what reads the indices is refused."""
    return [_adaptive(node, "max")]


REDUCTIONS = {
    "aten.mean": relax.op.mean,
    "aten.sum": relax.op.sum,
    "aten.amax": relax.op.max,
    "aten.amin": relax.op.min,
}


@handles(*REDUCTIONS)
def reduction(node: Node) -> Result:
    """Mean, sum, maximum or minimum along axes, all of them when none are named."""
    x, rank = node.x(), len(node.shape())
    node.need(
        node.arguments.get("dtype") in (None, "float32"),
        "computes in another type",
        expected="float32",
        found=node.arguments.get("dtype"),
    )
    axes = sorted(node.axes(node.integers("dim", []), rank)) or list(range(rank))
    return REDUCTIONS[node.op](x, axes, node.flag("keepdim"))


@handles("aten.argmax", "aten.argmin")
def arg_extremum(node: Node) -> relax.Expr:
    """The first position of the largest or smallest value along an axis, as int64."""
    x, rank = node.x(), len(ops.shape_of(node.x()))
    node.need(node.has("dim"), "looks at all axes at once", expected="a dim")
    function = relax.op.argmax if node.op == "aten.argmax" else relax.op.argmin
    return function(x, node.axis(node.integer("dim"), rank), node.flag("keepdim"))
