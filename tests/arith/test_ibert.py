"""The bounds of I-BERT's arithmetic: intervals that no integer leaves, and distances that hold and are not too wide."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core import ibert

rng = np.random.default_rng(29)
erf = np.vectorize(math.erf, otypes=[np.float64])


def test_irrational_numbers_have_sixty_digits():
    assert abs(ibert.ROOT2**2 - 2) < Fraction(1, 10**58)
    with localcontext() as context:
        context.prec = 70
        two = (Decimal(ibert.LN2.numerator) / Decimal(ibert.LN2.denominator)).exp()
        assert abs(two - 2) < Decimal(10) ** -58
    for n in (1, 2, 384, 400, 1024):
        scale = ibert.normalized_scale(n) * 2**30
        assert abs(scale**2 - n) < Fraction(1, 2**90) and (scale.denominator == 1) == (math.isqrt(n) ** 2 == n)


def test_what_the_polynomials_themselves_are_off_by():
    x = np.linspace(0, 12, 400_001)
    a, b = map(float, ibert.ERF)
    polynomial = a * (np.minimum(x, -b) + b) ** 2 + 1
    off = np.abs(polynomial - erf(x))
    gelu = x * 2**0.5 / 2 * off
    tanh = np.abs(polynomial - np.tanh(math.sqrt(2 / math.pi) * (x * 2**0.5 + 0.044715 * (x * 2**0.5) ** 3)))
    p = -np.linspace(0, math.log(2), 400_001)
    c, d, e = map(float, ibert.EXP)
    exponent = np.abs((c * (p + d) ** 2 + e) / np.exp(p) - 1)
    for bound, most in (
        (ibert.ERF_ERROR, off.max()),
        (ibert.GELU_ERROR, max(gelu.max(), (x * 2**0.5 / 2 * tanh).max())),
        (ibert.EXP_ERROR, exponent.max()),
    ):
        assert 0.99 * bound < most < bound


@pytest.mark.parametrize(("scale", "most"), [(0.05, 128), (2.0, 127), (2**-12, 2**15), (1e-6, 2**26), (3e-9, 2**31)])
def test_gelu_keeps_to_its_interval_and_distance(scale, most):
    n = ibert.Polynomial.gelu([Fraction(scale)], [most])
    every = rng.integers(-most, most, 20_000, endpoint=True)
    corner = np.arange(-3 * n.corner[0], 3 * n.corner[0] + 1, max(n.corner[0] // 2000, 1)).clip(-most, most)
    q = np.unique(np.concatenate([every, corner, [-most, most, 0, 1, -1]]))
    erf_part = ibert.erf(q, n.corner[0], n.constant[0], n.shift)
    y = q * (erf_part + n.one[0])
    low, high = ibert.gelu_bounds(-most, most, n.corner[0], n.constant[0], n.one[0], n.shift)
    assert low <= y.min() and y.max() <= high and max(-low, high) < 2**43
    x = q * scale
    off = np.abs(y - x / 2 * (1 + erf(x / 2**0.5)) / float(n.scale[0]))
    # float64 holds the real function to 53 bits of the largest.
    assert np.all(off <= n.distance[0] + np.abs(y) * 2.0**-50)
    # Where integers are finer than the polynomial is wrong, the bound is not much more than the polynomial.
    assert scale > 0.01 or n.distance[0] * float(n.scale[0]) < 0.03


@pytest.mark.parametrize("scale", [0.05, 2**-15, 1e-7])
def test_erf_keeps_to_its_distance(scale):
    n = ibert.Polynomial.erf([Fraction(scale)], [1])
    q = np.unique(
        np.concatenate([np.arange(-2000, 2001), np.linspace(-2 * n.corner[0], 2 * n.corner[0], 4001).astype(int)])
    )
    y = ibert.erf(q, n.corner[0], n.constant[0], n.shift)
    assert np.max(np.abs(y - erf(q * scale) / float(n.scale[0]))) <= n.distance[0]


@pytest.mark.parametrize("scale", [1.0, 0.03, 1e-4, 5e-8])
@pytest.mark.parametrize("count", [2, 3, 128])
def test_softmax_keeps_to_its_distance(scale, count):
    numbers, worst = ibert.Softmax.of(Fraction(scale)), 0.0
    for spread in (0.5, 2.0, 9.0, 40.0):
        q = np.rint(rng.normal(0, spread, (300, count)) / scale).astype(np.int64)
        e = ibert.exponents(q, 1, numbers)
        assert e.max() < 2**31 and e.max(axis=1).min() >= 2**30
        real = np.exp((q - q.max(axis=1, keepdims=True)) * scale)
        worst = max(worst, np.max(np.abs(e / e.sum(axis=1, keepdims=True) - real / real.sum(axis=1, keepdims=True))))
    assert worst <= ibert.softmax_distance(scale / 2**numbers.left, count, 1.0, 62)


def test_a_row_of_zeros_and_three_ones_is_what_the_equations_say():
    n = 384
    row = np.zeros((1, n), np.int64)
    row[0, :3] = 1
    h = ibert.normalized(row, [1])[0].astype(np.float64) * float(ibert.normalized_scale(n))
    real = (row[0] - row.mean()) / row.std()
    assert abs(np.max(np.abs(h - real)) / n**0.5 - 0.42) < 0.01
    assert np.max(np.abs(h - real)) <= ibert.normalized_distance(n) * float(ibert.normalized_scale(n))
