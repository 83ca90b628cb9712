"""(A31): polynomials in the cells of a grid, against fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core.interpolation import Steps, extremes, interpolated, worst

rng = np.random.default_rng(6)


def tables(cells: int, bits: tuple[int, int, int]) -> np.ndarray:
    return np.stack([rng.integers(-(1 << b), (1 << b) + 1, cells) for b in bits])


SHIFTS = [Steps(5, 3, 4, 2), Steps(1, 0, 0, 0), Steps(0, 2, 2, 1), Steps(9, 12, 7, 5)]


@pytest.mark.parametrize("steps", SHIFTS)
def test_it_is_the_polynomial_with_three_floors(steps: Steps) -> None:
    table = tables(8, (20, 12, 9))
    u = np.arange(8 << steps.cell)
    for one, got in zip(u.tolist(), interpolated(u, table, steps).tolist(), strict=True):
        cell, place = divmod(one, 1 << steps.cell)
        value, slope, curvature = (int(v) for v in table[:, cell])
        place -= (1 << steps.cell) // 2
        bend = math.floor(Fraction(curvature * place, 1 << steps.second))
        rise = math.floor(Fraction((slope + bend) * place, 1 << steps.first))
        assert got == math.floor(Fraction(value + rise, 1 << steps.last))


@pytest.mark.parametrize("steps", SHIFTS)
def test_bounds_hold_and_are_near(steps: Steps) -> None:
    for _ in range(20):
        table = tables(8, (20, 12, 9))
        low, high = sorted(rng.integers(0, 8 << steps.cell, 2).tolist())
        got = interpolated(np.arange(low, high + 1), table, steps)
        least, most = extremes(table, steps, low, high)
        room = 4 + (1 << steps.cell >> steps.first + steps.last)
        assert least <= got.min() <= least + room and most - room <= got.max() <= most


def test_no_product_and_no_sum_is_larger_than_the_worst() -> None:
    steps = Steps(5, 3, 4, 2)
    table = np.array([[1000], [-70], [9]])
    # |9 16|, |(70 + 18) 16| and 1000 + 88.
    assert worst(table, steps) == 1408
