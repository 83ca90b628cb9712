"""Quantizing and dequantizing by constant scales and zero points."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import relax

from hawq_tvm.core import arith, ops

from .node import expression
from .values import Array, Tensor, Value


@dataclass(frozen=True)
class Affine:
    """A scale and a zero point that broadcast against the data, and the element type of the integers.

    range: the least and greatest integer when the model allows fewer than the type holds.
    form: how a real tensor is divided by the scale (A2).
    """

    scale: Array
    zero: Array
    kind: str
    range: tuple[int, int] | None = None
    form: str = "divide"

    @property
    def qtype(self) -> arith.QType:
        """The integers' range and storage."""
        whole = arith.QType.of(self.kind)
        return arith.QType(*self.range, whole.storage) if self.range else whole


def calibrated_again(scale: float) -> str:
    """The remedy for a scale that is no positive finite number."""
    if scale == 0:
        return "calibrate again: a constant tensor gives a scale of zero"
    if math.isinf(scale):
        return (
            "calibrate again: a mask of -inf gives an infinite scale; make it about -100 before quantizing, or quantize"
            " by `hawq-tvm quantize`, which keeps masks out of the scale"
        )
    return "calibrate again"


def dequantized(value: Value, how: Affine) -> relax.Call:
    """`value` as real numbers (A1)."""
    low, high = value.range if isinstance(value, Tensor) else how.range or arith.RANGES[value.kind]
    return ops.dequantize(expression(value), how.scale, how.zero, qmin=low, qmax=high)


def quantized(expr: relax.Expr, how: Affine) -> Tensor:
    """A real tensor as integers (A2), able to narrow its range when a clip follows."""
    qtype = how.qtype

    def narrow(low: int, high: int) -> relax.Call:
        bounds = arith.QType(max(low, qtype.qmin), min(high, qtype.qmax), qtype.storage)
        return ops.quantize(expr, how.scale, how.zero, qtype=bounds, form=how.form)

    return Tensor(narrow(qtype.qmin, qtype.qmax), how.kind, how.range, narrow=narrow)
