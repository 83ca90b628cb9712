"""(A23a)-(A23c): thresholds that no single dyadic number per operand meets, put right by one common measure or by
two requantizes.

A mean of six integers has ties at 1/6 of a step, of which half go up and half go down. Two steps do that: the first
computes 2^bits times the real formula, rounded down, so finely that a tie is a tie of it and nothing else is; the
second rounds it by the model's rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from . import arith, thresholds
from .threshold_search import round_exactly
from .thresholds import Proof, Rescale

# The first step's result is an int32, and so is every multiplier.
LIMIT = 2**31


@dataclass(frozen=True)
class Exact:
    """Rescales that step where the real formulas do.

    counts: the operand of each is sum_i counts_i x_i.  bits: 0, or those after the point of results that a second
    requantize rounds.
    """

    rescales: Sequence[Rescale]
    counts: list[tuple[int, ...]]
    bits: int
    proof: Proof


def exactly(
    rescales: Sequence[Rescale], numbers: Sequence[int], rounding: str, steps: tuple[int, int], where: str
) -> Exact | None:
    """One or two requantizes for the real formulas of `rescales`, None where 31 bits are too few for that.

    rescales: of one operand only such as no correction (A23) puts right: two steps are all that is left for them.
    numbers: how many channels each stands for.  steps: the first and last result, less the zero point.  where: the
    layer, for errors.
    """
    if rounding == "double" or rounding in arith.DIRECTED:
        return None
    if all(len(r.ratios) == 1 for r in rescales) and fraction_bits(rescales, steps) is None:
        return None
    counts: list[tuple[int, ...]] = []
    one: list[Rescale] = []
    for rescale in rescales:
        measure = common_measure(rescale)
        made = joined(rescale, measure, rounding, where) if measure else None
        if made is None:
            return None
        one.append(made)
        counts.append(measure)
    settled, proof = thresholds.settle(one, numbers, rounding, steps)
    if proof.enumerated and not proof.differing and all(map(fits, settled, counts)):
        return Exact(settled, counts, 0, proof)
    bits = fraction_bits(one, steps)
    if bits is None:
        return None
    firsts: list[Rescale] = []
    proof = Proof()
    for real, count, number in zip(one, counts, numbers, strict=True):
        first = rounded_down(real, bits, count, where)
        if first is None or not fits(first, count):
            return None
        firsts.append(first)
        proof += prove_two_steps(real, first, bits, rounding, steps) * number
    return Exact(firsts, counts, bits, proof) if proof.enumerated and not proof.differing else None


def common_measure(rescale: Rescale) -> tuple[int, ...]:
    """(A23c): the least integers of which the ratios are multiples by one ratio; () where their sum of multiples
    leaves int32.
    """
    measure = Fraction(0)
    for r in rescale.ratios:
        # gcd(a/b, c/d) = gcd(a d, c b) / (b d)
        ends = measure.numerator * r.denominator, r.numerator * measure.denominator
        measure = Fraction(gcd(*ends), measure.denominator * r.denominator)
    counts = tuple(int(r / measure) if measure else int(i == 0) for i, r in enumerate(rescale.ratios))
    reach = sum(
        abs(c) * max(abs(low), abs(high)) for c, low, high in zip(counts, rescale.lows, rescale.highs, strict=True)
    )
    return counts if reach < LIMIT else ()


def joined(rescale: Rescale, counts: tuple[int, ...], rounding: str, where: str) -> Rescale | None:
    """(A23c): the rescale of the one operand sum_i counts_i x_i, None where a multiple of its multiplier leaves 31
    bits.
    """
    most = max(map(abs, counts))
    ratio = next(r / c for r, c in zip(rescale.ratios, counts, strict=True) if c)
    ends = [sorted((c * low, c * high)) for c, low, high in zip(counts, rescale.lows, rescale.highs, strict=True)]
    low, high = (sum(end[i] for end in ends) for i in (0, 1))
    # The second operand is always 0, and keeps the largest multiple of the first one's multiplier within 31 bits.
    made = _dyadic((ratio, ratio * most), rescale.constant, (low, 0), (high, 0), rounding, where)
    if made is None:
        return None
    return replace(made, ratios=(ratio,), multipliers=made.multipliers[:1], lows=(low,), highs=(high,))


def fits(rescale: Rescale, counts: tuple[int, ...]) -> bool:
    """Whether the multiples of a joined operand's multiplier are 32-bit integers."""
    return abs(rescale.multipliers[0]) * max(map(abs, counts)) < LIMIT


def fraction_bits(rescales: Sequence[Rescale], steps: tuple[int, int]) -> int | None:
    """(A23a): the least number of bits after the point at which nothing lies between a tie and the next number; None
    if int32 has no room.
    """
    finest = max(lcm(2, r.constant.denominator, *(x.denominator for x in r.ratios)) for r in rescales)
    bits = (finest - 1).bit_length()
    return bits if max(abs(steps[0] - 1), abs(steps[1])) << bits < LIMIT else None


def rounded_down(rescale: Rescale, bits: int, counts: tuple[int, ...], where: str) -> Rescale | None:
    """(A23b): the rescale that gives floor(2^bits (x ratio + constant)) for every x; None if 31 bits are too few for
    that.
    """
    ratio, constant, (low,), (high,) = (
        rescale.ratios[0] * 2**bits,
        rescale.constant * 2**bits,
        rescale.lows,
        rescale.highs,
    )
    made = _dyadic((ratio, ratio * max(map(abs, counts))), constant, (low, 0), (high, 0), "floor", where)
    if made is None:
        return None
    one = 2**made.shift
    error = Fraction(made.multipliers[0], one) - ratio
    least, most = sorted((error * low, error * high))
    offset = ((constant - least) * one).__ceil__()
    reach = max(abs(low), abs(high)) * abs(made.multipliers[0]) + abs(offset) + arith.rounding_room(made.shift, "floor")
    if reach >= arith.INT64_LIMIT or Fraction(offset, one) - constant + most >= Fraction(
        1, lcm(constant.denominator, ratio.denominator)
    ):
        return None
    return Rescale((ratio,), constant, made.multipliers[:1], offset, made.shift, (low,), (high,))


def _dyadic(
    ratios: tuple[Fraction, ...],
    constant: Fraction,
    lows: tuple[int, ...],
    highs: tuple[int, ...],
    rounding: str,
    where: str,
) -> Rescale | None:
    if max(map(abs, ratios)) >= LIMIT >> 1:
        return None
    return thresholds.dyadic_rescale(ratios, [0] * len(ratios), constant, lows, highs, rounding, where)


def prove_two_steps(rescale: Rescale, first: Rescale, bits: int, rounding: str, steps: tuple[int, int]) -> Proof:
    """(A22) for both steps together: every threshold compared with that of the real formula, in whole numbers."""
    low, high, ratio, c, m = (
        rescale.lows[0],
        rescale.highs[0],
        rescale.ratios[0],
        rescale.constant,
        first.multipliers[0],
    )
    if ratio < 0:
        low, high, ratio, m = -high, -low, -ratio, -m
    if ratio == 0:
        fine = (low * m + first.offset) >> first.shift
        return Proof(1, int(round_exactly(Fraction(fine, 2**bits), rounding) != round_exactly(c, rounding)))
    if m <= 0:
        return Proof(enumerated=False)
    ks = np.arange(steps[0], steps[1] + 1).astype(object)
    # Whether k - 1/2 becomes k.
    included = {"half_up": ks == ks, "half_even": ks % 2 == 0, "half_away": ks >= 1, "half_toward_zero": ks < 1}[
        rounding
    ]
    # v ratio + c >= k - 1/2  is  v per >= least
    least = (2 * ks - 1) * (c.denominator * ratio.denominator) - 2 * c.numerator * ratio.denominator
    per = 2 * ratio.numerator * c.denominator
    wanted = np.where(included.astype(bool), -(-least // per), least // per + 1)
    # (v m + offset) >> shift  has to reach the least integer that the second step rounds to k
    fine = ((2 * ks - 1) << bits >> 1) + np.where(included.astype(bool), 0, 1)
    got = -(-((fine << first.shift) - first.offset) // m)
    wanted, got = (np.minimum(np.maximum(t, low), high + 1) for t in (wanted, got))
    inside = ((wanted > low) & (wanted <= high)) | ((got > low) & (got <= high))
    return Proof(int(inside.sum()), int((wanted != got).sum()))
