"""The operators of I-BERT's arithmetic: types of their results, constructors, intervals, the largest numbers inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax

from . import arith, ibert, ops
from .intervals import Interval

WORD = (1 << 31) - 1
POLYNOMIALS = ("hawq.i_erf", "hawq.i_gelu")
NAMES = (*POLYNOMIALS, "hawq.i_softmax", "hawq.i_layer_norm")


def infer(call: relax.Call, _: Any) -> relax.TensorType:
    """The type of a result: the operand's shape."""
    return relax.TensorType(ops.shape_of(call.args[0]), str(call.attrs["out_dtype"]))


for _name in NAMES:
    ops.register(_name, infer)


def _call(name: str, args: list[relax.Expr], **attrs: Any) -> relax.Call:
    return relax.Call(tvm.ir.Op.get(name), args, attrs=tvm.ir.make_node("ir.DictAttrs", **attrs))


def i_gelu(x: relax.Expr, numbers: ibert.Polynomial, shape: Sequence[int], bounds: tuple[Any, Any]) -> relax.Call:
    """(A28) of integers: i-GELU, or i-erf where the numbers are its; shape: that of its constants, which broadcast;
    bounds: of the integers.

    The result is int32 where all of the arithmetic keeps to it, else int64.
    """
    arrays = [np.array(v, np.int64).reshape(shape) for v in (numbers.corner, numbers.constant, numbers.one) if v]
    low, high = _polynomial_bounds(bounds, arrays, numbers.shift)
    least, most = (int(f(b)) for f, b in zip((np.min, np.max), bounds, strict=True))
    reach = max(-least, most, -int(np.min(low)), int(np.max(high)))
    small = max(max(numbers.corner) ** 2, 2 * max(numbers.constant), reach) <= WORD
    dtype = "int32" if small else "int64"
    return _call(
        "hawq.i_gelu" if numbers.one else "hawq.i_erf",
        [x, *(ops.const(c, dtype) for c in arrays)],
        shift=numbers.shift,
        out_dtype=dtype,
        distance=[float(d) for d in numbers.distance],
    )


def i_softmax(
    x: relax.Expr,
    numbers: ibert.Softmax,
    *,
    axis: int,
    scale: float,
    multiplier: int,
    shift: int,
    qtype: arith.QType,
    zero_point: int,
    rounding: str = "half_even",
    fixed: bool = False,
) -> relax.Call:
    """(A29) along `axis`; scale: that of the scores after they were made finer.

    fixed: whether its scale is one that no model asked for, so that the proof hands its distance on.
    """
    return _call(
        "hawq.i_softmax",
        [x],
        axis=axis,
        **{k: int(v) for k, v in asdict(numbers).items()},
        scale=float(scale),
        multiplier=multiplier,
        shift=shift,
        qmin=qtype.qmin,
        qmax=qtype.qmax,
        out_dtype=qtype.storage,
        zero_point=int(zero_point),
        rounding=rounding,
        **({"bound": 0.0} if fixed else {}),
    )


def i_layer_norm(x: relax.Expr, axes: Sequence[int], zero_point: int) -> relax.Call:
    """(A30) each row over `axes` without its mean and divided by its deviation, in int32 of scale sqrt(n) / 2^30."""
    axes = sorted(int(a) for a in axes)
    return _call("hawq.i_layer_norm", [x], axes=axes, zero_point=int(zero_point), out_dtype="int32")


def softmax_numbers(call: relax.Call) -> ibert.Softmax:
    """What a call of hawq.i_softmax computes its exponents with."""
    return ibert.Softmax(*(int(call.attrs[k]) for k in ("left", "ln2", "shifted", "constant", "up")))


def row_length(call: relax.Call) -> int:
    """n of a call of hawq.i_layer_norm."""
    shape = ops.shape_of(call.args[0])
    return prod(shape[int(a)] for a in call.attrs["axes"])


# -- intervals -------------------------------------------------------------------------------------

_gelu_ends = np.frompyfunc(ibert.gelu_bounds, 6, 2)


def _polynomial_bounds(bounds: tuple[Any, Any], constants: Sequence[Any], shift: int) -> tuple[Any, Any]:
    """Bounds of (A28) for each channel, in Python's integers."""
    if len(constants) == 2:
        most = np.asarray((constants[1] >> shift) + 1, object)
        return -most, most
    numbers = (np.asarray(v).astype(object) for v in (*bounds, *constants))
    low, high = _gelu_ends(*numbers, shift)
    return np.asarray(low, object), np.asarray(high, object)


def polynomial_interval(call: relax.Call, x: Interval, *_: Any) -> Interval:
    """Bounds of i-GELU or i-erf (A28)."""
    constants = [ops.const_value(a).astype(np.int64) for a in call.args[1:]]
    low, high = _polynomial_bounds((x.low, x.high), constants, int(call.attrs["shift"]))
    return Interval(low.astype(np.int64), high.astype(np.int64))


def layer_norm_interval(call: relax.Call, *_: Any) -> Interval:
    """|q - mean| is an integer whose square is one of those summed: no more than their root."""
    return Interval.of_range(-(1 << ibert.NORMALIZED_BITS), 1 << ibert.NORMALIZED_BITS)


def worst(call: relax.Call, x: Interval) -> tuple[str, str, int, int]:
    """An operator's kind, the type of what it computes with, the largest number inside it, and what that must be
    below.
    """
    name, (low, high) = ops.op_name(call), x.scalar
    if name in POLYNOMIALS:
        corner, constant = (ops.const_value(a).astype(object) for a in call.args[1:3])
        inside = int(np.max(np.maximum(corner * corner, 2 * constant)))
        least, most = polynomial_interval(call, x).scalar
        dtype = str(call.attrs["out_dtype"])
        return name.removeprefix("hawq."), dtype, max(inside, -least, most, -low, high), arith.RANGES[dtype][1] + 1
    if name == "hawq.i_softmax":
        numbers, count = softmax_numbers(call), ops.shape_of(call.args[0])[int(call.attrs["axis"])]
        half = 1 << int(call.attrs["shift"]) + (count << ibert.WORD_BITS).bit_length() - 1
        inside = (int(call.attrs["multiplier"]) << ibert.WORD_BITS + 1) + half
        return "i_softmax", "int64", max(inside, high - low, numbers.shifted**2 + numbers.constant), 1 << 63
    zero, n = int(call.attrs["zero_point"]), row_length(call)
    inside = max(n * (high - low) ** 2, 2 * n * max(high - zero, zero - low, 1) + n)
    return "i_layer_norm", "int64", inside, 1 << 63
