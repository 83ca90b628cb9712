"""float16 and bfloat16 at the border, by their bits: no processor need know them, and every rounding is to even."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from hawq_tvm.core.arith import HALVES


def _u32(value: int) -> tirx.Expr:
    return tirx.const(value, "uint32")


def widened(x: tirx.Expr) -> tirx.Expr:
    """A float16 or bfloat16 element as the float32 it is; others unchanged."""
    dtype = str(x.ty.dtype)
    return _from_bits(tirx.reinterpret("uint16", x), dtype) if dtype in HALVES else x


def narrowed(x: tirx.Expr, dtype: str) -> tirx.Expr:
    """A float32 element rounded to `dtype`."""
    return tirx.reinterpret(dtype, _to_bits(x, dtype)) if dtype in HALVES else x.astype(dtype)


def rounded(x: tirx.Expr, dtype: str) -> tirx.Expr:
    """A float32 element rounded to a number of `dtype`, in float32."""
    return _from_bits(_to_bits(x, dtype), dtype) if dtype in HALVES else x


def _once(value: tirx.Expr, use: Callable[[tirx.Var], tirx.Expr]) -> tirx.Expr:
    """An expression of a value that is computed once, however often it is read."""
    name = tirx.Var("once", str(value.ty.dtype))
    return tirx.Let(name, value, use(name))


def _from_bits(bits: tirx.Expr, dtype: str) -> tirx.Expr:
    return _once(bits.astype("uint32"), lambda wide: _number(wide, dtype))


def _number(wide: tirx.Expr, dtype: str) -> tirx.Expr:
    if dtype == "bfloat16":
        return tirx.reinterpret("float32", wide << _u32(16))
    magnitude = (wide & _u32(0x7FFF)) << _u32(13)
    # 2^112 is the difference of the exponents' biases: exact for subnormal numbers, too.
    finite = tirx.reinterpret("float32", magnitude) * tirx.const(2.0**112, "float32")
    special = tirx.reinterpret("float32", magnitude | _u32(0x7F800000))
    value = tirx.Select(magnitude >= _u32(0x7C00 << 13), special, finite)
    sign = (wide & _u32(0x8000)) << _u32(16)
    return tirx.reinterpret("float32", tirx.reinterpret("uint32", value) | sign)


def _to_bits(x: tirx.Expr, dtype: str) -> tirx.Expr:
    return _once(tirx.reinterpret("uint32", x), lambda wide: _bits(wide, dtype))


def _bits(wide: tirx.Expr, dtype: str) -> tirx.Expr:
    magnitude, sign = wide & _u32(0x7FFFFFFF), (wide >> _u32(16)) & _u32(0x8000)
    shift, bias = (16, 0) if dtype == "bfloat16" else (13, 112 << 23)
    odd = (magnitude >> _u32(shift)) & _u32(1)
    usual = (magnitude - _u32(bias) + _u32((1 << shift - 1) - 1) + odd) >> _u32(shift)
    if dtype == "float16":
        # Below 2^-14 adding 1/2 rounds at 2^-24, the unit of subnormal numbers; from 2^16 on all is infinite.
        shifted = tirx.reinterpret("float32", magnitude) + tirx.const(0.5, "float32")
        small = tirx.reinterpret("uint32", shifted) - _u32(0x3F000000)
        usual = tirx.Select(magnitude < _u32(113 << 23), small, usual)
        usual = tirx.Select(magnitude >= _u32(143 << 23), _u32(0x7C00), usual)
    nan = _u32(0x7FC0 if dtype == "bfloat16" else 0x7E00)
    bits = tirx.Select(magnitude > _u32(0x7F800000), nan, usual)
    return (bits | sign).astype("uint16")
