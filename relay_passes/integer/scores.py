"""What a softmax is taken of: integers of 8 or 16 bits as they are, else a grid of powers of two (A24), on which masks
lie so low that they contribute nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ibert, ops
from hawq_tvm.core.softmax_wide import LOG2_E, fraction_of

from .curves import reach
from .fixed import interval
from .realize import realize
from .rescale import Output
from .values import TENSORS, Array, Constant, Context, Joined, Real, Softmax, Term, Value, is_uniform

# A two-valued term of this size or more can be a mask.
MASK = 1000.0
# Everything on the grid lies above the second power; what is masked is cut off at the first.
LOWEST = -(1 << 30)
PROBABLE = 32767
MAGNIFIED = 24


def scores(ctx: Context, value: Value, axis: int) -> Softmax:
    """The softmax of a value, waiting for its quantize.

    Raises NotLowered for a value that is not integer, or that can be too large for the grid.
    """
    if isinstance(value, Real) and ctx.feeding:
        term = own(value)
        # One zero point cancels in differences of scores; several, or the bias of a sum, do not.
        if term is not None and is_uniform(term.scale) and term.scale.flat[0] > 0 and is_uniform(term.zero):
            first, last = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
            fine = ctx.ibert and term.scale.flat[0] >= Fraction(1, 1 << ibert.MOST_FRACTION)
            if last - first < 1 << (ibert.WORD_BITS if fine else 16):
                return Softmax(tuple(value.shape), term, axis)
    if not isinstance(value, TENSORS) or not ctx.feeding:
        raise ctx.fail(
            "softmax",
            "its input is not an 8 or 16-bit tensor, or nothing quantizes its output",
            "quantize its input and its result (quantize/dequantize pairs before and after this node)",
        )
    low, high = _open(ctx, value, value.shape[axis])
    most = max(abs(low), abs(high))
    fraction = (ibert.fraction_of if ctx.ibert else fraction_of)(most)
    if fraction is None:
        raise ctx.fail("softmax", f"its scores can be {most:g}, where exponents have no integers", "quantize its input")
    step = 1 / ((1 if ctx.ibert else LOG2_E) * Fraction(1 << fraction))
    out = Output(
        np.asarray(step, object), 0, arith.QType(LOWEST, (1 << 30) - 1, "int32"), "half_up", "divide", fixed=True
    )
    layer, ctx.layer = ctx.layer, f"{ctx.layer}.scores"
    floor = step * LOWEST * 3 / 2
    data = realize(ctx, _magnified(ctx, shut(ctx, _chosen(ctx, value, floor), floor)), out)
    ctx.layer = layer
    return Softmax(tuple(value.shape), Term(data, np.zeros((), np.int64), out.scale), axis, fraction)


def probabilities(ctx: Context, value: Value) -> Value:
    """A softmax, or a choice between it and 0, that nothing quantizes before it is multiplied, in 15 bits: 1 is one of
    them, and 16-bit products take them; others unchanged.
    """
    parts = list(_parts(value))
    zero = all(isinstance(p, Softmax) or (isinstance(p, Constant) and not np.any(p.values)) for p in parts)
    if not zero or not any(isinstance(p, Softmax) for p in parts) or not ctx.feeding:
        return value
    scale = np.asarray(Fraction(1, PROBABLE), object)
    layer, ctx.layer = ctx.layer, f"{ctx.layer}.probabilities"
    data = realize(ctx, value, Output(scale, 0, arith.QType(0, PROBABLE, "int16"), "half_even", "divide", fixed=True))
    ctx.layer = layer
    return Real(value.shape, (Term(data, np.zeros((), np.int64), scale, near=True),))


def own(value: Real) -> Term | None:
    """The one term that a value is, neither clipped nor with a constant."""
    return value.terms[0] if len(value.terms) == 1 and not value.clipped and not np.any(value.constant) else None


def _chosen(ctx: Context, value: Value, floor: Fraction) -> Value:
    """The same value, in which a two-valued mask chooses between `floor` and the rest where one of its values lies
    below: as an addend it would leave the multiplier of the rest few bits (A4).
    """
    if isinstance(value, Joined):
        return replace(value, parts=tuple(_chosen(ctx, p, floor) for p in value.parts))
    if not isinstance(value, Real) or value.clipped:
        return value
    for i, mask in enumerate(value.terms):
        others = value.terms[:i] + value.terms[i + 1 :]
        if not others or not _is_mask(ctx, mask):
            continue
        ends = [np.asarray(value.constant + mask.scale * (bit - mask.zero), object) for bit in (0, 1)]
        shape = np.broadcast_shapes(*(ops.shape_of(t.data) for t in others))
        for closed, end in enumerate(reversed(ends)):
            shut_off = np.asarray(ends[closed] < floor, bool).all()
            if shut_off and np.all(end >= floor) and np.broadcast_shapes(end.shape, shape) == shape:
                bit = ctx.emit(relax.op.not_equal(mask.data, ops.const(closed, ops.dtype_of(mask.data))), f"open{i}")
                rest = _chosen(ctx, Real(shape, others, end), floor)
                parts = (rest, Constant(np.asarray(floor, object)))
                return Joined(value.shape, parts, partial(_either, bit))
    return value


def _either(bit: relax.Expr, parts: list[relax.Expr]) -> relax.Expr:
    return relax.op.where(bit, *parts)


def shut(ctx: Context, value: Value, floor: Fraction) -> Value:
    """The same value, in which what a two-valued mask pushes below `floor` lies there: everything below is one."""
    if isinstance(value, Joined):
        return replace(value, parts=tuple(shut(ctx, p, floor) for p in value.parts))
    if not isinstance(value, Real):
        return value
    terms, constant = list(value.terms), np.asarray(value.constant, object)
    for i, t in enumerate(terms):
        if not _is_mask(ctx, t):
            continue
        ends = [np.asarray(constant + t.scale * (bit - t.zero), object) for bit in (0, 1)]
        low, high = (np.where(np.asarray(e < floor, bool), np.asarray(floor, object), e) for e in ends)
        terms[i] = replace(t, scale=np.asarray(high - low, object), zero=np.zeros((), np.int64))
        constant = np.asarray(low, object)
    return replace(value, terms=tuple(terms), constant=constant)


def _magnified(ctx: Context, value: Value) -> Value:
    """The same value, in which the bit of a mask that shuts nothing off is 0 or 2^24 of a finer scale: beside a large
    scale the multipliers of the rest keep few bits (A4).
    """
    if isinstance(value, Joined):
        return replace(value, parts=tuple(_magnified(ctx, p) for p in value.parts))
    if not isinstance(value, Real):
        return value
    terms = list(value.terms)
    for i, t in enumerate(terms):
        if _is_bit(ctx, t) and not np.any(t.zero):
            data = relax.op.multiply(relax.op.astype(t.data, "int32"), ops.const(1 << MAGNIFIED, "int32"))
            finer = np.asarray(t.scale * Fraction(1, 1 << MAGNIFIED), object)
            terms[i] = replace(t, data=ctx.emit(data, f"mask{i}"), scale=finer)
    return replace(value, terms=tuple(terms))


def saturated(ctx: Context, value: Value, out: Output) -> Value:
    """The same for a quantize: what a mask pushes below the least of its integers lies just below it."""
    if not isinstance(value, Real) or not any(_is_mask(ctx, t) for t in value.terms):
        return value
    plain = tuple(t for t in value.terms if not _is_mask(ctx, t))
    high = reach(ctx, replace(value, terms=plain, constant=np.zeros(())))[1] if plain else 0.0
    least = min((out.qtype.qmin - out.level - 2) * s for s in out.scale.flat)
    return shut(ctx, value, least - Fraction(max(high, 0.0)))


def _is_bit(ctx: Context, term: Term) -> bool:
    low, high = ctx.bounds(term.data)
    return bool(np.min(low) >= 0 and np.max(high) <= 1)


def _is_mask(ctx: Context, term: Term) -> bool:
    return _is_bit(ctx, term) and bool(np.max(np.abs(term.scale)) >= MASK)


def _open(ctx: Context, value: Value, count: int) -> tuple[float, float]:
    """Bounds of what is not masked: a mask lies so far below the rest that it adds less than 2^-32 to a row's sum."""
    margin = math.log(count) + 33 * math.log(2)
    parts = list(_parts(value))
    reals = [_open_real(ctx, p, margin) for p in parts if isinstance(p, Real)]
    reals += [interval(ctx, p) for p in parts if not isinstance(p, Real | Constant)]
    levels = [np.ravel(p.doubles) for p in parts if isinstance(p, Constant)]
    known = np.concatenate(levels) if levels else np.zeros(0)
    least = min((low for low, _ in reals), default=float(np.max(known, initial=-math.inf)))
    shown = known[known >= least - margin]
    lows, highs = [low for low, _ in reals], [high for _, high in reals]
    return min([*lows, float(np.min(shown, initial=math.inf))]), max([*highs, float(np.max(shown, initial=-math.inf))])


def _parts(value: Value) -> Iterator[Value]:
    if isinstance(value, Joined):
        for p in value.parts:
            yield from _parts(p)
    else:
        yield value


def _open_real(ctx: Context, value: Real, margin: float) -> tuple[float, float]:
    masks = [t for t in value.terms if _is_mask(ctx, t)]
    plain = tuple(t for t in value.terms if t not in masks)
    low, high = reach(ctx, replace(value, terms=plain, constant=np.zeros(()))) if plain else (0.0, 0.0)
    constant: Array = np.asarray(value.constant).astype(np.float64)
    for t in masks:
        constant = constant + np.maximum(
            *(np.asarray(t.scale * (bit - t.zero), object).astype(np.float64) for bit in (0, 1))
        )
    shown = constant[constant >= np.max(constant) - (high - low) - margin]
    return low + float(np.min(shown)), high + float(np.max(shown))
