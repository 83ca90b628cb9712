"""Normalisation with stored statistics."""

from __future__ import annotations

import numpy as np
from tvm import relax

from hawq_tvm import ops

from .node import Operation
from .values import Array


def batch_normalized(node: Operation, gamma: Array, beta: Array, mean: Array, variance: Array, *, epsilon: float) -> relax.Expr:
    """Input 0 normalised per channel (axis 1); a pass folds it into the convolution before it."""
    shape = node.shape()
    node.need(len(shape) >= 2, "needs a channel axis", expected="rank 2 or more", found=list(shape))
    for name, array in (("scale", gamma), ("bias", beta), ("mean", mean), ("variance", variance)):
        node.need(
            array.shape == (shape[1],), f"has a {name} that does not fit", expected=f"shape [{shape[1]}]", found=list(array.shape)
        )
        strangers = array[~np.isfinite(array)]
        node.need(not strangers.size, f"has a {name} that is not finite", expected="finite numbers", found=strangers[:1].tolist())
    least = float((variance.astype(np.float64) + epsilon).min())
    node.need(
        least > 0, "has a variance that is not positive", expected="variance + epsilon above 0", found=f"{least:g}"
    )
    parameters = (ops.const(a.astype(np.float32), "float32") for a in (gamma, beta, mean, variance))
    normalized = relax.op.nn.batch_norm(
        node.expr(0), *parameters, axis=1, epsilon=epsilon, center=True, scale=True, training=False
    )
    return relax.TupleGetItem(node.emit(normalized, "norm"), 0)
