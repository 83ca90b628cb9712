"""Operators that only move elements: the integers move, and so do scales that vary over the tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops

from .elementwise import with_one_zero
from .fixed import settled
from .values import (
    INSERT,
    WAITING,
    Array,
    Constant,
    Context,
    Joined,
    Moved,
    Real,
    Term,
    Value,
    broadcast_rank,
    compress,
    is_uniform,
    summed,
    whole,
    with_integer_bias,
)


def _ints(values: Any) -> list[int]:
    return [int(v) for v in values]


def _strided_slice(call: relax.Call, a: Array) -> Array:
    axes, begin, end = (_tuple_of_ints(x) for x in call.args[1:4])
    steps = _tuple_of_ints(call.args[4]) if len(call.args) > 4 else [1] * len(axes)
    index = [slice(None)] * a.ndim
    for axis, b, e, s in zip(axes, begin, end, steps, strict=True):
        stop: int | None = e
        if s < 0 and e < -a.shape[axis]:
            stop = None
        index[axis] = slice(b, stop, s)
    return a[tuple(index)]


def _tuple_of_ints(expr: Any) -> list[int]:
    return [int(f.value) for f in expr.fields]


def _take(call: relax.Call, a: Array) -> Array:
    axis = call.attrs.axis
    return np.take(a, ops.const_value(call.args[1]).astype(np.int64), None if axis is None else int(axis), mode="wrap")


def _out_shape(call: relax.Call) -> tuple[int, ...]:
    return tuple(int(d) for d in call.ty.shape.values)


MOVES: dict[str, Callable[[relax.Call, Array], Array]] = {
    "relax.reshape": lambda c, a: a.reshape(_out_shape(c)),
    "relax.flatten": lambda c, a: a.reshape(_out_shape(c)),
    "relax.squeeze": lambda c, a: a.reshape(_out_shape(c)),
    "relax.expand_dims": lambda c, a: a.reshape(_out_shape(c)),
    "relax.permute_dims": lambda c, a: a.transpose(None if c.attrs.axes is None else _ints(c.attrs.axes)),
    "relax.broadcast_to": lambda c, a: np.broadcast_to(a, _out_shape(c)),
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.flip": lambda c, a: np.flip(a, int(c.attrs.axis)),
    "relax.tile": lambda c, a: np.tile(a, _ints(c.attrs.repeats)),
    "relax.repeat": lambda c, a: np.repeat(
        a, int(c.attrs.repeats), None if c.attrs.axis is None else int(c.attrs.axis)
    ),
}


def move(ctx: Context, call: relax.Call, x: Value) -> Value:
    """One of MOVES applied to a value."""
    name = ops.op_name(call)
    op = name.removeprefix("relax.")

    def numbers(array: Array, shape: tuple[int, ...]) -> Array:
        if array.size == 1:
            return array
        # Which number an element has is moved in its place: comparing integers is quick.
        places = np.arange(array.size, dtype=np.int32).reshape(array.shape)
        return np.asarray(array.reshape(-1)[compress(MOVES[name](call, np.broadcast_to(places, shape)))])

    def again(data: relax.Expr) -> relax.Expr:
        return relax.Call(call.op, [data, *call.args[1:]], attrs=call.attrs)

    if isinstance(x, Constant):
        scale = None if x.scale is None else numbers(np.asarray(x.scale), x.shape)
        return Constant(MOVES[name](call, x.values), scale)
    if isinstance(x, Moved):
        return replace(x, moves=(*x.moves, call))
    if isinstance(x, relax.Expr):
        return ctx.emit(again(x))
    if isinstance(x, Real):
        moved = {t.half[0]: object() for t in x.terms if t.half is not None}
        terms = tuple(
            replace(
                t,
                data=ctx.emit(again(whole(ctx, t, x.shape).data), op),
                zero=numbers(t.zero, x.shape),
                scale=numbers(t.scale, x.shape),
                half=t.half and (moved[t.half[0]], t.half[1]),
            )
            for t in x.terms
        )
        return Real(_out_shape(call), terms, numbers(x.constant, x.shape), x.low, x.high)
    if isinstance(x, WAITING):
        # Moved at the quantize, whose one scale no movement changes: a function becomes a table first.
        return Joined(_out_shape(call), (x,), lambda parts: again(parts[0]), moved=True)
    raise ctx.fail(op, "its input has no quantize of its own", INSERT)


def pad(ctx: Context, call: relax.Call, x: Value) -> Value:
    """relax.nn.pad with a constant.

    On the integer grid the value is a level, of a wider type where the data's does not hold it; elsewhere it is
    quantized beside the data.
    """
    width, value = _ints(call.attrs.pad_width), float(call.attrs.pad_value)
    if isinstance(x, Constant):
        pairs = list(zip(width[0::2], width[1::2], strict=True))
        return Constant(np.pad(x.real, pairs, constant_values=value))
    if isinstance(x, relax.Expr):
        return ctx.emit(relax.Call(call.op, [x, *call.args[1:]], attrs=call.attrs))
    if str(call.attrs.pad_mode) != "constant":
        raise ctx.fail("pad", f"it pads in mode {call.attrs.pad_mode!r}", "use constant padding")
    if isinstance(x, WAITING):
        return _padded_later(call, x, width, value)
    if not isinstance(x, Real):
        raise ctx.fail("pad", "its input is not quantized", INSERT)
    if len(x.terms) == 1:
        x = replace(x, terms=(with_one_zero(ctx, x.terms[0]),))
    level = _level(x, value)
    if level is None:
        return _padded_later(call, x, width, value)
    real = with_integer_bias(settled(ctx, x, "pad"))
    term, data = real.terms[0], real.terms[0].data
    kind = next(
        (d for d in (ops.dtype_of(data), "int16", "int32") if arith.RANGES[d][0] <= level <= arith.RANGES[d][1]), ""
    )
    if not kind:
        return _padded_later(call, x, width, value)
    if kind != ops.dtype_of(data):
        data = ctx.emit(relax.op.astype(data, kind), "wide")
    data = ctx.emit(relax.op.nn.pad(data, width, "constant", level), "pad")
    scale = broadcast_rank(term.scale, len(x.shape))
    beside = [(a, b) if n > 1 else (0, 0) for a, b, n in zip(width[0::2], width[1::2], scale.shape, strict=True)]
    # An integer 0 does not tell that the border's is -0.
    signed = term.signed and not (value == 0 and np.signbit(value))
    padded = replace(term, data=data, scale=np.pad(scale, beside, mode="edge"), signed=signed)
    return Real(ops.shape_of(data), (summed(padded),))


def _level(x: Real, value: float) -> int | None:
    """The integer that stands for `value` in the data of `x`; None where there is none, or not the same in every
    channel.
    """
    real = with_integer_bias(x)
    if len(real.terms) != 1 or np.any(real.constant) or not is_uniform(real.terms[0].zero):
        return None
    levels = np.asarray(Fraction(value) / real.terms[0].scale + real.terms[0].zero, object)
    return int(levels.flat[0]) if is_uniform(levels) and levels.flat[0].denominator == 1 else None


def _padded_later(call: relax.Call, x: Value, width: list[int], value: float) -> Joined:
    """A padded tensor whose value becomes an integer at the quantize, which saturates it as the data."""

    def join(parts: list[relax.Expr]) -> relax.Expr:
        return relax.op.nn.pad(parts[0], width, "constant", ops.const_value(parts[1]).item())

    return Joined(_out_shape(call), (x, Constant(np.array(value, np.float32))), join, moved=True)


def concat(ctx: Context, call: relax.Call, parts: list[Value]) -> Value:
    """relax.concat: at once when all parts share a scale, else at the quantize (A18)."""
    axis = int(call.attrs.axis)
    if all(isinstance(p, relax.Expr) for p in parts):
        return ctx.emit(relax.op.concat(parts, axis))
    if all(isinstance(p, Constant) for p in parts):
        return Constant(np.concatenate([p.real for p in parts], axis))
    for p in parts:
        if isinstance(p, Moved | relax.Expr):
            raise ctx.fail("concat", "one of its inputs is float and not quantized", INSERT)
    shape = _out_shape(call)
    same = _common_term(parts)
    if same is not None:
        data = ctx.emit(relax.op.concat([p.terms[0].data for p in parts], axis))
        return Real(shape, (replace(same, data=data),))
    return Joined(shape, tuple(parts), lambda items: relax.op.concat(items, axis), axis=axis)


def _common_term(parts: list[Value]) -> Term | None:
    first: Term | None = None
    for p in parts:
        if not isinstance(p, Real) or len(p.terms) != 1 or p.clipped or np.any(p.constant):
            return None
        term = p.terms[0]
        if not (is_uniform(term.scale) and is_uniform(term.zero)) or term.accumulator:
            return None
        if first is None:
            first = term
        elif (
            term.scale.flat[0] != first.scale.flat[0]
            or term.zero.flat[0] != first.zero.flat[0]
            or ops.dtype_of(term.data) != ops.dtype_of(first.data)
        ):
            return None
        first = replace(first, signed=first.signed and term.signed, near=first.near or term.near)
    return first


def split(ctx: Context, call: relax.Call, index: int, x: Value) -> Value:
    """Output `index` of relax.split, as a strided slice."""
    axis = int(call.attrs.axis)
    sizes = [int(f.shape.values[axis]) for f in call.ty.fields]
    begin = sum(sizes[:index])
    shape = tuple(int(d) for d in call.ty.fields[index].shape.values)
    if isinstance(x, relax.Expr) and not isinstance(x, relax.Tuple):
        return ctx.emit(relax.op.strided_slice(x, [axis], [begin], [begin + sizes[index]]))
    template = relax.op.strided_slice(
        relax.Var("x", relax.TensorType(tuple(x.shape), "float32")), [axis], [begin], [begin + sizes[index]]
    )
    normalized = ctx.builder.normalize(template)
    value = move(ctx, normalized, x)
    assert not hasattr(value, "shape") or tuple(value.shape) == shape or isinstance(value, relax.Expr)
    return value
