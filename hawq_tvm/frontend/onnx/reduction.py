"""Reductions along axes, ArgMax and ArgMin."""

from __future__ import annotations

from tvm import relax

from .node import Node, handles
from .values import Result

# The opset from which the axes are an input.
AXES_INPUT = {"ReduceSum": 13, "ReduceMean": 18, "ReduceMax": 18, "ReduceMin": 18}
FUNCTIONS = {
    "ReduceSum": relax.op.sum,
    "ReduceMean": relax.op.mean,
    "ReduceMax": relax.op.max,
    "ReduceMin": relax.op.min,
}


@handles(*FUNCTIONS)
def reduce(node: Node) -> Result:
    """Sum, mean, maximum or minimum along axes, all of them when none are named."""
    rank = len(node.shape())
    if node.opset >= AXES_INPUT[node.op]:
        axes = node.ints(1, "list of axes") if node.given(1) else []
        if not axes and node.flag("noop_with_empty_axes", 0):
            return node.value(0)
    else:
        axes = node.attr("axes", [])
    axes = sorted(node.axes(axes, rank)) or list(range(rank))
    keepdims = node.flag("keepdims", 1)
    kind = node.value(0).kind
    if node.op in ("ReduceSum", "ReduceMean") and not node.is_float():
        node.need(
            node.op == "ReduceSum" and kind in ("int32", "int64"), "is supported on float tensors only", found=kind
        )
    result = FUNCTIONS[node.op](node.expr(0), axes, keepdims)
    return node.like(result) if node.op in ("ReduceMax", "ReduceMin") else result


@handles("ArgMax", "ArgMin")
def arg_extremum(node: Node) -> relax.Expr:
    """The first position of the largest or smallest value along an axis, as int64."""
    node.need(not node.flag("select_last_index", 0), "selects the last of equal values", expected="select_last_index 0")
    function = relax.op.argmax if node.op == "ArgMax" else relax.op.argmin
    return function(node.expr(0), node.axis(node.attr("axis", 0), len(node.shape())), node.flag("keepdims", 1))
