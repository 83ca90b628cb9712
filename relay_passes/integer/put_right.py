"""What is tried for a requantize whose thresholds differ from the real formula's, or are too many to be compared (A23a)-(A23c).

Each channel's operands are joined into one where their ratios have a common measure; then one corrected requantize, and if ties are
in its way two of them, must be proved to step where the real formula does. Else the requantize stays as it is, and is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tvm import relax

from hawq_tvm import arith, ops, thresholds, two_steps

from .values import Array, Context

if TYPE_CHECKING:
    from .rescale import Output

Rescales = Sequence[thresholds.Rescale]


def dyadic_call(
    data: list[relax.Expr], rescales: Rescales, counts: Sequence[tuple[int, ...]], which: Array,
    qtype: arith.QType, zero: int, rounding: str, proof: thresholds.Proof,
) -> relax.Call:  # fmt: skip
    """The hawq.requantize by `rescales`; counts: of its joined operand, or (), for each.  which: the number of every element's rescale."""

    def back(values: list[int]) -> Array:
        return np.array(values, np.int64)[which] if len(set(values)) > 1 else np.array(values[0], np.int64)

    each = [[c * r.multipliers[0] for c in n] if n else r.multipliers for r, n in zip(rescales, counts, strict=True)]
    return ops.requantize(
        data, [back([m[j] for m in each]) for j in range(len(data))],
        back([r.offset for r in rescales]), back([r.shift for r in rescales]), qtype=qtype, zero_point=zero, rounding=rounding,
        thresholds=proof.thresholds if proof.enumerated else -1, differing=proof.differing if proof.enumerated else -1,
    )  # fmt: skip


def put_right(ctx: Context, data: list[relax.Expr], rescales: Rescales, which: Array, out: Output) -> relax.Call | None:
    """One or two requantizes that step where the real formulas do, None where 31 bits are too few for that; see `dyadic_call`."""
    steps = out.qtype.qmin - out.zero + 1, out.qtype.qmax - out.zero
    numbers = np.bincount(which.ravel()).tolist()
    counts: list[tuple[int, ...]] = []
    joined: list[thresholds.Rescale] = []
    for rescale in rescales:
        measure = two_steps.common_measure(rescale)
        one = two_steps.joined(rescale, measure, out.rounding, ctx.layer) if measure else None
        if one is None:
            return None
        joined.append(one)
        counts.append(measure)
    if len(data) > 1:
        corrected, proof = thresholds.settle(joined, numbers, out.rounding, steps)
        if proof.enumerated and not proof.differing and all(map(two_steps.fits, corrected, counts)):
            return dyadic_call(data, corrected, counts, which, out.qtype, out.zero, out.rounding, proof)
    bits = two_steps.fraction_bits(joined, steps)
    if bits is None:
        return None
    firsts: list[thresholds.Rescale] = []
    proof = thresholds.Proof()
    for one, count, number in zip(joined, counts, numbers, strict=True):
        first = two_steps.rounded_down(one, bits, count, ctx.layer)
        if first is None or not two_steps.fits(first, count):
            return None
        firsts.append(first)
        proof += two_steps.prove_two_steps(one, first, bits, out.rounding, steps) * number
    if not proof.enumerated or proof.differing:
        return None
    fine = arith.QType((steps[0] - 1) << bits, steps[1] << bits, "int32")
    first_step = ctx.emit(dyadic_call(data, firsts, counts, which, fine, 0, "floor", proof), "fine")
    return ops.requantize([first_step], [1], 0, bits, qtype=out.qtype, zero_point=out.zero, rounding=out.rounding)
