"""Activation functions and BatchNorm, by the builders that all frontends share."""

from __future__ import annotations

import numpy as np
from tvm import relax

from hawq_tvm.frontend.common.activation import exponential, hard_gate, hard_swish_of, mish_of, sloped, softmax_over
from hawq_tvm.frontend.common.movement import parts
from hawq_tvm.frontend.common.normalization import batch_normalized
from hawq_tvm.frontend.common.values import Constant, Result, Tensor

from .node import Node, expression, handles, scalar

# Klambauer et al., Self-Normalizing Neural Networks, 2017.
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


@handles("aten.hardsigmoid")
def hard_sigmoid(node: Node) -> relax.Expr:
    """clip(x / 6 + 1 / 2, 0, 1)."""
    return hard_gate(node, node.x())


@handles("aten.hardswish")
def hard_swish(node: Node) -> relax.Expr:
    """x hard_sigmoid(x)."""
    return hard_swish_of(node, node.x())


@handles("aten.gelu")
def gelu(node: Node) -> relax.Expr:
    """x times the normal distribution function, exact or by tanh."""
    mode = node.arguments.get("approximate") or "none"
    node.need(mode in ("none", "tanh"), "has an unknown approximation", expected="none or tanh", found=mode)
    return relax.op.nn.gelu_tanh(node.x()) if mode == "tanh" else relax.op.nn.gelu(node.x())


@handles("aten.leaky_relu")
def leaky_relu(node: Node) -> relax.Expr:
    """x for x >= 0, else slope x."""
    return relax.op.nn.leakyrelu(node.x(), float(node.number("negative_slope", 0.01)))


@handles("aten.prelu", "aten._prelu_kernel")
def prelu(node: Node) -> relax.Expr:
    """x for x >= 0, else slope x, with one slope or one per channel (axis 1)."""
    x, slope = node.x(), node.value(1)
    rank = len(node.shape())
    if len(slope.shape) == 1 and slope.shape[0] > 1:
        shape = (slope.shape[0], *(1,) * max(0, rank - 2))
        slope = (
            Constant(slope.array.reshape(shape))
            if isinstance(slope, Constant)
            else Tensor(node.emit(relax.op.reshape(slope.expr, shape), "slope"), slope.kind)
        )
    return sloped(node, x, slope)


@handles("aten.elu")
def elu(node: Node) -> relax.Expr:
    """x for x >= 0, else alpha (exp(x) - 1)."""
    node.need(
        node.number("scale", 1) == 1 and node.number("input_scale", 1) == 1,
        "scales its input or output",
        expected="scale 1 and input_scale 1",
    )
    return exponential(node, node.x(), float(node.number("alpha", 1)))


@handles("aten.selu")
def selu(node: Node) -> relax.Expr:
    """A scaled Elu."""
    x = node.x()
    return relax.op.multiply(scalar(SELU_SCALE, x), node.emit(exponential(node, x, SELU_ALPHA), "elu"))


@handles("aten.celu")
def celu(node: Node) -> relax.Expr:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    alpha = float(node.number("alpha", 1))
    node.need(alpha > 0, "has an alpha that is not positive", found=alpha)
    return exponential(node, node.x(), alpha, alpha)


@handles("aten.mish")
def mish(node: Node) -> relax.Expr:
    """x tanh(softplus(x))."""
    return mish_of(node, node.x())


@handles("aten.softplus")
def softplus(node: Node) -> relax.Expr:
    """log(1 + exp(beta x)) / beta."""
    return relax.op.nn.softplus(node.x(), float(node.number("beta", 1)), float(node.number("threshold", 20)))


@handles("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(node: Node) -> Result:
    """exp(x) over its sum along an axis, and its logarithm."""
    return softmax_over(node, node.x(), node.integer("dim"), False, "log" in node.op)


def _statistics(node: Node, mean: str, variance: str) -> relax.Expr:
    shape = node.shape()
    node.need(len(shape) >= 2, "needs a channel axis", expected="rank 2 or more", found=list(shape))
    for name in (mean, variance):
        node.need(
            node.has(name),
            "computes statistics of its input",
            expected=f"a stored {name}",
            remedy="use track_running_stats=True",
        )
    gamma = node.array("weight") if node.has("weight") else np.ones(shape[1], np.float32)
    beta = node.array("bias") if node.has("bias") else np.zeros(shape[1], np.float32)
    return batch_normalized(
        node, gamma, beta, node.array(mean), node.array(variance), epsilon=float(node.number("eps"))
    )


@handles("aten.glu")
def glu(node: Node) -> relax.Expr:
    """The first half of an axis times the sigmoid of the second."""
    shape = node.shape()
    axis = node.axis(node.integer("dim", -1), len(shape))
    node.need(shape[axis] % 2 == 0, "cuts an axis in halves", expected="an even size", found=shape[axis])
    node.x()
    first, second = (
        node.emit(expression(half), name)
        for half, name in zip(parts(node, axis, [shape[axis] // 2] * 2), ("value", "gate"), strict=True)
    )
    return relax.op.multiply(first, node.emit(relax.op.sigmoid(second), "sigmoid"))


@handles("aten.batch_norm")
def batch_norm(node: Node) -> relax.Expr:
    """Normalisation with stored statistics; a pass folds it into the convolution before it."""
    node.need(
        not node.flag("training"),
        "is in training mode",
        remedy="call move_exported_model_to_eval before convert_pt2e, or export in evaluation mode",
    )
    node.x()
    return _statistics(node, "running_mean", "running_var")


@handles("aten._native_batch_norm_legit_no_training")
def native_batch_norm(node: Node) -> list[Result]:
    """The same, as decomposed programs spell it; its other results are empty."""
    node.x()
    return [_statistics(node, "running_mean", "running_var")]


@handles(
    "aten.dropout",
    "aten.feature_dropout",
    "aten.alpha_dropout",
    "aten.contiguous",
    "aten.clone",
    "aten.detach",
    "aten.detach_",
    "aten.alias",
    "aten.lift_fresh_copy",
    "aten.lift_fresh",
)
def identity(node: Node) -> Result:
    """The input itself: nothing is dropped when a model runs."""
    node.need(
        not node.flag("train"),
        "is in training mode",
        remedy="call move_exported_model_to_eval before convert_pt2e, or export in evaluation mode",
    )
    return node.value(0)


@handles("aten.to", "aten._to_copy", "quantized_decomposed.convert_element_type")
def cast(node: Node) -> Result:
    """A change of element type that changes nothing, or integers as real numbers."""
    x = node.value(0)
    kind = node.arguments.get("dtype") or x.kind
    if kind == x.kind:
        return x
    if kind == "bool" and x.kind.lstrip("u").startswith("int"):
        return relax.op.not_equal(node.expr(0), scalar(0, node.expr(0)))
    node.need(
        kind == "float32" and x.kind in ("int8", "uint8", "int16", "uint16", "int32", "int64", "bool"),
        "to this element type is not supported",
        expected="float32",
        found=f"{x.kind} to {kind}",
        remedy="convert the model to float32",
    )
    return relax.op.astype(node.expr(0), "float32")
