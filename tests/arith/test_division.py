"""The integers of a quotient (A32): bytes against fractions, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core.division import Division


def float32(value: float) -> Fraction:
    return Fraction(float(np.float32(value)))


RATIOS = {
    "small": float32(0.0197) / (float32(0.0313) * float32(0.0243)),
    "with a factor": float32(0.0197) * float32(-0.731) / (float32(0.0313) * float32(0.0243)),
    "two factors": float32(0.0197) * float32(0.731) * float32(1.37) / (float32(0.00313) * float32(0.0243)),
    "a whole number": Fraction(3),
    "ties everywhere": Fraction(1, 2),
    "ties at thirds": Fraction(-5, 6),
    "far below": float32(1e-9) / float32(0.37),
    "far above": float32(1e9) / float32(0.37),
}


@pytest.mark.parametrize("name", RATIOS)
def test_bytes_round_as_the_fractions_of_the_file_do(name: str) -> None:
    ratio = RATIOS[name]
    made = Division.of(ratio, (255, 255), 255)
    assert made.off == 0
    assert 255 * abs(made.multiplier) < 2**61 and 0 < 255 * made.divisor < 2**61
    near = Fraction(made.multiplier, made.divisor)
    for b in (1, 2, 3, 7, 12, 100, 127, 254, 255):
        for a in range(-255, 256):
            assert round(min(max(a * near / b, -300), 300)) == round(min(max(a * ratio / b, -300), 300))


def test_what_64_bits_do_not_hold_is_near_and_bounded() -> None:
    ratio = float32(0.0197) / (float32(0.0313) * float32(0.0243))
    made = Division.of(ratio, (2**31, 2**31), 128)
    near = Fraction(made.multiplier, made.divisor)
    assert 0 < abs(near - ratio) < ratio / 2**28
    # The furthest result that is not clamped is off by the same part of it.
    lost = abs(near - ratio)
    assert made.off == 129 * made.apart and made.apart == lost / (ratio - lost)
    assert max(2**31 * made.multiplier, 2**31 * made.divisor) < 2**61
    assert Division.of(ratio, (2**15, 2**16), 128).off == 0


def test_a_dividend_of_zeros() -> None:
    assert Division.of(Fraction(0), (255, 255), 255) == Division(0, 1, Fraction(0), Fraction(0))


@pytest.mark.parametrize(
    ("ratio", "most", "match"),
    [
        (Fraction(1, 2**61), (255, 255), "scales too far apart"),
        (Fraction(2**61), (255, 255), "scales too far apart"),
        (Fraction(1), (2**61, 1), "integers too large"),
    ],
)
def test_what_has_no_integers(ratio: Fraction, most: tuple[int, int], match: str) -> None:
    with pytest.raises(OverflowError, match=match):
        Division.of(ratio, most, 255)


def test_what_a_ratio_is_apart_holds_for_numbers_that_are_no_integers() -> None:
    """(A32e) says nothing of those, so that fixed-point operands have it of every ratio that is not exact."""
    ratio = RATIOS["two factors"]
    made = Division.of(ratio, (255, 255), 255)
    near = Fraction(made.multiplier, made.divisor)
    assert made.off == 0 < made.apart < Fraction(1, 2**40)
    assert abs(near - ratio) <= made.apart * near
    assert Division.of(Fraction(1, 2), (255, 255), 255).apart == 0
