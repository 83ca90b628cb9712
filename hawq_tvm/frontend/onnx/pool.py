"""Pools over windows and over whole images, in one to three dimensions, on floats and (maxima) on integers."""

from __future__ import annotations

from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.frontend.common.pool import check_rank, pooled

from .node import Node, handles
from .values import Result
from .window import auto_pad, read_window


def pool2d(node: Node, x: relax.Expr, kind: str) -> relax.Expr:
    """The maximum or mean over a node's window."""
    shape = ops.shape_of(x)
    check_rank(node, shape)
    window = read_window(node, shape[2:])
    ceil_mode = node.flag("ceil_mode", 0) and not auto_pad(node).startswith("SAME")
    count_include_pad = kind != "max" and node.flag("count_include_pad", 0)
    return pooled(node, x, window, kind, ceil_mode=ceil_mode, count_include_pad=count_include_pad)


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
