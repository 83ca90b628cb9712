"""Thresholds counted by sums of floors against a look at each."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core import arith, threshold_sums, thresholds
from hawq_tvm.core.rescales import Rescales, dyadic_rescale
from hawq_tvm.core.threshold_search import Steps, Table, searches_of
from hawq_tvm.core.thresholds import Proof, Rescale

ROUNDINGS = (*(r for r in arith.ROUNDINGS if r != "double"),)


def test_sums_of_floors() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        count, divisor = draw.randrange(0, 40), draw.randrange(1, 60)
        factor, constant = draw.randrange(0, 200), draw.randrange(-500, 500)
        expected = sum((i * factor + constant) // divisor for i in range(count))
        assert threshold_sums.floor_sum(count, factor, constant, divisor) == expected


def _looked_at(r: Rescale, rounding: str, steps: tuple[int, int]) -> tuple[int, int]:
    """Every threshold found by the definition: the least v in low .. high + 1 that gives k or more."""
    inside = differing = 0
    (low,), (high,) = r.lows, r.highs
    sign = 1 if r.ratios[0] > 0 else -1
    ends = sorted((sign * low, sign * high))
    formulas = [(r.ratios[0], r.constant), (Fraction(r.multipliers[0], 1 << r.shift), Fraction(r.offset, 1 << r.shift))]
    for k in range(steps[0], steps[1] + 1):
        found = []
        for ratio, constant in formulas:
            results = (
                thresholds.round_exactly(ratio * sign * v + constant, rounding) for v in range(ends[0], ends[1] + 1)
            )
            found.append(next((v for v, y in enumerate(results, ends[0]) if y >= k), ends[1] + 1))
        inside += any(ends[0] < v <= ends[1] for v in found)
        differing += found[0] != found[1]
    return inside, differing


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_kind_of_difference(rounding: str) -> None:
    # Coarse multipliers: from equal lines to such that are several steps apart, on either side, or never meet.
    draw = random.Random(1)
    kinds = set()
    for _ in range(60):
        shift, low = draw.randrange(0, 6), draw.randrange(-30, 10)
        ratio = Fraction(draw.choice([-1, 1]) * draw.randrange(1, 40), draw.randrange(1, 20))
        multiplier = max(1, round(abs(ratio) * 2**shift) + draw.choice([0, 0, 1, -1])) * (1 if ratio > 0 else -1)
        constant = Fraction(draw.randrange(-60, 60), draw.randrange(1, 9))
        offset = round(constant * 2**shift) + draw.randrange(-1, 2)
        r = Rescale((ratio,), constant, (multiplier,), offset, shift, (low,), (low + draw.randrange(1, 40),))
        steps = (-14, 11)
        many = Rescales.of([r])
        (box,) = many.boxes()
        found = threshold_sums.counted(searches_of(many, *box), rounding, steps)
        expected = _looked_at(r, rounding, steps)
        assert (int(found[0][0]), int(found[1][0])) == expected
        kinds.add((expected[1] > 0, expected[1] < expected[0]))
    assert len(kinds) >= 3


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_wide_sums_of_many_steps(rounding: str) -> None:
    draw = random.Random(2)
    steps = (-20000, 1 << 15)
    rows = [
        dyadic_rescale(
            (Fraction(draw.randrange(2**46, 2**48), 2 ** draw.randrange(60, 63)) * draw.choice([-1, 1]),),
            [draw.randrange(-9, 9)],
            Fraction(draw.randrange(-(10**6), 10**6), draw.choice([1, 2, 512, 999])),
            (-(2**29),),
            (2**30,),
            rounding,
            "a layer",
        )
        for _ in range(12)
    ]
    many = Rescales.of(rows)
    (box,) = many.boxes()
    searches = searches_of(many, *box)
    found = threshold_sums.counted(searches, rounding, steps)
    expected = Table(searches, Steps(steps, rounding)).compare()
    assert expected is not None
    assert all(np.array_equal(f, e) for f, e in zip(found, expected, strict=True))
    assert 0 < found[1].sum() < found[0].sum()
    total = thresholds.prove_all(rows, rounding, steps)
    assert total == Proof(int(found[0].sum()), int(found[1].sum()))
