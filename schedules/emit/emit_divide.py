"""The TE stage of hawq.divide: a quotient of two tensors, rounded as its quantize asks."""

from __future__ import annotations

from typing import Any

from tvm import relax, te, tirx

from hawq_tvm.core import arith, division

from .emit import Emission, emitter, immediate, out_shape


def _i64(value: int) -> tirx.Expr:
    return immediate(value, "int64")


@emitter(division.NAME)
def _divide(e: Emission, call: relax.Call) -> te.Tensor:
    """(A32): magnitudes are divided and rounded, then the quotient has its sign."""
    a, b, multiplier, divisor = (e.operand(x) for x in call.args)
    low, high, zero_point, undefined = (_i64(int(call.attrs[n])) for n in ("qmin", "qmax", "zero_point", "undefined"))
    zero, rounding, dtype = _i64(0), str(call.attrs["rounding"]), str(call.attrs["out_dtype"])

    def element(*i: Any) -> tirx.Expr:
        n, d = (x.at(i).astype("int64") * c.at(i) for x, c in ((a, multiplier), (b, divisor)))
        sign = (n ^ d) >> _i64(63)  # 0, or -1 of a negative quotient
        magnitude = _rounded(tirx.Max(n, zero - n), tirx.Max(tirx.Max(d, zero - d), _i64(1)), sign, rounding)
        result = tirx.Min(tirx.Max(((magnitude ^ sign) - sign) + zero_point, low), high)
        beyond = tirx.Select(n > zero, high, tirx.Select(n < zero, low, undefined))
        # Picked by a mask: of a Select the simplifier knows that d is not 0 beside it, and takes the guard away.
        nothing = zero - d.equal(zero).astype("int64")
        return (result ^ ((result ^ beyond) & nothing)).astype(dtype)

    return te.compute(out_shape(call), element, name=division.NAME[5:])


def _rounded(size: tirx.Expr, by: tirx.Expr, sign: tirx.Expr, rounding: str) -> tirx.Expr:
    """size / by, both magnitudes, rounded so that the number of this sign is as (A5)-(A7e) ask."""
    one = _i64(1)
    negative = sign & one
    if rounding in arith.DIRECTED:
        whole = tirx.truncdiv(size, by)
        some = tirx.NE(whole * by, size).astype("int64")
        away = {"floor": some & negative, "ceil": some & (one - negative), "away": some}
        return whole + away[rounding] if rounding in away else whole
    # Half away from zero; a tie is where nothing is left of what is divided.
    top, twice = size + size + by, by + by
    whole = tirx.truncdiv(top, twice)
    tie = (whole * twice).equal(top).astype("int64")
    back = {"half_even": tie & whole & one, "half_up": tie & negative, "half_toward_zero": tie}
    return whole - back[rounding] if rounding in back else whole
