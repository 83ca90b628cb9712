"""hawq.divide: the quotient of two integer tensors, rounded once (A32): its numbers, type, interval and worst case."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import tvm
from tvm import relax

from . import arith, ops
from .intervals import Interval

NAME = "hawq.divide"
# Twice the numerator and the divisor, whose sum is divided by twice the divisor, stay below 2^63.
BITS = 61
# A ratio that is further off than this has lost its scale.
COARSEST = Fraction(1, 1 << 20)


@dataclass(frozen=True)
class Division:
    """The integers of (A32): m for the dividend and d > 0 for the divisor, m / d near the ratio of the scales.

    off: how far the quotient can be from the real one before it is rounded, in steps; 0 where no result can be another.
    apart: how far m / d is from the ratio, as a part of m / d itself at most.
    """

    multiplier: int
    divisor: int
    off: Fraction
    apart: Fraction

    @staticmethod
    def of(ratio: Fraction, most: tuple[int, int], furthest: int) -> Division:
        """The numbers for a ratio; most: the largest magnitudes of both tensors.  furthest: the largest
        magnitude of a result, in steps from its zero point.

        Raises OverflowError where 61 bits hold no m / d within 2^-20 of the ratio.
        """
        if not ratio:
            return Division(0, 1, Fraction(0), Fraction(0))
        top, bottom = (((1 << BITS) - 1) // max(m, 1) for m in most)
        if not top or not bottom:
            raise OverflowError("integers too large to be divided in 64 bits")
        size = abs(ratio)
        near = size
        if size.numerator > top or size.denominator > bottom:
            near = _nearest(size, top, bottom) if size <= 1 else 1 / (_nearest(1 / size, bottom, top) or 1 / size)
        off = abs(near - size)
        if off > COARSEST * size or near.numerator > top or near.denominator > bottom:
            raise OverflowError("scales too far apart")
        sign = 1 if ratio > 0 else -1
        exact, apart = not off or _settles(size, most, furthest, off), off / (size - off)
        lost = Fraction(0) if exact else (furthest + 1) * apart
        return Division(sign * near.numerator, near.denominator, lost, apart)


def _nearest(ratio: Fraction, top: int, bottom: int) -> Fraction:
    """The nearest fraction to a ratio of at most 1 whose denominator, and so its numerator, has room."""
    return ratio.limit_denominator(max(1, min(bottom, int((top - 1) / ratio))))


def _settles(ratio: Fraction, most: tuple[int, int], furthest: int, off: Fraction) -> bool:
    """Whether a ratio that is so much off decides as the right one, P / Q, does.

    a P / (b Q) is a boundary k + 1/2 only where Q divides 2 a and P divides (2 k + 1) b; else 1 / (2 b Q) away from it.
    """
    ties = ratio.denominator <= 2 * most[0] and ratio.numerator <= (2 * furthest + 1) * most[1]
    return not ties and 2 * most[0] * off * ratio.denominator < 1


def infer(call: relax.Call, _: Any) -> relax.TensorType:
    """The type of a result: both operands' shapes, broadcast; its constants fit in."""
    shape = np.broadcast_shapes(*(ops.shape_of(a) for a in call.args[:2]))
    if np.broadcast_shapes(shape, *(ops.shape_of(a) for a in call.args[2:])) != shape:
        raise ValueError(f"{NAME}: constants that do not fit data of shape {list(shape)}")
    return relax.TensorType(tuple(int(n) for n in shape), str(call.attrs["out_dtype"]))


ops.register(NAME, infer)


def divide(
    a: relax.Expr,
    b: relax.Expr,
    multiplier: Any,
    divisor: Any,
    *,
    qtype: arith.QType,
    zero_point: int,
    rounding: str,
    undefined: int,
    bound: float | None = None,
    apart: float = 0.0,
) -> relax.Call:
    """(A32) clamp(round(a m / (b d)) + zero_point) to `qtype` for integers a and b, whose zero points are taken away.

    multiplier, divisor: int64 constants m and d > 0 that broadcast.  undefined: what 0 / 0 is.  bound: how far the
    quotient can be from the real one before its rounding, in steps, where it is not the real one's or a fixed point.
    apart: how far the ratio m / d is at most from the real one, as a part of itself.
    """
    known = {"apart": apart} | ({} if bound is None else {"bound": bound})
    attrs = tvm.ir.make_node(
        "ir.DictAttrs",
        qmin=qtype.qmin,
        qmax=qtype.qmax,
        out_dtype=qtype.storage,
        zero_point=int(zero_point),
        rounding=rounding,
        undefined=int(undefined),
        **known,
    )
    constants = [ops.const(v, "int64") for v in (multiplier, divisor)]
    return relax.Call(tvm.ir.Op.get(NAME), [a, b, *constants], attrs=attrs)


def interval(call: relax.Call, *_: Any) -> Interval:
    """All that it is clamped to, and what 0 / 0 is."""
    low, high, undefined = (int(call.attrs[n]) for n in ("qmin", "qmax", "undefined"))
    return Interval.of_range(min(low, undefined), max(high, undefined))


def worst(call: relax.Call, a: Interval, b: Interval) -> int:
    """The largest number inside (A32): twice the numerator and the divisor, or twice the divisor."""
    m, d = (int(np.max(np.abs(ops.const_value(c)))) for c in call.args[2:])
    most = [max(map(abs, v.scalar)) for v in (a, b)]
    return most[1] * d + max(2 * most[0] * m, most[1] * d)
