"""Element-wise float operators on Reals: sums stay symbolic, products and piecewise-linear functions become
integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops

from .exact import rational
from .fixed import exact_integers, factors, fixed, narrowed, real_of, settled, single
from .functions import Clip
from .values import (
    INFINITY,
    INSERT,
    LARGEST,
    TENSORS,
    Array,
    Constant,
    Context,
    Curve,
    Joined,
    Quotient,
    Real,
    Term,
    Value,
    bound,
    broadcast_rank,
    compress,
    is_uniform,
    summed,
    whole,
    widened,
)


def _shape(a: Value, b: Value) -> tuple[int, ...]:
    return tuple(np.broadcast_shapes(a.shape, b.shape))


# Stands for an infinite addend: beyond every sum, so that it saturates or masks as infinity does.
BEYOND = 2.0**200


def exact(ctx: Context, constant: Constant, op: str, *, infinite: bool = False) -> Array:
    """The values of a constant as Fractions.  Raises NotLowered where one is not finite.

    infinite: whether infinity is one, far beyond every sum.
    """
    _check_size(ctx, constant, op)
    try:
        real = constant.real
        if infinite and constant.scale is None and real.dtype.kind == "f":
            real = np.clip(real.astype(np.float64), -BEYOND, BEYOND)
        return rational(real)
    except (OverflowError, ValueError):
        raise ctx.fail(op, "it computes with a constant that is not a finite number", "correct the constant") from None


def _check_size(ctx: Context, constant: Constant, op: str) -> None:
    size = constant.stored.size
    if size > LARGEST:
        raise ctx.fail(
            op, f"it computes with a constant of {size} numbers", "use scales and constants per tensor or per channel"
        )


def add(ctx: Context, a: Value, b: Value, sign: int = 1, op: str = "add") -> Value:
    """a + sign * b: terms are collected, constants on the accumulator's grid join it, others the 64-bit offset (A9)."""
    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(np.asarray(exact(ctx, a, op) + sign * exact(ctx, b, op), object))
    if isinstance(a, Constant):
        return add(ctx, negate(ctx, b, op) if sign < 0 else b, a, 1, op)
    left = settled(ctx, real_of(ctx, a, op), op)
    if isinstance(b, Constant):
        return _add_constant(ctx, widened(ctx, left, _shape(a, b)), b, sign, op)
    right = settled(ctx, real_of(ctx, b, op), op)
    shape, constant = _shape(a, b), left.constant + sign * right.constant
    terms = _collected([*left.terms, *(replace(t, scale=sign * t.scale) for t in right.terms)])
    if not terms:
        return Constant(np.broadcast_to(constant, shape))
    if np.broadcast_shapes(*(ops.shape_of(t.data) for t in terms)) != shape:  # the larger ones cancelled
        terms = (whole(ctx, terms[0], shape), *terms[1:])
    return Real(shape, tuple(map(summed, terms)), constant)


def _collected(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms of the same integers and zero as one, those that cancel as none: a chain of additions has as many as it
    has tensors.
    """
    kept: dict[relax.Expr, list[Term]] = {}
    for term in terms:
        same = kept.setdefault(term.data, [])
        for i, other in enumerate(same):
            if np.array_equal(term.zero, other.zero):
                scale, signed = np.asarray(other.scale + term.scale, object), other.signed and term.signed
                same[i] = replace(other, scale=scale, signed=signed, near=other.near or term.near)
                break
        else:
            same.append(term)
    return tuple(t for same in kept.values() for t in same if np.any(t.scale))


def _add_constant(ctx: Context, left: Real, b: Constant, sign: int, op: str) -> Real:
    _check_size(ctx, b, op)
    term = left.terms[0] if len(left.terms) == 1 else None
    if term is not None and term.accumulator and not np.any(left.constant) and _on_grid(term, b):
        zero = term.zero - sign * b.values
        # Padding fills with the data's zero elsewhere: an accumulator's zero is only ever its negated bias.
        if np.max(np.abs(zero), initial=0) <= arith.RANGES["int32"][1]:
            return Real(left.shape, (summed(replace(term, zero=zero.astype(np.int64))),))
    return Real(left.shape, tuple(map(summed, left.terms)), left.constant + sign * exact(ctx, b, op, infinite=True))


def _on_grid(term: Term, bias: Constant) -> bool:
    """Whether a bias has the scale of a sum, which files hold as a float32 product."""
    return bias.scale is not None and bool(np.all(term.scale.astype(np.float32) == bias.scale.astype(np.float32)))


def negate(ctx: Context, a: Value, op: str = "negative") -> Value:
    """-a."""
    if isinstance(a, Constant):
        return _scaled(ctx, a, rational(-1), op)
    if isinstance(a, Quotient):
        return scale_by(ctx, a, rational(-1), op)
    real = settled(ctx, real_of(ctx, a, op), op)
    return Real(real.shape, tuple(replace(t, scale=-t.scale) for t in real.terms), -real.constant)


def multiply(ctx: Context, a: Value, b: Value, op: str = "multiply") -> Value:
    """a * b: by a constant it is a change of scale, by another tensor an integer product."""
    if isinstance(a, Constant) and isinstance(b, Constant):
        a, b = (b, a) if a.scale is None else (a, b)
        return _scaled(ctx, a, exact(ctx, b, op), op)
    if isinstance(a, Constant):
        a, b = b, a
    if isinstance(b, Constant):
        return scale_by(ctx, a, exact(ctx, b, op), op)
    x, y, approximate = factors(ctx, a, b, op)
    left, right = centred(ctx, x, "int32", "a"), centred(ctx, y, "int32", "b")
    product = ctx.accumulate(lambda d: relax.op.multiply(_cast(left, d), _cast(right, d)), "product")
    # 0 times what is below 0 is -0.
    signed = not approximate and _never_below(ctx, x, left) and _never_below(ctx, y, right)
    scale, near = x.scale * y.scale, approximate or x.near or y.near
    made = Real(
        _shape(a, b), (Term(product, np.zeros((), np.int64), scale, accumulator=True, signed=signed, near=near),)
    )
    return narrowed(ctx, made, op) if approximate else made


def _never_below(ctx: Context, term: Term, data: relax.Expr) -> bool:
    """Whether a tensor is never below 0, nor -0; data: its integers, whose zero point is taken away."""
    return summed(term).signed and bool(np.min(ctx.bounds(data)[0]) >= 0)


def _scaled(ctx: Context, a: Constant, factor: Array, op: str) -> Constant:
    """A constant times Fractions: one of integers keeps them, and so stays a quantized weight."""
    if a.scale is None or np.broadcast_shapes(a.shape, factor.shape) != a.shape:
        return Constant(np.asarray(exact(ctx, a, op) * factor, object))
    return Constant(a.stored, np.asarray(rational(compress(a.scale)) * factor, object))


def scale_by(ctx: Context, a: Value, factor: Array, op: str) -> Value:
    """a * factor for a constant factor of Fractions."""
    if isinstance(a, Quotient) and np.broadcast_shapes(a.shape, factor.shape) == tuple(a.shape):
        own = a.low == -INFINITY and a.high == INFINITY
        if own or (is_uniform(factor) and factor.flat[0] > 0):
            low, high = (a.low, a.high) if own else (bound(v * factor.flat[0]) for v in (a.low, a.high))
            return replace(a, dividend=replace(a.dividend, scale=a.dividend.scale * factor), low=low, high=high)
    real = real_of(ctx, a, op)
    if is_uniform(factor) and factor.flat[0] > 0:  # the bounds of a clip scale with it
        low, high = (bound(v * factor.flat[0]) for v in (real.low, real.high))
    else:
        real = settled(ctx, real, op)
        low, high = real.low, real.high
    real = widened(ctx, real, tuple(np.broadcast_shapes(real.shape, factor.shape)))
    return Real(
        real.shape, tuple(replace(t, scale=t.scale * factor) for t in real.terms), real.constant * factor, low, high
    )


def divide(ctx: Context, a: Value, b: Value) -> Value:
    """a / b: by a constant it is a change of scale, by another tensor a quotient of integers (A32)."""
    if not isinstance(b, Constant):
        return _quotient(ctx, a, b)
    divisor = exact(ctx, b, "divide")
    if np.any(divisor == 0):
        raise ctx.fail("divide", "it divides by zero", "correct the constant")
    if isinstance(a, Constant):
        return _scaled(ctx, a, np.asarray(1 / divisor, object), "divide")
    return scale_by(ctx, a, np.asarray(1 / divisor, object), "divide")


def _quotient(ctx: Context, a: Value, b: Value) -> Quotient:
    if not ctx.feeding:
        remedy = "quantize its result too, or keep it outside the integer region with --allow-float-tail"
        raise ctx.fail("divide", "it divides by a tensor, and nothing quantizes the quotient", remedy)
    if isinstance(a, Constant):
        a = _counted(ctx, a)
    own = [exact_integers(ctx, v, "divide") for v in (a, b)]
    x, y = (t or fixed(ctx, v, "divide") for t, v in zip(own, (a, b), strict=True))
    low, high = (int(f(e)) for f, e in zip((np.min, np.max), ctx.bounds(y.data), strict=True))
    least, most, near = low - int(np.max(y.zero)), high - int(np.min(y.zero)), int(own[1] is None or own[1].near)
    if least <= near and most >= -near:
        _check_zeros(ctx, own, y)
    if not np.all(y.scale):
        raise ctx.fail("divide", "it divides by a tensor whose scale is zero", "correct the scale")
    nothing = np.zeros((), np.int64)
    dividend, divisor = (
        replace(t, data=centred(ctx, t, "int32", name), zero=nothing) for t, name in ((x, "a"), (y, "b"))
    )
    return Quotient(_shape(a, b), dividend, divisor)


def _check_zeros(ctx: Context, own: Sequence[Term | None], divisor: Term) -> None:
    """Raises NotLowered where what is divided by 0 is not known exactly, or the sign of that 0 is not."""
    reason = ""
    if own[1] is None or own[1].near:
        reason = "it divides by a tensor that may be 0, and no quantize gives it integers of its own"
    elif (
        own[0] is None
        or own[0].near
        or not (own[0].signed or own[0].accumulator or ops.dtype_of(own[0].data) != "int32")
    ):
        # Fixed-point values: 0 may stand for what is none.
        reason = "it divides a tensor to which no quantize gives integers of its own by one that may be 0"
    elif not divisor.signed:
        reason = "it divides by a tensor that may be 0, and its integers do not tell whether that is 0 or -0"
    if reason:
        raise ctx.fail("divide", reason, INSERT)


def _counted(ctx: Context, a: Constant) -> Real:
    """A constant as a tensor of ones, each times its number."""
    values = exact(ctx, a, "divide")
    ones = ops.const(np.ones(values.shape), "int32")
    return Real(values.shape, (Term(ones, np.zeros((), np.int64), values, signed=True),))


def _cast(x: relax.Expr, dtype: str) -> relax.Expr:
    return x if ops.dtype_of(x) == dtype else relax.op.astype(x, dtype)


def centred(ctx: Context, term: Term, dtype: str, suffix: str) -> relax.Expr:
    """data - zero in `dtype`, in int32 where that does not hold it, or in int64 as it is, emitted."""
    data = term.data
    kind = "int64" if ops.dtype_of(data) == "int64" else dtype
    ends = [f(e - z) for f, e in zip((np.min, np.max), ctx.bounds(data), strict=True) for z in (0, term.zero)]
    if kind == "int16" and not arith.RANGES[kind][0] <= min(ends) <= max(ends) <= arith.RANGES[kind][1]:
        kind = "int32"
    if ops.dtype_of(data) != kind:
        data = ctx.emit(relax.op.astype(data, kind), f"{suffix}.cast")
    if np.any(term.zero):
        data = ctx.emit(relax.op.subtract(data, ops.const(term.zero, kind)), f"{suffix}.centred")
    return data


def rising(ctx: Context, term: Term) -> Term:
    """A term whose integers rise with its real values: where its scale is negative they change their sign."""
    if np.all(term.scale >= 0):
        return term
    data = centred(ctx, term, "int16" if ops.dtype_of(term.data) in ("int8", "uint8") else "int32", "x")
    signs = ops.const(np.where(np.asarray(term.scale < 0, bool), -1, 1), ops.dtype_of(data))
    data = ctx.emit(relax.op.multiply(data, signs), "turned")
    scale, nothing = np.abs(term.scale), np.zeros((), np.int64)
    return replace(term, data=data, zero=nothing, scale=scale, half=None, signed=False)


def with_one_zero(ctx: Context, term: Term) -> Term:
    """A term whose integers that stand for 0 are the same in every channel, as padding needs them."""
    if is_uniform(term.zero):
        return term
    kind = "int16" if ops.dtype_of(term.data) in ("int8", "uint8") else "int32"
    return replace(term, data=centred(ctx, term, kind, "x"), zero=np.zeros((), np.int64))


def clip(ctx: Context, a: Value, low: Fraction | float, high: Fraction | float) -> Value:
    """min(max(a, low), high), kept symbolic until the quantize, where it is exact (A12)."""
    if isinstance(a, Constant):
        return Constant(np.minimum(np.maximum(exact(ctx, a, "clip"), bound(low)), bound(high)))  # type: ignore[arg-type]
    if isinstance(a, Curve):
        return replace(a, function=a.function.then(Clip(bound(low), bound(high))))
    if isinstance(a, Quotient):
        return replace(a, low=bound(min(max(a.low, low), high)), high=bound(min(max(a.high, low), high)))
    if isinstance(a, Joined):
        parts = tuple(clip(ctx, p, low, high) for p in a.parts)
        return replace(a, parts=parts)
    real = real_of(ctx, a, "clip")
    if any(v == 0 and np.signbit(float(v)) for v in (low, high)):  # clipped at -0
        real = replace(real, terms=tuple(replace(t, signed=False) for t in real.terms))
    new_low, new_high = (bound(min(max(v, low), high)) for v in (real.low, real.high))
    return replace(real, low=new_low, high=new_high)


def extremum(ctx: Context, a: Value, b: Value, op: str) -> Value:
    """maximum or minimum: against a uniform constant it is a clip, else both sides meet at the quantize."""
    if a is b:
        return a
    for x, other in ((a, b), (b, a)):
        if isinstance(other, Constant) and is_uniform(other.real) and not isinstance(x, Constant):
            level = other.real.flat[0]
            clipped = clip(ctx, x, level, np.inf) if op == "maximum" else clip(ctx, x, -np.inf, level)
            return widened(ctx, clipped, _shape(a, b))
    if isinstance(a, Constant) and isinstance(b, Constant):
        return Constant(np.maximum(a.real, b.real) if op == "maximum" else np.minimum(a.real, b.real))
    function = relax.op.maximum if op == "maximum" else relax.op.minimum
    for x in (a, b):
        if not isinstance(x, (*TENSORS, Constant)):
            raise ctx.fail(op, "its input is float and not quantized", INSERT)
    return Joined(_shape(a, b), (a, b), lambda parts: function(*parts), picks=False)


def leaky_relu(ctx: Context, a: Value, slope: Array, op: str) -> Value:
    """max(a, 0) + slope * min(a, 0), of a slope of Fractions: two terms of which one is always zero, so that they
    round once.
    """
    if isinstance(a, Constant):
        values = exact(ctx, a, op)
        return Constant(np.where(values >= 0, values, values * slope))
    term = rising(ctx, single(ctx, a, op))
    data = centred(ctx, term, "int32", "in")
    zero = ops.const(0, ops.dtype_of(data))
    nothing = np.zeros((), np.int64)
    positive = ctx.emit(relax.op.maximum(data, zero), "positive")
    negative = ctx.emit(relax.op.minimum(data, zero), "negative")
    slope = broadcast_rank(slope, len(a.shape)) if np.ndim(slope) else slope
    mark = object()
    halves = (
        Term(positive, nothing, term.scale, half=(mark, 1), near=term.near),
        Term(negative, nothing, term.scale * slope, half=(mark, -1), near=term.near),
    )
    return Real(a.shape, halves)


def where(ctx: Context, condition: relax.Expr, a: Value, b: Value) -> Value:
    """where(condition, a, b): both sides meet at the quantize."""
    for x in (a, b):
        if not isinstance(x, (*TENSORS, Constant)):
            raise ctx.fail("where", "its input is float and not quantized", INSERT)
    shape = tuple(np.broadcast_shapes(ops.shape_of(condition), a.shape, b.shape))
    if isinstance(a, Constant) and isinstance(b, Constant) and not ops.is_const(condition):
        # One bit: b, or b and the difference.
        first, second = (exact(ctx, x, "where", infinite=True) for x in (a, b))
        bit = ctx.emit(relax.op.astype(condition, "int8"), "bit")
        term = Term(bit, np.zeros((), np.int64), np.asarray(first - second, object))
        return Real(shape, (whole(ctx, term, shape),), second)
    return Joined(shape, (a, b), lambda parts: relax.op.where(condition, *parts))
