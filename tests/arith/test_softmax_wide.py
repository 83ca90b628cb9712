"""Softmax of wide scores (A24) against the real softmax: (A24e) holds, and rows of two have no wrong rounding."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest

from hawq_tvm.core import arith, softmax_wide

RNG = np.random.default_rng(24)


def on_grid(scores: np.ndarray, fraction: int) -> np.ndarray:
    return np.floor(scores.astype(np.longdouble) * np.longdouble(1.4426950408889634074) * 2.0**fraction + 0.5)


def computed(scores: np.ndarray, fraction: int, inverse: int, high: int) -> tuple[np.ndarray, int]:
    m, k = arith.softmax_dyadic(softmax_wide.Fraction(inverse), scores.shape[-1])
    u = on_grid(scores, fraction).astype(np.int64)
    return softmax_wide.softmax(u, -1, fraction, m, k, zero_point=0, qmin=0, qmax=high), k


def real(scores: np.ndarray, inverse: int) -> np.ndarray:
    e = np.exp(scores.astype(np.longdouble) - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) * inverse


@pytest.mark.parametrize("fraction", [12, 16, 20])
@pytest.mark.parametrize("inverse, high", [(256, 255), (32767, 32767), (65536, 65535)])
def test_the_bound_holds(fraction: int, inverse: int, high: int) -> None:
    for count in (1, 2, 7, 128, 1000):
        for width in (0.01, 1.0, 8.0, 60.0):
            scores = RNG.normal(0, width, (20, count))
            scores[0], scores[1], scores[1, -1] = 0.5, -300.0, 0.0
            got, k = computed(scores, fraction, inverse, high)
            bound = 0.5 + softmax_wide.distance(count, inverse, k, fraction)
            assert np.max(np.abs(got - np.minimum(real(scores, inverse), high))) <= bound
    assert softmax_wide.distance(128, 256, 22, 20) < 2e-4


def test_rows_of_two() -> None:
    """Scores in steps of 2^-20, from equal to one that has nothing: 40,000 rows, none rounded the wrong way."""
    below = np.unique(np.concatenate([RNG.integers(0, 12 << 20, 40000), [0, 1, 2, 40 << 20]]))
    u = np.stack([np.zeros_like(below), -below], -1)
    m, k = arith.softmax_dyadic(softmax_wide.Fraction(256), 2)
    got = softmax_wide.softmax(u, -1, 20, m, k, zero_point=0, qmin=0, qmax=256)
    p = np.exp2(-below.astype(np.longdouble) / 2**20)
    exact = 256 * np.stack([1 / (1 + p), p / (1 + p)], -1)
    unsure = np.abs(exact - np.floor(exact) - 0.5) < softmax_wide.distance(2, 256, k, 20)
    assert unsure.mean() < 1e-3
    assert np.count_nonzero((got != np.rint(exact)) & ~unsure) == 0


@pytest.mark.parametrize("fraction", [12, 14, 20])
def test_the_tables_are_correctly_rounded(fraction: int) -> None:
    coarse, fine = softmax_wide.tables(fraction)
    assert len(coarse) == len(fine) == 2 ** (fraction // 2) and coarse[0] == fine[0] == 2**30
    with localcontext() as context:
        context.prec = 40
        for table, bits in ((coarse, fraction // 2), (fine, fraction)):
            for i in RNG.integers(0, len(table), 50).tolist():
                exact = Decimal(2) ** (30 - Decimal(i) / 2**bits)
                assert abs(Decimal(int(table[i])) - exact) <= Decimal("0.5")


def test_the_grid_is_as_fine_as_the_scores_allow() -> None:
    assert softmax_wide.fraction_of(0.0) == softmax_wide.fraction_of(300.0) == 20
    for most in (400.0, 3000.0, 60000.0):
        fraction = softmax_wide.fraction_of(most)
        assert fraction is not None and most * math.log2(math.e) * 2**fraction < 2**29
    assert softmax_wide.fraction_of(1e6) is None
