"""Rows of a table by run-time positions: an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from . import movement
from .values import INSERT, Constant, Context, Joined, Real, Term, Value, integer_constant, is_uniform, whole


def take(ctx: Context, call: relax.Call, v: Sequence[Any]) -> Value:
    """relax.take of a tensor.  A constant table of one scale gives its integers; another one is quantized whole, at
    compile time, by the quantize that follows: rounding commutes with the choice of rows.
    """
    x, index = v[0], v[1]
    if not isinstance(index, relax.Var):
        return movement.move(ctx, call, x)
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    shape = ops.shape_of(call.args[0])
    size = int(np.prod(shape)) if axis is None else shape[axis]
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(index), strict=True))
    if low < -size or high >= size:
        reason = f"its index can be {low}..{high}, outside of its table of {size}"
        raise ctx.fail("take", reason, "clip the index, or make it an input of the model")

    def rows(data: relax.Expr) -> relax.Expr:
        return relax.op.take(data, index, axis)

    out = tuple(int(d) for d in call.ty.shape.values)
    if isinstance(x, Constant) and x.scale is not None and is_uniform(np.asarray(x.scale)):
        data = ctx.emit(rows(integer_constant(x.values)), "rows")
        return Real(out, (Term(data, np.zeros((), np.int64), np.asarray(x.scale).flat[0]),))
    if isinstance(x, Constant):
        return Joined(out, (x,), lambda parts: rows(parts[0]), moved=True)
    if isinstance(x, Joined):
        return replace(x, shape=out, join=lambda parts: rows(ctx.emit(x.join(parts), "joined")), moved=True, axis=None)
    if not isinstance(x, Real) or not all(is_uniform(a) for t in x.terms for a in (t.scale, t.zero, x.constant)):
        raise ctx.fail("take", "its table is not quantized with one scale", INSERT)
    terms = [replace(t, data=ctx.emit(rows(whole(ctx, t, x.shape).data), "rows"), half=None) for t in x.terms]
    return Real(out, tuple(terms), x.constant, x.low, x.high)
