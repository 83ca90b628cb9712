"""arith.py against exact rationals: every rounding, every equation, at ties, negative ties and extremes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hawq_tvm.core import arith


def exact(value: Fraction, rounding: str) -> int:
    """The rounding rules of section 3, said of rationals."""
    down, part = value.__floor__(), value - value.__floor__()
    directed = {
        "floor": down,
        "ceil": down + (part > 0),
        "toward_zero": int(value),
        "away": down + (part > 0 and value > 0),
    }
    if rounding in directed:
        return directed[rounding]
    if part != Fraction(1, 2):
        return down + (part > Fraction(1, 2))
    ties = {
        "half_up": down + 1,
        "half_even": down + down % 2,
        "half_away": down + (value > 0),
        "half_toward_zero": down + (value < 0),
    }
    return ties[rounding]


SHIFTED = [r for r in arith.ROUNDINGS if r != "double"]
POWERS = [sign * (2**p + d) for p in range(40) for d in (-1, 0, 1) for sign in (1, -1)]


@pytest.mark.parametrize("rounding", SHIFTED)
@pytest.mark.parametrize("shift", [0, 1, 2, 7, 31, 38])
def test_shift_round_is_exact_at_ties_and_powers(rounding: str, shift: int) -> None:
    ties = [k * 2**shift + (2**shift >> 1) + d for k in range(-6, 7) for d in (-1, 0, 1)]
    values = np.array(POWERS + ties, np.int64)
    expected = [exact(Fraction(int(v), 2**shift), rounding) for v in values]
    np.testing.assert_array_equal(arith.shift_round(values, shift, rounding), expected)


@given(st.integers(-(2**61), 2**61), st.integers(0, 62), st.sampled_from(SHIFTED))
def test_shift_round_is_exact_anywhere(value: int, shift: int, rounding: str) -> None:
    assert int(arith.shift_round(np.int64(value), shift, rounding)) == exact(Fraction(value, 2**shift), rounding)


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown rounding 'nearest'"):
        arith.shift_round(np.int64(1), 1, "nearest")


@given(st.fractions(min_value=Fraction(1, 10**12), max_value=10**6), st.sampled_from([1, -1]))
def test_dyadic_is_the_nearest_with_its_bits(ratio: Fraction, sign: int) -> None:
    m, s = arith.dyadic(sign * ratio)
    assert 0 <= s <= 62 and abs(m) < 2**31
    assert abs(Fraction(m, 2**s) - sign * ratio) <= Fraction(1, 2 ** (s + 1))
    assert abs(m) >= 2**30 or s == 62


@pytest.mark.parametrize(
    "ratio, expected", [(Fraction(1), (2**30, 30)), (Fraction(1, 2), (2**30, 31)), (Fraction(0), (0, 31))]
)
def test_dyadic_of_powers_of_two_is_exact(ratio: Fraction, expected: tuple[int, int]) -> None:
    assert arith.dyadic(ratio) == expected


def test_dyadic_renormalizes_when_rounding_reaches_the_next_power() -> None:
    m, s = arith.dyadic(1 - Fraction(1, 2**40))
    assert (m, s) == (2**30, 30)


def test_dyadic_refuses_what_no_shift_can_hold() -> None:
    with pytest.raises(OverflowError, match=r"a ratio of about 2\^31"):
        arith.dyadic(Fraction(2**31))


def test_common_dyadic_shares_the_shift_of_the_largest() -> None:
    multipliers, shift = arith.common_dyadic([Fraction(1, 3), Fraction(-2, 7)])
    assert shift == arith.dyadic(Fraction(1, 3))[1]
    assert multipliers == [
        arith.round_fraction(Fraction(1, 3) * 2**shift),
        arith.round_fraction(Fraction(-2, 7) * 2**shift),
    ]


def gemmlowp(x: int, m: int, s: int) -> int:
    """(A8) in Python integers, term by term as gemmlowp's two functions are defined."""
    left, right = max(0, 31 - s), max(0, s - 31)
    product = (x << left) * m
    total = product + (2**30 if product >= 0 else 1 - 2**30)
    high = abs(total) // 2**31 * (1 if total >= 0 else -1)
    mask = 2**right - 1
    remainder, threshold = high & mask, (mask >> 1) + (high < 0)
    return (high >> right) + (remainder > threshold)


@given(st.integers(-(2**20), 2**20), st.integers(2**30, 2**31 - 1), st.integers(22, 50))
def test_double_round_is_gemmlowps(x: int, m: int, s: int) -> None:
    assert int(arith.double_round(np.int64(x), m, s)) == gemmlowp(x, m, s)


def test_requantize_sums_operands_before_one_rounding() -> None:
    a, c = np.array([1, 1, -1, 3]), np.array([0, 1, 0, 4])
    y = arith.requantize([a, c], [1, 1], 0, 1, rounding="half_even", zero_point=3, qmin=0, qmax=6)
    np.testing.assert_array_equal(y, [3, 4, 3, 6])  # 0.5, 1, -0.5, 3.5 -> 0, 1, 0, 4; plus 3; clamped


@pytest.mark.parametrize("storage, qmin, qmax", [("int8", -128, 127), ("uint8", 0, 15), ("int16", -(2**15), 2**15 - 1)])
def test_quantize_rounds_ties_to_even_and_saturates(storage: str, qmin: int, qmax: int) -> None:
    x = np.array([0.25, 0.75, -0.25, 1e30, -1e30, np.inf, -np.inf], np.float32)
    q = arith.quantize(x, np.float32(0.5), np.int64(1), qmin=qmin, qmax=qmax, storage=storage)
    np.testing.assert_array_equal(q, [1, 3, 1, qmax, qmin, qmax, qmin])
    assert q.dtype == storage


def test_quantize_forms_differ_where_onnx_and_pytorch_do() -> None:
    scales = np.random.default_rng(0).uniform(0.01, 1, 500).astype(np.float32)
    x = (np.arange(-50, 50)[:, None] + np.float32(0.5)) * scales
    divide, reciprocal = (
        arith.quantize(x.astype(np.float32), scales, np.int64(0), qmin=-128, qmax=127, storage="int8", form=form)
        for form in ("divide", "reciprocal")
    )
    assert 0 < np.sum(divide != reciprocal) < x.size // 2


@pytest.mark.parametrize("rounding", SHIFTED)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_round_real_is_exact(rounding: str, kind: type) -> None:
    quarters = np.arange(-16, 17) / 4
    near = [np.nextafter(kind(v), kind(to)) for v in quarters for to in (-9, 9)]
    values = np.array([*quarters, *near, 2**23 - 0.5, 2**23 + 1, -(2**23) - 1], kind)
    np.testing.assert_array_equal(
        arith.round_real(values, rounding), [exact(Fraction(float(v)), rounding) for v in values]
    )


def test_the_affine_form_rounds_after_the_zero_point() -> None:
    x = np.array([0.5, 1.5, -0.5, -1.5, -2.5], np.float32)
    args = {"qmin": -8, "qmax": 7, "storage": "int8"}
    np.testing.assert_array_equal(
        arith.quantize(x, np.float32(1), np.int64(1), form="affine", **args), [2, 2, 0, 0, -2]
    )
    np.testing.assert_array_equal(arith.quantize(x, np.float32(1), np.int64(1), **args), [1, 3, 1, -1, -1])
    np.testing.assert_array_equal(
        arith.quantize(x, np.float32(1), np.int64(1), form="affine", rounding="toward_zero", **args), [1, 2, 0, 0, -1]
    )


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=33), st.booleans())
def test_int4_packing_round_trips(values: list[int], signed: bool) -> None:
    array = np.array(values, np.int8) if signed else np.array([v + 8 for v in values], np.uint8)
    packed = arith.pack_int4(array)
    assert packed.size == (array.size + 1) // 2
    np.testing.assert_array_equal(arith.unpack_int4(packed, array.shape, signed), array)


def test_int4_packing_puts_the_first_value_low() -> None:
    np.testing.assert_array_equal(arith.pack_int4(np.array([1, -1, -8], np.int8)), [0xF1, 0x08])


@pytest.mark.parametrize(
    "name, qmin, qmax, storage",
    [("int4", -8, 7, "int8"), ("uint2", 0, 3, "uint8"), ("int16", -(2**15), 2**15 - 1, "int16")],
)
def test_qtype_of(name: str, qmin: int, qmax: int, storage: str) -> None:
    assert arith.QType.of(name) == arith.QType(qmin, qmax, storage)


def test_qtype_bits_and_storage() -> None:
    assert [arith.QType(0, 15, "uint8").bits, arith.QType(-8, 7, "int8").bits, arith.QType(0, 0, "int8").bits] == [
        4,
        4,
        1,
    ]
    assert [
        arith.smallest_storage(*r) for r in ((-1, 1), (0, 200), (-129, 0), (0, 65535), (-(2**31), 0), (0, 2**40))
    ] == [
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "int64",
    ]
    with pytest.raises(OverflowError):
        arith.smallest_storage(0, 2**63)
