"""A sum of terms becomes integers of a given scale: the only place where real scales turn into dyadic numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ibert, ibert_ops, ops, softmax_wide, thresholds
from hawq_tvm.core.rescales import Lines, Rescales, dyadic_rescales
from hawq_tvm.core.threshold_search import round_exactly

from .exact import rational
from .put_right import dyadic_call, put_right
from .values import (
    LARGEST,
    Array,
    Context,
    Quotient,
    Real,
    Softmax,
    Term,
    broadcast_rank,
    compress,
    is_uniform,
    whole,
    with_bias,
)

# Scales beyond these are no model's: their squares still are float64 numbers.
MOST_SHIFT = 500

_whole = np.frompyfunc(int, 1, 1)


@dataclass(frozen=True)
class Output:
    """What a hawq.quantize asks for: (A2) with scale, zero point, type and rounding; how branches are rounded (A14).

    form: "affine" where the zero point is added before the rounding (A2a); else how constants are divided by the
    scale (A2).  levels: the zero points where they differ between channels; level is 0 then.  fixed: whether it is a
    fixed-point value (A26), which no model asks for.
    """

    scale: Array
    level: int
    qtype: arith.QType
    rounding: str
    form: str
    branches: str = "common"
    levels: Array | None = None
    fixed: bool = False

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last threshold, in steps before the zero point is added after the rounding."""
        return self.qtype.qmin - self.zero + 1, self.qtype.qmax - self.zero

    @property
    def inside(self) -> int:
        """The zero point as far as it is added before the rounding."""
        return self.level if self.form == "affine" else 0

    @property
    def zero(self) -> int:
        """The zero point as far as it is added after the rounding."""
        return self.level - self.inside

    @staticmethod
    def of(ctx: Context, call: relax.Call) -> Output:
        """Read a hawq.quantize call."""
        zero, attrs = ops.const_value(call.args[2]), call.attrs
        one = is_uniform(zero)
        if not one and (str(attrs["form"]) == "affine" or str(attrs["branches"]) == "each"):
            raise ctx.fail(
                "hawq.quantize",
                "its zero points differ between channels and are added before the rounding",
                "use one zero point for the tensor",
            )
        qtype = arith.QType(int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["out_dtype"]))
        return Output(
            rational(ops.const_value(call.args[1])),
            int(zero.flat[0]) if one else 0,
            qtype,
            str(attrs["rounding"]),
            str(attrs["form"]),
            str(attrs["branches"]),
            None if one else compress(zero),
        )

    @staticmethod
    def fixed_point(most: float, bits: int) -> Output:
        """(A26): integers of `bits` bits at the largest scale 2^F that holds -most .. most."""
        # 2^(e-1) <= most < 2^e, with one step of room for the rounding.
        shift = bits - 1 - math.frexp(most * (1 + 2.0 ** (1 - bits)))[1] if most else 0
        shift = min(max(shift, -MOST_SHIFT), MOST_SHIFT)
        scale = Fraction(1, 1 << shift) if shift >= 0 else Fraction(1 << -shift)
        qtype = arith.QType(-(1 << bits - 1), (1 << bits - 1) - 1, "int32")
        return Output(np.asarray(scale, object), 0, qtype, "half_up", "divide", fixed=True)

    def bounds(self, low: Fraction | float, high: Fraction | float) -> tuple[Array, Array]:
        """(A12): the least and greatest integers that stand for real low .. high, as the scale broadcasts."""
        # (A8) rounds products, and not a real bound.
        rounding = "half_away" if self.rounding == "double" else self.rounding

        def level(value: Fraction | float, default: int) -> Array:
            if abs(value) == np.inf:
                return np.asarray(default)
            steps = [round_exactly(Fraction(value) / s + self.inside, rounding) for s in self.scale.flat]
            levels = [min(max(v + self.zero, self.qtype.qmin), self.qtype.qmax) for v in steps]
            return compress(np.array(levels, np.int64).reshape(self.scale.shape))

        return level(low, self.qtype.qmin), level(high, self.qtype.qmax)

    def part(self, axis: int, begin: int, end: int, rank: int) -> Output:
        """The output for a part of a tensor along an axis."""
        scale = broadcast_rank(self.scale, rank)
        return self if scale.shape[axis] == 1 else replace(self, scale=np.take(scale, range(begin, end), axis))


def requantized(ctx: Context, value: Real, out: Output) -> relax.Expr:
    """(A9) for a value with terms; integers that are right already stay as they are."""
    return clipped(ctx, value, out, lambda narrow, suffix: _rescaled(ctx, value, narrow, suffix))


def clipped(ctx: Context, value: Real | Quotient, out: Output, make: Callable[[Output, str], relax.Expr]) -> relax.Expr:
    """What `make` gives for the range of a value's clip (A12)."""
    ends = out.bounds(value.low, value.high)
    out = replace(out, qtype=arith.QType(int(ends[0].min()), int(ends[1].max()), out.qtype.storage))
    # Where a bound differs between channels, each has its own after the one of all.
    own = [(f, e) for f, e in zip((relax.op.maximum, relax.op.minimum), ends, strict=True) if not is_uniform(e)]
    data = make(out, "all" if own else "")
    for i, (function, levels) in enumerate(own):
        bound = ops.const(levels, out.qtype.storage)
        data = ctx.emit(function(data, bound), "" if i == len(own) - 1 else "least")
    return data


def _rescaled(ctx: Context, value: Real, out: Output, suffix: str) -> relax.Expr:
    """The integers of a Real whose clip is in the range of `out`."""
    terms = tuple(with_bias(ctx, t) for t in value.terms)
    if len(terms) > 1 and out.branches == "each":
        return _each_branch(ctx, terms, value.constant, out)
    if len(terms) == 1 and _is_identity(ctx, terms[0], value.constant, out):
        return terms[0].data
    if out.fixed:
        return ctx.emit(approximated(ctx, terms, value.constant, out)[0], suffix)
    return ctx.emit(_requantize(ctx, terms, value.constant, out), suffix)


def _is_identity(ctx: Context, term: Term, constant: Array, out: Output) -> bool:
    if ops.dtype_of(term.data) != out.qtype.storage or np.any(constant):
        return False
    if not np.all(term.zero == out.level) or not np.all(term.scale == out.scale):
        return False
    low, high = ctx.bounds(term.data)
    return bool(np.min(low) >= out.qtype.qmin and np.max(high) <= out.qtype.qmax)


def _each_branch(ctx: Context, terms: Sequence[Term], constant: Array, out: Output) -> relax.Expr:
    """(A14): every branch rounded on its own, then an exact addition and one clamp."""
    wide = arith.QType.of("int32")
    total: relax.Expr | None = None
    for i, term in enumerate(terms):
        last = i == len(terms) - 1
        own = Output(out.scale, out.inside if last else 0, wide, out.rounding, "affine")
        rounded = ctx.emit(_requantize(ctx, [term], constant if last else rational(0), own), f"branch{i}")
        total = rounded if total is None else ctx.emit(relax.op.add(total, rounded), "sum")
    one = ops.requantize([total], [1], 0, 0, qtype=out.qtype, zero_point=out.zero, rounding="half_up")
    return ctx.emit(one)


def _requantize(ctx: Context, terms: Sequence[Term], constant: Array, out: Output) -> relax.Call:
    """(A9) for the terms, and its proof (A22)."""
    rescales, which = _dyadic(ctx, terms, constant, out)
    first, last = out.steps
    proof, provable = thresholds.Proof(enumerated=False), last - first < 1 << 16
    if provable:
        rescales, proof = _settled(terms, rescales, np.bincount(which.ravel()).tolist(), out)
        if rescales.given:  # the thresholds of sums that are near the model's own say nothing
            proof = thresholds.Proof(enumerated=False)

    data = [t.data for t in terms]
    if provable and not rescales.given and (proof.differing or not proof.enumerated):
        exact = put_right(ctx, data, rescales, which, out)
        if exact is not None:
            return exact
    bounded = provable and not proof.enumerated and out.rounding != "double"
    return _call(ctx, terms, rescales, which, out, proof, _off(rescales) if bounded else None)


def _off(rescales: Rescales) -> float:
    return float(rescales.off()) * (1 + 2.0**-50)


def _settled(
    terms: Sequence[Term], rescales: Rescales, counts: list[int], out: Output
) -> tuple[Rescales, thresholds.Proof]:
    """(A23) and (A22): of 32-bit sums that become bytes with shifts that (A9c) takes, where no threshold differs."""
    most = arith.PACKED_SHIFTS.get(out.qtype.storage, arith.MAX_SHIFT)
    if len(terms) == 1 and ops.dtype_of(terms[0].data) == "int32" and out.rounding != "double":
        short = rescales.shortened(most)
        if short is not rescales:
            settled, proof = thresholds.settle(short, counts, out.rounding, out.steps)
            if proof.enumerated and not proof.differing:
                return settled, proof
    return thresholds.settle(rescales, counts, out.rounding, out.steps)


def approximated(
    ctx: Context, terms: Sequence[Term], constant: Array, out: Output
) -> tuple[relax.Call, Rescales, Array]:
    """(A9) onto a grid that no model asked for, whose error is bounded and not enumerated: the call, the rescales,
    and the number of every element's one.
    """
    rescales, which = _dyadic(ctx, terms, constant, out)
    return _call(ctx, terms, rescales, which, out, thresholds.Proof(), _off(rescales)), rescales, which


def _dyadic(ctx: Context, terms: Sequence[Term], constant: Array, out: Output) -> tuple[Rescales, Array]:
    """The different channels' rescales with the widest multipliers that cannot overflow (A3), and which one each
    element has.
    """
    arrays = [a for t in terms for a in (t.scale, t.zero)] + [constant, out.scale]
    shape = np.broadcast_shapes(*(np.shape(a) for a in arrays))
    size = int(np.prod(shape))
    if size > LARGEST:
        raise ctx.fail(
            "hawq.quantize", f"its scales take {size} different values", "use scales per tensor or per channel"
        )
    bounds = [b for t in terms for b in _bounds(ctx, t.data, shape)]
    columns, which = _distinct([*arrays, *bounds], shape)
    count = 2 * len(terms)
    (scales, zeros), (lows, highs) = (
        [np.stack(part[i::2], axis=1) for i in (0, 1)] for part in (columns[:count], columns[count + 2 :])
    )
    zeros = np.asarray(_whole(zeros), object)
    real = Lines.of(scales, columns[count]).over(columns[count + 1], out.inside)
    real = _within_reach(real, zeros, lows, highs, out.steps)
    made = dyadic_rescales(real, zeros, lows, highs, out.rounding, ctx.layer, _apart(terms))
    return replace(made, given=_given(terms, scales, columns[count + 1])), which


def _given(terms: Sequence[Term], scales: Array, steps: Array) -> Fraction:
    """How far the terms' sum is at most from the model's own, in steps; scales: rows x terms."""
    if not any(t.off for t in terms):
        return Fraction(0)
    lost = (np.abs(scales) * np.array([t.off for t in terms], object)).sum(axis=1)
    most: Fraction = max((lost / steps).tolist())
    return most


def _call(
    ctx: Context,
    terms: Sequence[Term],
    rescales: Rescales,
    which: Array,
    out: Output,
    proof: thresholds.Proof,
    bound: float | None = None,
) -> relax.Call:
    # A scale below the last bit of what is asked for leaves no trace of its integers.
    data, multipliers = [t.data for t in terms], rescales.dyadic.factors
    kept = np.flatnonzero(np.any(multipliers != 0, axis=0)).tolist()
    if not kept:
        return _constant_result(ctx, terms, proof, rescales, which, out)
    numbers = multipliers[:, kept], rescales.dyadic.constant, rescales.shift
    shape = np.broadcast_shapes(*map(ops.shape_of, data))
    data = [data[j] for j in kept]
    if np.broadcast_shapes(*map(ops.shape_of, data)) != shape:
        data[0] = whole(ctx, terms[kept[0]], shape).data
    return dyadic_call(data, numbers, which, out.qtype, out.zero, out.rounding, proof, bound)


def _within_reach(real: Lines, zeros: Array, lows: Array, highs: Array, steps: tuple[int, int]) -> Lines:
    """The lines with their constants, or nearer ones that saturate every sum on the same side; steps: the first and
    the last threshold.
    """
    ends = real.factors * (lows - zeros), real.factors * (highs - zeros)
    least, most = (choose(*ends).sum(axis=1) for choose in (np.minimum, np.maximum))
    one = real.denominator
    constant = np.maximum(np.minimum(real.constant, (steps[1] + 2) * one - least), (steps[0] - 3) * one - most)
    return replace(real, constant=constant)


def _constant_result(
    ctx: Context,
    terms: Sequence[Term],
    proof: thresholds.Proof,
    rescales: Rescales,
    which: Array,
    out: Output,
) -> relax.Call:
    """(A9) without operands: the same integers whatever comes in."""
    if proof.differing:
        raise ctx.fail(
            "hawq.quantize",
            "its scale is so large that every input gives the same integer, or the next",
            "check the scales of this layer",
        )
    offset, shift = (v.astype(np.int64)[which] for v in (rescales.dyadic.constant, rescales.shift))
    rounded = arith.requantize(
        [np.zeros((), np.int64)],
        [0],
        offset,
        shift,
        zero_point=out.zero,
        qmin=out.qtype.qmin,
        qmax=out.qtype.qmax,
        rounding=out.rounding,
    )
    full = np.broadcast_shapes(rounded.shape, *(ops.shape_of(t.data) for t in terms))
    return relax.op.broadcast_to(ops.const(rounded, out.qtype.storage), full)


def _distinct(arrays: Sequence[Array], shape: tuple[int, ...]) -> tuple[list[Array], Array]:
    """The different rows of arrays that broadcast to `shape`, as columns of Python's numbers, and for every element of
    it the number of its row.
    """
    columns: list[Array] = []
    which, used = np.zeros(shape, np.int64), np.zeros(1, np.int64)
    for array in arrays:
        flat = np.asarray(array).ravel().tolist()
        # Pairs of integers are hashed many times faster than Fractions.
        pairs = [v.as_integer_ratio() for v in flat]
        codes = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        found = [codes[pair] for pair in pairs] if len(codes) > 1 else [0]
        values = np.empty(len(codes), object)
        values[found] = flat[: len(found)]
        if len(codes) > 1:
            which = which * len(codes) + np.array(found).reshape(np.shape(array))
            rows, which = np.unique(which, return_inverse=True)
            which, used = which.reshape(shape), rows
            columns = [c[used // len(codes)] for c in columns]
            columns.append(values[used % len(codes)])
        else:
            columns.append(np.broadcast_to(values, used.shape))
    return columns, which


def _apart(terms: Sequence[Term]) -> tuple[tuple[int, int], ...]:
    """The pairs of terms that are the two halves of one tensor: wherever one is not 0, the other is."""
    halves: dict[object, dict[int, list[int]]] = {}
    for i, t in enumerate(terms):
        if t.half is not None:
            halves.setdefault(t.half[0], {1: [], -1: []})[t.half[1]].append(i)
    return tuple((h[1][0], h[-1][0]) for h in halves.values() if len(h[1]) == len(h[-1]) == 1)


def _bounds(ctx: Context, data: relax.Expr, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The data's bounds as they broadcast to the constants' shape, reduced over the axes it does not have."""
    rank = len(shape)
    result = []
    for array, reduce in zip(ctx.bounds(data), (np.min, np.max), strict=True):
        full = array.reshape((1,) * max(0, rank - array.ndim) + array.shape)
        full = full.reshape(full.shape[full.ndim - rank :]) if full.ndim > rank and _leading_ones(full, rank) else full
        if full.ndim != rank:
            full = np.asarray(reduce(array)).reshape((1,) * rank)
        axes = tuple(i for i in range(rank) if shape[i] == 1 and full.shape[i] > 1)
        result.append(reduce(full, axis=axes, keepdims=True) if axes else full)
    return result[0], result[1]


def _leading_ones(array: Array, rank: int) -> bool:
    return all(n == 1 for n in array.shape[: array.ndim - rank])


def softmax(ctx: Context, value: Softmax, out: Output) -> relax.Expr:
    """(A17), whose table covers every difference that the input's range allows, or two tables those of a grid (A24);
    or (A29).
    """
    rounding = "half_even" if out.fixed else out.rounding
    if rounding not in ("half_even", "floor") or (out.inside and not out.fixed):
        raise ctx.fail(
            "softmax",
            "its quantize rounds in another way than half to even or down",
            "quantize its result with rounding to nearest, ties to even",
        )
    inverse, bits = 1 / out.scale.flat[0], arith.MANTISSA_BITS - ctx.ibert
    if inverse >= 1 << bits:
        raise ctx.fail(
            "softmax", f"the scale of its result is 2^-{bits} or less", "quantize it with a larger scale, such as 1/256"
        )
    numbers: dict[str, Any] = {"axis": value.axis, "qtype": out.qtype, "zero_point": out.zero}
    numbers |= {"rounding": rounding, "fixed": out.fixed}
    count, scale = value.shape[value.axis], value.term.scale.flat[0]
    if ctx.ibert:
        by = ibert.Softmax.of(scale)
        numbers["multiplier"], numbers["shift"] = ibert.softmax_dyadic(inverse, count)
        return ctx.emit(ibert_ops.i_softmax(value.term.data, by, scale=float(scale / (1 << by.left)), **numbers))
    numbers["multiplier"], numbers["shift"] = arith.softmax_dyadic(inverse, count)
    if value.fraction:
        tables = softmax_wide.tables(value.fraction)
        return ctx.emit(ops.softmax_wide(value.term.data, tables, fraction=value.fraction, **numbers))
    low, high = ctx.bounds(value.term.data)
    table = arith.softmax_table(scale, int(np.max(high)) - int(np.min(low)) + 1)
    return ctx.emit(ops.softmax(value.term.data, table, **numbers))
