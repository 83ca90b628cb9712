"""Resizing, nearest and linear, as gathers of constant positions with constant weights."""

from __future__ import annotations

import numpy as np
from tvm import relax

from hawq_tvm import ops

from .movement import take
from .node import Operation
from .quant import Affine, dequantized, quantized
from .values import QUANTIZED, Array, Result

# By axis: the lower of the two positions that each output element reads, and the weight of the one after it as a fraction,
# its numerator for each element and the one denominator. Where that is 1, numerators are float32 numbers.
Plans = dict[int, tuple[Array, Array, int]]


def interpolated(node: Operation, plans: Plans) -> Result:
    """Input 0 with every planned axis resized."""
    if not plans:
        return node.value(0)
    if not any(part.any() for _, part, _ in plans.values()):
        return node.like(_gathered(node, node.expr(0), plans))
    if node.is_float():
        return _gathered(node, node.expr(0), plans)
    # The means of integers are rounded half to even, as in ONNX's reference; ONNX Runtime cuts the fraction off.
    kind = node.value(0).kind
    node.need(kind in QUANTIZED, "in mode linear does not take this type", expected=", ".join(QUANTIZED), found=kind)
    unit = Affine(np.ones((), np.float32), np.zeros((), np.int32), kind)
    real = node.emit(dequantized(node.value(0), unit), "real")
    return quantized(node.emit(_gathered(node, real, plans), "mean"), unit)


def _gathered(node: Operation, x: relax.Expr, plans: Plans) -> relax.Expr:
    last = list(plans)[-1]
    for axis, plan in plans.items():
        x = _along(node, x, axis, *plan)
        x = x if axis == last else node.emit(x, f"axis{axis}")
    return x


def _along(node: Operation, x: relax.Expr, axis: int, places: Array, part: Array, whole: int) -> relax.Expr:
    """(take(i) (whole - part) + take(i + 1) part) / whole along one axis."""
    if not part.any():
        return take(x, places, axis)
    shape = ops.shape_of(x)
    weights = part.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    following = np.minimum(places + 1, shape[axis] - 1)
    low = node.emit(take(x, places, axis), f"low{axis}")
    high = node.emit(take(x, following, axis), f"high{axis}")
    low = node.emit(relax.op.multiply(low, ops.const(whole - weights, "float32")), f"low{axis}.part")
    high = node.emit(relax.op.multiply(high, ops.const(weights, "float32")), f"high{axis}.part")
    total = relax.op.add(low, high)
    return total if whole == 1 else relax.op.divide(node.emit(total, f"sum{axis}"), ops.const(whole, "float32"))
