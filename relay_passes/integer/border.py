"""Where the integer region ends: one integer tensor becomes float32 (A1), a constant beside it included to its last
bits (A1a).
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .fixed import fixed, single
from .values import Array, Context, Curve, Real, Term, Value, nearest, with_bias, with_integer_bias

# Integers below 2^53 are float64 numbers as they are.
EXACT_BITS = 53
# What the integers may reach before the constant is taken from them: int64, with room for it.
WIDE_BITS = 62


def dequantized(ctx: Context, value: Value, op: str) -> relax.Expr:
    """The float32 tensor of a value that one integer tensor stands for, alone or with a constant added.

    A function becomes a fixed-point value (A26).  Raises NotLowered as `single` does.
    """
    if isinstance(value, Curve):
        return as_float(ctx, fixed(ctx, value, op))
    kinds = (value.through, value.kind) if isinstance(value, Real) else ("", "float32")
    finer = _with_fraction(ctx, value) if isinstance(value, Real) else None
    if finer is None:
        return as_float(ctx, single(ctx, value, op), *kinds)
    term = single(ctx, finer, op)
    return _emit(ctx, term, np.asarray(term.scale).astype(np.float64), *kinds)


def as_float(ctx: Context, term: Term, through: str = "", kind: str = "float32") -> relax.Expr:
    """(A1) a term's real numbers; the scale is float32 where that holds it exactly."""
    scale = np.asarray(term.scale).astype(np.float64)
    narrow = scale.astype(np.float32)
    exact = narrow if np.all(narrow.astype(np.float64) == scale) else scale
    return _emit(ctx, with_bias(ctx, term), exact, through, kind)


def _emit(ctx: Context, term: Term, scale: Array, through: str, kind: str) -> relax.Expr:
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
    made = ops.dequantize(term.data, scale, term.zero, qmin=low, qmax=high, through=through, out_dtype=kind)
    return ctx.emit(made)


def _with_fraction(ctx: Context, value: Real) -> Real | None:
    """(A1a): the value on a grid 2^k times finer, which holds the constant; None where there is none, or the grid
    itself holds it.

    k is the most that keeps every integer below 2^53.
    """
    if len(value.terms) != 1 or not np.any(value.constant) or np.any(value.terms[0].scale == 0):
        return None
    (term,) = value.terms
    zero = np.asarray(term.zero - value.constant / term.scale, object)
    rounded = with_integer_bias(value)
    if rounded is not value and np.all(rounded.terms[0].zero == zero):
        return None
    ends = [np.asarray(v).astype(object) for v in ctx.bounds(term.data)]
    largest = math.ceil(max(np.max(np.abs(v - zero)) for v in ends))
    widest = int(max(np.max(np.abs(v)) for v in ends))
    bits = min(EXACT_BITS - largest.bit_length(), WIDE_BITS - widest.bit_length())
    if bits < 1:
        return None
    data = term.data
    if ops.dtype_of(data) != "int64":
        data = ctx.emit(relax.op.astype(data, "int64"), "wide")
    data = ctx.emit(relax.op.multiply(data, ops.const(1 << bits, "int64")), "finer")
    data = ctx.emit(relax.op.subtract(data, ops.const(nearest(zero * (1 << bits)), "int64")), "fraction")
    finer = Term(data, np.zeros((), np.int64), np.asarray(term.scale / (1 << bits), object))
    return replace(value, terms=(finer,), constant=np.zeros(()))
