"""The interval of one integer operator's result from the intervals of its arguments: one rule per operator (A21).

Bounds are kept per channel where an operator keeps channels apart, else one pair stands for the tensor. They are
worked out from the real weights and hold for every input whatever. Arithmetic on bounds is exact: it moves from
int64 to Python's integers where int64 could overflow, so that a bound too large for any type is still seen as that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from . import arith, interpolation, ops
from .attributes import Conv2d, Pad, Pool2d
from .interpolation import Steps
from .layer_norm import norm_of

Array = NDArray[Any]

# Larger arrays of bounds are collapsed to one pair; weights are the exception, the sums of products need them whole.
LARGEST_KEPT = 1 << 16
# Sums and products of float64 estimates below this stay exact in int64, with room for the estimate's own error.
_SAFE = 2.0**62
# Integers below this are exact in float64, and so are sums of them that stay below it.
_EXACT_FLOAT, _EXACT_SINGLE = 2.0**53, 2.0**24
_AT_ONCE = 1 << 15


@dataclass(frozen=True, eq=False)
class Interval:
    """Inclusive bounds of a tensor's elements: int64 arrays that broadcast against it.

    A bound that leaves int64 is held as Python integers in an object array.
    """

    low: Any
    high: Any

    @staticmethod
    def of_range(low: int, high: int) -> Interval:
        """The same bounds for every element."""
        return Interval(_scalar(low), _scalar(high))

    @property
    def scalar(self) -> tuple[int, int]:
        """The bounds over the whole tensor."""
        return int(np.min(self.low)), int(np.max(self.high))

    def collapse(self) -> Interval:
        """One pair for the whole tensor."""
        return Interval.of_range(*self.scalar)

    @property
    def holds_zero(self) -> bool:
        """Whether every element may be 0."""
        return bool(np.max(self.low) <= 0 <= np.min(self.high))

    def with_zero(self) -> Interval:
        """The smallest interval that holds this one and 0."""
        return Interval(np.minimum(self.low, 0), np.maximum(self.high, 0))


class _Constant(Interval):
    """The interval of a constant, whose bounds are made of its elements when somebody asks for them: few read those of
    weights.
    """

    values: Array

    def __init__(self, values: Array) -> None:
        object.__setattr__(self, "values", values)

    @cached_property
    def low(self) -> Any:
        return self.values.astype(np.int64)

    @property
    def high(self) -> Any:
        return self.low


Bounds = Interval | tuple[Any, ...]


def constant(array: Array) -> Interval:
    """The interval of a constant: each element is its own bound."""
    return _Constant(array)


# -- exact arithmetic on bounds --------------------------------------------------------------------


def _scalar(value: int) -> Any:
    return np.int64(value) if -(2**63) <= value < 2**63 else np.array([value], object)


def _object(array: Any) -> Array:
    """Python's integers, in one dimension at least: NumPy turns what it computes without any into fixed-size
    integers.
    """
    return np.atleast_1d(np.asarray(array).astype(object))


def _int64(array: Any) -> Array:
    return np.asarray(array).astype(np.int64)


def _compact(low: Any, high: Any) -> Interval:
    if max(np.size(low), np.size(high)) > LARGEST_KEPT:
        return Interval.of_range(int(np.min(low)), int(np.max(high)))
    return Interval(np.asarray(low), np.asarray(high))


def _largest(x: Any) -> float:
    return float(max(abs(int(np.min(x))), abs(int(np.max(x))))) if np.size(x) else 0.0


def _exact(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """function(a, b), a sum, difference or product, in int64 or, where that could overflow, in Python's integers."""
    a, b = np.asarray(a), np.asarray(b)
    if max(_largest(a) + _largest(b), _largest(a) * _largest(b)) >= _SAFE:
        a, b = _object(a), _object(b)
    return np.asarray(function(a, b))


def _scaled(x: Interval, count: int) -> Interval:
    """The interval of a sum of `count` such values."""
    return Interval(_exact(np.multiply, x.low, count), _exact(np.multiply, x.high, count))


def _products(a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in a.scalar for y in b.scalar]
    return Interval.of_range(min(corners), max(corners))


def _kept(x: Interval, shape: tuple[int, ...], axes: Sequence[int]) -> Interval:
    """The interval with its bounds told apart along `axes` of a tensor of `shape` only."""
    sides = []
    for array, reduce in ((x.low, np.min), (x.high, np.max)):
        full = np.asarray(array).reshape((1,) * (len(shape) - np.ndim(array)) + np.shape(array))
        sides.append(reduce(full, axis=tuple(i for i in range(len(shape)) if i not in axes), keepdims=True))
    return Interval(*sides)


def _known(x: Interval, shape: tuple[int, ...]) -> Array | None:
    """The values of a constant of `shape`, when the interval is that of one."""
    if isinstance(x, _Constant):
        return x.values if x.values.shape == shape else None
    return x.low if np.shape(x.low) == shape and (x.low is x.high or np.array_equal(x.low, x.high)) else None


# -- sums of products --------------------------------------------------------------------------------


def _contributions(weights: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """(A21): the least and the greatest sums of weights (groups, outputs, inputs) times inputs between their bounds
    (groups, inputs), by group and output.
    """
    largest = max(_largest(low), _largest(high))
    heaviest = 255.0 if weights.dtype.itemsize == 1 else _largest(weights)
    bounds = np.stack([low, high], axis=-1)
    if 2 * heaviest * largest * weights.shape[-1] >= _EXACT_FLOAT:
        weights, bounds = _object(weights), _object(bounds)
        return _ends(np.maximum(weights, 0) @ bounds, np.minimum(weights, 0) @ bounds)
    uniform = bool(np.all(low == low.flat[0]) and np.all(high == high.flat[0]))
    if uniform and heaviest * weights.shape[-1] < _EXACT_SINGLE:
        every, positive = _summed(weights)
        pair = np.array([low.flat[0], high.flat[0]], np.int64)
        return _ends(positive[..., None] * pair, (every - positive)[..., None] * pair)
    bounds = bounds.astype(np.float64)
    ends = np.empty((2, *weights.shape[:2]), np.int64)
    # A few outputs at a time, whose weights as float64 fit in a cache.
    step = max(1, _AT_ONCE // (weights.shape[0] * weights.shape[-1]))
    for start in range(0, weights.shape[1], step):
        part = weights[:, start : start + step].astype(np.float64)
        all_ = part @ bounds
        positive = np.maximum(part, 0, out=part) @ bounds
        ends[:, :, start : start + step] = _ends(positive, all_ - positive)
    return ends[0], ends[1]


def _summed(weights: Array) -> Array:
    """The sums along the last axis, of all and of those above 0, which float32 holds exactly."""
    flat, one = weights.reshape(-1, weights.shape[-1]), np.ones(weights.shape[-1], np.float32)
    sums = np.empty((2, len(flat)), np.int64)
    step = max(1, _AT_ONCE // flat.shape[1])
    for start in range(0, len(flat), step):
        part = flat[start : start + step].astype(np.float32)
        sums[0, start : start + step] = part @ one
        sums[1, start : start + step] = np.maximum(part, 0, out=part) @ one
    return sums.reshape(2, *weights.shape[:-1])


def _ends(positive: Array, negative: Array) -> tuple[Array, Array]:
    """The least and the greatest sums, from the positive and the negative weights' with both bounds."""
    return positive[..., 0] + negative[..., 1], positive[..., 1] + negative[..., 0]


def conv2d(call: relax.Call, x: Interval, w: Interval) -> Interval:
    a = Conv2d.of(call)
    layout, groups = a.data_layout, a.groups
    shape, kernel_shape = ops.shape_of(call.args[0]), ops.shape_of(call.args[1])
    order = [a.kernel_layout.index(c) for c in "OIHW"]
    outputs, inputs = kernel_shape[order[0]], kernel_shape[order[1]]
    values = _known(w, kernel_shape)
    if values is None:
        return _scaled(_products(x, w), int(np.prod(kernel_shape)) // outputs)
    flat = values.transpose(order).reshape(groups, outputs // groups, -1)
    channel = _kept(x, shape, [layout.index("C")])
    # Every group of outputs reads its own inputs, each with its own bounds, at every place of the kernel.
    ends = (
        np.repeat(np.broadcast_to(np.ravel(b), groups * inputs).reshape(groups, -1), flat.shape[2] // inputs, axis=1)
        for b in (channel.low, channel.high)
    )
    low, high = _contributions(flat, *ends)
    result = [1] * 4
    result[layout.index("C")] = outputs
    return Interval(low.reshape(result), high.reshape(result))


def matmul(call: relax.Call, a: Interval, b: Interval) -> Interval:
    left, right = ops.shape_of(call.args[0]), ops.shape_of(call.args[1])
    values = _known(b, right)
    if values is None or len(right) < 2:
        return _scaled(_products(a, b), left[-1])
    # Per column: (..., K, N) transposed to (..., N, K) against the bounds of a's last axis.
    columns = np.swapaxes(values, -1, -2)
    inner = _kept(a, left, [len(left) - 1])
    ends = (np.broadcast_to(np.ravel(b), (1, left[-1])) for b in (inner.low, inner.high))
    low, high = (e.reshape(columns.shape[:-1]) for e in _contributions(columns.reshape(1, -1, left[-1]), *ends))
    if len(left) > 1:
        low, high = low[..., None, :], high[..., None, :]
    return _compact(low, high)


def sum_pool2d(call: relax.Call, x: Interval) -> Interval:
    count = prod(Pool2d.of(call).size)
    return _scaled(per_channel(call, x), count)


def sum_(call: relax.Call, x: Interval) -> Interval:
    before, after = (int(np.prod(ops.shape_of(e))) for e in (call.args[0], call))
    return _scaled(x.collapse(), before // max(after, 1))


# -- element by element ------------------------------------------------------------------------------


def binary(name: str) -> Callable[[relax.Call, Interval, Interval], Interval]:
    """The rule of a NumPy function of two operands, monotone in each: its extremes are at the ends of the operands."""
    function = getattr(np, name)

    def rule(_: relax.Call, a: Interval, b: Interval) -> Interval:
        corners = [_exact(function, x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
        low = high = corners[0]
        for corner in corners[1:]:
            low, high = np.minimum(low, corner), np.maximum(high, corner)
        return _compact(low, high)

    return rule


def requantize(call: relax.Call, data: Sequence[Interval], *_: Any) -> Interval:
    """(A9) is monotone in every operand, rising where its multiplier is positive: the ends go to the ends.

    Where the 64-bit sum itself could overflow, which `ranges.margins` reports, the declared range is all that is known.
    """
    attrs = call.attrs
    if requantize_worst(call, data) >= arith.INT64_LIMIT:
        return declared(call)
    multipliers = [ops.const_value(m).astype(np.int64) for m in call.args[1].fields]
    offset, shift = (ops.const_value(a).astype(np.int64) for a in call.args[2:4])
    ends = []
    for near, far in (("low", "high"), ("high", "low")):
        operands = [np.where(m >= 0, getattr(x, near), getattr(x, far)) for x, m in zip(data, multipliers, strict=True)]
        end = arith.requantize(
            operands,
            list(multipliers),
            offset,
            shift,
            rounding=str(attrs["rounding"]),
            zero_point=int(attrs["zero_point"]),
            qmin=int(attrs["qmin"]),
            qmax=int(attrs["qmax"]),
        )
        ends.append(end)
    return _compact(*ends)


def requantize_worst(call: relax.Call, data: Sequence[Interval]) -> int:
    """The largest magnitude inside a requantize, over all channels, in Python's integers.

    sum |x_i| |m_i| + |b| + 2^(s-1) (2^s if directed) of section 7, or (|x| << max(0, 31 - s)) |m| + 2^30 for the
    rounding "double" (A8).
    """
    multipliers = [ops.const_value(m) for m in call.args[1].fields]
    offset, shift, rounding = ops.const_value(call.args[2]), ops.const_value(call.args[3]), str(call.attrs["rounding"])
    reach = sum(max(_largest(x.low), _largest(x.high)) * _largest(m) for x, m in zip(data, multipliers, strict=True))
    small = rounding != "double" and reach + _largest(offset) + 2.0 ** int(np.max(shift, initial=0)) < _SAFE
    of = _int64 if small else _object
    magnitudes = [_magnitude(np.maximum(-of(x.low), of(x.high))) for x in data]
    multipliers = [_magnitude(of(m)) for m in multipliers]
    if rounding == "double":
        left = _power(np.maximum(31 - shift.astype(np.int64), 0))
        return int(np.max(_times(_times(magnitudes[0], left), multipliers[0]))) + (1 << 30)
    total = _magnitude(of(offset)) + arith.rounding_room(of(shift), rounding)
    for x, m in zip(magnitudes, multipliers, strict=True):
        total = total + _times(x, m)
    return int(np.max(total))


def _magnitude(array: Array) -> Array:
    return np.maximum(array, -array)


def _power(exponent: Array) -> Array:
    """2^exponent in Python's integers, 1 for a negative exponent."""
    return _object(np.vectorize(lambda e: 1 << max(int(e), 0), otypes=[object])(exponent))


def _times(a: Array, b: Array) -> Array:
    """The product where it stays small, else of the largest elements: only upper bounds are asked for."""
    return a * b if np.size(a) * np.size(b) <= LARGEST_KEPT else np.array([np.max(a) * np.max(b)], object)


def declared(call: relax.Call, *_: Any) -> Interval:
    return Interval.of_range(int(call.attrs["qmin"]), int(call.attrs["qmax"]))


def softmax(call: relax.Call, *_: Any) -> Interval:
    """From 0 to 1 / s_y = M / 2^k, which the floor of the sum's leading bits lets (A17) exceed by 2^-30 of itself."""
    attrs, (multiplier, shift, zero) = call.attrs, (int(call.attrs[n]) for n in ("multiplier", "shift", "zero_point"))
    most = -(-(multiplier + (multiplier >> arith.SOFTMAX_BITS) + 1) >> shift)
    low, high = (min(max(v + zero, int(attrs["qmin"])), int(attrs["qmax"])) for v in (0, most))
    return Interval.of_range(low, high)


def layer_norm(call: relax.Call, *_: Any) -> Interval:
    """No element of a row lies further from its mean than sqrt(n - 1) deviations (A25)."""
    most = norm_of(call.attrs, ops.shape_of(call.args[0])).largest
    return Interval.of_range(-most, most)


def lookup(call: relax.Call, x: Interval, *_: Any) -> Interval:
    """The extremes of the part of the table that the operand can reach."""
    table = ops.const_value(call.args[1]).astype(np.int64)
    lowest = int(np.iinfo(ops.dtype_of(call.args[0])).min)
    low, high = x.scalar
    reached = table[low - lowest : high - lowest + 1]
    return Interval.of_range(int(reached.min()), int(reached.max()))


def interpolate(call: relax.Call, u: Interval, *_: Any) -> Interval:
    """The extremes of the polynomials of the cells that the operand can reach (A31)."""
    return Interval.of_range(*interpolation.extremes(ops.const_value(call.args[1]), Steps.of(call.attrs), *u.scalar))


def where(_: relax.Call, condition: Any, a: Interval, b: Interval) -> Interval:
    del condition
    return _compact(np.minimum(a.low, b.low), np.maximum(a.high, b.high))


def clip(call: relax.Call, x: Interval, *_: Any) -> Interval:
    low, high = (int(bound.value) for bound in call.args[1:3])
    return _compact(np.clip(x.low, low, high), np.clip(x.high, low, high))


# -- tensors that change their shape -----------------------------------------------------------------


def per_channel(call: relax.Call, x: Interval) -> Interval:
    attrs = call.attrs
    layout = str(attrs["layout"] if ops.op_name(call).startswith("hawq.") else attrs.layout)
    return _kept(x, ops.shape_of(call.args[0]), [layout.index("C")])


def pad(call: relax.Call, x: Interval, *_: Any) -> Interval:
    a = Pad.of(call)
    kept = _kept(
        x, ops.shape_of(call.args[0]), [i for i, n in enumerate(zip(a.before, a.after, strict=True)) if not any(n)]
    )
    return _compact(np.minimum(kept.low, a.value), np.maximum(kept.high, a.value))


def dilate(call: relax.Call, x: Interval) -> Interval:
    kept, fill = per_channel(call, x), int(call.attrs["fill"])
    return Interval(np.minimum(kept.low, fill), np.maximum(kept.high, fill))


def concat(_: relax.Call, parts: Sequence[Interval]) -> Interval:
    ends = [p.scalar for p in parts]
    return Interval.of_range(min(e[0] for e in ends), max(e[1] for e in ends))


def argument(call: relax.Call, *_: Any) -> Interval:
    shape, axis = ops.shape_of(call.args[0]), call.attrs.axis
    return Interval.of_range(0, (int(np.prod(shape)) if axis is None else shape[int(axis)]) - 1)


def unpack(call: relax.Call, *_: Any) -> Interval:
    shape, signed = tuple(int(d) for d in call.attrs["shape"]), bool(int(call.attrs["signed"]))
    if not ops.is_const(call.args[0]):
        return Interval.of_range(*arith.RANGES["int4" if signed else "uint4"])
    return constant(arith.unpack_int4(ops.const_value(call.args[0]), shape, signed))


def dynamic(*_: Any) -> tuple[Interval, ...]:
    return (Interval.of_range(0, 255),) * 3


def moved(call: relax.Call, x: Interval, *_: Any) -> Interval:
    """Elements that only change their place; a transpose takes the bounds along."""
    if ops.op_name(call) == "relax.permute_dims" and call.attrs.axes is not None:
        axes, rank = [int(a) for a in call.attrs.axes], len(ops.shape_of(call.args[0]))
        sides = (
            np.asarray(b).reshape((1,) * (rank - np.ndim(b)) + np.shape(b)).transpose(axes) for b in (x.low, x.high)
        )
        return Interval(*sides)
    return x.collapse()
