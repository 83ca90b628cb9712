"""Convolutions and matrix products: integer sums of raw data and centred weights, zero points in the bias (A10)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from tvm import relax

from hawq_tvm import arith, ops

from .elementwise import centred
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
    rational,
    single,
)  # fmt: skip


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


def _activation(ctx: Context, x: Value, op: str) -> Term:
    term = single(ctx, x, op)
    if ops.dtype_of(term.data) in ("int64",) or term.accumulator:
        raise ctx.fail(op, "its input is a 32-bit sum that nothing quantizes", INSERT)
    if not is_uniform(term.scale) or not is_uniform(term.zero):
        raise ctx.fail(op, "its input has one scale per channel", "quantize the activation per tensor")
    return term


def _unit_integers(ctx: Context, weight: Constant, op: str) -> tuple[Array, Array]:
    if weight.scale is None:
        raise ctx.fail(op, "its weight is float and not quantized", "quantize the weight of this node too")
    return weight.values.astype(np.int64), rational(weight.scale)


def conv2d(ctx: Context, call: relax.Call, x: Value, weight: Value) -> Value:
    """relax.nn.conv2d (NCHW, OIHW) with constant or run-time weights."""
    attrs = call.attrs
    padding = [int(p) for p in attrs.padding]
    stride, dilation = [int(s) for s in attrs.strides], [int(d) for d in attrs.dilation]
    return convolve(ctx, x, weight, padding, stride, dilation, int(attrs.groups), "conv2d")


def convolve(
    ctx: Context, x: Value, weight: Value, pads: Sequence[int], strides: Sequence[int],
    dilation: Sequence[int], groups: int, op: str,
) -> Value:  # fmt: skip
    """The accumulator of a convolution, its zero point correction kept as the term's zero."""
    term = _activation(ctx, x, op)
    zero = int(term.zero.flat[0])

    def make(data: relax.Expr, kernel: relax.Expr) -> relax.Expr:
        return ctx.accumulate(
            lambda dtype: relax.op.nn.conv2d(
                data, kernel, strides=list(strides), padding=0, dilation=list(dilation), groups=groups, out_dtype=dtype
            ),
            "acc",
        )  # fmt: skip

    if isinstance(weight, Constant):
        values, scale = _unit_integers(ctx, weight, op)
        channel = broadcast_rank(scale, 4)
        if any(n != 1 for n in channel.shape[1:]):
            raise ctx.fail(op, "its weight scales vary inside an output channel", "quantize the weight per tensor or per output channel")
        # A scale below zero (a negative BatchNorm gamma) moves into the weights, so that ReLU and pooling stay monotone.
        values = np.where(channel < 0, -values, values)
        scale = np.abs(channel).reshape(1, -1, 1, 1) * term.scale
        acc = make(pad2d(ctx, term.data, pads, zero), integer_constant(values))
        correction = zero * values.sum(axis=(1, 2, 3)).reshape(1, -1, 1, 1)
        return Real(ops.shape_of(acc), (Term(acc, compress(correction), compress(scale), accumulator=True),))
    kernel = single(ctx, weight, op)
    if any(n != 1 for n in np.shape(broadcast_rank(kernel.scale, 4))[1:]):
        raise ctx.fail(op, "its weight scales vary inside an output channel", "quantize the weight per output channel")
    data = pad2d(ctx, centred(ctx, term, "int16", "x"), pads, 0)
    acc = make(data, centred(ctx, kernel, "int16", "w"))
    scale = np.reshape(kernel.scale, (1, -1, 1, 1)) * term.scale if np.ndim(kernel.scale) else kernel.scale * term.scale
    return Real(ops.shape_of(acc), (Term(acc, np.zeros((), np.int64), compress(scale), accumulator=True),))


def conv2d_transpose(ctx: Context, call: relax.Call, x: Value, weight: Value) -> Value:
    """relax.nn.conv2d_transpose (NCHW, IOHW) as a convolution of the dilated input with the flipped kernel."""
    op, attrs = "conv2d_transpose", call.attrs
    if not isinstance(weight, Constant):
        raise ctx.fail(op, "its weight is not constant", "make the weight an initializer")
    values, scale = _unit_integers(ctx, weight, op)
    groups, dilation = int(attrs.groups), [int(d) for d in attrs.dilation]
    inputs, outputs, *kernel = values.shape
    split = values.reshape(groups, inputs // groups, outputs, *kernel)[..., ::-1, ::-1]
    flipped = split.transpose(0, 2, 1, 3, 4).reshape(groups * outputs, inputs // groups, *kernel)
    channel = broadcast_rank(scale, 4)
    if channel.shape[0] != 1 or any(n != 1 for n in channel.shape[2:]):
        raise ctx.fail(op, "its weight scales vary inside an output channel", "quantize the weight per tensor or per output channel")
    per_output = np.broadcast_to(channel.reshape(-1), (outputs,)) if channel.size > 1 else channel.reshape(1)
    flat_scale = np.tile(per_output, groups).reshape(-1, 1, 1, 1) if per_output.size > 1 else per_output.reshape(1, 1, 1, 1)
    pads, extra = [int(p) for p in attrs.padding], [int(p) for p in attrs.output_padding]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    new_pads = [reach[0] - pads[0], reach[1] - pads[1], reach[0] - pads[2] + extra[0], reach[1] - pads[3] + extra[1]]
    term = _activation(ctx, x, op)
    strides = [int(s) for s in attrs.strides]
    data = term.data
    if strides != [1, 1]:
        data = ctx.emit(ops.dilate2d(data, strides, int(term.zero.flat[0])), "dilate")
    spread = Real(ops.shape_of(data), (Term(data, term.zero, term.scale),))
    return convolve(ctx, spread, Constant(flipped, flat_scale), new_pads, [1, 1], dilation, groups, op)


def matmul(ctx: Context, a: Value, b: Value) -> Value:
    """relax.matmul of two tensors of which at most one is constant; blocked weight scales give one term per block."""
    if isinstance(b, Constant) and isinstance(a, Real):
        return _times_constant(ctx, a, b)
    if isinstance(a, Constant) and isinstance(b, Real):
        return _constant_times(ctx, a, b)
    x, y = single(ctx, a, "matmul"), single(ctx, b, "matmul")
    left, right = centred(ctx, x, "int16", "a"), centred(ctx, y, "int16", "b")
    acc = ctx.accumulate(lambda d: relax.op.matmul(left, right, out_dtype=d), "acc")
    scale = _row_scale(ctx, x, len(a.shape)) * _column_scale(ctx, y, len(b.shape))
    return Real(ops.shape_of(acc), (Term(acc, np.zeros((), np.int64), compress(scale), accumulator=True),))


def _row_scale(ctx: Context, term: Term, rank: int) -> Array:
    scale = broadcast_rank(term.scale, max(rank, 2)) if np.ndim(term.scale) else term.scale
    if np.ndim(scale) and scale.shape[-1] != 1:
        raise ctx.fail("matmul", "the scales of its left side vary along the summed axis", "quantize it per tensor or per row")
    return scale


def _column_scale(ctx: Context, term: Term, rank: int) -> Array:
    scale = broadcast_rank(term.scale, max(rank, 2)) if np.ndim(term.scale) else term.scale
    if np.ndim(scale) and scale.shape[-2] != 1:
        raise ctx.fail("matmul", "the scales of its right side vary along the summed axis", "quantize it per tensor or per column")
    return scale


def _times_constant(ctx: Context, a: Real, b: Constant) -> Real:
    values, scale = _unit_integers(ctx, b, "matmul")
    x = single(ctx, a, "matmul")
    if x.accumulator:
        raise ctx.fail("matmul", "its input is a 32-bit sum that nothing quantizes", INSERT)
    row_scale = _row_scale(ctx, x, len(a.shape))
    if values.ndim == 1:
        values, scale = values.reshape(-1, 1), np.reshape(scale, (-1, 1)) if np.ndim(scale) else scale
        return _column(ctx, _times_constant(ctx, a, Constant(values, scale)))
    depth = values.shape[-2]
    scale = broadcast_rank(scale, values.ndim)
    full = np.broadcast_to(scale, values.shape)
    rows = [i for i in range(scale.ndim) if i != scale.ndim - 2]
    changes = np.any(scale[..., 1:, :] != scale[..., :-1, :], axis=tuple(rows))  # none at all where one row serves for all
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), depth]
    terms = []
    for start, end in pairwise(edges):
        block, suffix = values[..., start:end, :], "acc" if len(edges) == 2 else f"acc{start}"
        data = x.data
        if len(edges) > 2:
            data = ctx.emit(relax.op.strided_slice(data, [len(a.shape) - 1], [start], [end]), f"block{start}")
        kernel = integer_constant(block)
        acc = ctx.accumulate(partial(_matmul_call, data, kernel), suffix)
        columns = block.sum(axis=-2, keepdims=True)
        zero = _row_zero(x.zero, len(a.shape)) * columns
        column_scale = compress(full[..., start : start + 1, :])
        zero = zero if len(a.shape) > 1 else zero.reshape(zero.shape[:-2] + zero.shape[-1:])
        if len(a.shape) == 1 and np.ndim(column_scale) > 1:
            column_scale = column_scale.reshape(column_scale.shape[:-2] + column_scale.shape[-1:])
        terms.append(Term(acc, compress(zero), compress(row_scale * column_scale), accumulator=True))
    return Real(ops.shape_of(terms[0].data), tuple(terms))


def _column(ctx: Context, product: Real) -> Real:
    """A product with one column, which is that column."""

    def numbers(array: Array) -> Array:
        return array if array.ndim == 0 else array[..., 0]

    terms = tuple(
        Term(ctx.emit(relax.op.squeeze(t.data, [-1]), "column"), numbers(t.zero), numbers(t.scale), accumulator=True) for t in product.terms
    )
    return Real(product.shape[:-1], terms)


def _matmul_call(a: relax.Expr, b: relax.Expr, dtype: str) -> relax.Expr:
    return relax.op.matmul(a, b, out_dtype=dtype)


def _row_zero(zero: Array, rank: int) -> Array:
    return broadcast_rank(zero, max(rank, 2)) if np.ndim(zero) else zero


def _constant_times(ctx: Context, a: Constant, b: Real) -> Value:
    values, scale = _unit_integers(ctx, a, "matmul")
    y = single(ctx, b, "matmul")
    if y.accumulator:
        raise ctx.fail("matmul", "its input is a 32-bit sum that nothing quantizes", INSERT)
    left_scale = _row_scale(ctx, Term(b.terms[0].data, y.zero, scale), values.ndim)
    kernel = integer_constant(values)
    acc = ctx.accumulate(lambda d: relax.op.matmul(kernel, y.data, out_dtype=d), "acc")
    if not is_uniform(y.zero):
        raise ctx.fail("matmul", "its right side has one zero point per column", "use one zero point for the tensor")
    zero = values.sum(axis=-1, keepdims=True) * int(np.asarray(y.zero).flat[0])
    scale_out = left_scale * _column_scale(ctx, y, len(b.shape))
    return Real(ops.shape_of(acc), (Term(acc, compress(zero), compress(scale_out), accumulator=True),))


__all__ = ["arith", "conv2d", "conv2d_transpose", "convolve", "matmul", "pad2d"]
