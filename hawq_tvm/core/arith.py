"""The project's one integer arithmetic, in NumPy int64; equations (A1) to (A22) are derived in ARITHMETIC.md.

Passes use it to fold constants and to turn real scales into dyadic numbers. Kernels restate it in TIR
(`schedules/emit/emit.py`); `verify/reference.py` restates it a third time, on purpose sharing no code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]

DIRECTED = ("floor", "ceil", "toward_zero", "away")
ROUNDINGS = ("half_up", "half_even", "half_away", "half_toward_zero", *DIRECTED, "double")
MANTISSA_BITS = 31
HALVES = ("float16", "bfloat16")
MAX_SHIFT = 62
PACKED_SHIFTS = {"uint8": 39, "int8": 40}  # the most that (A9c) takes, by the type of the result
INT64_LIMIT = 2**63
SOFTMAX_BITS = 30  # after the point, of the exponents of (A17)

RANGES: dict[str, tuple[int, int]] = {
    name: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if name[0] == "i" else (0, 2**bits - 1)
    for bits in (2, 4, 8, 16, 32)
    for name in (f"int{bits}", f"uint{bits}")
} | {"int64": (-(2**63), 2**63 - 1)}


@dataclass(frozen=True)
class QType:
    """A quantized integer type: the values it may hold and the dtype that stores it.

    qmin, qmax: inclusive range, e.g. -8..7 for int4.  storage: a NumPy/TVM dtype that holds it.
    """

    qmin: int
    qmax: int
    storage: str

    @staticmethod
    def of(name: str) -> QType:
        """The type called `name` (int2 ... uint32); sub-byte types are stored in 8 bits."""
        qmin, qmax = RANGES[name]
        wide = {"int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}
        return QType(qmin, qmax, wide.get(name, name))

    @property
    def bits(self) -> int:
        """The number of bits needed to hold the range."""
        return max((self.qmax - self.qmin).bit_length(), 1)


def smallest_storage(low: int, high: int) -> str:
    """The narrowest of int8, uint8, int16, uint16, int32, int64 that holds low..high."""
    for name in ("int8", "uint8", "int16", "uint16", "int32", "int64"):
        if RANGES[name][0] <= low and high <= RANGES[name][1]:
            return name
    raise OverflowError(f"{low}..{high} does not fit in 64 bits")


def half_type(name: str) -> Any:
    """The type of arrays of float16, or of bfloat16, which NumPy itself does not know."""
    if name == "float16":
        return np.float16
    import ml_dtypes

    return ml_dtypes.bfloat16


def dyadic(ratio: Fraction, bits: int = MANTISSA_BITS, max_shift: int = MAX_SHIFT) -> tuple[int, int]:
    """(A3): the integers (m, s) with m / 2^s nearest to `ratio`, |m| < 2^bits, 0 <= s <= max_shift.

    Raises OverflowError when |ratio| >= 2^bits, which no requantization needs.
    """
    numerator, denominator = abs(ratio.numerator), ratio.denominator
    if numerator == 0:
        return 0, min(bits, max_shift)
    # 2^exponent is the power of two just above the magnitude: magnitude / 2^exponent lies in [1/2, 1).
    exponent = numerator.bit_length() - denominator.bit_length()
    exponent += numerator << max(0, -exponent) >= denominator << max(0, exponent)
    shift = min(bits - exponent, max_shift)
    multiplier = scaled(ratio, shift) if shift >= 0 else 0
    if abs(multiplier) == 2**bits:
        multiplier, shift = multiplier // 2, shift - 1
    if shift < 0:
        raise OverflowError(f"a ratio of about 2^{exponent - 1}")
    return multiplier, shift


def common_dyadic(
    ratios: Sequence[Fraction], bits: int = MANTISSA_BITS, max_shift: int = MAX_SHIFT
) -> tuple[list[int], int]:
    """(A4): multipliers of several ratios over one shift, set by the ratio of largest magnitude."""
    multiplier, shift = dyadic(max(ratios, key=abs) if len(ratios) > 1 else ratios[0], bits, max_shift)
    return [scaled(r, shift) for r in ratios] if len(ratios) > 1 else [multiplier], shift


def scaled(value: Fraction, shift: int) -> int:
    """The integer nearest to value 2^shift, ties away from zero: symmetric, so that -value gives its negative."""
    magnitude = ((abs(value.numerator) << shift + 1) + value.denominator) // (2 * value.denominator)
    return magnitude if value.numerator >= 0 else -magnitude


def round_fraction(value: Fraction) -> int:
    """The integer nearest to an exact rational, ties away from zero."""
    return scaled(value, 0)


def shift_round(value: Int, shift: Int | int, rounding: str) -> Int:
    """(A5)-(A7e): value / 2^shift rounded to an integer; value int64, shift broadcasts, 0 <= shift <= 62."""
    value, bits = np.asarray(value, np.int64), np.asarray(shift, np.int64)
    half: Int = np.where(bits > 0, np.int64(1) << np.maximum(bits - 1, 0), 0)
    most: Int = (np.int64(1) << bits) - 1
    if rounding == "half_up":
        return (value + half) >> bits
    if rounding == "half_even":
        odd = (value >> bits) & 1
        return np.where(bits > 0, (value + half - 1 + odd) >> bits, value)
    if rounding == "half_away":
        return np.where(bits > 0, (value + half - (value < 0)) >> bits, value)
    if rounding == "half_toward_zero":
        return np.where(bits > 0, (value + half - (value > 0)) >> bits, value)
    if rounding in DIRECTED:
        upward: dict[str, Any] = {"floor": False, "ceil": True, "toward_zero": value < 0, "away": value > 0}
        added: Int = np.where(upward[rounding], most, 0)
        return (value + added) >> bits
    raise ValueError(f"unknown rounding {rounding!r}: one of {', '.join(ROUNDINGS)}")


def rounding_room(shift: Any, rounding: str) -> Any:
    """The most that a rounding but "double" adds to the magnitude of a sum before it shifts (section 7), of one
    shift or an array of Python integers.
    """
    return 1 << shift if rounding in DIRECTED else 1 << shift >> 1


def double_round(value: Int, multiplier: Any, shift: Any) -> Int:
    """(A8): gemmlowp's two-step product; |value * 2^max(0, 31 - shift)| must fit int32."""
    value, multiplier = np.asarray(value, np.int64), np.asarray(multiplier, np.int64)
    shift = np.asarray(shift, np.int64)
    product = (value << np.maximum(31 - shift, 0)) * multiplier
    # Round half away from zero at bit 31: the doubling high multiply truncates after a signed nudge.
    nudge = np.where(product >= 0, np.int64(1) << 30, 1 - (np.int64(1) << 30))
    total = product + nudge
    high = np.where(total >= 0, total >> 31, -((-total) >> 31))
    return shift_round(high, np.maximum(shift - 31, 0), "half_away")


def requantize(
    operands: list[Int],
    multipliers: list[Any],
    offset: Any,
    shift: Any,
    *,
    rounding: str,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> Int:
    """(A9): clamp(round((sum x_i m_i + offset) / 2^shift) + zero_point, qmin, qmax), all broadcasting."""
    if rounding == "double":
        (value,), (multiplier,) = operands, multipliers
        rounded = double_round(value, multiplier, shift)
    else:
        total = np.asarray(offset, np.int64)
        for value, multiplier in zip(operands, multipliers, strict=True):
            total = total + np.asarray(value, np.int64) * np.asarray(multiplier, np.int64)
        rounded = shift_round(total, shift, rounding)
    return np.clip(rounded + zero_point, qmin, qmax)


_REAL_ROUNDINGS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "half_even": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "toward_zero": np.trunc,
    "away": lambda value: np.where(value < 0, np.floor(value), np.ceil(value)),
}


def round_real(value: NDArray[Any], rounding: str) -> NDArray[Any]:
    """A real array rounded to integers by the named rule ("double" has no real counterpart), without an error of its
    own.

    The rest after truncation is exact; value + 1/2 is not: the float just below 1/2 would become 1.
    """
    if rounding in _REAL_ROUNDINGS:
        return _REAL_ROUNDINGS[rounding](value)
    whole = np.trunc(value)
    with np.errstate(invalid="ignore"):  # infinity has no rest
        rest, sign = np.abs(value - whole), np.copysign(value.dtype.type(1), value)
    if rounding == "half_up":
        away = np.where(value < 0, rest > 0.5, rest >= 0.5)
    elif rounding in ("half_away", "half_toward_zero"):
        away = rest >= 0.5 if rounding == "half_away" else rest > 0.5
    else:
        raise ValueError(f"rounding {rounding!r} does not apply to real numbers")
    rounded: NDArray[Any] = whole + sign * away
    return rounded


def quantize(
    x: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    *,
    qmin: int,
    qmax: int,
    storage: str,
    rounding: str = "half_even",
    form: str = "divide",
    through: str = "",
) -> NDArray[Any]:
    """(A2): clamp(round(x / scale), qmin - z, qmax - z) + z in the float type of x (float64 for int32).

    form: "divide" as ONNX writes it, "float16" or "bfloat16" for a quotient of that type, "reciprocal" for x * (1 /
    scale) as PyTorch computes it, "affine" for (A2a) as QONNX does.  through: a type that x is rounded to first.
    """
    real = np.float64 if storage == "int32" else np.float32
    with np.errstate(over="ignore"):  # infinity saturates like any large number
        x, scale = (x.astype(half_type(through)) if through else x).astype(real), scale.astype(real)
        ratio = x * (real(1) / scale) if form == "reciprocal" else x / scale
        if form in HALVES:
            ratio = ratio.astype(half_type(form)).astype(real)
    if form == "affine":
        ratio, zero_point = ratio + zero_point.astype(real), np.zeros_like(zero_point)
    low, high = qmin - zero_point.astype(np.int64), qmax - zero_point.astype(np.int64)
    bounded = np.clip(round_real(ratio, rounding), low.astype(real), high.astype(real))
    integers: NDArray[Any] = bounded.astype(np.int64) + zero_point
    return integers.astype(storage)


def pack_int4(values: NDArray[Any]) -> NDArray[np.uint8]:
    """(A20): two 4-bit values to a byte in C order, the first in the low nibble; an odd end is padded with 0."""
    nibbles = values.ravel().astype(np.int64) & 15
    nibbles = np.pad(nibbles, (0, nibbles.size % 2))
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8)


def unpack_int4(packed: NDArray[np.uint8], shape: tuple[int, ...], signed: bool) -> NDArray[Any]:
    """(A20) inverted: an array of `shape`, int8 in -8..7 when signed, else uint8 in 0..15."""
    codes = np.arange(256, dtype=np.uint8)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    pairs = (pairs ^ 8).view(np.int8) - np.int8(8) if signed else pairs
    # By bytes, both values of one at once: large weights are opened several times in a compile.
    values = np.take(pairs.view(np.uint16).ravel(), packed.ravel()).view(pairs.dtype)
    return values[: int(np.prod(shape))].reshape(shape)


def softmax_table(scale: Fraction, levels: int) -> NDArray[np.int32]:
    """(A17): T[d] = rne(2^30 exp(-scale d)) for d = 0 .. levels - 1, each correctly rounded."""
    real = np.exp(-float(scale) * np.arange(levels, dtype=np.float64)) * 2**30
    table: NDArray[np.float64] = np.rint(real)
    # float64 is wrong by 2^-18 at most: nearer to a half than that, 50 digits decide.
    with localcontext() as context:
        context.prec = 50
        for d in np.flatnonzero(np.abs(real - np.floor(real) - 0.5) < 2.0**-16).tolist():
            exact = (-Decimal(scale.numerator) * d / Decimal(scale.denominator)).exp() * 2**30
            table[d] = int(exact.to_integral_value(ROUND_HALF_EVEN))
    return table.astype(np.int32)


def softmax_dyadic(inverse: Fraction, count: int) -> tuple[int, int]:
    """(A17): M and k with M / 2^k nearest to 1 / s_y, of 31 bits, or of as many as k + bits(sum) <= 62 leaves rows
    of `count`.

    Raises OverflowError when `inverse` is 2^31 or more.
    """
    return dyadic(inverse, max_shift=MAX_SHIFT - (count << SOFTMAX_BITS).bit_length())


def softmax(
    x: Int, table: Int, axis: int, multiplier: int, shift: int, *, zero_point: int, qmin: int, qmax: int
) -> Int:
    """(A17): the exponents from the table, one reciprocal of their sum in each row, one rounded product for each
    element.
    """
    x = np.asarray(x, np.int64)
    e = np.asarray(table, np.int64)[x.max(axis=axis, keepdims=True) - x]
    return normalize_exponents(e, axis, multiplier, shift, zero_point=zero_point, qmin=qmin, qmax=qmax)


def normalize_exponents(
    e: Int,
    axis: int,
    multiplier: int,
    shift: int,
    *,
    zero_point: int,
    qmin: int,
    qmax: int,
    rounding: str = "half_even",
) -> Int:
    """(A17) from the sum of the exponents on."""
    total = e.sum(axis=axis, keepdims=True)
    bits = SOFTMAX_BITS + 1 + sum((total >> i > 0).astype(np.int64) for i in range(SOFTMAX_BITS + 1, 62))
    reciprocal = (np.int64(multiplier) << 31) // (total >> (bits - 31))
    return np.clip(shift_round(e * reciprocal, shift + bits, rounding) + zero_point, qmin, qmax)
