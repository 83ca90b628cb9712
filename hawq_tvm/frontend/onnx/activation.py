"""Activation functions, BatchNormalization, and what leaves a tensor as it is."""

from __future__ import annotations

from tvm import relax

from ..common.activation import exponential, hard_sigmoid_of, hard_swish_of, mish_of, sloped, softmax_over, times
from ..common.normalization import batch_normalized
from .node import MICROSOFT, Node, handles, scalar
from .values import Result


@handles("LeakyRelu")
def leaky_relu(node: Node) -> relax.Expr:
    """x for x >= 0, else alpha x."""
    return relax.op.nn.leakyrelu(node.expr(0), node.attr("alpha", 0.01))


@handles("PRelu")
def prelu(node: Node) -> relax.Expr:
    """x for x >= 0, else slope x; the slope broadcasts to x."""
    return sloped(node, node.expr(0), node.value(1))


@handles("HardSigmoid")
def hard_sigmoid(node: Node) -> relax.Expr:
    """clip(alpha x + beta, 0, 1)."""
    return hard_sigmoid_of(node, node.expr(0), node.attr("alpha", 0.2), node.attr("beta", 0.5))


@handles("HardSwish")
def hard_swish(node: Node) -> relax.Expr:
    """x hard_sigmoid(x) with alpha 1/6 and beta 1/2."""
    return hard_swish_of(node, node.expr(0))


@handles("Elu")
def elu(node: Node) -> relax.Expr:
    """x for x >= 0, else alpha (exp(x) - 1)."""
    return exponential(node, node.expr(0), node.attr("alpha", 1.0))


@handles("Celu")
def celu(node: Node) -> relax.Expr:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    alpha = node.attr("alpha", 1.0)
    node.need(alpha > 0, "has an alpha that is not positive", found=alpha)
    return exponential(node, node.expr(0), alpha, alpha)


@handles("Selu")
def selu(node: Node) -> relax.Expr:
    """gamma times Elu."""
    x = node.expr(0)
    y = exponential(node, x, node.attr("alpha", 1.67326319217681884765625))
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
    return mish_of(node, node.expr(0))


@handles("Swish")
@handles("QuickGelu", domain=MICROSOFT, inputs=(1, 1))
def swish(node: Node) -> relax.Expr:
    """x sigmoid(alpha x)."""
    x, alpha = node.expr(0), node.attr("alpha", 1.702 if node.op == "QuickGelu" else 1.0)
    if alpha == 1.0:
        return relax.op.nn.silu(x)
    return relax.op.multiply(x, node.emit(relax.op.sigmoid(times(node, alpha, x, "scaled")), "gate"))


@handles("Gelu")
@handles("Gelu", domain=MICROSOFT, inputs=(1, 1))
def gelu(node: Node) -> relax.Expr:
    """x times the normal distribution function, exact or by tanh."""
    mode = node.attr("approximate", "none")
    node.need(mode in ("none", "tanh"), "has an unknown approximation", expected="none or tanh", found=mode)
    return relax.op.nn.gelu_tanh(node.expr(0)) if mode == "tanh" else relax.op.nn.gelu(node.expr(0))


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
    node.need(node.flag("spatial", 1), "has statistics for every pixel", expected="spatial 1", remedy="export with opset 9 or later")
    arrays = [node.constant(i + 1, name) for i, name in enumerate(("scale", "bias", "mean", "variance"))]
    return batch_normalized(node, *arrays, epsilon=node.attr("epsilon", 1e-5))


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
