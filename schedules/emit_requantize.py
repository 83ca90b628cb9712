"""The TE stage of hawq.requantize (A9): constants folded into one offset, one shift, the rounding by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hawq_tvm import arith, ops

from .emit import Array, Emission, Operand, clamp, emitter, immediate, out_shape


def shift_round(value: tirx.Expr, shift: tirx.Expr, shifts: Array, rounding: str) -> tirx.Expr:
    """(A5)-(A7) on int64; `shifts` are all the values that `shift` takes, known at compile time."""
    if not shifts.any():
        return value
    one = immediate(1, "int64")
    shift = shift.astype("int64")
    if shifts.all():
        half = one << (shift - one)
    else:
        half = tirx.Select(shift > 0, one << tirx.Max(shift - one, immediate(0, "int64")), immediate(0, "int64"))
    if rounding == "half_up":
        return (value + half) >> shift
    if rounding == "half_even":
        rounded = (value + (half - one) + ((value >> shift) & one)) >> shift
    elif rounding == "half_away":
        rounded = (value + half - (value < 0).astype("int64")) >> shift
    else:
        raise ValueError(f"unknown rounding {rounding!r}")
    return rounded if shifts.all() else tirx.Select(shift > 0, rounded, value)


def double_round(value: tirx.Expr, multiplier: tirx.Expr, shift: tirx.Expr, shifts: Array) -> tirx.Expr:
    """(A8) on int64."""
    zero, bits = immediate(0, "int64"), immediate(31, "int64")
    shift = shift.astype("int64")
    product = (value << tirx.Max(bits - shift, zero)) * multiplier
    nudge = tirx.Select(product >= zero, immediate(1 << 30, "int64"), immediate(1 - (1 << 30), "int64"))
    total = product + nudge
    high = tirx.Select(total >= zero, total >> bits, zero - ((zero - total) >> bits))
    return shift_round(high, tirx.Max(shift - bits, zero), np.maximum(shifts - 31, 0), "half_away")


@emitter("hawq.requantize")
def _requantize(e: Emission, call: relax.Call) -> te.Tensor:
    """(A9), in int64 until the shift; when every shift leaves 31 bits, the rest in int32."""
    attrs = call.attrs
    multipliers, shift = e.operands(call.args[1]), e.operand(call.args[3])
    assert shift.value is not None, "requantize takes constants"
    shifts, rounding = shift.value, str(attrs["rounding"])
    data, constant, folded = _fold_constants(e, call, rounding)
    offset = Operand(e, value=constant)
    low, high, zero_point = int(attrs["qmin"]), int(attrs["qmax"]), int(attrs["zero_point"])
    # |total| < 2^63 (ARITHMETIC.md section 7), so a shift of 34 or more leaves less than 2^29 + 1.
    narrow = bool(np.all(shifts >= 34)) and max(abs(low), abs(high), abs(zero_point)) < 1 << 29

    def element(*i: Any) -> tirx.Expr:
        if rounding == "double":
            value = data[0].at(i).astype("int64")
            rounded = double_round(value, multipliers[0].at(i).astype("int64"), shift.at(i), shifts)
        else:
            total = offset.at(i)
            for x, m in zip(data, multipliers, strict=True):
                total = total + x.at(i).astype("int64") * m.at(i).astype("int64")
            if folded:
                rounded = shift_after_half(total, shift.at(i), rounding)
            else:
                rounded = shift_round(total, shift.at(i), shifts, rounding)
        dtype = "int32" if narrow else "int64"
        if narrow:
            rounded = rounded.astype("int32")
        return clamp(rounded + immediate(zero_point, dtype), low, high, dtype).astype(str(attrs["out_dtype"]))

    return te.compute(out_shape(call), element, name="requantize")


def shift_after_half(value: tirx.Expr, shift: tirx.Expr, rounding: str) -> tirx.Expr:
    """(A5) or (A6) of v where value = v + 2^(shift-1) and shift > 0.

    value >> shift is (A5). A tie is where the bits shifted out are all zero: there (A5) went up, and when that is
    odd, (A6) is the even number below it.
    """
    one, shift = immediate(1, "int64"), shift.astype("int64")
    rounded = value >> shift
    if rounding == "half_up":
        return rounded
    tie = (value & ((one << shift) - one)).equal(immediate(0, "int64"))
    return tirx.Select(tie, rounded & immediate(-2, "int64"), rounded)


def _fold_constants(e: Emission, call: relax.Call, rounding: str) -> tuple[list[Operand], Array, bool]:
    """The operands without the constants added to them (a bias), those times m in the offset, and half of 2^shift.

    (x + c) m + b = x m + (c m + b) exactly. Nothing is folded where a sum could then leave 64 bits, judged by the
    types alone. Returns the operands, the offset, and whether 2^(shift-1) is in it.
    """
    fields = e.tuple_fields(call.args[0])
    multipliers = [ops.const_value(m).astype(np.int64) for m in e.tuple_fields(call.args[1])]
    offset, shifts = (ops.const_value(a).astype(np.int64) for a in call.args[2:])
    plain = [e.operand(f) for f in fields]
    if rounding == "double":
        return plain, offset, False
    data, total, reach = [], offset.astype(object), 0
    for field, operand, m in zip(fields, plain, multipliers, strict=True):
        inner, added = _without_bias(e, field)
        data.append(inner if inner is not None else operand)
        low, high = arith.RANGES[data[-1].dtype]
        reach += max(-low, high) * int(np.abs(m).max(initial=0))
        total = total + added.astype(object) * m.astype(object)
    folded = rounding in ("half_up", "half_even") and bool(np.all(shifts > 0))
    if folded:
        total = total + (2 ** (shifts.astype(object) - 1))
    if reach + max(abs(int(v)) for v in np.ravel(total)) >= arith.INT64_LIMIT:
        return plain, offset, False
    return data, np.asarray(total).astype(np.int64), folded


def _without_bias(e: Emission, expr: relax.Expr) -> tuple[Operand | None, Array]:
    """x and c where an expression is x + c with a constant c that broadcasts into x; else None and 0."""
    value = e.layer.definition(expr)
    if ops.op_name(value) == "relax.add" and ops.is_const(value.args[1]):
        x, c = value.args[0], ops.const_value(value.args[1])
        if ops.shape_of(x) == ops.shape_of(value):
            return e.operand(x), c
    return None, np.zeros((), np.int64)
