"""Element-wise arithmetic, Clip, Cast and Where, on float tensors and directly on integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.frontend.common.elementwise import check_broadcast, clipped

from .node import Node, handles, scalar
from .values import FLOAT_KINDS, Array, Constant, Result, Tensor, Value, storage_of

BINARY: dict[str, Callable[[relax.Expr, relax.Expr], relax.Expr]] = {
    "Add": relax.op.add,
    "Sub": relax.op.subtract,
    "Mul": relax.op.multiply,
    "Div": relax.op.divide,
    "Pow": relax.op.power,
    "Max": relax.op.maximum,
    "Min": relax.op.minimum,
    "Sum": relax.op.add,
    "Mean": relax.op.add,
}
UNARY: dict[str, Callable[[relax.Expr], relax.Expr]] = {
    "Abs": relax.op.abs,
    "Neg": relax.op.negative,
    "Floor": relax.op.floor,
    "Ceil": relax.op.ceil,
    "Round": relax.op.round,
    "Sqrt": relax.op.sqrt,
    "Exp": relax.op.exp,
    "Log": relax.op.log,
    "Sin": relax.op.sin,
    "Cos": relax.op.cos,
    "Erf": relax.op.erf,
    "Tanh": relax.op.tanh,
    "Sigmoid": relax.op.sigmoid,
}


@handles(*BINARY)
def arithmetic(node: Node) -> relax.Expr:
    """Two or more tensors combined element by element, from left to right."""
    values = [node.value(i) for i in range(len(node.inputs))]
    check_broadcast(node, *values)
    floats = values[0].kind in FLOAT_KINDS
    node.need(
        floats or node.op in ("Add", "Sub", "Mul", "Max", "Min"),
        "is supported on float tensors only",
        found=values[0].kind,
    )
    operands = [_power_operand(node, i) if node.op == "Pow" else node.expr(i) for i in range(len(values))]
    if len(operands) == 1:
        return operands[0]
    function = BINARY[node.op]
    result = reduce(lambda a, b: function(node.emit(a, "sum") if isinstance(a, relax.Call) else a, b), operands)
    if node.op == "Mean":
        result = relax.op.divide(node.emit(result, "sum"), scalar(len(operands), operands[0]))
    return result


def _power_operand(node: Node, index: int) -> relax.Expr:
    value = node.value(index)
    if isinstance(value, Constant):
        return ops.const(value.array.astype(np.float32), "float32")
    node.need(node.is_float(index), "is supported on float tensors only", found=value.kind)
    return value.expr


@handles(*UNARY)
def unary(node: Node) -> relax.Expr:
    """A function of one float tensor (Abs and Neg of integers too)."""
    node.need(
        node.is_float() or node.op in ("Abs", "Neg"), "is supported on float tensors only", found=node.value(0).kind
    )
    return UNARY[node.op](node.expr(0))


@handles("Reciprocal")
def reciprocal(node: Node) -> relax.Expr:
    """1 / x."""
    x = node.expr(0)
    return relax.op.divide(scalar(1.0, x), x)


@handles("Relu")
def relu(node: Node) -> Result:
    """max(x, 0), on floats or integers."""
    x = node.expr(0)
    return relax.op.nn.relu(x) if node.is_float() else node.like(relax.op.maximum(x, scalar(0, x)))


@handles("Clip")
def clip(node: Node) -> Result:
    """min(max(x, low), high); on the integers of a QuantizeLinear it narrows their range (QCDQ)."""
    low, high = _bound(node, 1, "min"), _bound(node, 2, "max")
    x = node.value(0)
    if low is None and high is None:
        return x
    if low is not None and high is not None:
        low = min(low, high)  # ONNX: all values become max when min is above it
    if not node.is_float():
        return _clip_integers(node, x, low, high)
    return clipped(node.expr(0), low, high)


def _bound(node: Node, index: int, name: str) -> float | None:
    """A bound of Clip: an input since opset 11, an attribute before; None when it is left out or infinite."""
    if node.opset < 11:
        default = math.inf if name == "max" else -math.inf
        value = node.attr(name, default)
    elif node.given(index):
        array = node.constant(index, f"bound {name}")
        node.need(array.size == 1, f"has a bound {name} that is not a scalar", found=list(array.shape))
        value = array.astype(np.float64).item() if array.dtype.kind not in "iu" else int(array.item())
    else:
        return None
    node.need(not math.isnan(value), f"has a bound {name} that is not a number", found=value)
    return None if math.isinf(value) or abs(value) >= float(np.finfo(np.float32).max) else value


def _clip_integers(node: Node, x: Value, low: float | None, high: float | None) -> Result:
    bottom, top = x.range if isinstance(x, Tensor) else arith.RANGES[x.kind]
    least = bottom if low is None else max(bottom, int(low))
    most = top if high is None else min(top, int(high))
    if least > most:  # the bounds lie outside the range: one value is left
        least = most = min(max(bottom, least), top) if low is not None and low > top else most
        least = most = min(max(least, bottom), top)
    if isinstance(x, Tensor) and x.narrow is not None:
        return Tensor(x.narrow(least, most), x.kind, (least, most))
    return Tensor(relax.op.clip(node.expr(0), least, most), x.kind, (least, most))


@handles("Cast", "CastLike")
def cast(node: Node) -> Result:
    """A change of element type that keeps every value, or truncates a float to an integer."""
    from .fold import type_name
    from .values import ELEMENT_TYPES

    x = node.value(0)
    if node.op == "Cast":
        number = node.attr("to", 0)
        kind = ELEMENT_TYPES.get(number, type_name(number))
    else:
        kind = node.value(1).kind
    if kind == x.kind:
        return x
    if kind in FLOAT_KINDS and x.kind in FLOAT_KINDS:
        return _cast_float(node, x, kind)
    if kind == "float32" and (x.kind in arith.RANGES or x.kind == "bool"):
        return relax.op.astype(node.expr(0), "float32")
    if kind == "bool" and x.kind in arith.RANGES:
        return relax.op.not_equal(node.expr(0), scalar(0, node.expr(0)))
    node.need(
        kind in arith.RANGES, "to this element type is not supported", expected="float32 or an integer type", found=kind
    )
    if x.kind in arith.RANGES and isinstance(x, Tensor):
        (low, high), (least, most) = x.range, arith.RANGES[kind]
        # Of 64 bits the whole range is what nobody means: the compiler finds the range of ids and masks, and checks it.
        node.need(
            (least <= low and high <= most) or (x.kind == "int64" and kind == "int32" and x.bounds is None),
            "of integers that may not fit",
            expected=f"values in {least}..{most} ({kind})",
            found=f"{low}..{high} ({x.kind})",
            remedy="put a Clip before it",
        )
        expr = node.expr(0)
        return Tensor(
            expr if storage_of(kind) == storage_of(x.kind) else relax.op.astype(expr, storage_of(kind)), kind, x.bounds
        )
    node.need(
        storage_of(kind) == kind,
        "to this element type is not supported",
        expected="an integer type of 8 bits or more",
        found=kind,
    )
    return relax.op.astype(node.expr(0), kind)


def _cast_float(node: Node, x: Value, kind: str) -> Result:
    """To or from 16 bits, where a number is rounded to them; between layers it stands for itself."""
    half = kind if kind != "float32" else x.kind
    return Tensor(relax.op.astype(node.emit(relax.op.astype(node.expr(0), half), half), "float32"), kind)


COMPARISONS: dict[str, Callable[..., relax.Expr]] = {
    "Greater": relax.op.greater,
    "GreaterOrEqual": relax.op.greater_equal,
    "Less": relax.op.less,
    "LessOrEqual": relax.op.less_equal,
    "Equal": relax.op.equal,
    "And": relax.op.logical_and,
    "Or": relax.op.logical_or,
    "Xor": relax.op.logical_xor,
    "Not": relax.op.logical_not,
}
_OF_NUMBERS: dict[str, Callable[..., Array]] = {
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Equal": np.equal,
}


@handles(*COMPARISONS)
def truth(node: Node) -> Result:
    """Truth values of integers, or of truth values; real numbers are compared where they are known."""
    check_broadcast(node, *(node.value(i) for i in range(len(node.inputs))))
    if node.is_float():
        return Constant(_OF_NUMBERS[node.op](*(node.constant(i, "real operand") for i in range(2))))
    return COMPARISONS[node.op](*node.exprs())


@handles("Where")
def where(node: Node) -> relax.Expr:
    """x where the condition holds, else y."""
    check_broadcast(node, *(node.value(i) for i in range(3)))
    return relax.op.where(*node.exprs())
