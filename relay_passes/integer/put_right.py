"""What is tried for a requantize whose thresholds differ from the real formula's, or are too many to be compared
(A23a)-(A23c).

Each channel's operands are joined into one where their ratios have a common measure; then one corrected requantize,
and if ties are in its way two of them, must be proved to step where the real formula does. Else the requantize stays
as it is, and is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops, thresholds, two_steps
from hawq_tvm.core.rescales import Rescale, Rescales

from .values import Array, Context

if TYPE_CHECKING:
    from .rescale import Output

Numbers = tuple[Array, Array, Array]


def dyadic_call(
    data: list[relax.Expr],
    numbers: Numbers,
    which: Array,
    qtype: arith.QType,
    zero: int,
    rounding: str,
    proof: thresholds.Proof,
    bound: float | None = None,
) -> relax.Call:
    """The hawq.requantize by the multipliers (rows x operands), offsets and shifts of the rescales.

    which: the number of every element's rescale.  bound: see `ops.requantize`.
    """

    def back(column: Array) -> Array:
        values = column.astype(np.int64)
        return values[which] if np.any(values != values[0]) else values[0]

    multipliers, offset, shift = numbers
    return ops.requantize(
        data,
        [back(column) for column in multipliers.T],
        back(offset),
        back(shift),
        qtype=qtype,
        zero_point=zero,
        rounding=rounding,
        thresholds=proof.thresholds if proof.enumerated else -1,
        differing=proof.differing if proof.enumerated else -1,
        bound=bound,
    )


def put_right(
    ctx: Context, data: list[relax.Expr], rescales: Sequence[Rescale], which: Array, out: Output
) -> relax.Call | None:
    """One or two requantizes that step where the real formulas do, None where 31 bits are too few for that; see
    `dyadic_call`.
    """
    steps = out.qtype.qmin - out.zero + 1, out.qtype.qmax - out.zero
    exact = two_steps.exactly(rescales, np.bincount(which.ravel()).tolist(), out.rounding, steps, ctx.layer)
    if exact is None:
        return None
    made, counts = Rescales.of(exact.rescales), np.array(exact.counts, object)
    numbers = counts * made.dyadic.factors, made.dyadic.constant, made.shift
    if not exact.bits:
        return dyadic_call(data, numbers, which, out.qtype, out.zero, out.rounding, exact.proof)
    fine = arith.QType((steps[0] - 1) << exact.bits, steps[1] << exact.bits, "int32")
    first_step = ctx.emit(dyadic_call(data, numbers, which, fine, 0, "floor", exact.proof), "fine")
    return ops.requantize([first_step], [1], 0, exact.bits, qtype=out.qtype, zero_point=out.zero, rounding=out.rounding)
