"""Rows of a table by run-time positions: an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from . import movement
from .values import INSERT, Array, Constant, Context, Joined, Real, Term, Value, integer_constant, is_uniform, whole


def take(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """relax.take of a tensor.  A constant table whose scales do not vary along what is chosen from gives its integers;
    another one is quantized whole, at compile time, by the quantize that follows: rounding commutes with the choice
    of rows.
    """
    x, index = v[0], v[1]
    if not isinstance(index, relax.Var):
        return movement.move(ctx, call, x)
    shape = ops.shape_of(call.args[0])
    axis = None if call.attrs.axis is None else int(call.attrs.axis) % len(shape)
    size = int(np.prod(shape)) if axis is None else shape[axis]
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(index), strict=True))
    if low < -size or high >= size:
        reason = f"its index can be {low}..{high}, outside of its table of {size}"
        raise ctx.fail("take", reason, "clip the index, or make it an input of the model")

    def rows(data: relax.Expr) -> relax.Expr:
        return relax.op.take(data, index, axis)

    out = tuple(int(d) for d in call.ty.shape.values)
    if isinstance(x, Constant):
        scale = _scale_of_rows(x, axis, len(out))
        if scale is not None:
            data = ctx.emit(rows(integer_constant(x.values)), "rows")
            return Real(out, (Term(data, np.zeros((), np.int64), scale, signed=True),))
        return Joined(out, (x,), lambda parts: rows(parts[0]), moved=True)
    if isinstance(x, Joined):
        return replace(x, shape=out, join=lambda parts: rows(ctx.emit(x.join(parts), "joined")), moved=True, axis=None)
    if not isinstance(x, Real) or not all(is_uniform(a) for t in x.terms for a in (t.scale, t.zero, x.constant)):
        raise ctx.fail("take", "its table is not quantized with one scale", INSERT)
    terms = [replace(t, data=ctx.emit(rows(whole(ctx, t, x.shape).data), "rows"), half=None) for t in x.terms]
    return Real(out, tuple(terms), x.constant, x.low, x.high)


def _scale_of_rows(table: Constant, axis: int | None, rank: int) -> Array | None:
    """The scale of what is chosen from a table along an axis, of so many dimensions; None where it varies along that
    axis, and for a table of no integers.
    """
    if table.scale is None:
        return None
    scale = np.asarray(table.scale)
    if is_uniform(scale):
        return np.asarray(scale.flat[0])
    scale = scale.reshape((1,) * (table.values.ndim - scale.ndim) + scale.shape)
    if axis is None or scale.shape[axis] != 1:
        return None
    return scale.reshape(scale.shape[:axis] + (1,) * (rank - scale.ndim + 1) + scale.shape[axis + 1 :])
