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

from .elementwise import exact
from .values import INSERT, Array, Constant, Context, Real, Term, Value, is_uniform, single


def layer_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Over the axes named; gamma and beta have their shape."""
    axes = _axes(call.attrs.axes, len(v[0].shape))
    gamma, beta = (_parameter(ctx, p, "layer_norm") for p in v[1:3])
    term = _normalized(ctx, _term(ctx, v[0], "layer_norm"), axes, _epsilon(ctx, call), "layer_norm")
    return _scaled(term, gamma if call.attrs.scale else None, beta if call.attrs.center else None)


def rms_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Without a mean to take away and without beta."""
    axes, gamma = _axes(call.attrs.axes, len(v[0].shape)), _parameter(ctx, v[1], "rms_norm")
    term = _normalized(ctx, _term(ctx, v[0], "rms_norm"), axes, _epsilon(ctx, call), "rms_norm", centered=False)
    return _scaled(term, gamma, None)


def instance_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Over the pixels of every channel; gamma and beta are one number for each channel."""
    rank, channel = len(v[0].shape), int(call.attrs.channel_axis)
    gamma, beta = (_per_channel(_parameter(ctx, p, "instance_norm"), channel, rank) for p in v[1:3])
    axes = _axes(call.attrs.axes, rank)
    term = _normalized(ctx, _term(ctx, v[0], "instance_norm"), axes, _epsilon(ctx, call), "instance_norm")
    return _scaled(term, gamma, beta)


def group_norm(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """Over the pixels and the channels of each of several groups, which become an axis of their own."""
    shape, channel, groups = list(v[0].shape), int(call.attrs.channel_axis), int(call.attrs.num_groups)
    gamma, beta = (_per_channel(_parameter(ctx, p, "group_norm"), channel, len(shape)) for p in v[1:3])
    term = _term(ctx, v[0], "group_norm")
    apart = [*shape[:channel], groups, shape[channel] // groups, *shape[channel + 1 :]]
    axes = [channel + 1, *(a + 1 for a in _axes(call.attrs.axes, len(shape)) if a != channel)]
    grouped = replace(term, data=ctx.emit(relax.op.reshape(term.data, apart), "groups"))
    term = _normalized(ctx, grouped, axes, _epsilon(ctx, call), "group_norm")
    return _scaled(replace(term, data=ctx.emit(relax.op.reshape(term.data, shape), "ungrouped")), gamma, beta)


def _axes(axes: Any, rank: int) -> list[int]:
    return sorted(int(a) % rank for a in axes)


def _epsilon(ctx: Context, call: relax.Call) -> Fraction:
    epsilon = Fraction(float(call.attrs.epsilon))
    if epsilon < 0:
        raise ctx.fail(ops.op_name(call), f"its epsilon is {float(epsilon):g}", "correct it to a number of at least 0")
    return epsilon


def _parameter(ctx: Context, value: Value, op: str) -> Array:
    if not isinstance(value, Constant):
        raise ctx.fail(op, "its scale or bias is computed at run time", "make both initializers of the model")
    return exact(ctx, value, op)


def _per_channel(array: Array, channel: int, rank: int) -> Array:
    return array.reshape([-1 if i == channel else 1 for i in range(rank)])


def _term(ctx: Context, value: Value, op: str) -> Term:
    """The integers that are normalized, of one scale and one zero point."""
    term = single(ctx, value, op)
    if not is_uniform(term.scale) or not is_uniform(term.zero):
        raise ctx.fail(op, "its input has one scale per channel", INSERT)
    if term.scale.flat[0] <= 0:
        raise ctx.fail(op, "its input has a scale that is not positive", INSERT)
    return term


def _normalized(
    ctx: Context, term: Term, axes: Sequence[int], epsilon: Fraction, op: str, *, centered: bool = True
) -> Term:
    """(A25): the term of scale 2^-H."""
    shape = ops.shape_of(term.data)
    count = int(np.prod([shape[a] for a in axes]))
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
    zero = None if centered else int(term.zero.flat[0])
    try:
        norm = Norm.of(count, (low, high), term.scale.flat[0], epsilon, zero)
    except OverflowError as e:
        found = f"rows of {count} integers in {low}..{high}"
        raise ctx.fail(op, f"it has {e} ({found})", "quantize its input to 16 bits") from None
    data = ctx.emit(ops.layer_norm(term.data, axes, norm), "normalized")
    return Term(data, np.zeros((), np.int64), np.asarray(Fraction(1, 1 << norm.fraction), object))


def _scaled(term: Term, gamma: Array | None, beta: Array | None) -> Real:
    scale = term.scale if gamma is None else np.asarray(term.scale * gamma, object)
    return Real(ops.shape_of(term.data), (replace(term, scale=scale),), np.zeros(()) if beta is None else beta)
