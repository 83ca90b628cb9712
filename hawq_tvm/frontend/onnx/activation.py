"""Activation functions, decomposed into elementary operators where Relax has none of their meaning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm import ops

from .elementwise import check_broadcast
from .node import MICROSOFT, Node, expression, handles, scalar
from .values import Constant, Result


def _times(node: Node, factor: float, x: relax.Expr, suffix: str) -> relax.Expr:
    return x if factor == 1.0 else node.emit(relax.op.multiply(scalar(factor, x), x), suffix)


@handles("LeakyRelu")
def leaky_relu(node: Node) -> relax.Expr:
    """x for x >= 0, else alpha x."""
    return relax.op.nn.leakyrelu(node.expr(0), node.attr("alpha", 0.01))


@handles("PRelu")
def prelu(node: Node) -> relax.Expr:
    """x for x >= 0, else slope x; the slope broadcasts to x."""
    x, slope = node.expr(0), node.value(1)
    shape = ops.shape_of(x)
    check_broadcast(node, node.value(0), slope)
    if np.broadcast_shapes(shape, slope.shape) != shape:
        raise node.fail(
            "has a slope that does not fit",
            expected=f"a shape that broadcasts to {list(shape)}",
            found=str(list(slope.shape)),
        )
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


def _hard_sigmoid(node: Node, x: relax.Expr, alpha: float, beta: float) -> relax.Expr:
    line = node.emit(relax.op.add(_times(node, alpha, x, "scaled"), scalar(beta, x)), "line")
    return relax.op.clip(line, 0, 1)


@handles("HardSigmoid")
def hard_sigmoid(node: Node) -> relax.Expr:
    """clip(alpha x + beta, 0, 1)."""
    return _hard_sigmoid(node, node.expr(0), node.attr("alpha", 0.2), node.attr("beta", 0.5))


@handles("HardSwish")
def hard_swish(node: Node) -> relax.Expr:
    """x hard_sigmoid(x) with alpha 1/6 and beta 1/2."""
    x = node.expr(0)
    return relax.op.multiply(x, node.emit(_hard_sigmoid(node, x, 1.0 / 6.0, 0.5), "gate"))


def _exponential(node: Node, x: relax.Expr, alpha: float, divisor: float = 1.0) -> relax.Expr:
    """max(x, 0) + alpha (exp(min(x, 0) / divisor) - 1): the exponent is never positive, so nothing overflows."""
    negative = node.emit(relax.op.minimum(x, scalar(0, x)), "negative")
    exponent = _times(node, 1.0 / divisor, negative, "exponent")
    below = node.emit(relax.op.subtract(node.emit(relax.op.exp(exponent), "exp"), scalar(1, x)), "below")
    return relax.op.add(node.emit(relax.op.nn.relu(x), "positive"), _times(node, alpha, below, "scaled"))


@handles("Elu")
def elu(node: Node) -> relax.Expr:
    """x for x >= 0, else alpha (exp(x) - 1)."""
    return _exponential(node, node.expr(0), node.attr("alpha", 1.0))


@handles("Celu")
def celu(node: Node) -> relax.Expr:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    alpha = node.attr("alpha", 1.0)
    node.need(alpha > 0, "has an alpha that is not positive", found=alpha)
    return _exponential(node, node.expr(0), alpha, alpha)


@handles("Selu")
def selu(node: Node) -> relax.Expr:
    """gamma times Elu."""
    x = node.expr(0)
    y = _exponential(node, x, node.attr("alpha", 1.67326319217681884765625))
    return relax.op.multiply(scalar(node.attr("gamma", 1.05070102214813232421875), x), node.emit(y, "elu"))


@handles("Softplus")
def softplus(node: Node) -> relax.Expr:
    """log(1 + exp(x))."""
    return relax.op.nn.softplus(node.expr(0), 1.0, 20.0)


@handles("Softsign")
def softsign(node: Node) -> relax.Expr:
    """x / (1 + |x|)."""
    x = node.expr(0)
    return relax.op.divide(x, node.emit(relax.op.add(scalar(1, x), node.emit(relax.op.abs(x), "abs")), "divisor"))


@handles("Mish")
def mish(node: Node) -> relax.Expr:
    """x tanh(softplus(x))."""
    x = node.expr(0)
    gate = node.emit(relax.op.tanh(node.emit(relax.op.nn.softplus(x, 1.0, 20.0), "softplus")), "gate")
    return relax.op.multiply(x, gate)


@handles("Swish")
@handles("QuickGelu", domain=MICROSOFT, inputs=(1, 1))
def swish(node: Node) -> relax.Expr:
    """x sigmoid(alpha x)."""
    x, alpha = node.expr(0), node.attr("alpha", 1.702 if node.op == "QuickGelu" else 1.0)
    if alpha == 1.0:
        return relax.op.nn.silu(x)
    return relax.op.multiply(x, node.emit(relax.op.sigmoid(_times(node, alpha, x, "scaled")), "gate"))


@handles("Gelu")
@handles("Gelu", domain=MICROSOFT, inputs=(1, 1))
def gelu(node: Node) -> relax.Expr:
    """x times the normal distribution function, exact or by tanh."""
    mode = node.attr("approximate", "none")
    node.need(mode in ("none", "tanh"), "has an unknown approximation", expected="none or tanh", found=mode)
    return relax.op.nn.gelu_tanh(node.expr(0)) if mode == "tanh" else relax.op.nn.gelu(node.expr(0))


def softmax_over(node: Node, x: relax.Expr, axis: int, flatten: bool, log: bool = False) -> relax.Expr:
    """Softmax along one axis, or over all axes from `axis` on, as ONNX meant before opset 13."""
    function = relax.op.nn.log_softmax if log else relax.op.nn.softmax
    shape: Sequence[int] = ops.shape_of(x)
    axis = len(shape) if flatten and axis == len(shape) else node.axis(axis, len(shape))
    if not flatten or (math.prod(shape[axis + 1 :]) == 1 and axis < len(shape)):
        return function(x, axis)
    rows = node.emit(relax.op.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:]))), "rows")
    return relax.op.reshape(node.emit(function(rows, 1), "normalized"), tuple(shape))


@handles("Softmax", "LogSoftmax")
def softmax(node: Node) -> Result:
    """exp(x) over its sum, and its logarithm."""
    flatten = node.opset < 13
    return softmax_over(node, node.expr(0), node.attr("axis", 1 if flatten else -1), flatten, node.op == "LogSoftmax")


@handles("BatchNormalization")
def batch_normalization(node: Node) -> relax.Expr:
    """Normalisation with stored statistics; a pass folds it into the convolution before it."""
    node.need(
        not node.flag("training_mode", 0),
        "is in training mode",
        expected="training_mode 0",
        remedy="export the model in evaluation mode",
    )
    node.need(
        len([o for o in node.outputs if o]) == 1,
        "gives its statistics",
        expected="one output",
        remedy="export in evaluation mode",
    )
    shape = node.shape()
    node.need(len(shape) >= 2, "needs a channel axis", expected="rank 2 or more", found=list(shape))
    names = ("scale", "bias", "mean", "variance")
    arrays = [node.constant(i + 1, name) for i, name in enumerate(names)]
    for name, array in zip(names, arrays, strict=True):
        node.need(
            array.shape == (shape[1],),
            f"has a {name} that does not fit",
            expected=f"shape [{shape[1]}]",
            found=list(array.shape),
        )
    epsilon = node.attr("epsilon", 1e-5)
    least = float((arrays[3].astype(np.float64) + epsilon).min())
    node.need(
        least > 0, "has a variance that is not positive", expected="variance + epsilon above 0", found=f"{least:g}"
    )
    gamma, beta, mean, variance = (ops.const(a.astype(np.float32), "float32") for a in arrays)
    normalized = relax.op.nn.batch_norm(
        node.expr(0), gamma, beta, mean, variance, axis=1, epsilon=epsilon, center=True, scale=True, training=False
    )
    return relax.TupleGetItem(node.emit(normalized, "norm"), 0)


@handles("Identity")
def identity(node: Node) -> Result:
    """The input itself."""
    return node.value(0)


@handles("Dropout")
def dropout(node: Node) -> list[Result]:
    """The input itself: nothing is dropped when a model runs."""
    if node.given(2):
        training = node.constant(2, "training_mode")
        node.need(not training.any(), "is in training mode", remedy="export the model in evaluation mode")
    node.need(
        len([o for o in node.outputs if o]) == 1,
        "gives its mask",
        expected="one output",
        remedy="export in evaluation mode",
    )
    return [node.value(0)]
