"""An INTEGER module in torch: the values of its tensors, as the compiled package computes them.

Tensors are stored in their own integer types (uint16 in int32, uint32 in int64) and computed in int64; products are
summed in a floating type that holds them exactly. What the compiler has proved of the module, above all that nothing
overflows, is not checked again. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import ModelError

from .rows import exponents_of_table, layer_norm, softmax, wide_exponents

Tensor = torch.Tensor
# What is summed in a floating type stays below, so that every order gives the same.
EXACT_FLOAT32, EXACT_FLOAT64 = 1 << 24, 1 << 53
HALF_BITS = 20
STORED = {name: getattr(torch, name) for name in ("bool", "int8", "uint8", "int16", "int32", "int64", "float32")} | {
    "uint16": torch.int32,
    "uint32": torch.int64,
}


def evaluate(
    module: tvm.IRModule, inputs: Mapping[str, Tensor], kept: Collection[str]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The values of the bindings of `kept`, as far as the module has them, and the outputs in order.

    inputs: by name, all on one device.
    Raises ModelError naming a layer whose operator no training computes.
    """
    main = module["main"]
    values: dict[relax.Var, Any] = {p: inputs[p.name] for p in main.params}
    device = next(iter(inputs.values())).device
    bindings = list(stages.bindings(main))
    last = {v: i for i, b in enumerate(bindings) for v in ops.variables(b.value)}
    held = {b.var for b in bindings if b.var.name in kept} | set(ops.variables(main.body.body))
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for i, b in enumerate(bindings):
            values[b.var] = _value(b.value, values, b.var.name, device)
            if b.var.name in kept:
                found[b.var.name] = values[b.var]
            for var in ops.variables(b.value):
                if last[var] == i and var not in held:
                    values.pop(var, None)
        outputs = _value(main.body.body, values, "output", device)
    return found, list(outputs) if isinstance(outputs, tuple) else [outputs]


def _value(expr: relax.Expr, values: Mapping[relax.Var, Any], where: str, device: torch.device) -> Any:
    if isinstance(expr, relax.Var):
        return values[expr]
    if ops.is_const(expr):
        array = ops.const_value(expr)
        wide = {"uint16": np.int32, "uint32": np.int64}.get(str(array.dtype))
        return torch.from_numpy(np.array(array, wide)).to(device)
    if isinstance(expr, relax.Tuple):
        return tuple(_value(f, values, where, device) for f in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _value(expr.tuple_value, values, where, device)[expr.index]
    if not isinstance(expr, relax.Call):
        return expr
    name = ops.op_name(expr)
    if name not in OPERATORS:
        raise ModelError(f"is made by {name}, which is not trained", where=where, remedy="quantize after training")
    result = OPERATORS[name](expr, *(_value(a, values, where, device) for a in expr.args))
    return result if isinstance(result, tuple) else result.to(STORED[str(expr.ty.dtype)])


def _ints(values: Any) -> list[int]:
    return [int(v.value) if hasattr(v, "value") else int(v) for v in values]


def _shape(call: relax.Call) -> tuple[int, ...]:
    return ops.shape_of(call)


# -- the border
# ----------------------------------------------------------------------------------------------------------------


def _quantize(call: relax.Call, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(A2), as quantizers of ours write it: divided in float32, half to even."""
    low, high = (int(call.attrs[k]) for k in ("qmin", "qmax"))
    # A tensor with dimensions: CUDA multiplies by the reciprocal of a plain number.
    steps = (x / scale.reshape([1] * (x.ndim - scale.ndim) + list(scale.shape))).round()
    return steps.clamp((low - zero).to(x.dtype), (high - zero).to(x.dtype)).long() + zero


def _dequantize(call: relax.Call, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(A1): float64 scales, made by folding, are multiplied in float64 and narrowed once."""
    return ((q.long() - zero.long()).to(scale.dtype) * scale).float()


# -- sections 3 and 4
# ----------------------------------------------------------------------------------------------------------------


def shifted(v: Tensor, shift: Tensor, rounding: str) -> Tensor:
    """v / 2^shift in int64, rounded (A5), (A6), (A7b)."""
    if rounding == "floor":
        return v >> shift
    half = (torch.ones_like(shift) << shift) >> 1
    if rounding == "half_up":
        return (v + half) >> shift
    if rounding != "half_even":
        raise ValueError(f"no quantizer of ours writes the rounding {rounding}")
    return torch.where(shift > 0, (v + half - 1 + ((v >> shift) & 1)) >> shift, v)


def _requantize(
    call: relax.Call, data: Sequence[Tensor], multipliers: Sequence[Tensor], offset: Tensor, shift: Tensor
) -> Tensor:
    """(A9)"""
    total = offset
    for x, multiplier in zip(data, multipliers, strict=True):
        total = total + x.long() * multiplier.long()
    found = shifted(total, shift.long(), str(call.attrs["rounding"]))
    return (found + int(call.attrs["zero_point"])).clamp(int(call.attrs["qmin"]), int(call.attrs["qmax"]))


def _divide(call: relax.Call, a: Tensor, b: Tensor, multiplier: Tensor, divisor: Tensor) -> Tensor:
    """(A32)"""
    n, d = a.long() * multiplier.long(), b.long() * divisor.long()
    n, d = torch.where(d < 0, -n, n), d.abs()
    by, rounding = d.clamp(min=1), str(call.attrs["rounding"])
    whole = n // by
    rest = 2 * (n - whole * by)
    up = {"floor": rest < 0, "half_up": rest >= by, "half_even": (rest > by) | ((rest == by) & (whole % 2 == 1))}
    low, high, undefined = (int(call.attrs[k]) for k in ("qmin", "qmax", "undefined"))
    found = (whole + up[rounding] + int(call.attrs["zero_point"])).clamp(low, high)
    beyond = torch.full_like(n, undefined).masked_fill(n > 0, high).masked_fill(n < 0, low)
    return torch.where(d == 0, beyond, found)


# -- section 5
# ----------------------------------------------------------------------------------------------------------------


def exactly(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, summed: Sequence[int]) -> Tensor:
    """A sum of products, bilinear in a and b, in int64.

    function: in a floating type.  summed: the axes of b over which one result's products run.
    """
    low, high = (int(v) for v in a.aminmax())
    most, each = max(-low, high), int(b.double().abs().sum(tuple(summed)).max())
    # On a GPU always float64: convolutions in float32 may round operands and transform sums.
    if most * each < EXACT_FLOAT32 and a.device.type == "cpu":
        return function(a.float(), b.float()).long()
    if most * each < EXACT_FLOAT64:
        return function(a.double(), b.double()).round_().long()
    if most >> HALF_BITS:
        upper, lower = a >> HALF_BITS, a & ((1 << HALF_BITS) - 1)
        return (exactly(function, upper, b, summed) << HALF_BITS) + exactly(function, lower, b, summed)
    upper, lower = b >> HALF_BITS, b & ((1 << HALF_BITS) - 1)
    return (exactly(function, a, upper, summed) << HALF_BITS) + exactly(function, a, lower, summed)


def _conv2d(call: relax.Call, x: Tensor, w: Tensor) -> Tensor:
    """(A10), padded before."""
    strides, dilation, groups = _ints(call.attrs.strides), _ints(call.attrs.dilation), int(call.attrs.groups)
    return exactly(lambda a, b: F.conv2d(a, b, None, strides, 0, dilation, groups), x, w, (1, 2, 3))


def _matmul(call: relax.Call, a: Tensor, b: Tensor) -> Tensor:
    return exactly(torch.matmul, a, b, (-2 if b.ndim > 1 else -1,))


def _windows(x: Tensor, attrs: Any) -> Tensor:
    """Every window of an NCHW tensor: (N, C, OH, OW, KH, KW)."""
    size, strides, dilation = (_ints(attrs[k]) for k in ("pool_size", "strides", "dilation"))
    for axis in (0, 1):
        x = x.unfold(2 + axis, (size[axis] - 1) * dilation[axis] + 1, strides[axis])
    return x[..., :: dilation[0], :: dilation[1]]


def _max_pool2d(call: relax.Call, x: Tensor) -> Tensor:
    attrs = call.attrs
    return _windows(x, {"pool_size": attrs.pool_size, "strides": attrs.strides, "dilation": attrs.dilation}).amax(
        (-2, -1)
    )


def _sum_pool2d(call: relax.Call, x: Tensor) -> Tensor:
    """(A15)"""
    return _windows(x, call.attrs).sum((-2, -1), dtype=torch.int64)


def _lookup(call: relax.Call, x: Tensor, table: Tensor) -> Tensor:
    """(A16)"""
    return table[x.long() - int(np.iinfo(ops.dtype_of(call.args[0])).min)]


def _interpolate(call: relax.Call, u: Tensor, table: Tensor) -> Tensor:
    """(A31)"""
    cell, second, first, last = (int(call.attrs[k]) for k in ("cell", "second", "first", "last"))
    value, slope, curvature = table.long()
    u = u.long()
    which, place = u >> cell, (u & ((1 << cell) - 1)) - (1 << cell >> 1)
    bent = slope[which] + ((curvature[which] * place) >> second)
    return (value[which] + ((bent * place) >> first)) >> last


def _reduced(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def op(call: relax.Call, x: Tensor) -> Tensor:
        axes = range(x.ndim) if call.attrs.axis is None else _ints(call.attrs.axis)
        return function(x, tuple(axes), bool(call.attrs.keepdims))

    return op


def _argument(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def op(call: relax.Call, x: Tensor) -> Tensor:
        axis = call.attrs.axis
        return function(x, None if axis is None else int(axis)).reshape(_shape(call))

    return op


# -- movement
# ----------------------------------------------------------------------------------------------------------------


def _pad(call: relax.Call, x: Tensor, *_: Any) -> Tensor:
    pairs = _ints(call.attrs.pad_width)
    width = [v for i in reversed(range(x.ndim)) for v in pairs[2 * i : 2 * i + 2]]
    return F.pad(x, width, value=int(call.attrs.pad_value))


def _dilate2d(call: relax.Call, x: Tensor) -> Tensor:
    height, width = _ints(call.attrs["strides"])
    y = torch.full(_shape(call), int(call.attrs["fill"]), dtype=x.dtype, device=x.device)
    y[:, :, ::height, ::width] = x
    return y


def _strided_slice(call: relax.Call, x: Tensor, axes: Any, begin: Any, end: Any, *strides: Any) -> Tensor:
    along, steps = _ints(axes), _ints(strides[0]) if strides else [1] * len(_ints(axes))
    for axis, low, high, step in zip(along, _ints(begin), _ints(end), steps, strict=True):
        size = x.shape[axis]
        places = range(*slice(low, None if step < 0 and high < -size else high, step).indices(size))
        x = x.index_select(axis, torch.tensor(list(places), device=x.device))
    return x


def _split(call: relax.Call, x: Tensor) -> tuple[Tensor, ...]:
    axis = int(call.attrs.axis)
    return x.split([int(f.shape.values[axis]) for f in call.ty.fields], axis)


def _take(call: relax.Call, x: Tensor, index: Tensor) -> Tensor:
    x, axis = (x.flatten(), 0) if call.attrs.axis is None else (x, int(call.attrs.axis) % x.ndim)
    places = index.long() % x.shape[axis]
    return x.index_select(axis, places.flatten()).reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def _repeat(call: relax.Call, x: Tensor) -> Tensor:
    axis = call.attrs.axis
    return x.repeat_interleave(int(call.attrs.repeats), None if axis is None else int(axis))


def _tile(call: relax.Call, x: Tensor) -> Tensor:
    repeats = _ints(call.attrs.repeats)
    return x.repeat([1] * (x.ndim - len(repeats)) + repeats)


def _reshape(call: relax.Call, x: Tensor, *_: Any) -> Tensor:
    return x.reshape(_shape(call))


def _wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operator on integers of 64 bits."""
    return lambda call, *operands: function(*(v.long() for v in operands))


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda call, *operands: function(*operands)


OPERATORS: dict[str, Callable[..., Any]] = {
    "hawq.quantize": _quantize,
    "hawq.dequantize": _dequantize,
    "hawq.requantize": _requantize,
    "hawq.lookup": _lookup,
    "hawq.interpolate": _interpolate,
    "hawq.divide": _divide,
    "hawq.sum_pool2d": _sum_pool2d,
    "hawq.dilate2d": _dilate2d,
    "hawq.softmax": lambda call, x, table: softmax(call.attrs, exponents_of_table(call.attrs, x, table), shifted),
    "hawq.softmax_wide": lambda call, x, *tables: softmax(call.attrs, wide_exponents(call.attrs, x, *tables), shifted),
    "hawq.layer_norm": lambda call, x: layer_norm(call.attrs, x),
    "relax.nn.conv2d": _conv2d,
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.nn.pad": _pad,
    "relax.matmul": _matmul,
    "relax.astype": lambda call, x: x,
    "relax.add": _wide(torch.add),
    "relax.subtract": _wide(torch.sub),
    "relax.multiply": _wide(torch.mul),
    "relax.maximum": _wide(torch.maximum),
    "relax.minimum": _wide(torch.minimum),
    "relax.clip": lambda call, x, low, high: x.long().clamp(int(low.value), int(high.value)),
    "relax.where": lambda call, c, a, b: torch.where(c.bool(), a.long(), b.long()),
    **{f"relax.{n}": _wide(getattr(torch, n)) for n in ("greater", "greater_equal", "less", "less_equal", "not_equal")},
    "relax.equal": _wide(torch.eq),
    **{f"relax.logical_{n}": _plain(getattr(torch, f"logical_{n}")) for n in ("and", "or", "xor", "not")},
    "relax.sum": _reduced(lambda x, axes, keep: x.sum(axes, keep, dtype=torch.int64)),
    "relax.max": _reduced(torch.amax),
    "relax.min": _reduced(torch.amin),
    "relax.argmax": _argument(torch.argmax),
    "relax.argmin": _argument(torch.argmin),
    "relax.reshape": _reshape,
    "relax.flatten": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.permute_dims": lambda call, x: x.permute(
        list(reversed(range(x.ndim))) if call.attrs.axes is None else _ints(call.attrs.axes)
    ),
    "relax.broadcast_to": lambda call, x, *_: x.expand(_shape(call)),
    "relax.concat": lambda call, parts: torch.cat(parts, int(call.attrs.axis)),
    "relax.split": _split,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.flip": lambda call, x: x.flip(int(call.attrs.axis)),
    "relax.tile": _tile,
    "relax.repeat": _repeat,
}
