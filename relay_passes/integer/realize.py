"""A value becomes integers of a given scale: every kind of value by its own equation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops

from .curves import check_pole, own_integers, tabulated, values_of
from .functions import Clip
from .interpolation import fixed_curve
from .quotients import DEFINED, quotient, undefined_in
from .rescale import Output, requantized, softmax
from .values import INSERT, Constant, Context, Curve, Joined, Quotient, Real, Softmax, Term, Value, is_uniform, widened

FIXED_BITS = 24


def realize(ctx: Context, value: Value, out: Output) -> relax.Expr:
    """The integers of `value` at the scale of `out`; the last operation carries the layer's own name."""
    if out.levels is not None:
        return _at_levels(ctx, value, out)
    if isinstance(value, Constant):
        return _constant(ctx, value, out)
    if isinstance(value, Joined):
        if value.moved and not is_uniform(out.scale):
            raise ctx.fail(
                "hawq.quantize",
                "its scales differ between channels of a moved concatenation",
                "use one scale for the tensor",
            )
        return _joined(ctx, value, out)
    if isinstance(value, Curve):
        return _curve(ctx, value, out)
    if isinstance(value, Softmax) and not is_uniform(out.scale):
        value = _fixed_point(ctx, value, out)
    if isinstance(value, Softmax):
        return softmax(ctx, value, out)
    if isinstance(value, Quotient):
        return quotient(ctx, value, out)
    if not isinstance(value, Real):
        raise ctx.fail("hawq.quantize", "its input is computed in float", INSERT)
    if not value.terms:
        ends = out.bounds(value.low, value.high)
        out = replace(out, qtype=arith.QType(int(ends[0].min()), int(ends[1].max()), out.qtype.storage))
        return _constant(ctx, Constant(np.broadcast_to(value.constant, value.shape)), out)
    return requantized(ctx, value, out)


def _curve(ctx: Context, value: Curve, out: Output) -> relax.Expr:
    """The integers of a curve; those that another reader asked for already are not computed again."""
    key = (value, tuple(out.scale.flat), out.scale.shape, out.level, out.qtype, out.rounding, out.form)
    if key not in ctx.realized:
        check_pole(ctx, value)
        smooth = fixed_curve(ctx, value, out) if own_integers(value.leaf) is None else None
        if smooth is None and is_uniform(out.scale):
            ctx.realized[key] = tabulated(ctx, value, out)
        else:
            smooth = smooth or _fixed_point(ctx, value, out)
            ctx.realized[key] = smooth.terms[0].data if out.fixed else requantized(ctx, smooth, out)
    return ctx.realized[key]


def _constant(ctx: Context, value: Constant, out: Output) -> relax.Expr:
    if value.scale is None and value.values.dtype.kind == "f" and np.isnan(value.values).any():
        raise ctx.fail("hawq.quantize", "it quantizes a constant that is not a number", "correct the constant")
    if out.fixed:
        levels = np.floor(value.doubles / float(out.scale.flat[0]) + 0.5)
        q = np.clip(levels, out.qtype.qmin, out.qtype.qmax)
        return ops.const(np.broadcast_to(q, value.shape), out.qtype.storage)
    q = arith.quantize(
        value.doubles.astype(np.float32),
        out.scale.astype(np.float32),
        np.asarray(out.level),
        qmin=out.qtype.qmin,
        qmax=out.qtype.qmax,
        storage=out.qtype.storage,
        rounding=out.rounding,
        form=out.form,
    )
    return ops.const(np.broadcast_to(q, value.shape), out.qtype.storage)


def _fixed_point(ctx: Context, value: Softmax | Curve, out: Output) -> Real:
    """What is computed at one scale, where its result has one for every channel: then a requantize (A26).

    What saturates in every channel need not be held, and may be infinite.
    """
    most = 1.0
    if isinstance(value, Curve):
        ends = [(q - out.level) * s for q in (out.qtype.qmin - 1, out.qtype.qmax + 1) for s in out.scale.flat]
        value = replace(value, function=value.function.then(Clip(min(ends), max(ends))))
        most = max(map(abs, values_of(ctx, value)))
    one = Output.fixed_point(most, FIXED_BITS)
    layer, ctx.layer = ctx.layer, f"{ctx.layer}.fixed"
    data = realize(ctx, value, one)
    ctx.layer = layer
    return Real(value.shape, (Term(data, np.zeros((), np.int64), one.scale, near=True),))


def _at_levels(ctx: Context, value: Value, out: Output) -> relax.Expr:
    """Integers whose zero points differ between channels: the sum rounded around 0 first, which is what (A2) says."""
    assert out.levels is not None
    if out.form == "reciprocal" and undefined_in(ctx, value):
        raise ctx.fail("hawq.quantize", "it has several zero points for what may be 0 / 0", DEFINED)
    low, high = out.qtype.qmin - int(out.levels.max()), out.qtype.qmax - int(out.levels.min())
    kind = next(d for d in ("int16", "int32") if arith.RANGES[d][0] <= low and high <= arith.RANGES[d][1])
    layer, storage = ctx.layer, out.qtype.storage
    ctx.layer = f"{layer}.centred"
    data = realize(ctx, value, replace(out, levels=None, qtype=arith.QType(low, high, kind)))
    ctx.layer = layer
    data = ctx.emit(relax.op.add(data, ops.const(out.levels, kind)), "shifted")
    data = ctx.emit(relax.op.clip(data, out.qtype.qmin, out.qtype.qmax), "clipped")
    return ctx.emit(relax.op.astype(data, storage))


def _joined(ctx: Context, value: Joined, out: Output) -> relax.Expr:
    """Every part at the scale of the whole, or of its own channels, then all joined."""
    if not value.picks and undefined_in(ctx, value):
        raise ctx.fail(
            "hawq.quantize", "it quantizes a maximum or minimum of what may be 0 / 0, which is no number", DEFINED
        )
    layer, parts, begin = ctx.layer, [], 0
    for i, part in enumerate(value.parts):
        ctx.layer, own = f"{layer}.{i}", out
        if value.axis is not None:
            own = out.part(value.axis, begin, begin + part.shape[value.axis], len(value.shape))
            begin += part.shape[value.axis]
        elif not is_uniform(out.scale):
            part = _spread(ctx, part, value.shape)
        parts.append(realize(ctx, part, own))
    ctx.layer = layer
    return ctx.emit(value.join(parts))


def _spread(ctx: Context, part: Value, shape: tuple[int, ...]) -> Value:
    return (
        Constant(np.broadcast_to(part.values, shape), part.scale)
        if isinstance(part, Constant)
        else widened(ctx, part, shape)
    )
