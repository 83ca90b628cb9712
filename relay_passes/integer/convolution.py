"""Convolutions and matrix products: integer sums of raw data and centred weights, zero points in the bias (A10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import pairwise

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from .elementwise import centred, with_one_zero
from .exact import negative, rational
from .fixed import narrowed, rows_and_columns, short, single, summand
from .scores import probabilities
from .values import (
    INSERT,
    Array,
    Constant,
    Context,
    Real,
    Term,
    Value,
    broadcast_rank,
    compress,
    integer_constant,
    is_uniform,
    summed,
)
from .weights import with_output_scales


def pad2d(ctx: Context, data: relax.Expr, pads: Sequence[int], value: int) -> relax.Expr:
    """`data` (NCHW) with [top, left, bottom, right] borders of `value`; negative pads crop."""
    top, left, bottom, right = pads
    if any(p < 0 for p in pads):
        height, width = ops.shape_of(data)[2:]
        begin = [max(0, -top), max(0, -left)]
        end = [height + min(0, bottom), width + min(0, right)]
        data = ctx.emit(relax.op.strided_slice(data, [2, 3], begin, end), "crop")
        top, left, bottom, right = (max(0, p) for p in pads)
    if not any((top, left, bottom, right)):
        return data
    return ctx.emit(relax.op.nn.pad(data, [0, 0, 0, 0, top, bottom, left, right], "constant", value), "pad")


def _activation(ctx: Context, x: Value, weight: Value, op: str) -> tuple[Term, Value]:
    """The integers of a convolution's data, whose scale and zero may differ between channels and nowhere else, and
    its weight.
    """
    term, weight = summand(ctx, x, op, weight, (1, 2, 3))
    for numbers in (term.scale, term.zero):
        if any(n != 1 for i, n in enumerate(broadcast_rank(numbers, 4).shape) if i != 1):
            raise ctx.fail(op, "its input has scales that differ within a channel", "quantize it per tensor")
    return term, weight


def _by_weight(array: Array, groups: int, outputs: int) -> Array:
    """What belongs to the data's channels as the weights (OIHW) that are multiplied with them see it."""
    if array.size == 1:
        return array.reshape(1, 1, 1, 1)
    per_group = array.reshape(groups, -1)
    if groups == 1:
        return per_group[:, :, None, None]
    return np.repeat(per_group, outputs // groups, axis=0)[:, :, None, None]


def conv2d(ctx: Context, call: relax.Call, x: Value, weight: Value) -> Value:
    """relax.nn.conv2d (NCHW, OIHW) with constant or run-time weights."""
    attrs = call.attrs
    padding = [int(p) for p in attrs.padding]
    stride, dilation = [int(s) for s in attrs.strides], [int(d) for d in attrs.dilation]
    return convolve(ctx, x, weight, padding, stride, dilation, int(attrs.groups), "conv2d")


def convolve(
    ctx: Context,
    x: Value,
    weight: Value,
    pads: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    op: str,
) -> Value:
    """The accumulator of a convolution, its zero point correction kept as the term's zero."""
    term, weight = _activation(ctx, x, weight, op)
    if any(pads):
        term = with_one_zero(ctx, term)
    if isinstance(weight, Constant):
        outputs = weight.shape[0]
        factor, zero = (_by_weight(a, groups, outputs) for a in (term.scale, term.zero))
        parts, lost = with_output_scales(ctx, weight, factor, (1, 2, 3), op)
        data = pad2d(ctx, term.data, pads, int(term.zero.flat[0]))
        terms, signed = [], term.signed and not weight.rounded
        for i, (values, scale) in enumerate(parts):
            # A scale below zero (a negative BatchNorm gamma) moves into the weights, so that ReLU and pooling stay
            # monotone.
            if np.any(below := negative(scale)):
                values, scale = np.where(below, -values, values), np.abs(scale)
            suffix = "acc" if len(parts) == 1 else f"acc{i}"
            acc = _summed(ctx, data, integer_constant(values), strides, dilation, groups, suffix)
            # Sums first where they are multiplied by one zero point alike.
            sums = zero * values.sum(axis=(1, 2, 3), keepdims=True) if zero.size == 1 else zero * values
            correction = sums.sum(axis=(1, 2, 3)).reshape(1, -1, 1, 1)
            scale = compress(scale.reshape(1, -1, 1, 1))
            made = Term(acc, compress(correction), scale, accumulator=True, signed=signed, near=term.near)
            terms.append(made)
        return Real(ops.shape_of(acc), _off(ctx, terms, term, lost))
    if not is_uniform(term.scale):
        remedy = "make its weight an initializer, or quantize the activation per tensor"
        raise ctx.fail(op, "its input has one scale per channel and its weight is not constant", remedy)
    kernel = single(ctx, weight, op, narrow=True)
    if any(n != 1 for n in np.shape(broadcast_rank(kernel.scale, 4))[1:]):
        raise ctx.fail(op, "its weight scales vary inside an output channel", "quantize the weight per output channel")
    data = pad2d(ctx, centred(ctx, term, "int16", "x"), pads, 0)
    acc = _summed(ctx, data, centred(ctx, kernel, "int16", "w"), strides, dilation, groups, "acc")
    scale = np.reshape(kernel.scale, (1, -1, 1, 1)) * term.scale if np.ndim(kernel.scale) else kernel.scale * term.scale
    near = term.near or kernel.near
    return Real(ops.shape_of(acc), (Term(acc, np.zeros((), np.int64), compress(scale), accumulator=True, near=near),))


def _summed(
    ctx: Context,
    data: relax.Expr,
    kernel: relax.Expr,
    strides: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    suffix: str,
) -> relax.Expr:
    def make(dtype: str) -> relax.Expr:
        return relax.op.nn.conv2d(
            data, kernel, strides=list(strides), padding=0, dilation=list(dilation), groups=groups, out_dtype=dtype
        )

    return ctx.accumulate(make, suffix)


def conv2d_transpose(ctx: Context, call: relax.Call, x: Value, weight: Value) -> Value:
    """relax.nn.conv2d_transpose (NCHW, IOHW) as a convolution of the dilated input with the flipped kernel."""
    op, attrs = "conv2d_transpose", call.attrs
    if not isinstance(weight, Constant):
        raise ctx.fail(op, "its weight is not constant", "make the weight an initializer")
    groups, dilation = int(attrs.groups), [int(d) for d in attrs.dilation]
    inputs, outputs, *kernel = weight.shape

    def flipped(array: Array) -> Array:
        split = array.reshape(groups, inputs // groups, outputs, *array.shape[2:])[..., ::-1, ::-1]
        return split.transpose(0, 2, 1, 3, 4).reshape(groups * outputs, inputs // groups, *array.shape[2:])

    scale = weight.scale
    if scale is not None and scale.size > 1:
        scale = broadcast_rank(scale, 4)
        scale = compress(flipped(np.broadcast_to(scale, (inputs, outputs, *scale.shape[2:]))))
    pads, extra = [int(p) for p in attrs.padding], [int(p) for p in attrs.output_padding]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    new_pads = [reach[0] - pads[0], reach[1] - pads[1], reach[0] - pads[2] + extra[0], reach[1] - pads[3] + extra[1]]
    kernels = Constant(flipped(weight.values), scale)
    term, kernels = _activation(ctx, x, kernels, op)
    strides = [int(s) for s in attrs.strides]
    if strides != [1, 1]:
        term = with_one_zero(ctx, term)
        data = ctx.emit(ops.dilate2d(term.data, strides, int(term.zero.flat[0])), "dilate")
        term = replace(term, data=data)
    spread = Real(ops.shape_of(term.data), (term,))
    return convolve(ctx, spread, kernels, new_pads, [1, 1], dilation, groups, op)


def matmul(ctx: Context, a: Value, b: Value) -> Value:
    """relax.matmul of two tensors of which at most one is constant; blocked weight scales give one term per block."""
    # Beside a fixed-point value a probability is one, too, and has its bits.
    narrow = [isinstance(v, Constant) or short(ctx, v, axis, "matmul") for v, axis in ((a, -1), (b, -2))]
    a, b = (probabilities(ctx, v) if other else v for v, other in zip((a, b), reversed(narrow), strict=True))
    if isinstance(b, Constant) and isinstance(a, Real):
        return _times_constant(ctx, a, b)
    if isinstance(a, Constant) and isinstance(b, Real):
        return _constant_times(ctx, a, b)
    x, y, approximate = rows_and_columns(ctx, a, b, "matmul")
    left, right = _without_zero(ctx, x, "a"), _without_zero(ctx, y, "b")
    acc = ctx.accumulate(lambda d: relax.op.matmul(left, right, out_dtype=d), "acc")
    scale = _row_scale(ctx, x, len(a.shape)) * _column_scale(ctx, y, len(b.shape))
    term = Term(acc, np.zeros((), np.int64), compress(scale), accumulator=True, near=approximate or x.near or y.near)
    made = Real(ops.shape_of(acc), (term,))
    return narrowed(ctx, made, "matmul") if approximate else made


def _without_zero(ctx: Context, term: Term, suffix: str) -> relax.Expr:
    """data - zero in int16, from which kernels see the bytes that they multiply."""
    if not np.any(term.zero) and ops.dtype_of(term.data) in ("int8", "uint8"):
        return term.data
    return centred(ctx, term, "int16", suffix)


def _row_scale(ctx: Context, term: Term, rank: int) -> Array:
    scale = broadcast_rank(term.scale, max(rank, 2)) if np.ndim(term.scale) else term.scale
    if np.ndim(scale) and scale.shape[-1] != 1:
        raise ctx.fail(
            "matmul", "the scales of its left side vary along the summed axis", "quantize it per tensor or per row"
        )
    return scale


def _column_scale(ctx: Context, term: Term, rank: int) -> Array:
    scale = broadcast_rank(term.scale, max(rank, 2)) if np.ndim(term.scale) else term.scale
    if np.ndim(scale) and scale.shape[-2] != 1:
        raise ctx.fail(
            "matmul", "the scales of its right side vary along the summed axis", "quantize it per tensor or per column"
        )
    return scale


def _times_constant(ctx: Context, a: Real, b: Constant) -> Real:
    x, b = summand(ctx, a, "matmul", b, (max(len(b.shape) - 2, 0),))
    if len(b.shape) == 1:
        scale = np.reshape(b.scale, (-1, 1)) if b.scale is not None and np.ndim(b.scale) else b.scale
        return _column(ctx, _times_constant(ctx, a, replace(b, stored=b.stored.reshape(-1, 1), scale=scale)))
    row_scale, factor = _row_scales(ctx, x, len(a.shape), len(b.shape))
    zero = broadcast_rank(x.zero, max(len(a.shape), 2))
    parts, lost = with_output_scales(ctx, b, factor, (len(b.shape) - 2,), "matmul")
    blocks = _blocks(b) if factor.size == 1 else []
    if 1 < len(blocks) <= len(parts):
        parts, lost = [_block(ctx, b, start, end) for start, end in blocks], 0.0
    else:
        blocks = [(0, b.shape[-2])] * len(parts)
    terms = []
    for i, ((values, scale), (start, end)) in enumerate(zip(parts, blocks, strict=True)):
        data = x.data
        if end - start < b.shape[-2]:
            data = ctx.emit(relax.op.strided_slice(data, [len(a.shape) - 1], [start], [end]), f"block{start}")
        suffix = "acc" if len(parts) == 1 else f"acc{i}"
        acc = ctx.accumulate(partial(_matmul_call, data, integer_constant(values)), suffix)
        numbers = [_row_sums(zero, values, start, end), row_scale * broadcast_rank(scale, max(len(b.shape), 2))]
        if len(a.shape) == 1:
            numbers = [n.reshape(n.shape[:-2] + n.shape[-1:]) for n in numbers]
        signed = x.signed and not b.rounded
        made = Term(acc, compress(numbers[0]), compress(numbers[1]), accumulator=True, signed=signed, near=x.near)
        terms.append(summed(made))
    return Real(ops.shape_of(terms[0].data), _off(ctx, terms, x, lost))


def _off(ctx: Context, terms: Sequence[Term], data: Term, lost: float) -> tuple[Term, ...]:
    """The terms of a weight whose products with integers of magnitude 1 lose so much, in units of the first."""
    most = max(int(np.max(np.abs(np.asarray(end).astype(object) - data.zero))) for end in ctx.bounds(data.data))
    return (replace(terms[0], off=Fraction(lost) * most), *terms[1:])


def _row_scales(ctx: Context, x: Term, rank: int, weight_rank: int) -> tuple[Array, Array]:
    """The data's scales by row, and those along the summed axis as the weight sees them."""
    scale, one = broadcast_rank(x.scale, max(rank, 2)), rational(np.ones((1,) * weight_rank))
    if scale.shape[-1] == 1:
        return scale, one
    if any(n != 1 for n in scale.shape[:-1]):
        raise ctx.fail("matmul", "the scales of its left side vary in two directions", "quantize it per tensor")
    return rational(np.ones((1, 1))), one * scale.reshape(-1, 1)


def _blocks(b: Constant) -> list[tuple[int, int]]:
    """Where runs of rows with the same scales begin and end."""
    scale = broadcast_rank(np.asarray(b.scale), len(b.shape))
    changes = np.any(
        scale[..., 1:, :] != scale[..., :-1, :], axis=tuple(i for i in range(scale.ndim) if i != scale.ndim - 2)
    )
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), b.shape[-2]]
    return list(pairwise(edges))


def _block(ctx: Context, b: Constant, start: int, end: int) -> tuple[Array, Array]:
    scale = broadcast_rank(np.asarray(b.scale), len(b.shape))
    return b.values[..., start:end, :].astype(np.int64), rational(scale[..., start : start + 1, :])


def _row_sums(zero: Array, values: Array, start: int, end: int) -> Array:
    """What the zero points of the rows add to a product: one number for a column, or for a row and a column."""
    part = zero[..., start:end] if zero.shape[-1] > 1 else np.broadcast_to(zero, (*zero.shape[:-1], end - start))
    return np.asarray(np.matmul(part, values))


def _column(ctx: Context, product: Real) -> Real:
    """A product with one column, which is that column."""

    def numbers(array: Array) -> Array:
        return array if array.ndim == 0 else array[..., 0]

    terms = tuple(
        replace(
            t, data=ctx.emit(relax.op.squeeze(t.data, [-1]), "column"), zero=numbers(t.zero), scale=numbers(t.scale)
        )
        for t in product.terms
    )
    return Real(product.shape[:-1], terms)


def _matmul_call(a: relax.Expr, b: relax.Expr, dtype: str) -> relax.Expr:
    return relax.op.matmul(a, b, out_dtype=dtype)


def _constant_times(ctx: Context, a: Constant, b: Real) -> Value:
    if a.scale is None:
        raise ctx.fail("matmul", "its weight is float and not quantized", "quantize the weight of this node too")
    values, scale = a.values.astype(np.int64), rational(a.scale)
    y = single(ctx, b, "matmul", narrow=True)
    if y.accumulator:
        raise ctx.fail("matmul", "its input is a 32-bit sum that nothing quantizes", INSERT)
    left_scale = _row_scale(ctx, Term(b.terms[0].data, y.zero, scale), values.ndim)
    kernel = integer_constant(values)
    acc = ctx.accumulate(lambda d: relax.op.matmul(kernel, y.data, out_dtype=d), "acc")
    if not is_uniform(y.zero):
        raise ctx.fail("matmul", "its right side has one zero point per column", "use one zero point for the tensor")
    zero = values.sum(axis=-1, keepdims=True) * int(np.asarray(y.zero).flat[0])
    scale_out = left_scale * _column_scale(ctx, y, len(b.shape))
    term = Term(acc, compress(zero), compress(scale_out), accumulator=True, near=y.near)
    return Real(ops.shape_of(acc), (term,))
