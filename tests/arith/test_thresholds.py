"""The threshold proof (A22) against brute force over every reachable accumulator."""

from __future__ import annotations

import dataclasses
import time
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hawq_tvm.core import arith, thresholds
from hawq_tvm.core.rescales import Rescales
from hawq_tvm.core.threshold_search import round_exactly

QMIN, QMAX = -8, 7
ROUNDINGS = [r for r in arith.ROUNDINGS if r != "double"]


def brute_force(r: thresholds.Rescale, rounding: str) -> int:
    """How many operand tuples give different results under the real and the dyadic formula."""
    different = 0
    for values in product(*(range(lo, hi + 1) for lo, hi in zip(r.lows, r.highs, strict=True))):
        real = sum((v * s for v, s in zip(values, r.ratios, strict=True)), r.constant)
        total = sum(v * m for v, m in zip(values, r.multipliers, strict=True)) + r.offset
        got = int(arith.shift_round(np.int64(total), r.shift, rounding))
        near = {
            "half_even": round(real),
            "half_up": (real + Fraction(1, 2)).__floor__(),
            "half_away": arith.round_fraction(real),
            "half_toward_zero": -(Fraction(1, 2) - abs(real)).__floor__() * (1 if real > 0 else -1),
        }
        up, down = real.__ceil__(), real.__floor__()
        directed = {"floor": down, "ceil": up, "toward_zero": int(real), "away": up if real > 0 else down}
        wanted = {**near, **directed}[rounding]
        different += min(max(wanted, QMIN), QMAX) != min(max(got, QMIN), QMAX)
    return different


@settings(max_examples=150, deadline=None)
@given(
    st.fractions(min_value=-3, max_value=3, max_denominator=60),
    st.fractions(min_value=-9, max_value=9, max_denominator=9),
    st.sampled_from([7, 8, 31]),
    st.sampled_from(ROUNDINGS),
    st.integers(-150, 0),
    st.integers(0, 150),
    st.booleans(),
)
def test_proof_agrees_with_brute_force(ratio, constant, bits, rounding, low, high, second) -> None:  # type: ignore[no-untyped-def]
    (m, *_), shift = arith.common_dyadic([ratio], bits)
    ratios, multipliers, lows, highs = (ratio,), (m,), (low,), (high,)
    if second:
        other = Fraction(5, 7)
        ratios, multipliers = (ratio, other), (m, arith.round_fraction(other * 2**shift))
        lows, highs = (low, -2), (high, 3)
    r = thresholds.Rescale(ratios, constant, multipliers, arith.round_fraction(constant * 2**shift), shift, lows, highs)
    proof = thresholds.prove(r, rounding, (QMIN + 1, QMAX))
    assert (proof.differing > 0) == (brute_force(r, rounding) > 0)


def test_a_tie_that_no_dyadic_number_meets_is_found() -> None:
    """1/12 is no dyadic number, and 12 k + 6 is a tie of it: half of the ties must round the other way."""
    m, s = arith.dyadic(Fraction(1, 12))
    r = thresholds.Rescale((Fraction(1, 12),), Fraction(0), (m,), 0, s, (0,), (10**6,))
    assert thresholds.prove(r, "half_even", (1, 255)) == thresholds.Proof(255, 127)


def test_powers_of_two_are_exact() -> None:
    r = thresholds.Rescale((Fraction(1, 64),), Fraction(0), (2**30,), 0, 36, (-(10**6),), (10**6,))
    assert thresholds.prove(r, "half_even", (-127, 127)) == thresholds.Proof(255, 0)


def test_double_rounding_is_compared_by_search() -> None:
    m, s = arith.dyadic(Fraction(1, 700))
    r = thresholds.Rescale((Fraction(1, 700),), Fraction(0), (m,), 0, s, (-(10**5),), (10**5,))
    proof = thresholds.prove(r, "double", (-127, 127))
    values = np.arange(-(10**5), 10**5 + 1)
    got = np.clip(arith.double_round(values, m, s), -128, 127)
    wanted = np.clip([arith.round_fraction(Fraction(int(v), 700)) for v in values], -128, 127)
    assert (proof.differing > 0) == bool(np.any(got != wanted)) and proof.thresholds > 0


def test_too_many_operands_say_so() -> None:
    r = thresholds.Rescale((Fraction(1, 3),) * 3, Fraction(0), (5, 5, 5), 0, 4, (0, 0, 0), (99_999, 19_999, 9_999))
    assert not thresholds.prove(r, "half_up", (0, 9)).enumerated


@pytest.mark.parametrize("multiplier, differing", [(0, 0), (0, 0)])
def test_a_vanishing_ratio_is_checked_at_the_ends(multiplier: int, differing: int) -> None:
    r = thresholds.Rescale((Fraction(1, 10**25),), Fraction(3), (multiplier,), 3 * 2**20, 20, (-1000,), (1000,))
    assert thresholds.prove(r, "half_even", (QMIN + 1, QMAX)).differing == differing


def counted(r: thresholds.Rescale, rounding: str, steps: tuple[int, int]) -> tuple[int, int]:
    """The thresholds of one operand inside its interval and those that differ, by trying every value of the operand."""
    (low,), (high,), (ratio,) = r.lows, r.highs, r.ratios
    values = range(low, high + 1) if ratio > 0 else range(high, low - 1, -1)
    wanted = [round_exactly(v * ratio + r.constant, rounding) for v in values]
    got = [round_exactly(Fraction(v * r.multipliers[0] + r.offset, 2**r.shift), rounding) for v in values]
    inside = differing = 0
    for k in range(steps[0], steps[1] + 1):
        first, second = (next((i for i, y in enumerate(ys) if y >= k), len(ys)) for ys in (wanted, got))
        inside += 0 < first < len(wanted) or 0 < second < len(got)
        differing += first != second
    return inside, differing


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.fractions(min_value=-3, max_value=3, max_denominator=40), st.integers(-9, 9), st.integers(-90, -1)
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([6, 9, 31]),
    st.sampled_from(ROUNDINGS),
)
def test_all_channels_together_are_each_counted_exactly(channels, bits, rounding) -> None:  # type: ignore[no-untyped-def]
    made = []
    for ratio, constant, low in channels:
        (m,), shift = arith.common_dyadic([ratio], bits)
        if m:
            made.append(
                thresholds.Rescale((ratio,), Fraction(constant), (m,), constant << shift, shift, (low,), (low + 120,))
            )
    proof = thresholds.prove_all(made, rounding, (QMIN + 1, QMAX))
    each = [counted(r, rounding, (QMIN + 1, QMAX)) for r in made]
    assert (proof.thresholds, proof.differing) == (sum(e[0] for e in each), sum(e[1] for e in each))


@settings(max_examples=60, deadline=None)
@given(
    st.fractions(min_value=Fraction(1, 50), max_value=3, max_denominator=60),
    st.fractions(min_value=-2, max_value=2, max_denominator=90),
    st.sampled_from([6, 31]),
    st.sampled_from(ROUNDINGS),
)
def test_two_halves_of_a_tensor_are_proved_where_one_is_zero(up, down, bits, rounding) -> None:  # type: ignore[no-untyped-def]
    multipliers, shift = arith.common_dyadic([up, down], bits)
    r = thresholds.Rescale((up, down), Fraction(0), tuple(multipliers), 0, shift, (0, -70), (80, 0), apart=((0, 1),))

    def differing(r: thresholds.Rescale) -> bool:
        """Over every value of the tensor itself."""
        for v in range(-70, 81):
            x, y = max(v, 0), min(v, 0)
            real, total = x * up + y * down, x * r.multipliers[0] + y * r.multipliers[1] + r.offset
            results = (round_exactly(a, rounding) for a in (real, Fraction(total, 2**r.shift)))
            wanted, got = (min(max(a, QMIN), QMAX) for a in results)
            if wanted != got:
                return True
        return False

    proof = thresholds.prove(r, rounding, (QMIN + 1, QMAX))
    assert proof.enumerated and (proof.differing > 0) == differing(r)
    better = thresholds.corrected(r, rounding, (QMIN + 1, QMAX))
    assert (thresholds.prove(better, rounding, (QMIN + 1, QMAX)).differing > 0) == differing(better)


def test_hundreds_of_channels_behind_a_leaky_relu_take_a_moment() -> None:
    start = time.process_time()
    made = [
        thresholds.dyadic_rescale(
            (Fraction(0.001 + i * 1e-6), Fraction(0.0001 + i * 1e-7)),
            [0, 0],
            Fraction(0),
            (0, -(10**6)),
            (10**6, 0),
            "half_even",
            "leaky",
            ((0, 1),),
        )
        for i in range(512)
    ]
    settled, proof = thresholds.settle(made, [1] * len(made), "half_even", (-127, 127))
    assert (
        proof == thresholds.prove_all(settled, "half_even", (-127, 127))
        and proof.differing == 0
        and proof.thresholds > 512 * 200
    )
    assert time.process_time() - start < 10


def test_a_layer_that_would_take_minutes_is_not_enumerated() -> None:
    """The limit is one of the layer: each of these channels alone is below it."""
    one = thresholds.Rescale((Fraction(1, 3), Fraction(1, 5)), Fraction(0), (5, 3), 0, 4, (0, 0), (2**20, 2**15))
    channels = [dataclasses.replace(one, offset=i) for i in range(2000)]
    start = time.process_time()
    assert thresholds.prove(one, "half_up", (0, 9)).enumerated
    assert not thresholds.prove_all(channels, "half_up", (0, 9)).enumerated
    settled, proof = thresholds.settle(channels, [1] * 2000, "half_up", (0, 9))
    assert list(settled) == channels and proof == thresholds.Proof(enumerated=False)
    assert time.process_time() - start < 20


def test_prove_all_counts_equal_channels_once_each() -> None:
    r = thresholds.Rescale((Fraction(1, 64),), Fraction(0), (2**30,), 0, 36, (-(10**6),), (10**6,))
    assert thresholds.prove_all([r, r, r], "half_even", (-127, 127)).thresholds == 3 * 255


@settings(max_examples=100, deadline=None)
@given(
    st.fractions(min_value=-3, max_value=3, max_denominator=997),
    st.sampled_from(ROUNDINGS),
    st.integers(-400, 0),
    st.integers(0, 400),
)
def test_a_corrected_offset_never_makes_it_worse_and_proves_right(ratio, rounding, low, high) -> None:  # type: ignore[no-untyped-def]
    m, shift = arith.dyadic(ratio, 9)  # few bits, so that many thresholds differ at first
    r = thresholds.Rescale((ratio,), Fraction(0), (m,), 0, shift, (low,), (high,))
    better = thresholds.corrected(r, rounding, (QMIN + 1, QMAX))
    before, after = (thresholds.prove(x, rounding, (QMIN + 1, QMAX)).differing for x in (r, better))
    assert after == 0 if better != r else after == before
    assert (after > 0) == (brute_force(better, rounding) > 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.fractions(min_value=-3, max_value=3, max_denominator=997), st.integers(-400, 0), st.integers(0, 9)
        ),
        min_size=2,
        max_size=9,
    ),
    st.sampled_from(ROUNDINGS),
    st.sampled_from([(QMIN + 1, QMAX), (-1100, 1200)]),
)
def test_channels_are_corrected_as_each_alone(channels, rounding, steps) -> None:  # type: ignore[no-untyped-def]
    """The second range of results is longer than what is looked at in full at first."""
    made = []
    for ratio, low, high in channels:
        m, shift = arith.dyadic(ratio, 9)
        made.append(thresholds.Rescale((ratio,), Fraction(0), (m,), 0, shift, (low,), (high,)))
    settled, proof = thresholds.settle(made, [1] * len(made), rounding, steps)
    assert list(settled) == [thresholds.corrected(r, rounding, steps) for r in made]
    assert proof == thresholds.prove_all(list(settled), rounding, steps)


def test_a_correction_is_found_where_one_exists() -> None:
    ratio = Fraction(12345, 1000003)
    m, shift = arith.dyadic(ratio, 8)
    r = thresholds.Rescale((ratio,), Fraction(0), (m,), 0, shift, (0,), (500,))
    assert thresholds.prove(r, "half_even", (1, 7)).differing > 0
    assert thresholds.prove(thresholds.corrected(r, "half_even", (1, 7)), "half_even", (1, 7)).differing == 0


def test_shortened_shifts():
    """One operand's multiplier loses bits, (A23) mends what that moves, and several operands keep theirs."""
    ratio, constant = Fraction(1, 3001), Fraction(1, 7)
    made = Rescales.of(
        [
            thresholds.dyadic_rescale((r,), [0], constant, (-(2**20),), (2**20,), "half_up", "")
            for r in (ratio, 1 / ratio)
        ]
    )
    short = made.shortened(39)
    assert [r.shift for r in made] == [42, 19] and [r.shift for r in short] == [39, 19] and short[1] == made[1]
    assert short[0].multipliers == (round(ratio * 2**39),) and short[0].offset == round(constant * 2**39)
    settled, proof = thresholds.settle(short, [1, 1], "half_up", (-127, 127))
    assert proof.differing == 0 and settled[0].shift == 39
    assert made.shortened(62) is made
    two = Rescales.of([thresholds.dyadic_rescale((ratio, ratio), [0, 0], constant, (0, 0), (9, 9), "half_up", "")])
    assert two.shortened(39) is two
