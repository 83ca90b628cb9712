"""Pools and reductions: maxima of the integers, sums with the divisor in the scale (A15)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .convolution import pad2d
from .elementwise import rising, with_one_zero
from .fixed import BITS, fixed, real_of, single
from .values import (
    INFINITY,
    INSERT,
    WAITING,
    Array,
    Context,
    Joined,
    Real,
    Term,
    Value,
    compress,
    is_uniform,
    summed,
)

SPATIAL = (2, 3)


def _windows(call: relax.Call, shape: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, strides, dilation and the full padding [t, l, b, r] that makes the windows tile the padded input."""
    attrs = call.attrs
    kernel, strides = [int(k) for k in attrs.pool_size], [int(s) for s in attrs.strides]
    dilation, pads = [int(d) for d in attrs.dilation], [int(p) for p in attrs.padding]
    for axis in (0, 1):
        reach = (int(call.ty.shape.values[2 + axis]) - 1) * strides[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        pads[2 + axis] = reach - shape[2 + axis] - pads[axis]
    return kernel, strides, dilation, pads


@dataclass(frozen=True)
class _Rest:
    """What a pool or reduction leaves to be added and clipped after it."""

    constant: Array
    low: Fraction | float
    high: Fraction | float

    def of(self, term: Term, count: int = 1) -> Real:
        """The result of which `term` is the integer part; count: how many equal constants were added up."""
        return Real(ops.shape_of(term.data), (term,), self.constant * count, self.low, self.high)


# A sum of fixed-point values keeps to 32 bits where this many are left of each.
FEWEST_BITS = 16


def _apart(
    ctx: Context, value: Value, op: str, axes: Sequence[int], *, apart: bool, keepdims: bool = True, summed: int = 1
) -> tuple[Term, _Rest]:
    """The integers that are summed or compared along `axes`, whose scale and zero must not vary there, and the rest.

    apart: a constant that is the same along the axes is added after them, and so keeps its fraction; a clip goes
    with it.  summed: how many of them make one sum.
    """
    bits = max(min(BITS, 32 - summed.bit_length()), FEWEST_BITS)
    value = real_of(ctx, value, op, bits)
    rest, rank = _Rest(np.zeros(()), -INFINITY, INFINITY), len(value.shape)
    if apart and len(value.terms) == 1 and np.any(value.constant):
        kept = _reduced(value.constant, rank, axes, keepdims)
        if kept is not None:
            rest = _Rest(kept, value.low, value.high)
            value = replace(value, constant=np.zeros(()), low=-INFINITY, high=INFINITY)
    term = single(ctx, value, op, bits=bits)
    if any(_reduced(a, rank, axes, True) is None for a in (term.scale, term.zero)):
        if not ctx.feeding:
            raise ctx.fail(op, "its input's scale varies along the reduced axes", INSERT)
        term = fixed(ctx, value, op, bits)
    return term, rest


def max_pool2d(ctx: Context, call: relax.Call, x: Value) -> Value:
    """The maximum of the integers: padding holds the lowest value the data can reach, so it never wins."""
    kernel, strides, dilation, pads = _windows(call, ops.shape_of(call.args[0]))

    def pool(data: relax.Expr) -> relax.Expr:
        data = pad2d(ctx, data, pads, int(np.min(ctx.bounds(data)[0])))
        return relax.op.nn.max_pool2d(data, kernel, strides, 0, dilation)

    if isinstance(x, WAITING):
        return _later(call, x, pool)
    term, rest = _apart(ctx, x, "max_pool2d", SPATIAL, apart=True)
    term = rising(ctx, term)
    return rest.of(replace(term, data=ctx.emit(pool(term.data), "max")))


def _later(call: relax.Call, x: Value, reduce: Callable[[relax.Expr], relax.Expr]) -> Joined:
    """An extremum of integers that only a quantize makes, with which it commutes."""
    shape = tuple(int(d) for d in call.ty.shape.values)
    return Joined(shape, (x,), lambda parts: reduce(parts[0]), moved=True, picks=False)


def _counts(call: relax.Call, shape: Sequence[int]) -> Array:
    """How many elements each window's mean divides by, (1, 1, H, W): ONNX counts padding only when told to."""
    kernel, strides, dilation, _ = _windows(call, shape)
    per_axis = []
    for axis in (0, 1):
        begin, end = int(call.attrs.padding[axis]), int(call.attrs.padding[2 + axis])
        size, out = shape[2 + axis], int(call.ty.shape.values[2 + axis])
        first, last = (-begin, size + end) if int(call.attrs.count_include_pad) else (0, size)
        start = np.arange(out) * strides[axis] - begin
        # The taps below `first` and below `last`, without a list of taps: kernels can be large.
        below, inside = (np.clip(-((start - limit) // dilation[axis]), 0, kernel[axis]) for limit in (first, last))
        per_axis.append(inside - below)
    counts: Array = np.multiply.outer(per_axis[0], per_axis[1])
    return counts[None, None]


def avg_pool2d(ctx: Context, call: relax.Call, x: Value) -> Value:
    """(A15) with one divisor, or one per position where padding does not count."""
    # Padding that counts holds the real 0, to which no constant is added.
    pads_count = bool(int(call.attrs.count_include_pad)) and any(int(p) for p in call.attrs.padding)
    kernel, strides, dilation, pads = _windows(call, ops.shape_of(call.args[0]))
    term, rest = _apart(
        ctx,
        x,
        "avg_pool2d",
        SPATIAL,
        apart=not pads_count and not _is_clipped(x),
        summed=kernel[0] * kernel[1],
    )
    term = with_one_zero(ctx, term)
    counts = _counts(call, ops.shape_of(call.args[0]))
    zero = int(term.zero.flat[0])
    data = pad2d(ctx, term.data, pads, zero)
    acc = ctx.accumulate(lambda d: ops.sum_pool2d(data, kernel, strides, dilation, out_dtype=d), "acc")
    total = np.asarray(zero * kernel[0] * kernel[1], np.int64)
    scale = compress(np.asarray(term.scale / counts.astype(object), object))
    return rest.of(Term(acc, total, scale, accumulator=True, signed=summed(term).signed, near=term.near))


def _is_clipped(value: Value) -> bool:
    """Whether a mean of these values is another than their clipped mean."""
    return isinstance(value, Real) and value.clipped


def _kept(call: relax.Call, rank: int) -> tuple[list[int], bool]:
    axes = call.attrs.axis
    chosen = list(range(rank)) if axes is None else sorted(int(a) % rank for a in axes)
    return chosen, bool(call.attrs.keepdims)


def _reduced(array: Array, rank: int, axes: Sequence[int], keepdims: bool) -> Any:
    """A broadcasting constant after the reduction of `axes`, None when it varies along one of them."""
    if not np.ndim(array):
        return array
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if any(full.shape[a] != 1 for a in axes):
        return None
    return compress(full if keepdims else full.squeeze(tuple(axes)))


def reduce_sum(ctx: Context, call: relax.Call, x: Value, *, mean: bool) -> Value:
    """relax.sum and relax.mean over any axes, summed in int32."""
    op = "mean" if mean else "sum"
    shape = ops.shape_of(call.args[0])
    axes, keepdims = _kept(call, len(shape))
    count = int(np.prod([shape[a] for a in axes]))
    term, rest = _apart(ctx, x, op, axes, apart=not _is_clipped(x), keepdims=keepdims, summed=count)
    scale, zero = (_reduced(a, len(x.shape), axes, keepdims) for a in (term.scale, term.zero))

    def make(dtype: str) -> relax.Expr:
        wide = (
            ctx.builder.normalize(relax.op.astype(term.data, dtype)) if ops.dtype_of(term.data) != dtype else term.data
        )
        return relax.op.sum(ctx.emit(wide, "cast"), axes, keepdims)

    low, high = ctx.bounds(term.data)
    fits = max(abs(int(np.min(low))), abs(int(np.max(high)))) * count < 2**31
    acc = ctx.emit(make("int32" if fits else "int64"), "acc")
    scale = np.asarray(scale / count, object) if mean else scale
    zero = np.asarray(zero * count, np.int64)
    return rest.of(
        Term(acc, zero, scale, accumulator=True, signed=summed(term).signed, near=term.near), 1 if mean else count
    )


def reduce_extremum(ctx: Context, call: relax.Call, x: Value, op: str) -> Value:
    """relax.max and relax.min over any axes of the integers."""
    function = relax.op.max if op == "max" else relax.op.min
    axes, keepdims = _kept(call, len(ops.shape_of(call.args[0])))
    if isinstance(x, WAITING):
        return _later(call, x, lambda data: function(data, axes, keepdims))
    term, rest = _apart(ctx, x, op, axes, apart=True, keepdims=keepdims)
    term = rising(ctx, term)
    scale, zero = (_reduced(a, len(x.shape), axes, keepdims) for a in (term.scale, term.zero))
    data = ctx.emit(function(term.data, axes, keepdims), op)
    return rest.of(replace(term, data=data, scale=scale, zero=zero))


def arg_extremum(ctx: Context, call: relax.Call, x: Value) -> relax.Expr:
    """argmax / argmin of the integers: an integer result, so it leaves the float world here."""
    op = ops.op_name(call)
    term = rising(ctx, single(ctx, x, op))
    if not np.all(term.scale):
        raise ctx.fail(op, "its input has a scale of zero", INSERT)
    axis = None if call.attrs.axis is None else int(call.attrs.axis)
    scale = _reduced(term.scale, len(x.shape), [axis % len(x.shape)] if axis is not None else range(len(x.shape)), True)
    if scale is None or not is_uniform(term.zero):
        raise ctx.fail(op, "its input's scale varies along the axis", INSERT)
    return ctx.emit(relax.Call(call.op, [term.data], attrs=call.attrs))
