"""(A26): a float tensor that no quantize follows as integers of about 24 bits, with a scale of a power of two.

A sum of terms, a concatenation, a function: where an operator reads integers and the model has none of one scale.
The error is bounded, and the certificate states it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops
from relay_passes.integer.rescale import Output

from .curves import NARROW, own_integers, reach, values_of
from .exact import integral, nearest
from .quotients import quotient_interval
from .realize import FIXED_BITS, realize
from .values import (
    INFINITY,
    INSERT,
    TENSORS,
    Constant,
    Context,
    Curve,
    Joined,
    NotLowered,
    Quotient,
    Real,
    Softmax,
    Term,
    Value,
    with_integer_bias,
)
from .weights import BITS as SCALE_BITS
from .weights import halves, most_summed

BITS = FIXED_BITS
# How much wider the bounds of a sum are than the sums: the root of the number of its products; and how many bits of a
# function's values that may cost, where no quantize bounds them.
WIDER, MOST_GROWTH = 16, 10


def interval(ctx: Context, value: Value) -> tuple[float, float]:
    """Bounds of a tensor's real values, perhaps infinite."""
    if isinstance(value, Joined):
        ends = [interval(ctx, p) for p in value.parts]
        return min(e[0] for e in ends), max(e[1] for e in ends)
    if isinstance(value, Constant):
        values = value.doubles
        return float(np.min(values)), float(np.max(values))
    if isinstance(value, Softmax):
        return 0.0, 1.0
    if isinstance(value, Quotient):
        return quotient_interval(ctx, value)
    return values_of(ctx, value) if isinstance(value, Curve) else reach(ctx, value)


def fixed(ctx: Context, value: Value, op: str = "quantize", bits: int = BITS) -> Term:
    """(A26) the integers v of `bits` bits with value = v 2^-F nearly, F the largest that the value's interval allows.

    Raises NotLowered where the interval is not finite.
    """
    if not isinstance(value, (*TENSORS, Constant)):
        raise ctx.fail(op, "its input is float and not quantized", INSERT)
    most = max(map(abs, interval(ctx, value)))
    if not most < INFINITY and isinstance(value, Quotient):
        raise ctx.fail(op, "its input is a quotient that nothing quantizes, of a tensor that may be 0", INSERT)
    if not most < INFINITY:
        raise ctx.fail(
            op, "its input is a function that is not bounded where its own input can be", "clip the function's input"
        )
    if ctx.ending and _grows(ctx, value):
        raise ctx.fail(
            op, "its input is a function of sums that grows too fast for fixed point where nothing quantizes it", INSERT
        )
    out = Output.fixed_point(most, bits)
    key = (value, out.scale.flat[0], bits)
    if key not in ctx.realized:
        layer = ctx.layer
        ctx.layer = f"{layer}.fixed"
        ctx.realized[key] = realize(ctx, value, out)
        ctx.layer = layer
    return Term(ctx.realized[key], np.zeros((), np.int64), out.scale, near=True)


def _grows(ctx: Context, value: Value) -> bool:
    """Whether a function of sums, whose bounds are far wider than sums are, has values far beyond those in their midst:
    of an integer's bits hardly one would be left for these.
    """
    if isinstance(value, Joined):
        return any(_grows(ctx, part) for part in value.parts)
    if not isinstance(value, Curve) or own_integers(value.leaf) is not None:
        return False
    low, high = reach(ctx, value.leaf)
    middle, half = (low + high) / 2, (high - low) / 2 / WIDER
    inside = np.abs(value.function.bounds(np.array([middle - half]), np.array([middle + half])))
    return not max(map(abs, values_of(ctx, value))) <= 2.0**MOST_GROWTH * float(np.max(inside))


def single(ctx: Context, value: Value, op: str, *, bits: int = BITS, narrow: bool = False) -> Term:
    """The one integer term that stands for `value`, its clip applied; a fixed-point one (A26) of `bits` bits where
    no other does and a quantize is still to come.

    narrow: whether the operator multiplies integers that the model itself has quantized.
    Raises NotLowered where none stands for it.
    """
    try:
        return _own(ctx, value, op)
    except NotLowered:
        if narrow or not ctx.feeding or not isinstance(value, TENSORS):
            raise
        return fixed(ctx, value, op, bits)


def _own(ctx: Context, value: Value, op: str) -> Term:
    """The one integer term that stands for `value` exactly, but for the bias of a sum (A11).

    Raises NotLowered when the value is a sum, or clipped at a number that the integer grid does not hold.
    """
    if isinstance(value, Joined | Softmax | Quotient):
        raise ctx.fail(op, "its input has no quantize of its own, so its parts have no common scale", INSERT)
    if isinstance(value, Curve):
        raise ctx.fail(op, "its input is a function that nothing quantizes", INSERT)
    if not isinstance(value, Real):
        raise ctx.fail(op, "its input is float and not quantized", INSERT)
    value = with_integer_bias(value)
    if len(value.terms) != 1 or np.any(value.constant != 0):
        raise ctx.fail(
            op,
            "its input has several scales (a sum of tensors, an added constant or a slope) that nothing quantizes",
            INSERT,
        )
    term: Term = value.terms[0]
    if not value.clipped:
        return term
    if np.any(term.scale <= 0):
        raise ctx.fail(op, "its input is clipped after a negative scale", INSERT)
    data = term.data
    for end, clip, suffix in ((value.low, relax.op.maximum, "relu"), (value.high, relax.op.minimum, "clip")):
        if abs(end) == INFINITY:
            continue
        steps = np.asarray(end / term.scale, object)
        if not np.all(integral(steps)):
            raise ctx.fail(op, f"its input is clipped at {float(end):g}, which is not a multiple of its scale", INSERT)
        dtype = ops.dtype_of(data)
        level = np.clip(nearest(steps) + term.zero, *arith.RANGES[dtype])
        data = ctx.emit(clip(data, ops.const(level, dtype)), suffix)
    return replace(term, data=data)


def settled(ctx: Context, value: Real, op: str) -> Real:
    """`value` with its clip applied to the integers."""
    if not value.clipped:
        return value
    return Real(value.shape, (single(ctx, value, op),))


def real_of(ctx: Context, value: Value, op: str, bits: int = BITS) -> Real:
    """A tensor as a sum of terms: itself, or the fixed-point value (A26) of what waits for its quantize.

    Raises NotLowered as `single` does.
    """
    if isinstance(value, Real):
        return value
    term = single(ctx, value, op, bits=bits)
    return Real(ops.shape_of(term.data), (term,))


# What is left of 32 bits for a fixed-point factor beside one of 8 bits.
PRODUCT_BITS, FEWEST_BITS, FEWEST_SUMMED, WEIGHT_BITS = 31, 20, 20, 22


def factors(ctx: Context, a: Value, b: Value, op: str) -> tuple[Term, Term, bool]:
    """The integers of two tensors that are multiplied, and whether one of them is a fixed-point value (A26).

    Beside 8 bits such a value has as many as 32-bit products leave; beside a wider tensor both have 24.
    """
    own = [_owned(ctx, v, op) for v in (a, b)]
    if None not in own:
        return own[0], own[1], False  # type: ignore[return-value]
    bits = BITS
    for term in own:
        if term is not None:
            most = max(int(np.max(np.abs(np.asarray(end) - term.zero))) for end in ctx.bounds(term.data))
            bits = PRODUCT_BITS - most.bit_length()
    if bits < FEWEST_BITS:
        return fixed(ctx, a, op), fixed(ctx, b, op), True
    x, y = (t or single(ctx, v, op, bits=min(bits, BITS)) for t, v in zip(own, (a, b), strict=True))
    return x, y, True


def rows_and_columns(ctx: Context, a: Value, b: Value, op: str) -> tuple[Term, Term, bool]:
    """The integers of two tensors of a matrix product, and whether one of them is a fixed-point value (A26).

    That is so where a quantize follows and a tensor has no integers of 8 or 16 bits with one scale along what is
    summed; what it is multiplied with becomes one, too, unless that has 8 bits.
    Raises NotLowered as `single` does.
    """
    own = [_along(_owned(ctx, v, op), axis) for v, axis in ((a, -1), (b, -2))]
    if None not in own or not ctx.feeding:
        x, y = (t or single(ctx, v, op, narrow=True) for t, v in zip(own, (a, b), strict=True))
        return x, y, False
    kept = [t if t and ops.dtype_of(t.data) in ("int8", "uint8") else None for t in own]
    x, y = (t or fixed(ctx, v, op) for t, v in zip(kept, (a, b), strict=True))
    return x, y, True


def short(ctx: Context, value: Value, axis: int, op: str) -> bool:
    """Whether a tensor has integers of 8 or 16 bits of its own, with one scale along an axis."""
    return _along(_owned(ctx, value, op), axis) is not None


def _along(term: Term | None, axis: int) -> Term | None:
    """A term of 8 or 16 bits whose scale does not vary along an axis, else None."""
    if term is None or term.accumulator or ops.dtype_of(term.data) not in NARROW:
        return None
    return term if np.ndim(term.scale) < -axis or np.shape(term.scale)[axis] == 1 else None


def narrowed(ctx: Context, value: Real, op: str) -> Real:
    """A sum of more than 32 bits, which would leave its next requantize few bits for the multiplier, as a fixed-point
    value (A26); others unchanged.
    """
    wide = ops.dtype_of(value.terms[0].data) == "int64"
    return Real(value.shape, (fixed(ctx, value, op),)) if wide else value


def summand(ctx: Context, value: Value, op: str, weight: Value, axes: Sequence[int]) -> tuple[Term, Value]:
    """The integers of a tensor and of a weight, whose products are summed along the weight's `axes`.

    What no quantize precedes is a 32-bit sum itself, or a fixed-point value (A26), where the products' sums keep to 32
    bits; else one of all its bits. A float weight becomes integers with a scale of a power of two for each output:
    of WEIGHT_BITS, or beside a quantized tensor of as many as scales along what is summed have (A10a).
    Raises NotLowered as `single` does, and where no quantize follows.
    """
    term = _owned(ctx, value, op)
    floats = isinstance(weight, Constant) and weight.scale is None and ctx.feeding
    if term is not None and not term.accumulator and ops.dtype_of(term.data) in NARROW:
        return term, _fixed_weight(weight, axes, SCALE_BITS) if floats else weight
    if not isinstance(weight, Constant) or not ctx.feeding:
        term = single(ctx, value, op, narrow=True)
        if term.accumulator or ops.dtype_of(term.data) == "int64":
            raise ctx.fail(op, "its input is a 32-bit sum that nothing quantizes", INSERT)
        return term, weight
    if floats:
        weight = _fixed_weight(weight, axes, WEIGHT_BITS)
    parts = halves(weight.values) if weight.rounded else [(weight.values, 1)]
    total = max(int(np.max(np.abs(part.astype(np.int64)).sum(axis=tuple(axes)))) for part, _ in parts)
    if term is not None and ops.dtype_of(term.data) == "int32":
        most = max(int(np.max(np.abs(end))) for end in ctx.bounds(term.data))
        if most * total < 1 << PRODUCT_BITS:
            return replace(term, accumulator=False), weight
    bits = min(BITS, PRODUCT_BITS + 1 - total.bit_length())
    # Sums that must have 64 bits have them for all of the value's.
    return fixed(ctx, value, op, bits if bits >= FEWEST_SUMMED else BITS), weight


def _fixed_weight(weight: Constant, axes: Sequence[int], bits: int) -> Constant:
    """A float weight as integers, with a scale of a power of two for each output."""
    real = weight.doubles
    most = np.max(np.abs(real), axis=tuple(axes), keepdims=True)
    shift = bits - 1 - np.where(most > 0, np.frexp(most)[1], 0)
    scales = np.array([Fraction(2) ** -int(s) for s in shift.flat], object).reshape(shift.shape)
    exact = np.ldexp(real, shift)
    values, rounded = np.rint(exact), bits == WEIGHT_BITS
    lost = np.abs(exact - values) + (0 if weight.values.dtype.kind == "f" else np.abs(exact) * 2.0**-53)
    off = 0.0 if rounded else most_summed(lost, axes)
    return Constant(values.astype(np.int64), scales, rounded, off)


def exact_integers(ctx: Context, value: Value, op: str) -> Term | None:
    """The one integer term that stands for `value`, of whose constant (A11) loses nothing, nor (A10a) of its weights;
    None where there is none.
    """
    if isinstance(value, Real) and len(value.terms) == 1 and np.any(value.constant):
        scale = value.terms[0].scale
        if not np.all(scale) or not np.all(integral(np.asarray(value.constant / scale, object))):
            return None
    term = _owned(ctx, value, op)
    return None if term is None or term.off else term


def _owned(ctx: Context, value: Value, op: str) -> Term | None:
    try:
        return _own(ctx, value, op)
    except NotLowered:
        return None
