"""Normalizations by a row's own mean and variance: an integer operator (A25), whose result times gamma is one term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.core.layer_norm import Norm

from . import ibert
from .elementwise import exact
from .fixed import FEWEST_BITS, fixed, single
from .realize import FIXED_BITS
from .values import INSERT, Array, Constant, Context, Real, Term, Value, is_uniform


def layer_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Over the axes named; gamma and beta have their shape."""
    if ctx.ibert:
        shape = ops.shape_of(call.args[0])
        axes = _axes(call, len(shape))
        term = ibert.normalized(ctx, v[0], axes, int(np.prod([shape[a] for a in axes])))
    else:
        term = _normalized(ctx, call, _term(ctx, call, v[0]))
    gamma, beta = (_parameter(ctx, p, "layer_norm") for p in v[1:3])
    return _scaled(term, gamma if call.attrs.scale else None, beta if call.attrs.center else None)


def rms_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Without a mean to take away and without beta."""
    term = _normalized(ctx, call, _term(ctx, call, v[0]), centered=False)
    return _scaled(term, _parameter(ctx, v[1], "rms_norm"), None)


def instance_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Over the pixels of every channel; gamma and beta are one number for each channel."""
    term = _normalized(ctx, call, _term(ctx, call, v[0]))
    return _scaled(term, *_per_channel(ctx, call, v[1:3], len(ops.shape_of(term.data))))


def group_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Over the pixels and the channels of each of several groups, which become an axis of their own."""
    shape, channel, groups = list(ops.shape_of(call)), int(call.attrs.channel_axis), int(call.attrs.num_groups)
    term = _term(ctx, call, v[0], [channel, *_axes(call, len(shape))])
    apart = [*shape[:channel], groups, shape[channel] // groups, *shape[channel + 1 :]]
    axes = [channel + 1, *(a + 1 for a in _axes(call, len(shape)) if a != channel)]
    term = replace(term, data=ctx.emit(relax.op.reshape(term.data, apart), "groups"))
    term = _normalized(ctx, call, term, axes)
    term = replace(term, data=ctx.emit(relax.op.reshape(term.data, shape), "ungrouped"))
    return _scaled(term, *_per_channel(ctx, call, v[1:3], len(shape)))


def _op(call: relax.Call) -> str:
    return ops.op_name(call).removeprefix("relax.nn.")


def _axes(call: relax.Call, rank: int) -> list[int]:
    return sorted(int(a) % rank for a in call.attrs.axes)


def _parameter(ctx: Context, value: Value, op: str) -> Array:
    if not isinstance(value, Constant):
        raise ctx.fail(op, "its scale or bias is computed at run time", "make both initializers of the model")
    return exact(ctx, value, op)


def _per_channel(ctx: Context, call: relax.Call, values: Sequence[Value], rank: int) -> list[Array]:
    channel = int(call.attrs.channel_axis)
    return [_parameter(ctx, p, _op(call)).reshape([-1 if i == channel else 1 for i in range(rank)]) for p in values]


def _term(ctx: Context, call: relax.Call, value: Value, axes: Sequence[int] = ()) -> Term:
    """The integers that are normalized, of one scale and one zero point: the tensor's own, or a fixed-point value (A26)
    of as many bits as rows of that length leave.
    """
    shape = ops.shape_of(call.args[0])
    count = int(np.prod([shape[a] for a in axes or _axes(call, len(shape))]))
    bits = min(FIXED_BITS, 32 - (count - 1).bit_length())
    term = single(ctx, value, _op(call), bits=bits)
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
    other = not is_uniform(term.scale) or not is_uniform(term.zero) or term.scale.flat[0] <= 0
    if (other or (high - low) * count >= 1 << 32) and ctx.feeding and bits >= FEWEST_BITS:
        return fixed(ctx, value, _op(call), bits)
    if other:
        raise ctx.fail(_op(call), "its input has one scale per channel, or one that is not positive", INSERT)
    return term


def _normalized(ctx: Context, call: relax.Call, term: Term, axes: Sequence[int] = (), *, centered: bool = True) -> Term:
    """(A25): the term of scale 2^-H; axes: where they are not those of the call."""
    shape, epsilon = ops.shape_of(term.data), Fraction(float(call.attrs.epsilon))
    axes = axes or _axes(call, len(shape))
    if epsilon < 0:
        raise ctx.fail(_op(call), f"its epsilon is {float(epsilon):g}", "correct it to a number of at least 0")
    count = int(np.prod([shape[a] for a in axes]))
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
    zero = None if centered else int(term.zero.flat[0])
    try:
        norm = Norm.of(count, (low, high), term.scale.flat[0], epsilon, zero)
    except OverflowError as e:
        found = f"rows of {count} integers in {low}..{high}"
        raise ctx.fail(_op(call), f"it has {e} ({found})", "quantize its input to 16 bits") from None
    data = ctx.emit(ops.layer_norm(term.data, axes, norm), "normalized")
    return Term(data, np.zeros((), np.int64), np.asarray(Fraction(1, 1 << norm.fraction), object), near=True)


def _scaled(term: Term, gamma: Array | None, beta: Array | None) -> Real:
    scale = term.scale if gamma is None else np.asarray(term.scale * gamma, object)
    return Real(ops.shape_of(term.data), (replace(term, scale=scale),), np.zeros(()) if beta is None else beta)
