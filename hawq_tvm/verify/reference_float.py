"""Float and element-moving operators of the reference, in float64, so that a model can be evaluated before lowering.

Float tensors stay float64 from one operator to the next although the module declares float32: the real formula is
what the integers are compared with, not one float32 rounding of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tvm import relax

Array = NDArray[Any]


def evaluate(call: relax.Call, args: list[Any]) -> Any:
    """One float or element-moving operator call.

    Raises NotImplementedError naming an operator that the reference does not know.
    """
    name = call.op.name
    if name in _MOVING:
        return _MOVING[name](call, *args)
    if name not in _FLOAT:
        raise NotImplementedError(f"the reference has no {name}")
    return _FLOAT[name](call, *(_f64(a) for a in args))


def _f64(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_f64(f) for f in x)
    number = isinstance(x, np.ndarray) and (x.dtype.kind in "iuf" or x.dtype.name == "bfloat16")
    return x.astype(np.float64) if number else x


def half(name: str) -> Any:
    """The type of arrays of float16 or bfloat16."""
    if name == "float16":
        return np.float16
    import ml_dtypes

    return ml_dtypes.bfloat16


def _cast(dtype: str, x: Array) -> Array:
    """Floats stay in float64, but for those that are rounded to 16 bits."""
    if dtype.endswith("float16"):
        with np.errstate(over="ignore"):
            return x.astype(half(dtype))
    return x if "float" in dtype else x.astype(dtype)


def _shape(call: relax.Call) -> tuple[int, ...]:
    return tuple(int(d) for d in call.ty.shape.values)


def _ints(values: Any) -> list[int]:
    return [int(v) for v in values]


def _pair(values: Any) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _windows(x: Array, kernel: Any, strides: Any, dilation: Any) -> Array:
    reach = tuple((int(k) - 1) * int(d) + 1 for k, d in zip(kernel, dilation, strict=True))
    view = sliding_window_view(x, reach, axis=(2, 3))  # type: ignore[call-overload]  # the 2.2 stubs want one axis
    return view[:, :, :: int(strides[0]), :: int(strides[1]), :: int(dilation[0]), :: int(dilation[1])]


def _padded(call: relax.Call, x: Array, kernel: Any, value: float) -> Array:
    """x with its declared padding, and as much more at the end as the declared output shape reads."""
    attrs = call.attrs
    top, left, bottom, right = _ints(attrs.padding)
    for axis, begin in ((0, top), (1, left)):
        reach = (
            (_shape(call)[2 + axis] - 1) * int(attrs.strides[axis])
            + (int(kernel[axis]) - 1) * int(attrs.dilation[axis])
            + 1
        )
        extra = reach - x.shape[2 + axis] - begin
        if axis == 0:
            bottom = max(bottom, extra)
        else:
            right = max(right, extra)
    return np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)], constant_values=value)


def _conv2d(call: relax.Call, x: Array, w: Array) -> Array:
    attrs = call.attrs
    groups, (outputs, inputs, *kernel) = int(attrs.groups), w.shape
    windows = _windows(_padded(call, x, kernel, 0.0), kernel, attrs.strides, attrs.dilation)
    per_group, parts = outputs // groups, []
    for g in range(groups):
        part = windows[:, g * inputs : (g + 1) * inputs]
        parts.append(np.einsum("nchwij,ocij->nohw", part, w[g * per_group : (g + 1) * per_group], optimize=True))
    return np.concatenate(parts, axis=1)[:, :, : _shape(call)[2], : _shape(call)[3]]


def _conv2d_transpose(call: relax.Call, x: Array, w: Array) -> Array:
    """Every input element adds its multiple of the kernel to the output, then the padding is cut away."""
    attrs = call.attrs
    groups, (sh, sw), (dh, dw) = int(attrs.groups), _pair(attrs.strides), _pair(attrs.dilation)
    n, inputs, h, width = x.shape
    _, per_group, kh, kw = w.shape
    eh, ew = _pair(attrs.output_padding)
    full = np.zeros(
        (n, per_group * groups, (h - 1) * sh + (kh - 1) * dh + 1 + eh, (width - 1) * sw + (kw - 1) * dw + 1 + ew)
    )
    each = inputs // groups
    for g in range(groups):
        for i in range(kh):
            for j in range(kw):
                part = np.einsum(
                    "nchw,co->nohw", x[:, g * each : (g + 1) * each], w[g * each : (g + 1) * each, :, i, j]
                )
                rows, columns = (
                    slice(i * dh, i * dh + (h - 1) * sh + 1, sh),
                    slice(j * dw, j * dw + (width - 1) * sw + 1, sw),
                )
                full[:, g * per_group : (g + 1) * per_group, rows, columns] += part
    top, left, bottom, right = _ints(attrs.padding)
    return full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right]


def _max_pool2d(call: relax.Call, x: Array) -> Array:
    attrs = call.attrs
    windows = _windows(_padded(call, x, attrs.pool_size, -np.inf), attrs.pool_size, attrs.strides, attrs.dilation)
    return windows.max(axis=(4, 5))[:, :, : _shape(call)[2], : _shape(call)[3]]


def _avg_pool2d(call: relax.Call, x: Array) -> Array:
    attrs = call.attrs
    sums = _windows(_padded(call, x, attrs.pool_size, 0.0), attrs.pool_size, attrs.strides, attrs.dilation).sum(
        axis=(4, 5)
    )
    ones = np.ones((1, 1, *x.shape[2:]))
    if bool(attrs.count_include_pad):
        top, left, bottom, right = _ints(attrs.padding)
        inner = np.pad(ones, [(0, 0), (0, 0), (top, bottom), (left, right)], constant_values=1.0)
        ones = _padded(call, inner[:, :, top:, left:], attrs.pool_size, 0.0)
        ones[:, :, :top], ones[:, :, :, :left] = 0, 0
        ones[:, :, : inner.shape[2], : inner.shape[3]] = 1
    else:
        ones = _padded(call, ones, attrs.pool_size, 0.0)
    counts = _windows(ones, attrs.pool_size, attrs.strides, attrs.dilation).sum(axis=(4, 5))
    height, width = _shape(call)[2:]
    return sums[:, :, :height, :width] / counts[:, :, :height, :width]


def _batch_norm(
    call: relax.Call, x: Array, gamma: Array, beta: Array, mean: Array, var: Array
) -> tuple[Array, Array, Array]:
    axis = int(call.attrs.axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    y = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + float(call.attrs.epsilon))
    y = y * gamma.reshape(shape) if bool(call.attrs.scale) else y
    return (y + beta.reshape(shape) if bool(call.attrs.center) else y), mean, var


def _normalized(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    return (x - x.mean(axis=axes, keepdims=True)) / np.sqrt(x.var(axis=axes, keepdims=True) + epsilon)


def _layer_norm(call: relax.Call, x: Array, gamma: Array, beta: Array) -> Array:
    y = _normalized(x, tuple(_ints(call.attrs.axes)), float(call.attrs.epsilon))
    y = y * gamma if bool(call.attrs.scale) else y
    return y + beta if bool(call.attrs.center) else y


def _rms_norm(call: relax.Call, x: Array, gamma: Array) -> Array:
    squares = np.square(x).mean(axis=tuple(_ints(call.attrs.axes)), keepdims=True)
    return x / np.sqrt(squares + float(call.attrs.epsilon)) * gamma


def _group_norm(call: relax.Call, x: Array, gamma: Array, beta: Array) -> Array:
    """Every channel a group of its own where the call names no groups; channels are axis 1."""
    groups = int(getattr(call.attrs, "num_groups", x.shape[1]))
    y = _normalized(x.reshape(x.shape[0], groups, -1), (2,), float(call.attrs.epsilon)).reshape(x.shape)
    shape = (-1,) + (1,) * (x.ndim - 2)
    return y * gamma.reshape(shape) + beta.reshape(shape)


def _prelu(call: relax.Call, x: Array, slope: Array) -> Array:
    axis = int(call.attrs.axis) % x.ndim
    slope = (
        slope.reshape([-1 if i == axis else 1 for i in range(x.ndim)]) if slope.ndim == 1 and slope.size > 1 else slope
    )
    return np.where(x >= 0, x, x * slope)


def _softmax(call: relax.Call, x: Array) -> Array:
    e = np.exp(x - x.max(axis=int(call.attrs.axis), keepdims=True))
    return e / e.sum(axis=int(call.attrs.axis), keepdims=True)


def _axes(call: relax.Call) -> tuple[int, ...] | None:
    return None if call.attrs.axis is None else tuple(_ints(call.attrs.axis))


def _reduce(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda call, x: function(x, axis=_axes(call), keepdims=bool(call.attrs.keepdims))


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _pad(call: relax.Call, x: Array, *_: Any) -> Array:
    width = _ints(call.attrs.pad_width)
    mode = str(call.attrs.pad_mode)
    pairs = list(zip(width[0::2], width[1::2], strict=True))
    if mode == "constant":
        return np.pad(x, pairs, constant_values=float(call.attrs.pad_value))
    numpy_mode: Any = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
    return np.pad(x, pairs, mode=numpy_mode)


def _simple(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda call, *args: function(*args)


def _divided(a: Array, b: Array) -> Array:
    """Infinite where b is 0, and no number for 0 / 0, as floats have it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(a, b))


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


_FLOAT: dict[str, Callable[..., Any]] = {
    "relax.nn.conv2d": _conv2d,
    "relax.nn.conv2d_transpose": _conv2d_transpose,
    "relax.matmul": _simple(np.matmul),
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.nn.avg_pool2d": _avg_pool2d,
    "relax.nn.batch_norm": _batch_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.rms_norm": _rms_norm,
    "relax.nn.instance_norm": _group_norm,
    "relax.nn.group_norm": _group_norm,
    "relax.nn.prelu": _prelu,
    "relax.nn.softmax": _softmax,
    "relax.nn.log_softmax": lambda call, x: np.log(_softmax(call, x)),
    "relax.nn.pad": _pad,
    "relax.add": _simple(np.add),
    "relax.subtract": _simple(np.subtract),
    "relax.multiply": _simple(np.multiply),
    "relax.divide": _simple(_divided),
    "relax.power": _simple(np.power),
    "relax.maximum": _simple(np.maximum),
    "relax.minimum": _simple(np.minimum),
    "relax.nn.relu": _simple(lambda x: np.maximum(x, 0)),
    "relax.nn.leakyrelu": lambda call, x: np.where(x >= 0, x, x * float(call.attrs.alpha)),
    "relax.clip": lambda call, x, low, high: np.clip(x, float(low.value), float(high.value)),
    "relax.sigmoid": _simple(_sigmoid),
    "relax.nn.silu": _simple(lambda x: x * _sigmoid(x)),
    "relax.nn.softplus": lambda call, x: np.log1p(np.exp(x * float(call.attrs.beta))) / float(call.attrs.beta),
    "relax.nn.gelu": _simple(lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2.0)))),
    "relax.nn.gelu_tanh": _simple(lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    "relax.erf": _simple(_erf),
    "relax.rsqrt": _simple(lambda x: 1.0 / np.sqrt(x)),
    "relax.square": _simple(np.square),
    "relax.round": _simple(np.rint),
    "relax.negative": _simple(np.negative),
    "relax.mean": _reduce(np.mean),
    "relax.sum": _reduce(np.sum),
    "relax.max": _reduce(np.max),
    "relax.min": _reduce(np.min),
    "relax.where": lambda call, c, a, b: np.where(c != 0, a, b),
    "relax.astype": lambda call, x: _cast(str(call.attrs.dtype), x),
    **{
        f"relax.{n}": _simple(getattr(np, n))
        for n in ("tanh", "exp", "log", "sqrt", "abs", "floor", "ceil", "sin", "cos")
    },
}


def _tuple_of_ints(expr: Any) -> list[int]:
    return [int(f.value) if hasattr(f, "value") else int(f) for f in expr]


def _strided_slice(call: relax.Call, x: Array, axes: Any, begin: Any, end: Any, *strides: Any) -> Array:
    axes, begin, end = (_tuple_of_ints(a) for a in (axes, begin, end))
    steps = _tuple_of_ints(strides[0]) if strides else [1] * len(axes)
    index: list[Any] = [slice(None)] * x.ndim
    for axis, b, e, s in zip(axes, begin, end, steps, strict=True):
        index[axis] = slice(b, None if s < 0 and e < -x.shape[axis] else e, s)
    return x[tuple(index)]


def _split(call: relax.Call, x: Array) -> tuple[Array, ...]:
    axis = int(call.attrs.axis)
    sizes = [int(f.shape.values[axis]) for f in call.ty.fields]
    return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=axis))


def _take(call: relax.Call, x: Array, index: Array) -> Array:
    return np.take(x, index.astype(np.int64), None if call.attrs.axis is None else int(call.attrs.axis))


def _reshape(call: relax.Call, x: Array, *_: Any) -> Array:
    return x.reshape(_shape(call))


_MOVING: dict[str, Callable[..., Any]] = {
    "relax.reshape": _reshape,
    "relax.flatten": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.permute_dims": lambda call, x: x.transpose(None if call.attrs.axes is None else _ints(call.attrs.axes)),
    "relax.broadcast_to": lambda call, x, *_: np.broadcast_to(x, _shape(call)),
    "relax.concat": lambda call, parts: np.concatenate(parts, axis=int(call.attrs.axis)),
    "relax.split": _split,
    "relax.strided_slice": _strided_slice,
    "relax.take": _take,
    "relax.flip": lambda call, x: np.flip(x, int(call.attrs.axis)),
    "relax.tile": lambda call, x: np.tile(x, _ints(call.attrs.repeats)),
    "relax.repeat": lambda call, x: np.repeat(
        x, int(call.attrs.repeats), None if call.attrs.axis is None else int(call.attrs.axis)
    ),
}
