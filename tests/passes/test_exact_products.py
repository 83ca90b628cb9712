"""Products of scales (exact.product), which are made in float64 where that holds them, against fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from relay_passes.integer.exact import negative, product, rational

ENDS = np.array([np.finfo(np.float32).max, np.finfo(np.float32).smallest_subnormal, -1.1, 0, 1 - 2.0**-24], np.float32)
OTHERS = [
    Fraction(float(np.float32(0.1))),
    Fraction(-(2**24) + 1),
    Fraction(1, 3),
    Fraction(2**24 + 1),
    Fraction(1, 2**160),
    Fraction(float(np.finfo(np.float32).smallest_subnormal)),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_of_float32_and_one_fraction(other):
    one = np.array(other, object).reshape(1, 1)
    expected = [Fraction(float(v)) * other for v in ENDS]
    for got in (product(ENDS, one), product(one, ENDS)):
        assert got.dtype == object and got.ravel().tolist() == expected
        assert negative(got).ravel().tolist() == [v < 0 for v in expected]


def test_of_float32_float64_and_fractions():
    doubles, fractions = np.array([0.1, 1e300, 5e-324, 1, 2]), rational(np.array([1, 2, 3, 4, 5]))
    for a in (ENDS, doubles, fractions):
        for b in (ENDS, doubles, fractions):
            assert product(a, b).tolist() == (rational(a) * rational(b)).tolist()
