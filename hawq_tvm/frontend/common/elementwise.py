"""Element-wise operators of float tensors that every dialect has."""

from __future__ import annotations

import numpy as np
from tvm import relax

from .node import Operation, scalar
from .values import Value


def check_broadcast(node: Operation, *values: Value) -> None:
    """Raise ModelError when shapes do not broadcast together."""
    try:
        np.broadcast_shapes(*(v.shape for v in values))
    except ValueError:
        found = " and ".join(str(list(v.shape)) for v in values)
        raise node.fail(
            "has operands that do not broadcast", expected="equal sizes, or 1, counted from the last axis", found=found
        ) from None


def clipped(x: relax.Expr, low: float | None, high: float | None) -> relax.Expr:
    """min(max(x, low), high); a bound that is None is left out."""
    if low is not None and high is not None:
        return relax.op.clip(x, low, high)
    if low is not None:
        return relax.op.nn.relu(x) if low == 0 else relax.op.maximum(x, scalar(low, x))
    return x if high is None else relax.op.minimum(x, scalar(high, x))
