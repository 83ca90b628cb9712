"""The reference: an independent NumPy evaluator of ANNOTATED, INTEGER and PACKED modules, written to be read.

It restates ARITHMETIC.md in its own words, one short function per operator, all integers in int64, and shares no code
with the kernels, the passes or `arith.py`. It also detects overflow: a result that does not fit its declared type is
an error, never a wrap. Float operators of an ANNOTATED module are in `reference_float.py`: they compute in float64, and
a quantize or dequantize rounds to float32 as (A1) and (A2) say only where it meets a float32 tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tvm
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tvm import relax

from . import reference_float, reference_ibert, reference_rounding, reference_rows

Array = NDArray[Any]
OnLayer = Callable[[str, Any], None]


class ReferenceOverflow(ArithmeticError):
    """An integer result left the type that the module declares for it."""


def evaluate(
    module: tvm.IRModule,
    inputs: Mapping[str, Array],
    on_layer: OnLayer | None = None,
    given: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The outputs of `main` by name, for inputs by name.

    on_layer: called with (name, value) of every binding of main, in order.  given: values taken instead of
    evaluating the bindings of these names, a float head's results for example.  Raises ValueError for inputs of
    another type or shape, ReferenceOverflow when an integer leaves its declared type, NotImplementedError for an
    operator the reference does not know.
    """
    main = module["main"]
    env = {p: _input(p, np.asarray(inputs[p.name])) for p in main.params}
    result = _run(module, main, env, on_layer or (lambda name, value: None), given or {})
    names = [str(n) for n in (main.attrs or {}).get("hawq.output_names", [])]
    values = [_narrow(v) for v in (result if isinstance(result, tuple) else (result,))]
    return dict(zip(names or [f"output{i}" for i in range(len(values))], values, strict=True))


def _input(param: relax.Var, value: Array) -> Array:
    dtype, shape = str(param.ty.dtype), tuple(int(d) for d in param.ty.shape.values)
    if str(value.dtype) != dtype or value.shape != shape:
        raise ValueError(f"input {param.name} is {value.dtype}{list(value.shape)}, declared {dtype}{list(shape)}")
    return value


def _narrow(value: Array) -> Array:
    return value.astype(np.float32) if value.dtype == np.float64 else value


def _run(
    module: tvm.IRModule, func: relax.Function, env: dict[relax.Var, Any], on_layer: OnLayer, given: Mapping[str, Array]
) -> Any:
    for block in func.body.blocks:
        for binding in block.bindings:
            name = binding.var.name
            env[binding.var] = given[name] if name in given else _value(module, binding.value, env)
            on_layer(name, env[binding.var])
    return _value(module, func.body.body, env)


def _value(module: tvm.IRModule, expr: relax.Expr, env: dict[relax.Var, Any]) -> Any:
    if isinstance(expr, relax.Var):
        return env[expr]
    if isinstance(expr, tvm.ir.GenericConst):
        return expr.value.numpy()
    if isinstance(expr, relax.Tuple):
        return tuple(_value(module, f, env) for f in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _value(module, expr.tuple_value, env)[expr.index]
    if not isinstance(expr, relax.Call):
        return expr
    args = [_value(module, a, env) for a in expr.args]
    if isinstance(expr.op, tvm.ir.GlobalVar):
        func = module[expr.op]
        return _run(module, func, dict(zip(func.params, args, strict=True)), lambda name, value: None, {})
    return evaluate_call(expr, args)


def evaluate_call(call: relax.Call, args: list[Any]) -> Any:
    """One operator call on given argument values."""
    name = call.op.name
    if name == "hawq.dequantize":
        return _dequantize(call, *args)
    if name in _INTEGER and "float" not in str(getattr(call.ty, "dtype", "")):
        return _fit(_INTEGER[name](call, *args), call, name)
    return reference_float.evaluate(call, args)


def _fit(result: Any, call: relax.Call, name: str) -> Any:
    """The result in the declared dtype and shape, checked."""
    if isinstance(result, tuple):
        return result
    dtype, shape = str(call.ty.dtype), tuple(int(d) for d in call.ty.shape.values)
    result = np.asarray(result)
    if result.shape != shape:
        raise ValueError(f"{name} has shape {result.shape}, declared {shape}")
    if dtype == "bool" or result.dtype == dtype:
        return result.astype(dtype)
    info = np.iinfo(dtype)
    if result.size and (result.min() < info.min or result.max() > info.max):
        raise ReferenceOverflow(f"{name} reaches {result.min()}..{result.max()}, outside {dtype}")
    return result.astype(dtype)


def _i64(x: Any) -> Array:
    return np.asarray(x).astype(np.int64)


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _magnitude(x: Array) -> int:
    """The largest |element|, in Python's integers: abs(-128) is -128 in int8."""
    return max(abs(int(x.min())), abs(int(x.max()))) if x.size else 0


def _exactly(worst: int, *arrays: Array) -> tuple[Array, ...]:
    """int64 arrays, or Python's integers when the magnitude `worst` would leave int64; `_fit` judges what comes out."""
    return tuple(_i64(a) if worst < 2**63 else _i64(a).astype(object) for a in arrays)


def _add(call: relax.Call, a: Array, b: Array) -> Array:
    a, b = _exactly(_magnitude(a) + _magnitude(b), a, b)
    return a + b


def _subtract(call: relax.Call, a: Array, b: Array) -> Array:
    a, b = _exactly(_magnitude(a) + _magnitude(b), a, b)
    return a - b


def _multiply(call: relax.Call, a: Array, b: Array) -> Array:
    a, b = _exactly(_magnitude(a) * _magnitude(b), a, b)
    return a * b


# -- section 1: the border -----------------------------------------------------------------------------


def _round_float(v: Array, rounding: str) -> Array:
    if rounding == "half_even":
        return np.rint(v)
    floor = np.floor(v)
    part = v - floor
    return floor + reference_rounding.goes_up(rounding, part > 0, part > 0.5, part == 0.5, v > 0, floor % 2 != 0)


def _quantize(call: relax.Call, x: Array, scale: Array, zero: Array) -> Array:
    """(A2); a float64 operand is the real formula of an ANNOTATED module, which is not narrowed first."""
    attrs = call.attrs
    kind = np.float64 if str(attrs["out_dtype"]) == "int32" or x.dtype == np.float64 else np.float32
    real, half = x.dtype == np.float64, str(attrs["form"])
    z = _i64(zero)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity saturates, and has no fraction
        if str(attrs["through"]):
            x = _through(x, str(attrs["through"]))
        x, scale = x.astype(kind), scale.astype(kind)
        steps = x * (kind(1.0) / scale) if str(attrs["form"]) == "reciprocal" else x / scale
        if half in ("float16", "bfloat16") and not real:
            steps = _through(steps, half).astype(kind)
        if str(attrs["form"]) == "affine":
            steps, z = steps + z.astype(kind), np.zeros_like(z)
        steps = _round_float(steps, str(attrs["rounding"]))
    low, high = int(attrs["qmin"]) - z, int(attrs["qmax"]) - z
    # Of 0 / 0 (A32).
    steps = np.where(np.isnan(steps), np.clip(-z, low, high) if half == "reciprocal" else low, steps)
    q = np.maximum(np.minimum(steps, high.astype(kind)), low.astype(kind)).astype(np.int64) + z
    return q.astype(str(attrs["out_dtype"]))


def _dequantize(call: relax.Call, q: Array, scale: Array, zero: Array) -> Array:
    """(A1); float64 scales, made by folding, are multiplied in float64 and narrowed once."""
    difference = _i64(q) - _i64(zero)
    wide = np.float64 if scale.dtype == np.float64 else np.float32
    real = (difference.astype(wide) * scale).astype(np.float32)
    if str(call.attrs["through"]):
        real = _through(real, str(call.attrs["through"]))
    return real if str(call.attrs["out_dtype"]) != "float32" else real.astype(np.float32)


def _through(x: Array, name: str) -> Array:
    """Rounded to float16 or bfloat16, ties to even."""
    with np.errstate(over="ignore"):
        return x.astype(reference_float.half(name))


def _dynamic_quantize(call: relax.Call, x: Array) -> tuple[Array, ...]:
    """(A2b)"""
    f = np.float32
    low, high = np.minimum(f(0), x.min()), np.maximum(f(0), x.max())
    scale = f((high - low) / f(255))
    scale = f(1) if scale == 0 else scale
    zero = np.rint(np.clip((f(0) - low) / scale, f(0), f(255))).astype(np.uint8)
    y = np.clip(np.rint(x / scale) + f(zero), 0, 255).astype(np.uint8)
    return y, np.asarray(scale, np.float32), zero


# -- section 3 and 4: rounding and requantize ---------------------------------------------------------------


def _divide_by_power(v: Array, s: Array, rounding: str) -> Array:
    """v / 2^s by quotient and remainder, the rounding decided by comparing twice the remainder with the divisor."""
    quotient = v >> s
    remainder = v - (quotient << s)
    half = np.where(s > 0, np.int64(1) << np.maximum(s - 1, 0), 0)
    above, tie = (remainder > half) & (s > 0), (remainder == half) & (s > 0)
    return quotient + reference_rounding.goes_up(rounding, remainder > 0, above, tie, v > 0, quotient % 2 != 0)


def _gemmlowp(x: Array, m: Array, s: Array) -> Array:
    """(A8)"""
    shifted = x << np.maximum(31 - s, 0)
    if _magnitude(x) << max(0, 31 - int(s.min())) >= 2**31:
        raise ReferenceOverflow("the left shift of a double rounding leaves int32")
    product = shifted * m
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.sign(nudged) * (np.abs(nudged) >> 31)
    return _divide_by_power(high, np.maximum(s - 31, 0), "half_away")


def _requantize(
    call: relax.Call, data: tuple[Array, ...], multipliers: tuple[Array, ...], offset: Array, shift: Array
) -> Array:
    """(A9)"""
    attrs = call.attrs
    rounding, s = str(attrs["rounding"]), _i64(shift)
    if rounding == "double":
        rounded = _gemmlowp(_i64(data[0]), _i64(multipliers[0]), s)
    else:
        total = _weighted_sum(data, multipliers, offset, 2 ** max(int(s.max()) - 1, 0))
        rounded = _divide_by_power(total, np.broadcast_to(s, np.broadcast_shapes(total.shape, s.shape)), rounding)
    return np.minimum(np.maximum(rounded + int(attrs["zero_point"]), int(attrs["qmin"])), int(attrs["qmax"]))


def _weighted_sum(data: tuple[Array, ...], multipliers: tuple[Array, ...], offset: Array, half: int) -> Array:
    """sum x_i m_i + b in int64, checked to have room for the rounding's half (section 7)."""
    worst = (
        sum(_magnitude(x) * _magnitude(m) for x, m in zip(data, multipliers, strict=True)) + _magnitude(offset) + half
    )
    (total,) = _exactly(worst, offset)
    for x, m in zip(data, multipliers, strict=True):
        x, m = _exactly(worst, x, m)
        total = total + x * m
    if worst >= 2**63 and max(total.max() + half, -(total.min() - half)) >= 2**63:
        raise ReferenceOverflow(f"a requantize's sum reaches {total.min()}..{total.max()}, too much for int64")
    return _i64(total)


# -- section 5: the layers ------------------------------------------------------------------------------------


def _exact_product(a: Array, b: Array) -> Array:
    """a @ b in integers: float64 holds every partial sum exactly while the bound below stays under 2^53."""
    bound = _magnitude(a) * _magnitude(b) * a.shape[-1]
    if bound < 2**53:
        return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
    return np.matmul(*_exactly(bound, a, b))


def _windows(x: Array, kernel: tuple[int, int], strides: tuple[int, int], dilation: tuple[int, int]) -> Array:
    """Every window of an NCHW tensor: (N, C, OH, OW, KH, KW)."""
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    view = sliding_window_view(x, reach, axis=(2, 3))  # type: ignore[call-overload]  # the 2.2 stubs want one axis
    return view[:, :, :: strides[0], :: strides[1], :: dilation[0], :: dilation[1]]


def _to_nchw(x: Array, layout: str) -> Array:
    return x if layout == "NCHW" else x.transpose(*(layout.index(c) for c in "NCHW"))


def _from_nchw(x: Array, layout: str) -> Array:
    return x if layout == "NCHW" else x.transpose(*("NCHW".index(c) for c in layout))


def _conv2d(call: relax.Call, x: Array, w: Array) -> Array:
    """(A10) without zero points: they are in the padding and in the bias."""
    attrs = call.attrs
    x = _to_nchw(np.asarray(x), str(attrs.data_layout))
    w = np.asarray(w).transpose(*(str(attrs.kernel_layout).index(c) for c in "OIHW"))
    if any(int(p) for p in attrs.padding):
        raise NotImplementedError("an integer convolution is padded explicitly")
    groups, (outputs, inputs, *kernel) = int(attrs.groups), w.shape
    windows = _windows(x, (kernel[0], kernel[1]), _pair(attrs.strides), _pair(attrs.dilation))
    batch, _, height, width = windows.shape[:4]
    taps, per_group = inputs * kernel[0] * kernel[1], outputs // groups
    parts = []
    for g in range(groups):
        patch = (
            windows[:, g * inputs : (g + 1) * inputs].transpose(0, 2, 3, 1, 4, 5).reshape(batch * height * width, taps)
        )
        kernels = w[g * per_group : (g + 1) * per_group].reshape(per_group, taps)
        parts.append(_exact_product(patch, kernels.T))
    y = np.concatenate(parts, axis=1).reshape(batch, height, width, outputs).transpose(0, 3, 1, 2)
    return _from_nchw(y, str(attrs.data_layout))


def _matmul(call: relax.Call, a: Array, b: Array) -> Array:
    return _exact_product(np.asarray(a), np.asarray(b))


def _max_pool2d(call: relax.Call, x: Array) -> Array:
    attrs = call.attrs
    if any(int(p) for p in attrs.padding) or bool(attrs.ceil_mode):
        raise NotImplementedError("an integer pool is padded explicitly")
    windows = _windows(
        _to_nchw(x, str(attrs.layout)), _pair(attrs.pool_size), _pair(attrs.strides), _pair(attrs.dilation)
    )
    return _from_nchw(windows.max(axis=(4, 5)), str(attrs.layout))


def _sum_pool2d(call: relax.Call, x: Array) -> Array:
    """(A15)"""
    attrs = call.attrs
    layout = str(attrs["layout"])
    windows = _windows(
        _to_nchw(_i64(x), layout), _pair(attrs["pool_size"]), _pair(attrs["strides"]), _pair(attrs["dilation"])
    )
    return _from_nchw(windows.sum(axis=(4, 5)), layout)


def _dilate2d(call: relax.Call, x: Array) -> Array:
    layout = str(call.attrs["layout"])
    x, (sh, sw) = _to_nchw(x, layout), _pair(call.attrs["strides"])
    n, c, h, w = x.shape
    y = np.full((n, c, (h - 1) * sh + 1, (w - 1) * sw + 1), int(call.attrs["fill"]), x.dtype)
    y[:, :, ::sh, ::sw] = x
    return _from_nchw(y, layout)


def _lookup(call: relax.Call, x: Array, table: Array) -> Array:
    """(A16)"""
    return table[_i64(x) - int(np.iinfo(x.dtype).min)]


def _interpolate(call: relax.Call, u: Array, table: Array) -> Array:
    """(A31), checked to have room in 32 bits."""
    cell, second, first, last = (2 ** int(call.attrs[name]) for name in ("cell", "second", "first", "last"))
    value, slope, curvature = (_i64(row) for row in table)
    which, place = np.divmod(_i64(u), cell)
    place = place - cell // 2
    bend = _in_32_bits(curvature[which] * place) // second
    rise = _in_32_bits((slope[which] + bend) * place) // first
    return _in_32_bits(value[which] + rise) // last


def _in_32_bits(x: Array) -> Array:
    if _magnitude(x) >= 2**31:
        raise ReferenceOverflow(f"an interpolation reaches {_magnitude(x)}, too much for int32")
    return x


def _pad(call: relax.Call, x: Array, *_: Any) -> Array:
    width = [int(v) for v in call.attrs.pad_width]
    pairs = list(zip(width[0::2], width[1::2], strict=True))
    if str(call.attrs.pad_mode) != "constant":
        raise NotImplementedError(f"padding mode {call.attrs.pad_mode}")
    return np.pad(_i64(x), pairs, constant_values=int(call.attrs.pad_value))


def _unpack_int4(call: relax.Call, packed: Array) -> Array:
    """(A20)"""
    shape = tuple(int(d) for d in call.attrs["shape"])
    flat: Array = np.empty(2 * packed.size, np.int64)
    flat[0::2], flat[1::2] = packed.ravel() % 16, packed.ravel() // 16
    flat = flat[: int(np.prod(shape))]
    return (np.where(flat >= 8, flat - 16, flat) if int(call.attrs["signed"]) else flat).reshape(shape)


def _pack_int4(call: relax.Call, x: Array) -> Array:
    """(A20)"""
    nibbles = _i64(x) % 16
    return nibbles[..., 0::2] + 16 * nibbles[..., 1::2]


def _axes(call: relax.Call) -> tuple[int, ...] | None:
    return None if call.attrs.axis is None else tuple(int(a) for a in call.attrs.axis)


def _clip(call: relax.Call, x: Array, low: Any, high: Any) -> Array:
    return np.clip(_i64(x), int(low.value), int(high.value))


def _argument(function: Callable[..., Array]) -> Callable[..., Array]:
    def op(call: relax.Call, x: Array) -> Array:
        axis = call.attrs.axis
        if axis is None:
            return np.asarray(function(x)).reshape(tuple(int(d) for d in call.ty.shape.values))
        y = function(x, axis=int(axis))
        return np.expand_dims(y, int(axis)) if bool(call.attrs.keepdims) else y

    return op


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda call, *args: function(*(_i64(a) for a in args))


_COMPARISONS = (np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal)
_TRUTHS = (*_COMPARISONS, np.logical_and, np.logical_or, np.logical_xor, np.logical_not)
_INTEGER: dict[str, Callable[..., Any]] = {
    "hawq.quantize": _quantize,
    "hawq.dynamic_quantize": _dynamic_quantize,
    "hawq.requantize": _requantize,
    "hawq.lookup": _lookup,
    "hawq.interpolate": _interpolate,
    "hawq.divide": reference_rounding.divide,
    "hawq.sum_pool2d": _sum_pool2d,
    "hawq.dilate2d": _dilate2d,
    "hawq.softmax": reference_rows.softmax,
    "hawq.softmax_wide": reference_rows.softmax_wide,
    "hawq.layer_norm": reference_rows.layer_norm,
    **reference_ibert.OPERATORS,
    "hawq.unpack_int4": _unpack_int4,
    "hawq.pack_int4": _pack_int4,
    "relax.nn.conv2d": _conv2d,
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.nn.pad": _pad,
    "relax.matmul": _matmul,
    "relax.astype": lambda call, x: x if x.dtype.kind in "iub" else np.trunc(x).astype(np.int64),
    "relax.add": _add,
    "relax.subtract": _subtract,
    "relax.multiply": _multiply,
    "relax.maximum": _wide(np.maximum),
    "relax.minimum": _wide(np.minimum),
    "relax.negative": _wide(np.negative),
    **{f"relax.{f.__name__}": (lambda call, *operands, f=f: f(*operands)) for f in _TRUTHS},
    "relax.clip": _clip,
    "relax.where": lambda call, c, a, b: np.where(c, _i64(a), _i64(b)),
    "relax.sum": lambda call, x: _exactly(_magnitude(x) * x.size, x)[0].sum(
        axis=_axes(call), keepdims=bool(call.attrs.keepdims)
    ),
    "relax.max": lambda call, x: x.max(axis=_axes(call), keepdims=bool(call.attrs.keepdims)),
    "relax.min": lambda call, x: x.min(axis=_axes(call), keepdims=bool(call.attrs.keepdims)),
    "relax.argmax": _argument(np.argmax),
    "relax.argmin": _argument(np.argmin),
}
