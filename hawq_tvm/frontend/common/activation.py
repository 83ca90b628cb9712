"""Activation functions, decomposed into elementary operators where Relax has none of their meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm import ops

from .elementwise import check_broadcast
from .node import Operation, expression, scalar
from .values import Constant, Value


def times(node: Operation, factor: float, x: relax.Expr, suffix: str) -> relax.Expr:
    """factor x."""
    return x if factor == 1.0 else node.emit(relax.op.multiply(scalar(factor, x), x), suffix)


def sloped(node: Operation, x: relax.Expr, slope: Value) -> relax.Expr:
    """x for x >= 0, else slope x; x is input 0, the slope broadcasts to it."""
    shape = ops.shape_of(x)
    check_broadcast(node, node.value(0), slope)
    if np.broadcast_shapes(shape, slope.shape) != shape:
        raise node.fail(
            "has a slope that does not fit",
            expected=f"a shape that broadcasts to {list(shape)}",
            found=str(list(slope.shape)),
        )
    if isinstance(slope, Constant):
        node.need(bool(np.isfinite(slope.array.astype(np.float64)).all()), "has a slope that is not finite", expected="finite numbers")
    full = (1,) * (len(shape) - len(slope.shape)) + tuple(slope.shape)
    if isinstance(slope, Constant) and slope.array.size == 1:
        return relax.op.nn.leakyrelu(x, float(slope.array.item()))
    if len(shape) > 1 and math.prod(full) == full[1] == shape[1]:
        if isinstance(slope, Constant):
            return relax.op.nn.prelu(x, ops.const(slope.stored().reshape(-1), "float32"), axis=1)
        return relax.op.nn.prelu(x, node.emit(relax.op.reshape(slope.expr, (shape[1],)), "slope"), axis=1)
    below = node.emit(
        relax.op.multiply(expression(slope), node.emit(relax.op.minimum(x, scalar(0, x)), "negative")), "sloped"
    )
    return relax.op.add(node.emit(relax.op.nn.relu(x), "positive"), below)


def hard_sigmoid_of(node: Operation, x: relax.Expr, alpha: float, beta: float) -> relax.Expr:
    """clip(alpha x + beta, 0, 1)."""
    line = node.emit(relax.op.add(times(node, alpha, x, "scaled"), scalar(beta, x)), "line")
    return relax.op.clip(line, 0, 1)


def hard_gate(node: Operation, x: relax.Expr) -> relax.Expr:
    """clip(x / 6 + 1 / 2, 0, 1), with a divisor because no float is 1 / 6."""
    line = node.emit(relax.op.add(node.emit(relax.op.divide(x, scalar(6, x)), "sixth"), scalar(0.5, x)), "line")
    return relax.op.clip(line, 0, 1)


def hard_swish_of(node: Operation, x: relax.Expr) -> relax.Expr:
    """x clip(x / 6 + 1 / 2, 0, 1)."""
    return relax.op.multiply(x, node.emit(hard_gate(node, x), "gate"))


def exponential(node: Operation, x: relax.Expr, alpha: float, divisor: float = 1.0) -> relax.Expr:
    """max(x, 0) + alpha (exp(min(x, 0) / divisor) - 1): the exponent is never positive, so nothing overflows."""
    negative = node.emit(relax.op.minimum(x, scalar(0, x)), "negative")
    exponent = times(node, 1.0 / divisor, negative, "exponent")
    below = node.emit(relax.op.subtract(node.emit(relax.op.exp(exponent), "exp"), scalar(1, x)), "below")
    return relax.op.add(node.emit(relax.op.nn.relu(x), "positive"), times(node, alpha, below, "scaled"))


def mish_of(node: Operation, x: relax.Expr) -> relax.Expr:
    """x tanh(softplus(x))."""
    gate = node.emit(relax.op.tanh(node.emit(relax.op.nn.softplus(x, 1.0, 20.0), "softplus")), "gate")
    return relax.op.multiply(x, gate)


def softmax_over(node: Operation, x: relax.Expr, axis: int, flatten: bool, log: bool = False) -> relax.Expr:
    """Softmax along one axis, or over all axes from `axis` on, as ONNX meant before opset 13."""
    function = relax.op.nn.log_softmax if log else relax.op.nn.softmax
    shape: Sequence[int] = ops.shape_of(x)
    axis = len(shape) if flatten and axis == len(shape) else node.axis(axis, len(shape))
    if not flatten or (math.prod(shape[axis + 1 :]) == 1 and axis < len(shape)):
        return function(x, axis)
    rows = node.emit(relax.op.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:]))), "rows")
    return relax.op.reshape(node.emit(function(rows, 1), "normalized"), tuple(shape))
