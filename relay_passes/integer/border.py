"""Where the integer region ends: one integer tensor becomes float32 (A1), a constant beside it included to its last
bits (A1a), and so what a sum of several makes or a clip that its grid does not hold (A1b).
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .exact import integral, nearest
from .fixed import fixed, single
from .values import ALONE, INFINITY, Array, Context, Joined, Real, Term, Value, with_bias, with_integer_bias

# Integers below 2^53 are float64 numbers as they are.
EXACT_BITS = 53
# Of the largest sum of several, on the grid of (A1b).
GRID_BITS = 61
# The power of two of which int64 holds every multiple up to a magnitude, with room for the rounding of several.
_unit = np.frompyfunc(
    lambda x: Fraction(2) ** (x.numerator.bit_length() - x.denominator.bit_length() + 1 - GRID_BITS), 1, 1
)
# Of an output in fixed point, which no operator of ours reads.
OUTPUT_BITS = 31
# What the integers may reach before the constant is taken from them: int64, with room for it.
WIDE_BITS = 62


def dequantized(ctx: Context, value: Value, op: str) -> relax.Expr:
    """The float32 tensor of a value: of what a sum or its own integers stand for exactly, but for the last bits.

    A function or a softmax becomes a fixed-point value (A26), and where a quantize is still to come, or no float tail
    is asked for, so do tensors that are joined.  Raises NotLowered as `single` does.
    """
    if isinstance(value, ALONE):
        return as_float(ctx, fixed(ctx, value, op))
    if isinstance(value, Joined) and ctx.feeding:
        return as_float(ctx, fixed(ctx, value, op, OUTPUT_BITS))
    kinds = (value.through, value.kind) if isinstance(value, Real) else ("", "float32")
    if isinstance(value, Real) and not _on_own_grid(value):
        value, bound = _on_one_grid(ctx, value)
        return as_float(ctx, single(ctx, value, op), *kinds, bound)
    finer = _with_fraction(ctx, value) if isinstance(value, Real) else None
    if finer is None:
        return as_float(ctx, single(ctx, value, op), *kinds)
    term = single(ctx, finer, op)
    return _emit(ctx, term, np.asarray(term.scale).astype(np.float64), *kinds)


def _on_own_grid(value: Real) -> bool:
    """Whether the integers of a value's one term, or a grid that is finer by a power of two, hold its clip."""
    if len(value.terms) != 1:
        return not value.terms
    scale = value.terms[0].scale
    ends = [end for end in (value.low, value.high) if abs(end) != INFINITY]
    return not ends or (bool(np.all(scale > 0)) and all(np.all(integral(np.asarray(e / scale, object))) for e in ends))


def as_float(ctx: Context, term: Term, through: str = "", kind: str = "float32", bound: float = 0.0) -> relax.Expr:
    """(A1) a term's real numbers; the scale is float32 where that holds it exactly.  bound: as in `ops.dequantize`."""
    scale = np.asarray(term.scale).astype(np.float64)
    narrow = scale.astype(np.float32)
    exact = narrow if np.all(narrow.astype(np.float64) == scale) else scale
    return _emit(ctx, with_bias(ctx, term), exact, through, kind, bound)


def _emit(ctx: Context, term: Term, scale: Array, through: str, kind: str, bound: float = 0.0) -> relax.Expr:
    low, high = (int(f(b)) for f, b in zip((np.min, np.max), ctx.bounds(term.data), strict=True))
    how: dict[str, Any] = {"through": through, "out_dtype": kind, "bound": bound}
    return ctx.emit(ops.dequantize(term.data, scale, term.zero, qmin=low, qmax=high, **how))


def _on_one_grid(ctx: Context, value: Real) -> tuple[Real, float]:
    """(A1b): the sum of several tensors, such as the digits of a weight or a residual stream, as multiples of one power
    of two, which a clip of float32 numbers is, too; and what the roundings of scales and constant lose at most.
    """
    reaches = [int(max(np.max(np.abs(b.astype(object))) for b in ctx.bounds(t.data))) for t in value.terms]
    reaches = [r + int(np.max(np.abs(t.zero))) for r, t in zip(reaches, value.terms, strict=True)]
    total = sum((abs(t.scale) * r for r, t in zip(reaches, value.terms, strict=True)), abs(value.constant))
    unit = np.asarray(_unit(total), object)
    constant = nearest(value.constant / unit)
    data, zero, lost = None, -constant, abs(constant * unit - value.constant)
    for i, term in enumerate(value.terms):
        factor = nearest(term.scale / unit)
        lost = lost + abs(factor * unit - term.scale) * reaches[i] + abs(term.scale) * np.asarray(term.off, object)
        wide = ctx.emit(relax.op.astype(term.data, "int64"), f"wide{i}")
        part = ctx.emit(relax.op.multiply(wide, ops.const(factor, "int64")), f"part{i}")
        data = part if data is None else ctx.emit(relax.op.add(data, part), f"sum{i}")
        zero = zero + factor * term.zero
    assert data is not None
    data = ctx.emit(relax.op.subtract(data, ops.const(zero, "int64")), "grid")
    term = Term(data, np.zeros((), np.int64), unit)
    bound = float(np.max(lost)) * (1 + 2.0**-50)  # of a fraction, made a float
    return replace(value, terms=(term,), constant=np.zeros(())), bound


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
