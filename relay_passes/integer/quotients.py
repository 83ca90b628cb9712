"""A quotient of two integer tensors becomes integers of a given scale (A32)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from tvm import relax

from hawq_tvm.core.division import Division, divide

from .rescale import Output, clipped
from .values import INFINITY, LARGEST, Context, Joined, Quotient, Term, Value, compress, is_uniform

# Roundings that an integer may be added before or after.
SHIFTED = ("half_up", "floor", "ceil")
# What else may be done with a quotient that may be no number.
DEFINED = "quantize the quotient itself, with one scale, or keep the divisor from 0 by a clip"


def quotient(ctx: Context, value: Quotient, out: Output) -> relax.Expr:
    """(A32) at the scale of `out`, the dividend's scale over the divisor's and that: rounded once."""
    inside = 0 if out.fixed or out.rounding in SHIFTED else out.inside
    if out.rounding == "double" or inside:
        raise ctx.fail(
            "divide",
            "its quantize adds a zero point before it rounds, or rounds twice",
            "quantize its result with rounding to nearest, ties to even",
        )
    if undefined_in(ctx, value) and not all(map(is_uniform, out.bounds(value.low, value.high))):
        raise ctx.fail("hawq.quantize", "it has several scales behind a clip of what may be 0 / 0", DEFINED)
    # ONNX Runtime makes the least integer of what is no number, PyTorch 0.
    undefined = min(max(0, out.qtype.qmin), out.qtype.qmax) if out.form == "reciprocal" else out.qtype.qmin
    a, b = value.dividend, value.divisor
    assert not a.off and not b.off, "only exact integers and fixed-point values are divided"
    ratios = compress(np.asarray(a.scale / (b.scale * out.scale), object))
    if ratios.size > LARGEST:
        raise ctx.fail("divide", f"its scales take {ratios.size} different values", "use scales per channel")
    most = (_most(ctx, a), _most(ctx, b))
    furthest = max(abs(out.qtype.qmin - out.level), abs(out.qtype.qmax - out.level))
    try:
        found = {r: Division.of(r, most, furthest) for r in dict.fromkeys(ratios.flat)}
    except OverflowError as e:
        raise ctx.fail(
            "divide", f"it divides {e}", "check the scales of this layer, or quantize its operands"
        ) from None
    numbers = [
        np.array([getattr(found[r], name) for r in ratios.flat], np.int64).reshape(ratios.shape)
        for name in ("multiplier", "divisor")
    ]
    off, apart = (float(max(getattr(d, n) for d in found.values())) * (1 + 2.0**-50) for n in ("off", "apart"))

    def made(narrow: Output, suffix: str) -> relax.Expr:
        call = divide(
            a.data,
            b.data,
            *numbers,
            qtype=narrow.qtype,
            zero_point=narrow.level,
            rounding=narrow.rounding,
            undefined=undefined,
            bound=off if off or out.fixed else None,
            apart=apart,
        )
        return ctx.emit(call, suffix)

    return clipped(ctx, value, out, made)


def undefined_in(ctx: Context, value: Value) -> bool:
    """Whether a quotient, or one of the tensors joined, may be 0 / 0."""
    if isinstance(value, Joined):
        return any(undefined_in(ctx, part) for part in value.parts)
    if not isinstance(value, Quotient):
        return False
    a, b = value.dividend, value.divisor
    return _reaches_0(ctx, b) and (_reaches_0(ctx, a) or not np.all(a.scale))


def _reaches_0(ctx: Context, term: Term) -> bool:
    low, high = ctx.bounds(term.data)
    return bool(np.any((low <= 0) & (high >= 0)))


def quotient_interval(ctx: Context, value: Quotient) -> tuple[float, float]:
    """Bounds of a quotient's real values, infinite where the divisor may be 0."""
    low, high = (int(f(e)) for f, e in zip((np.min, np.max), ctx.bounds(value.divisor.data), strict=True))
    least = max(low, -high)
    if least <= 0:
        return -INFINITY, INFINITY
    scales = np.asarray(np.abs(value.dividend.scale) / np.abs(value.divisor.scale), object)
    most = Fraction(_most(ctx, value.dividend), least) * max(scales.flat)
    return float(max(-most, value.low)), float(min(most, value.high))


def _most(ctx: Context, term: Term) -> int:
    return max(int(np.max(np.abs(np.asarray(end)))) for end in ctx.bounds(term.data))
