"""The float operators that have integer arithmetic by name, and why another has none where it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops

from . import convolution, elementwise, gather, movement, normalization, pooling
from .exact import rational
from .functions import ELEMENTWISE
from .values import INSERT, Constant, Context, Real, Value, is_uniform

BOTH_SIDES = "quantize its input and its result (quantize/dequantize pairs before and after this node)"


def why_not(ctx: Context, name: str, values: list[Any]) -> tuple[str, str]:
    """The reason and the remedy for an operator without integer arithmetic of its own."""
    if name not in ELEMENTWISE:
        return "no integer arithmetic is defined for it", "replace it by operators that have integer arithmetic"
    if all(_tabulable(v) for v in values if not isinstance(v, Constant)):
        return (
            "it can only be a table between one quantized tensor and a quantize, and nothing quantizes its result",
            "quantize its result too (a quantize/dequantize pair after this node)",
        )
    return "it can only be a table of one quantized 8 or 16-bit tensor, which its input is not", INSERT


def _tabulable(value: Any) -> bool:
    if not isinstance(value, Real):
        return not isinstance(value, relax.Var)
    if len(value.terms) != 1 or np.any(value.constant):
        return False
    (term,) = value.terms
    return (
        not term.accumulator
        and ops.dtype_of(term.data) in ("int8", "uint8", "int16", "uint16")
        and is_uniform(term.scale)
    )


def _binary(function: Callable[..., Value]) -> Handler:
    return lambda ctx, call, v: function(ctx, v[0], v[1])


def _prelu(ctx: Context, call: relax.Call, v: list[Any]) -> Any:
    if not isinstance(v[1], Constant):
        raise ctx.fail("prelu", "its slope is not constant", "make the slope an initializer")
    slope, rank = elementwise.exact(ctx, v[1], "prelu"), len(ops.shape_of(call.args[0]))
    axis = int(call.attrs.axis) % rank
    if slope.ndim == 1 and slope.size > 1:
        slope = slope.reshape([-1 if i == axis else 1 for i in range(rank)])
    return elementwise.leaky_relu(ctx, v[0], slope, "prelu")


def _clip(ctx: Context, call: relax.Call, v: list[Any]) -> Any:
    bounds = [float(getattr(b, "value", b)) for b in call.args[1:3]]
    return elementwise.clip(ctx, v[0], bounds[0], bounds[1])


Handler = Callable[[Context, relax.Call, list[Any]], Any]
HANDLERS: dict[str, Handler] = {
    "relax.nn.conv2d": lambda ctx, call, v: convolution.conv2d(ctx, call, v[0], v[1]),
    "relax.nn.conv2d_transpose": lambda ctx, call, v: convolution.conv2d_transpose(ctx, call, v[0], v[1]),
    "relax.matmul": _binary(convolution.matmul),
    "relax.add": _binary(elementwise.add),
    "relax.subtract": lambda ctx, call, v: elementwise.add(ctx, v[0], v[1], -1, "subtract"),
    "relax.multiply": _binary(elementwise.multiply),
    "relax.divide": _binary(elementwise.divide),
    "relax.negative": lambda ctx, call, v: elementwise.negate(ctx, v[0]),
    "relax.maximum": lambda ctx, call, v: elementwise.extremum(ctx, v[0], v[1], "maximum"),
    "relax.minimum": lambda ctx, call, v: elementwise.extremum(ctx, v[0], v[1], "minimum"),
    "relax.nn.relu": lambda ctx, call, v: elementwise.clip(ctx, v[0], 0.0, np.inf),
    "relax.clip": _clip,
    "relax.nn.leakyrelu": lambda ctx, call, v: elementwise.leaky_relu(
        ctx, v[0], rational(float(call.attrs.alpha)), "leaky_relu"
    ),
    "relax.nn.prelu": _prelu,
    "relax.abs": lambda ctx, call, v: elementwise.leaky_relu(ctx, v[0], rational(-1.0), "abs"),
    "relax.where": lambda ctx, call, v: elementwise.where(ctx, v[0], v[1], v[2]),
    "relax.nn.max_pool2d": lambda ctx, call, v: pooling.max_pool2d(ctx, call, v[0]),
    "relax.nn.avg_pool2d": lambda ctx, call, v: pooling.avg_pool2d(ctx, call, v[0]),
    "relax.mean": lambda ctx, call, v: pooling.reduce_sum(ctx, call, v[0], mean=True),
    "relax.sum": lambda ctx, call, v: pooling.reduce_sum(ctx, call, v[0], mean=False),
    "relax.max": lambda ctx, call, v: pooling.reduce_extremum(ctx, call, v[0], "max"),
    "relax.min": lambda ctx, call, v: pooling.reduce_extremum(ctx, call, v[0], "min"),
    "relax.argmax": lambda ctx, call, v: pooling.arg_extremum(ctx, call, v[0]),
    "relax.argmin": lambda ctx, call, v: pooling.arg_extremum(ctx, call, v[0]),
    "relax.nn.layer_norm": normalization.layer_norm,
    "relax.nn.rms_norm": normalization.rms_norm,
    "relax.nn.instance_norm": normalization.instance_norm,
    "relax.nn.group_norm": normalization.group_norm,
    "relax.nn.pad": lambda ctx, call, v: movement.pad(ctx, call, v[0]),
    **{name: (lambda ctx, call, v: movement.move(ctx, call, v[0])) for name in movement.MOVES},
    "relax.take": gather.take,
}
