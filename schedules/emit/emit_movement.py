"""TE stages of the operators that move data and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Pad

from .emit import Emission, Index, Operand, emitter, immediate, ints, out_shape


def unravel(flat: Any, shape: Sequence[int]) -> list[Any]:
    """The index into `shape` of a position in C order."""
    index: list[Any] = []
    for d in reversed(shape[1:]):
        index.insert(0, flat % d)
        flat = flat // d
    return [flat, *index] if shape else []


def ravel(index: Index, shape: Sequence[int]) -> Any:
    """The position in C order of an index into `shape`."""
    flat: Any = 0
    for i, d in zip(index, shape, strict=True):
        flat = flat * d + i
    return flat


@emitter("relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims")
def _reshape(e: Emission, call: relax.Call) -> te.Tensor:
    x, shape = e.operand(call.args[0]), out_shape(call)
    long_in = [d for d in x.shape if d != 1]
    if long_in == [d for d in shape if d != 1]:
        positions = [k for k, d in enumerate(shape) if d != 1]

        def element(*i: Any) -> tirx.Expr:
            rest = iter(i[k] for k in positions)
            return x.at([0 if d == 1 else next(rest) for d in x.shape])

        return te.compute(shape, element, name="reshape")
    return te.compute(shape, lambda *i: x.at(unravel(ravel(i, shape), x.shape)), name="reshape")


@emitter("relax.permute_dims")
def _permute_dims(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    rank = len(x.shape)
    axes = ints(call.attrs.axes) if call.attrs.axes is not None else list(reversed(range(rank)))
    source = [(a + rank) % rank for a in axes]
    return te.compute(out_shape(call), lambda *i: x.at([i[source.index(k)] for k in range(rank)]), name="permute")


@emitter("relax.broadcast_to")
def _broadcast_to(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    return te.compute(out_shape(call), lambda *i: x.at(i), name="broadcast")


@emitter("relax.concat")
def _concat(e: Emission, call: relax.Call) -> te.Tensor:
    parts = e.operands(call.args[0])
    axis = int(call.attrs.axis or 0) % len(parts[0].shape)
    starts = np.cumsum([0, *(p.shape[axis] for p in parts)]).tolist()

    def element(*i: Any) -> tirx.Expr:
        def at(k: int) -> tirx.Expr:
            return parts[k].at([*i[:axis], i[axis] - starts[k], *i[axis + 1 :]])

        value = at(len(parts) - 1)
        for k in reversed(range(len(parts) - 1)):
            value = tirx.if_then_else(i[axis] < starts[k + 1], at(k), value)
        return value

    return te.compute(out_shape(call), element, name="concat")


def _slice(x: Operand, shape: Sequence[int], starts: Sequence[int], steps: Sequence[int], name: str) -> te.Tensor:
    return te.compute(
        tuple(shape), lambda *i: x.at([s + k * t for k, s, t in zip(i, starts, steps, strict=True)]), name=name
    )


@emitter("relax.split")
def _split(e: Emission, call: relax.Call) -> list[te.Tensor]:
    x = e.operand(call.args[0])
    axis, start, parts = int(call.attrs.axis) % len(x.shape), 0, []
    for k, field in enumerate(call.ty.fields):
        shape = ints(field.shape.values)
        starts = [start if d == axis else 0 for d in range(len(shape))]
        parts.append(_slice(x, shape, starts, [1] * len(shape), f"split{k}"))
        start += shape[axis]
    return parts


@emitter("relax.strided_slice")
def _strided_slice(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    rank = len(x.shape)
    axes, begins, ends = (ints(a.fields) for a in call.args[1:4])
    steps = ints(call.args[4].fields) if len(call.args) > 4 else [1] * len(axes)
    start, stride = [0] * rank, [1] * rank
    for axis, begin, end, step in zip(axes, begins, ends, steps, strict=True):
        start[axis % rank], _, stride[axis % rank] = slice(begin, end, step).indices(x.shape[axis % rank])
    return _slice(x, out_shape(call), start, stride, "slice")


@emitter("relax.take")
def _take(e: Emission, call: relax.Call) -> te.Tensor:
    """Indices count from the end when negative; one outside the axis reads the nearest element."""
    x, indices = e.operand(call.args[0]), e.operand(call.args[1])
    axis = int(call.attrs.axis) % len(x.shape) if call.attrs.axis is not None else 0
    length, span = x.shape[axis], len(indices.shape)
    if indices.value is not None:
        wrapped = np.where(indices.value < 0, indices.value + length, indices.value)
        indices = Operand(e, value=np.clip(wrapped, 0, length - 1).astype(np.int32))

    def element(*i: Any) -> tirx.Expr:
        k = indices.at(i[axis : axis + span])
        if indices.value is None:
            k = tirx.Select(k < 0, k + immediate(length, indices.dtype), k)
            k = tirx.Min(tirx.Max(k, immediate(0, indices.dtype)), immediate(length - 1, indices.dtype)).astype("int32")
        return x.at([*i[:axis], k, *i[axis + span :]])

    return te.compute(out_shape(call), element, name="take")


@emitter("relax.flip")
def _flip(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    axis = int(call.attrs.axis) % len(x.shape)
    last = x.shape[axis] - 1
    return te.compute(x.shape, lambda *i: x.at([last - k if d == axis else k for d, k in enumerate(i)]), name="flip")


@emitter("relax.tile")
def _tile(e: Emission, call: relax.Call) -> te.Tensor:
    x, shape = e.operand(call.args[0]), out_shape(call)
    inner = (1,) * (len(shape) - len(x.shape)) + x.shape
    skip = len(shape) - len(x.shape)
    return te.compute(shape, lambda *i: x.at([k % d for k, d in zip(i, inner, strict=True)][skip:]), name="tile")


@emitter("relax.repeat")
def _repeat(e: Emission, call: relax.Call) -> te.Tensor:
    x, times = e.operand(call.args[0]), int(call.attrs.repeats)
    if call.attrs.axis is None:
        return te.compute(out_shape(call), lambda i: x.at(unravel(i // times, x.shape)), name="repeat")
    axis = int(call.attrs.axis) % len(x.shape)
    return te.compute(
        out_shape(call), lambda *i: x.at([k // times if d == axis else k for d, k in enumerate(i)]), name="repeat"
    )


@emitter("relax.nn.pad")
def _pad(e: Emission, call: relax.Call) -> te.Tensor:
    x, a = e.operand(call.args[0]), Pad.of(call)
    before, after, fill = a.before, a.after, immediate(a.value, x.dtype)

    def element(*i: Any) -> tirx.Expr:
        inside = []
        for k, d, b, a in zip(i, x.shape, before, after, strict=True):
            inside += [k >= b] if b else []
            inside += [k < b + d] if a else []
        value = x.at([k - b if b else k for k, b in zip(i, before, strict=True)])
        return tirx.if_then_else(tirx.all(*inside), value, fill) if inside else value

    return te.compute(out_shape(call), element, name="pad")


@emitter("hawq.dilate2d")
def _dilate2d(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    axes = ops.spatial_axes(str(call.attrs["layout"]))
    steps = dict(zip(axes, ints(call.attrs["strides"]), strict=True))
    fill = immediate(int(call.attrs["fill"]), x.dtype)

    def element(*i: Any) -> tirx.Expr:
        on_grid = [i[a] % s == 0 for a, s in steps.items() if s > 1]
        value = x.at([k // steps.get(d, 1) for d, k in enumerate(i)])
        return tirx.if_then_else(tirx.all(*on_grid), value, fill) if on_grid else value

    return te.compute(out_shape(call), element, name="dilate")


@emitter("hawq.unpack_int4")
def _unpack_int4(e: Emission, call: relax.Call) -> te.Tensor:
    """(A20)"""
    packed, shape, signed = e.operand(call.args[0]), out_shape(call), bool(int(call.attrs["signed"]))

    def element(*i: Any) -> tirx.Expr:
        # One dimension holds constants; the tensors of other layers keep theirs, and pairs are neighbours in the last.
        flat = ravel(i, shape) if len(packed.shape) == 1 else i[-1]
        byte = packed.at([*(i[:-1] if len(packed.shape) > 1 else []), flat // 2]).astype("int32")
        nibble = (byte >> ((flat % 2) * 4)) & immediate(15, "int32")
        return ((nibble ^ immediate(8, "int32")) - 8).astype("int8") if signed else nibble.astype("uint8")

    return te.compute(shape, element, name="unpack")


@emitter("hawq.pack_int4")
def _pack_int4(e: Emission, call: relax.Call) -> te.Tensor:
    """(A20)"""
    x = e.operand(call.args[0])
    return te.compute(
        out_shape(call), lambda *i: pair(x.at([*i[:-1], 2 * i[-1]]), x.at([*i[:-1], 2 * i[-1] + 1])), name="pack"
    )


def pair(low: tirx.Expr, high: tirx.Expr) -> tirx.Expr:
    """(A20) of two elements, as uint8."""
    fifteen, four = immediate(15, "int32"), immediate(4, "int32")
    return ((low.astype("int32") & fifteen) | ((high.astype("int32") & fifteen) << four)).astype("uint8")
