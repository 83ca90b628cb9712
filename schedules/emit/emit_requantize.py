"""The TE stage of hawq.requantize (A9): constants folded into one offset, one shift, the rounding by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hawq_tvm.core import arith, ops
from schedules.spelling.byte_intrinsics import Order, pair_sum_of, shift_form
from schedules.spelling.lookup_intrinsics import WIDE

from .begun import BEGIN, begun_at, reach_of_sums
from .emit import Array, Emission, Operand, clamp, emitter, immediate, out_shape

SHIFT = "hawq.shift"  # of the stage "pair_sum": what its last shift is


def shift_round(value: tirx.Expr, shift: tirx.Expr, shifts: Array, rounding: str) -> tirx.Expr:
    """(A5)-(A7e) on int64; `shifts` are all the values that `shift` takes, known at compile time."""
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
    elif rounding in ("half_away", "half_toward_zero"):
        toward_lower = value < 0 if rounding == "half_away" else value > 0
        rounded = (value + half - toward_lower.astype("int64")) >> shift
    elif rounding in arith.DIRECTED:
        zero, most = immediate(0, "int64"), (one << shift) - one
        added = {
            "floor": zero,
            "ceil": most,
            "toward_zero": tirx.Select(value < zero, most, zero),
            "away": tirx.Select(value > zero, most, zero),
        }
        return (value + added[rounding]) >> shift
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
    return requantize(e, call)


def requantize(
    e: Emission, call: relax.Call, packs: int = 0, woven: int = 0, begins: bool = False, rows: bool = False
) -> te.Tensor:
    """(A9) in the cheapest of the forms that are exact for it.

    packs: the lanes of vectors for which there is a stage "scaled_bytes" where (A9c) applies, "pair_sum" where (A9d)
    does, for schedules that spell them; 0 for none.  woven: the vectors of a group of sums (`Order`).  begins: sums may
    begin at constants (`begun.py`), where (A9e) applies.  rows: vectors of two pixels become bytes together, and that
    alone.
    """
    attrs = call.attrs
    shift, shifts = e.operand(call.args[3]), ops.const_value(call.args[3])
    terms = _fold_constants(e, call)
    low, high, zero_point = int(attrs["qmin"]), int(attrs["qmax"]), terms.zero_point
    multipliers = [Operand(e, value=m.astype(np.int32)) for m in terms.multipliers]
    shape, rounding = out_shape(call), str(attrs["rounding"])
    # |total| < 2^63 (ARITHMETIC.md section 7), so a shift of 34 or more leaves less than 2^29 + 1.
    narrow = bool(np.all(shifts >= 34)) and max(abs(low), abs(high), abs(zero_point)) < 1 << 29
    # Where the data tell that the shift leaves less, so does any other.
    most = (terms.reach >> int(shifts.min())) + 1 + abs(zero_point)
    small = narrow or (terms.reach > 0 and most < 1 << 31)

    if rounding == "half_up" and terms.folded:
        if packs:
            given = (e, shape, terms, shifts, (low, high), str(attrs["out_dtype"]))
            own = (Order(packs, woven, rows), begins, int(attrs["zero_point"]))
            stage = _scaled_bytes(*given, *own)
            if stage is None and not rows:
                stage = _pair_sum(*given)
            if stage is not None:
                return stage
        rounded = _sums_of_halves(e, shape, terms, shifts) or (_high_half(e, shape, terms, shifts) if narrow else None)
        if rounded is not None:
            return _clamped(shape, lambda *i: rounded(*i) + zero_point, low, high, "int32", str(attrs["out_dtype"]))

    offset, dtype = Operand(e, value=terms.offset), "int32" if small else "int64"

    def element(*i: Any) -> tirx.Expr:
        if rounding == "double":
            value = terms.data[0].at(i).astype("int64")
            rounded = double_round(value, multipliers[0].at(i).astype("int64"), shift.at(i), shifts)
        else:
            total = offset.at(i)
            for x, m in zip(terms.data, multipliers, strict=True):
                total = total + x.at(i).astype("int64") * m.at(i).astype("int64")
            if terms.folded:
                rounded = shift_after_half(total, shift.at(i), rounding)
            else:
                rounded = shift_round(total, shift.at(i), shifts, rounding)
        return (rounded.astype("int32") if small else rounded) + immediate(zero_point, dtype)

    if str(attrs["out_dtype"]) == "int32" and terms.reach > 0 and most <= min(-low, high):
        low, high = arith.RANGES["int32"]  # no number is clamped
    return _clamped(shape, element, low, high, dtype, str(attrs["out_dtype"]))


Element = Callable[..., tirx.Expr]


def _clamped(shape: tuple[int, ...], value: Element, low: int, high: int, dtype: str, out: str) -> te.Tensor:
    """Numbers of a type clamped and stored in another.

    On the way from int32 to 8 bits there is a stage "unclamped", so that a schedule may spell out the clamp to all
    that fits in 8 bits. Other bounds belong to that stage; the second clamp then changes nothing, and goes when the
    stage is inlined.
    """
    numbers, bounds = value, (low, high)
    if dtype == "int32" and out in ("int8", "uint8"):
        bounds = arith.RANGES[out]
        clamps = (low, high) != bounds
        numbers = te.compute(
            shape, lambda *i: clamp(value(*i), low, high, dtype) if clamps else value(*i), name="unclamped"
        )
    return te.compute(shape, lambda *i: clamp(numbers(*i), *bounds, dtype).astype(out), name="requantize")


def _high_half(e: Emission, shape: tuple[int, ...], terms: Terms, shifts: Array) -> Element | None:
    """(x m + b) >> s as ((x m + b) >> 32) >> (s - 32).

    The first is a stage of its own, called "high" where x is an anchor's "view", so that a schedule may spell it out.

    One int32 operand; spelled out with constants that differ along the last dimension at most.
    """
    x, bits = terms.data[0].unfinished(), terms.data[0].bits
    if max(abs(int(b)) for b in terms.offset.ravel()) >= 1 << (62 - bits):
        return None
    constants = [terms.multipliers[0], terms.offset << bits, shifts + bits]
    if len(terms.data) != 1 or terms.data[0].dtype != "int32" or not shape or constants[2].max() >= 64:
        return None
    plain = all(_per_channel(c, shape) for c in constants)
    arrays = [np.broadcast_to(c.ravel(), shape[-1:]) if plain else c for c in constants[:2]]
    m, b = (Operand(e, tensor=e.argument(a.astype(t))) for a, t in zip(arrays, ("int32", "int64"), strict=True))

    def total(*i: Any) -> tirx.Expr:
        product = x.at(i).astype("int64") * m.at(i).astype("int64") + b.at(i)
        return (product >> immediate(32, "int64")).astype("int32")

    high = te.compute(shape, total, name="high" if plain and x.tensor.op.name == "view" else "total")
    rest = Operand(e, value=constants[2] - 32)
    return lambda *i: high(*i) >> rest.at(i)


def _per_channel(constant: Array, shape: tuple[int, ...]) -> bool:
    return constant.size == 1 or constant.size == constant.shape[-1] == shape[-1]


def _loaded(e: Emission, constant: Array, shape: tuple[int, ...]) -> Operand:
    """A constant as an argument, over the last dimension at least."""
    return Operand(e, e.argument(np.broadcast_to(constant, np.broadcast_shapes(constant.shape, shape[-1:]))))


def _sums_of_halves(e: Emission, shape: tuple[int, ...], terms: Terms, shifts: Array) -> Element | None:
    """(sum x m + b) >> s of operands of at most 16 bits in int32: with m = h 2^16 + l and b = p 2^16 + q, it is

        (sum x h + p + ((sum x l + q) >> 16)) >> (s - 16)

    exactly, and x h and x l are products of 16 bits, which CPUs do well.
    """
    data = [Operand(e, x.narrow) if x.narrow is not None else x for x in terms.data]
    if any(x.dtype not in ("int8", "uint8", "int16") for x in data) or not np.all((shifts >= 16) & (shifts < 48)):
        return None
    low = [(m + 2**15) % 2**16 - 2**15 for m in terms.multipliers]
    high = [(m - part) >> 16 for m, part in zip(terms.multipliers, low, strict=True)]
    p, q = terms.offset >> 16, terms.offset & 0xFFFF
    reach = 2**15 * sum(2**15 if x.dtype == "int16" else 2**8 for x in data) + 2**16
    if (
        max(int(np.abs(h).max(initial=0)) for h in high) >= 2**15
        or int(np.abs(p).max(initial=0)) + reach + (reach >> 16) >= 2**31
    ):
        return None
    highs, lows = ([Operand(e, value=m.astype(np.int16)) for m in part] for part in (high, low))
    # As arguments: LLVM adds immediates last, but starts a chain of multiply-adds from a value that it loads.
    first, second = (_loaded(e, constant.astype(np.int32), shape) for constant in (p, q))
    rest = Operand(e, value=(shifts - 16).astype(np.int32))

    def products(i: Sequence[Any], parts: list[Operand], constant: Operand) -> tirx.Expr:
        total = constant.at(i)
        for x, m in zip(data, parts, strict=True):
            total = total + x.at(i).astype("int32") * m.at(i).astype("int32")
        return total

    return lambda *i: (products(i, highs, first) + (products(i, lows, second) >> 16)) >> rest.at(i)


def _scaled_bytes(
    e: Emission,
    shape: tuple[int, ...],
    terms: Terms,
    shifts: Array,
    bounds: tuple[int, int],
    out: str,
    order: Order,
    begins: bool,
    zero_point: int,
) -> te.Tensor | None:
    """(A9c) of an anchor's sums or a wide table's entries, (A9a) where shifts are beyond it; None where their constants
    fit neither.  begins: (A9e) of sums that begin at its constants, if there are such.
    """
    if len(terms.data) != 1 or terms.zero_point or out not in arith.PACKED_SHIFTS or bounds != arith.RANGES[out]:
        return None
    x, bits = terms.data[0].unfinished(), terms.data[0].bits
    constants = [terms.multipliers[0], terms.offset << bits, shifts + bits - 32]
    kept = x.tensor.op.name in ("view", WIDE)
    if x.dtype != "int32" or not kept or not all(_per_channel(c, shape) for c in constants):
        return None
    if max(abs(int(b)) for b in terms.offset.ravel()) >= 1 << (62 - bits):
        return None
    if constants[2].min() < 0 or constants[2].max() >= 32:
        return None
    if x.tensor.op.name == WIDE:
        if order.rows:
            return None
        order, begins = Order(order.lanes), False  # a table's entries follow each other
    short = bool(constants[2].max() <= arith.PACKED_SHIFTS[out] - 32)
    channels = np.arange(shape[-1])
    apart, at = order.apart(channels), order.shift(channels, short)
    narrow = shift_form(order.lanes, short)[0]
    begin = None
    if begins and (reach := reach_of_sums(e)) is not None:
        m, b, t = (np.broadcast_to(c.ravel(), shape[-1:]) for c in constants)
        begin = begun_at(m, b, t, zero_point, bounds, short)
        if begin and (reach << bits) + int(np.abs(begin[0]).max()) > arith.RANGES["int32"][1]:
            begin = None

    if order.rows and (begin is None or not short):
        return None

    def placed(values: Array, dtype: str, place: Array, name: str = "") -> te.Tensor:
        twice = order.rows and place is at
        array = np.empty(shape[-1] * (1 + twice), dtype)
        for other in (0, 4)[: 1 + twice]:
            array[place ^ other] = values.ravel()
        return e.argument(array, name)

    multiplier = placed(constants[0], "int64", apart)
    offset = placed(begin[1], narrow, at) if begin else placed(constants[1], "int64", apart)
    further = placed(constants[2], narrow, at)
    start = placed(begin[0], "int32", order.flat(channels), BEGIN) if begin else None

    def element(*i: Any) -> tirx.Expr:
        at, sums, half = order.shift(i[-1], short), x.at(i), immediate(32, "int64")
        factor = multiplier(order.apart(i[-1]))
        if start is None:
            number = ((sums.astype("int64") * factor + offset(order.apart(i[-1]))) >> half).astype("int32")
        else:
            number = (((sums + start(order.flat(i[-1]))).astype("int64") * factor) >> half).astype("int32")
            number = number + offset(at).astype("int32")
        return clamp(number >> further(at).astype("int32"), *bounds, "int32").astype(out)

    return te.compute(shape, element, name="scaled_bytes")


def _pair_sum(
    e: Emission, shape: tuple[int, ...], terms: Terms, shifts: Array, bounds: tuple[int, int], out: str
) -> te.Tensor | None:
    """(A9d) of two tensors of bytes, or None where it is not exact for their constants."""
    constants = [*terms.multipliers, terms.offset, shifts]
    if (
        len(terms.data) != 2
        or not all(is_bytes(x, shape) for x in terms.data)
        or any(c.size > 1 for c in constants)
        or out not in arith.PACKED_SHIFTS
        or bounds != arith.RANGES[out]
    ):
        return None
    *multipliers, offset, shift = (int(c.ravel()[0]) for c in constants)
    if not 16 < shift < 32:
        return None
    offset -= sum(128 * m for x, m in zip(terms.data, multipliers, strict=True) if x.dtype == "int8")
    lows = [(m + 2**15) % 2**16 - 2**15 for m in multipliers]
    highs = [(m - part) >> 16 for m, part in zip(multipliers, lows, strict=True)]
    z = (offset + 2 ** (shift - 1)) >> shift
    q, z = offset - (z << shift), z + terms.zero_point
    if max(map(abs, highs)) >= 2**15 or abs(z) > 2**14:
        return None
    arrays = [np.array(v, t) for v, t in ((lows, "int16"), ([q], "int32"), (highs, "int16"), ([z], "int16"))]
    placed = [e.argument(array) for array in arrays]
    a, r = (x.at for x in terms.data)
    return te.compute(
        shape,
        lambda *i: pair_sum_of(a(i), r(i), placed, shift - 16, *bounds).astype(out),
        name="pair_sum",
        attrs={SHIFT: shift - 16},
    )


def is_bytes(x: Operand, shape: tuple[int, ...]) -> bool:
    """Whether an operand is a tensor of bytes that is there: an input, or a stage that a schedule does not inline."""
    if x.value is not None or x.dtype not in arith.PACKED_SHIFTS or x.shape != shape:
        return False
    stage = x.tensor.op
    clamped = [t.op.name for t in stage.input_tensors] == ["unclamped"]
    return isinstance(stage, te.PlaceholderOp) or stage.name in ("scaled_bytes", "pair_sum") or clamped


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


@dataclass(frozen=True, eq=False)
class Terms:
    """sum data[k] multipliers[k] + offset, still to be shifted, and then zero_point to be added.

    folded: 2^(shift-1) is in the offset.  reach: the sum's largest magnitude; 0 where only types tell.
    """

    data: list[Operand]
    multipliers: list[Array]
    offset: Array
    zero_point: int
    folded: bool
    reach: int = 0


def _fold_constants(e: Emission, call: relax.Call) -> Terms:
    """The constants added to an operand (a bias), those times m in the offset; half of 2^shift and the zero point too.

    (x + c) m + b = x m + (c m + b) exactly. Nothing is folded where a sum could then leave 64 bits, judged by the
    types alone.
    """
    fields, rounding = e.tuple_fields(call.args[0]), str(call.attrs["rounding"])
    multipliers = [ops.const_value(m).astype(np.int64) for m in e.tuple_fields(call.args[1])]
    offset, shifts = (ops.const_value(a).astype(np.int64) for a in call.args[2:])
    zero_point = int(call.attrs["zero_point"])
    plain = Terms([e.operand(f) for f in fields], multipliers, offset, zero_point, False)
    if rounding == "double":
        return plain
    data, total, reach, known = [], offset.astype(object), 0, True
    for field, m in zip(fields, multipliers, strict=True):
        operand, added = _without_bias(e, field)
        data.append(operand)
        low, high = arith.RANGES[operand.dtype]
        reach += (operand.reach or max(-low, high)) * int(np.abs(m).max(initial=0))
        known = known and operand.reach > 0
        total = total + added.astype(object) * m.astype(object)
    folded = rounding in ("half_up", "half_even") and bool(np.all(shifts > 0))
    if folded:
        total = total + (2 ** (shifts.astype(object) - 1))

    def fits(offset: Any) -> bool:
        return reach + max(abs(int(v)) for v in np.ravel(offset)) < arith.INT64_LIMIT

    if not fits(total):
        return plain
    if rounding == "half_up" and folded and fits(total + zero_point * 2 ** shifts.astype(object)):
        total, zero_point = total + zero_point * 2 ** shifts.astype(object), 0
    most = reach + max(abs(int(v)) for v in np.ravel(total)) if known else 0
    return Terms(data, multipliers, np.asarray(total).astype(np.int64), zero_point, folded, most)


def _without_bias(e: Emission, expr: relax.Expr) -> tuple[Operand, Array]:
    """x and c where an expression is x + c with a constant c that broadcasts into x."""
    value, operand = e.layer.definition(expr), e.operand(expr)
    added: Array = np.zeros((), np.int64)
    if (
        ops.op_name(value) == "relax.add"
        and ops.is_const(value.args[1])
        and ops.shape_of(value.args[0]) == ops.shape_of(value)
    ):
        operand, added = e.operand(value.args[0]), ops.const_value(value.args[1]).astype(np.int64)
    if operand.addend is None or operand.addend.value is None:
        return operand, added
    return operand.without_addend(), added + operand.addend.value
