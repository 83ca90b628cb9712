"""Element-wise arithmetic and functions of float tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import relax

from hawq_tvm.frontend.common.activation import times
from hawq_tvm.frontend.common.elementwise import check_broadcast, clipped

from .node import Node, expression, handles, scalar

BINARY: dict[str, Callable[[relax.Expr, relax.Expr], relax.Expr]] = {
    "aten.add": relax.op.add,
    "aten.sub": relax.op.subtract,
    "aten.mul": relax.op.multiply,
    "aten.div": relax.op.divide,
    "aten.maximum": relax.op.maximum,
    "aten.minimum": relax.op.minimum,
}
UNARY: dict[str, Callable[[relax.Expr], relax.Expr]] = {
    "aten.abs": relax.op.abs,
    "aten.neg": relax.op.negative,
    "aten.floor": relax.op.floor,
    "aten.ceil": relax.op.ceil,
    "aten.sqrt": relax.op.sqrt,
    "aten.exp": relax.op.exp,
    "aten.log": relax.op.log,
    "aten.sin": relax.op.sin,
    "aten.cos": relax.op.cos,
    "aten.erf": relax.op.erf,
    "aten.tanh": relax.op.tanh,
    "aten.sigmoid": relax.op.sigmoid,
    "aten.rsqrt": relax.op.rsqrt,
    "aten.relu": relax.op.nn.relu,
    "aten.square": relax.op.square,
    "aten.silu": relax.op.nn.silu,
}


@handles(*BINARY)
def binary(node: Node) -> relax.Expr:
    """Two tensors, or a tensor and a number, combined element by element."""
    mode = node.arguments.get("rounding_mode")
    node.need(mode is None, "rounds its quotient", expected="rounding_mode None", found=mode)
    check_broadcast(node, *(v for v in node.inputs if v is not None))
    a, b = node.operand("self"), node.operand("other")
    alpha = node.number("alpha", 1)
    return BINARY[node.op](a, times(node, alpha, b, "scaled"))


@handles("aten.where", "aten.masked_fill")
def where(node: Node) -> relax.Expr:
    """One tensor or number where a condition holds, another elsewhere."""
    filled = node.op == "aten.masked_fill"
    condition = node.tensor("mask" if filled else "condition")
    if condition is None or condition.kind != "bool":
        raise node.fail("chooses by no truth values", expected="bool", found=condition.kind if condition else "nothing")
    check_broadcast(node, *(v for v in node.inputs if v is not None))
    chosen, other = ("value", "self") if filled else ("self", "other")
    return relax.op.where(expression(condition), _choice(node, chosen), _choice(node, other))


def _choice(node: Node, name: str) -> relax.Expr:
    value = node.arguments.get(name)
    if isinstance(value, float) and math.isinf(value):  # what is masked
        return relax.const(value, "float32")
    return node.operand(name)


@handles("aten.rsub")
def reverse_subtract(node: Node) -> relax.Expr:
    """other - alpha x."""
    return relax.op.subtract(
        node.operand("other"), times(node, node.number("alpha", 1), node.operand("self"), "scaled")
    )


@handles(*UNARY)
def unary(node: Node) -> relax.Expr:
    """A function of one float tensor."""
    return UNARY[node.op](node.x())


@handles("aten.round")
def round_half_even(node: Node) -> relax.Expr:
    """The nearest integers, ties to even."""
    node.need(node.integer("decimals", 0) == 0, "rounds to decimals", expected="whole numbers")
    return relax.op.round(node.x())


@handles("aten.reciprocal")
def reciprocal(node: Node) -> relax.Expr:
    """1 / x."""
    x = node.x()
    return relax.op.divide(scalar(1.0, x), x)


@handles("aten.pow")
def power(node: Node) -> relax.Expr:
    """x to a constant power."""
    x = node.x()
    return relax.op.power(x, scalar(node.number("exponent"), x))


def _bound(node: Node, *names: str) -> float | None:
    """A bound of a clamp, None when it is left out or infinite."""
    name = next((n for n in names if node.has(n)), None)
    value = None if name is None else float(node.number(name))
    node.need(value is None or not math.isnan(value), "has a bound that is not a number", found=value)
    return None if value is None or math.isinf(value) else value


@handles("aten.clamp", "aten.clip", "aten.hardtanh", "aten.clamp_min", "aten.clamp_max", "aten.relu6")
def clamp(node: Node) -> relax.Expr:
    """min(max(x, low), high): all values become high where low is above it."""
    if node.op == "aten.relu6":
        return clipped(node.x(), 0.0, 6.0)
    low, high = _bound(node, "min", "min_val"), _bound(node, "max", "max_val")
    if low is not None and high is not None:
        low = min(low, high)
    return clipped(node.x(), low, high)
