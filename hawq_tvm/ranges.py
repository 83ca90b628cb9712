"""Computed intervals of every integer tensor (A21), and the margin that each accumulator keeps.

Intervals are per channel where the operation keeps channels apart, else one pair for the tensor. They are worked out
from the real weights and hold for every input whatever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from . import arith, ops, stages
from .errors import OverflowBoundError

Array = NDArray[Any]
LARGEST_KEPT = 1 << 16


@dataclass(frozen=True, eq=False)
class Interval:
    """Inclusive bounds of a tensor's elements: int64 arrays that broadcast against it."""

    low: Any
    high: Any

    @staticmethod
    def of_range(low: int, high: int) -> Interval:
        """The same bounds for every element."""
        return Interval(np.int64(low), np.int64(high))

    @property
    def scalar(self) -> tuple[int, int]:
        """The bounds over the whole tensor."""
        return int(np.min(self.low)), int(np.max(self.high))

    def collapse(self) -> Interval:
        """One pair for the whole tensor."""
        return Interval.of_range(*self.scalar)


Bounds = Interval | tuple[Any, ...]


def interval_of(call: relax.Call, args: Sequence[Any]) -> Bounds:
    """The interval of a call's result from those of its arguments (tuples for tuple arguments).

    Raises KeyError for an operator outside the integer grammar.
    """
    name = ops.op_name(call)
    if name in _MOVING:
        return _moved(call, args[0])
    return _RULES[name](call, *args)


def _compact(low: Array, high: Array) -> Interval:
    """Big arrays are collapsed along leading then trailing axes to one pair; small ones are kept."""
    if max(np.size(low), np.size(high)) > LARGEST_KEPT:
        return Interval.of_range(int(np.min(low)), int(np.max(high)))
    return Interval(np.asarray(low), np.asarray(high))


def constant(array: Array) -> Interval:
    """The interval of a constant, reduced to one pair per axis-1 or last-axis channel when it is big."""
    values = array.astype(np.int64)
    return _compact(values, values)


# -- sums of products ------------------------------------------------------------------------------


def _weight(expr: relax.Expr, lookup: Callable[[relax.Expr], relax.Expr | None]) -> Array | None:
    if ops.is_const(expr):
        return ops.const_value(expr).astype(np.int64)
    call = lookup(expr) if isinstance(expr, relax.Var) else expr
    if call is not None and ops.op_name(call) == "hawq.unpack_int4":
        shape = tuple(int(d) for d in call.attrs["shape"])
        return arith.unpack_int4(ops.const_value(call.args[0]), shape, bool(int(call.attrs["signed"]))).astype(np.int64)
    return None


def _conv2d(call: relax.Call, x: Interval, w: Interval) -> Interval:
    attrs = call.attrs
    kernel_layout, layout = str(attrs.kernel_layout), str(attrs.data_layout)
    out_axis, groups = layout.index("C"), int(attrs.groups)
    kernel_shape = ops.shape_of(call.args[1])
    values = w.low if np.shape(w.low) == kernel_shape and np.array_equal(w.low, w.high) else None
    x_low, x_high = x.scalar
    outputs = kernel_shape[kernel_layout.index("O")]
    taps = int(np.prod(kernel_shape)) // outputs
    if values is None:
        low, high = _products(x_low, x_high, *w.scalar)
        return Interval.of_range(low * taps, high * taps)
    flat = np.moveaxis(values, kernel_layout.index("O"), 0).reshape(outputs, -1)
    channel = _channel_bounds(x, layout, ops.shape_of(call.args[0]))
    if channel is not None and groups > 1 and len(channel[0]) == groups and taps == int(np.prod([kernel_shape[kernel_layout.index(c)] for c in "HW"])):
        # Depthwise: every output channel reads one input channel, so that channel's own bounds apply.
        per_output = outputs // groups
        lows, highs = (np.repeat(c, per_output)[:, None] for c in channel)
    else:
        lows, highs = np.array([[x_low]]), np.array([[x_high]])
    low = np.minimum(flat * lows, flat * highs).sum(axis=1)
    high = np.maximum(flat * lows, flat * highs).sum(axis=1)
    shape = [1] * 4
    shape[out_axis] = -1
    return Interval(low.reshape(shape), high.reshape(shape))


def _channel_bounds(x: Interval, layout: str, shape: tuple[int, ...]) -> tuple[Array, Array] | None:
    axis, rank = layout.index("C"), 4
    result = []
    for array, reduce in ((x.low, np.min), (x.high, np.max)):
        full = np.asarray(array)
        full = full.reshape((1,) * (rank - full.ndim) + full.shape) if full.ndim <= rank else full
        others = tuple(i for i in range(rank) if i != axis)
        result.append(np.broadcast_to(reduce(full, axis=others), (shape[axis],)))
    return result[0], result[1]


def _products(a_low: int, a_high: int, b_low: int, b_high: int) -> tuple[int, int]:
    corners = [a * b for a in (a_low, a_high) for b in (b_low, b_high)]
    return min(corners), max(corners)


def _matmul(call: relax.Call, a: Interval, b: Interval) -> Interval:
    depth = ops.shape_of(call.args[0])[-1]
    shape = ops.shape_of(call.args[1])
    if len(shape) >= 2 and np.shape(b.low) == shape and np.array_equal(b.low, b.high):
        low, high = a.scalar
        lows = np.minimum(b.low * low, b.low * high).sum(axis=-2, keepdims=len(ops.shape_of(call.args[0])) > 1)
        highs = np.maximum(b.low * low, b.low * high).sum(axis=-2, keepdims=len(ops.shape_of(call.args[0])) > 1)
        return _compact(lows, highs)
    low, high = _products(*a.scalar, *b.scalar)
    return Interval.of_range(low * depth, high * depth)


def _sum_pool2d(call: relax.Call, x: Interval) -> Interval:
    count = int(np.prod([int(k) for k in call.attrs["pool_size"]]))
    return Interval(np.asarray(x.low) * count, np.asarray(x.high) * count)


def _sum(call: relax.Call, x: Interval) -> Interval:
    shape = ops.shape_of(call.args[0])
    count = int(np.prod(shape)) // max(1, int(np.prod(ops.shape_of(call)) if call.ty is not None else 1))
    low, high = x.scalar
    return Interval.of_range(low * count, high * count)


# -- element by element ------------------------------------------------------------------------------


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[relax.Call, Interval, Interval], Interval]:
    def rule(_: relax.Call, a: Interval, b: Interval) -> Interval:
        corners = [function(np.asarray(x), np.asarray(y)) for x in (a.low, a.high) for y in (b.low, b.high)]
        low, high = corners[0], corners[0]
        for c in corners[1:]:
            low, high = np.minimum(low, c), np.maximum(high, c)
        return _compact(low, high)

    return rule


def _requantize(call: relax.Call, data: Any, *_: Any) -> Interval:
    multipliers = [ops.const_value(m).astype(np.int64) for m in call.args[1].fields]
    offset, shift = (ops.const_value(a).astype(np.int64) for a in call.args[2:4])
    attrs = call.attrs
    ends = []
    for lowest in (True, False):
        operands = [
            np.where(m >= 0, x.low if lowest else x.high, x.high if lowest else x.low)
            for x, m in zip(data, multipliers, strict=True)
        ]
        ends.append(
            arith.requantize(
                operands, list(multipliers), offset, shift, rounding=str(attrs["rounding"]),
                zero_point=int(attrs["zero_point"]), qmin=int(attrs["qmin"]), qmax=int(attrs["qmax"]),
            )  # fmt: skip
        )
    return _compact(*ends)


def _declared(call: relax.Call, *_: Any) -> Interval:
    return Interval.of_range(int(call.attrs["qmin"]), int(call.attrs["qmax"]))


def _lookup(call: relax.Call, *_: Any) -> Interval:
    table = ops.const_value(call.args[1])
    return Interval.of_range(int(table.min()), int(table.max()))


def _where(_: relax.Call, condition: Any, a: Interval, b: Interval) -> Interval:
    del condition
    return _compact(np.minimum(a.low, b.low), np.maximum(a.high, b.high))


def _concat(_: relax.Call, parts: Sequence[Interval]) -> Interval:
    return Interval.of_range(min(p.scalar[0] for p in parts), max(p.scalar[1] for p in parts))


def _pad(call: relax.Call, x: Interval, *_: Any) -> Interval:
    value = int(call.attrs.pad_value)
    return _compact(np.minimum(x.low, value), np.maximum(x.high, value))


def _dilate(call: relax.Call, x: Interval) -> Interval:
    fill = int(call.attrs["fill"])
    return _compact(np.minimum(x.low, fill), np.maximum(x.high, fill))


def _argument(call: relax.Call, *_: Any) -> Interval:
    return Interval.of_range(0, max(ops.shape_of(call.args[0])) - 1)


def _clip(call: relax.Call, x: Interval, *_: Any) -> Interval:
    low, high = (int(getattr(a, "value", 0)) for a in call.args[1:3])
    return _compact(np.clip(x.low, low, high), np.clip(x.high, low, high))


def _unpack(call: relax.Call, *_: Any) -> Interval:
    values = arith.unpack_int4(ops.const_value(call.args[0]), tuple(int(d) for d in call.attrs["shape"]), bool(int(call.attrs["signed"])))
    return Interval(values.astype(np.int64), values.astype(np.int64))


def _dynamic(*_: Any) -> tuple[Interval, ...]:
    u8 = Interval.of_range(0, 255)
    return u8, u8, u8


_MOVING = frozenset(
    f"relax.{n}"
    for n in (
        "reshape", "flatten", "squeeze", "expand_dims", "permute_dims", "broadcast_to", "strided_slice", "take", "flip",
        "tile", "repeat", "max", "min",
    )
)  # fmt: skip


def _moved(call: relax.Call, x: Interval) -> Interval:
    if ops.op_name(call) == "relax.permute_dims" and call.attrs.axes is not None and np.ndim(x.low) == len(call.attrs.axes):
        axes = [int(a) for a in call.attrs.axes]
        full = np.broadcast_arrays(x.low, x.high)
        return Interval(full[0].transpose(axes), full[1].transpose(axes))
    return x.collapse()


_RULES: dict[str, Callable[..., Any]] = {
    "relax.nn.conv2d": _conv2d,
    "relax.matmul": _matmul,
    "hawq.sum_pool2d": _sum_pool2d,
    "relax.sum": _sum,
    "relax.add": _binary(np.add),
    "relax.subtract": _binary(np.subtract),
    "relax.multiply": _binary(np.multiply),
    "relax.maximum": _binary(np.maximum),
    "relax.minimum": _binary(np.minimum),
    "relax.clip": _clip,
    "relax.astype": lambda call, x: x,
    "relax.where": _where,
    "relax.greater_equal": lambda call, a, b: Interval.of_range(0, 1),
    "relax.concat": _concat,
    "relax.split": lambda call, x: tuple(x.collapse() for _ in call.ty.fields),
    "relax.nn.pad": _pad,
    "relax.nn.max_pool2d": lambda call, x: x,
    "relax.argmax": _argument,
    "relax.argmin": _argument,
    "hawq.dilate2d": _dilate,
    "hawq.requantize": _requantize,
    "hawq.quantize": _declared,
    "hawq.dequantize": lambda call, *_: Interval.of_range(0, 0),
    "hawq.dynamic_quantize": _dynamic,
    "hawq.softmax": _declared,
    "hawq.lookup": _lookup,
    "hawq.unpack_int4": _unpack,
}

# -- a whole module ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerMargin:
    """The room an accumulator (or a requantize's 64-bit sum) leaves: worst |value|, the type's limit, spare bits."""

    layer: str
    kind: str
    dtype: str
    worst: int
    limit: int

    @property
    def spare_bits(self) -> float:
        """log2(limit / worst): 1.0 means the worst case could double."""
        return float(np.log2(self.limit / max(self.worst, 1)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "layer": self.layer, "kind": self.kind, "dtype": self.dtype, "worst": self.worst, "limit": self.limit,
            "spare_bits": round(self.spare_bits, 2),
        }  # fmt: skip


class _Walk:
    """Intervals of every binding of `main`, calls of private functions walked into; margins as they are met."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.named: dict[str, Interval] = {}
        self.margins: list[LayerMargin] = []

    def run(self) -> None:
        main = self.module["main"]
        attrs = main.attrs or {}
        types = [str(t) for t in attrs["hawq.input_types"]] if "hawq.input_types" in attrs else []
        env: dict[relax.Var, Any] = {}
        for i, p in enumerate(main.params):
            low, high = arith.RANGES.get(types[i] if i < len(types) else ops.dtype_of(p), (0, 0))
            env[p] = Interval.of_range(low, high)
        outside = stages.float_tail(main)
        self._function(main, env, lambda name, value: self.named.__setitem__(name, value), "", outside)

    def _function(self, func: relax.Function, env: dict[relax.Var, Any], record: Callable[[str, Any], None], layer: str, outside: set[str]) -> Any:
        for b in stages.bindings(func):
            name = layer or b.var.name
            if b.var.name in outside or (stages.is_float(b.var) and ops.op_name(b.value) not in ("hawq.dynamic_quantize",)):
                env[b.var] = Interval.of_range(0, 0)
                continue
            env[b.var] = self._expr(b.value, env, name)
            record(b.var.name, env[b.var])
        return self._expr(func.body.body, env, layer)

    def _expr(self, expr: relax.Expr, env: dict[relax.Var, Any], layer: str) -> Any:
        if isinstance(expr, relax.Var):
            return env[expr]
        if ops.is_const(expr):
            array = ops.const_value(expr)
            return Interval(array.astype(np.int64), array.astype(np.int64)) if array.dtype.kind in "iub" else Interval.of_range(0, 0)
        if isinstance(expr, relax.Tuple):
            return tuple(self._expr(f, env, layer) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._expr(expr.tuple_value, env, layer)[expr.index]
        if not isinstance(expr, relax.Call):
            return Interval.of_range(0, 0)
        args = [self._expr(a, env, layer) for a in expr.args]
        if isinstance(expr.op, tvm.ir.GlobalVar):
            func = self.module[expr.op]
            return self._function(func, dict(zip(func.params, args, strict=True)), lambda *_: None, layer, set())
        result = interval_of(expr, args)
        self._measure(expr, args, result, layer)
        return result

    def _measure(self, call: relax.Call, args: list[Any], result: Any, layer: str) -> None:
        name = ops.op_name(call)
        if name == "hawq.requantize":
            worst = _requantize_bound(call, args[0])
            self._margin(LayerMargin(layer, "requantize", "int64", worst, 2**63))
            return
        if not isinstance(result, Interval) or stages.is_float(call):
            return
        dtype = ops.dtype_of(call)
        if dtype not in ("int16", "int32", "int64") or name in _MOVING or name in ("relax.nn.pad", "hawq.quantize", "relax.astype"):
            return
        low, high = result.scalar
        limit = 2 ** (int(dtype[3:]) - 1)
        kind = name.removeprefix("relax.").removeprefix("nn.").removeprefix("hawq.")
        # -2^31 itself fits int32, so a lower bound counts one less.
        self._margin(LayerMargin(layer, kind, dtype, max(high, -low - 1), limit))

    def _margin(self, margin: LayerMargin) -> None:
        self.margins.append(margin)
        if margin.worst >= margin.limit:
            raise OverflowBoundError(
                f"the {margin.kind} accumulator can overflow {margin.dtype}", where=margin.layer,
                expected=f"a worst case below {margin.limit}", found=str(margin.worst),
                remedy="use fewer bits, a shorter sum, or smaller weights in this layer",
            )  # fmt: skip


def _requantize_bound(call: relax.Call, data: Sequence[Interval]) -> int:
    """sum |x_i| |m_i| + |b| + 2^(s-1) in exact Python integers, the largest over the channels."""
    multipliers = [np.abs(ops.const_value(m).astype(np.int64)).astype(object) for m in call.args[1].fields]
    offset, shift = (ops.const_value(a).astype(np.int64).astype(object) for a in call.args[2:4])
    reach = [np.maximum(np.abs(np.asarray(x.low, np.int64)), np.abs(np.asarray(x.high, np.int64))).astype(object) for x in data]
    total = abs(offset) + np.vectorize(lambda s: 1 << max(int(s) - 1, 0), otypes=[object])(shift)
    for x, m in zip(reach, multipliers, strict=True):
        small = m if np.size(m) * np.size(x) <= LARGEST_KEPT else np.max(m)
        total = total + (x if np.size(m) * np.size(x) <= LARGEST_KEPT else np.max(x)) * small
    return int(np.max(total))


def module_ranges(module: tvm.IRModule) -> dict[str, Interval]:
    """The interval of every integer binding of `main` by name, for INTEGER and PACKED modules."""
    walk = _Walk(module)
    walk.run()
    return walk.named


def margins(module: tvm.IRModule) -> list[LayerMargin]:
    """The margin of every accumulator and requantize, in order of execution.

    Raises OverflowBoundError naming the first layer whose worst case does not fit.
    """
    walk = _Walk(module)
    walk.run()
    return walk.margins
