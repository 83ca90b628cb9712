"""(A27): the thresholds that are counted against every sum tried in long double."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from hawq_tvm.core import thresholds
from hawq_tvm.core.crossings import UNDECIDED, boundary, compare, crossings

Long = np.longdouble
STEP, ZERO, LEAST = Fraction(3, 5000), 217, -(1 << 15)
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    # Bounds of x sigmoid(x): products of the factors' bounds.
    "silu": (
        lambda x: x / (1 + np.exp(-x)),
        lambda low, high: _product((low, high), (1 / (1 + np.exp(-low)), 1 / (1 + np.exp(-high)))),
    ),
    "tanh": (np.tanh, lambda low, high: (np.tanh(low), np.tanh(high))),
}


def _product(a: Any, b: Any) -> Any:
    corners = [x * y for x in a for y in b]
    return np.minimum.reduce(corners), np.maximum.reduce(corners)


def _levels(function: Callable[[Any], Any], x: Any, scale: float, steps: tuple[int, int]) -> np.ndarray:
    return np.clip(np.rint(function(x) / Long(scale)), steps[0] - 1, steps[1]).astype(np.int64)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("ratio", [Fraction(1, 700), Fraction(-1, 411), Fraction(7, 100_003)])
def test_every_sum(name: str, ratio: Fraction) -> None:
    function, bounds = FUNCTIONS[name]
    scale, steps, low, high = 0.0117, (-127, 127), -3000, 2500

    def in_steps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        least, most = bounds(a, b)
        return least / scale - 1e-14, most / scale + 1e-14

    constant = Fraction(13, 977)
    ends = sorted(float(v * ratio + constant) for v in (low, high))
    real = crossings(in_steps, ends[0] - 0.01, ends[1] + 0.01, steps, "half_even")
    assert real is not None and (real.levels != UNDECIDED).sum() > 10

    rescale = thresholds.dyadic_rescale(
        (ratio / STEP,), [0], constant / STEP + ZERO, (low,), (high,), "half_up", "a layer"
    )
    index = np.arange(LEAST, -LEAST)
    table = _levels(function, ((index - ZERO) * Long(float(STEP))), scale, steps)
    proof = compare(real, [rescale], [3], lambda i: table[np.clip(i, LEAST, -LEAST - 1) - LEAST], STEP, ZERO)

    v = np.arange(low, high + 1)
    sums = v * (Long(ratio.numerator) / Long(ratio.denominator)) + Long(constant.numerator) / Long(constant.denominator)
    wanted = _levels(function, sums, scale, steps)
    grid = (v * rescale.multipliers[0] + rescale.offset + (1 << rescale.shift - 1)) >> rescale.shift
    ours = table[np.clip(grid, LEAST, -LEAST - 1) - LEAST]
    # In the order in which the real value grows: a threshold is a sum whose result differs from the one before it.
    wanted, ours = (a if ratio > 0 else a[::-1] for a in (wanted, ours))
    changes = wanted[1:] != wanted[:-1]
    alike = (wanted == ours)[1:] & (wanted == ours)[:-1]
    assert proof.enumerated and proof.thresholds == 3 * changes.sum() > 0
    assert proof.differing == 3 * (changes & ~alike).sum()


def test_what_has_too_many_steps_or_operands_is_not_enumerated() -> None:
    assert crossings(lambda a, b: (a, b), 0, 1, (-32767, 32767), "half_even") is None
    real = crossings(lambda a, b: (a - 1e-15, b + 1e-15), -3, 3, (-1, 1), "half_even")
    assert real is not None
    two = thresholds.dyadic_rescale(
        (Fraction(1), Fraction(1, 3)), [0, 0], Fraction(0), (0, 0), (9, 9), "half_up", "a layer"
    )
    assert not compare(real, [two], [1], np.zeros_like, STEP, ZERO).enumerated


@pytest.mark.parametrize("rounding", ["half_even", "floor", "ceil", "toward_zero", "away"])
def test_boundaries(rounding: str) -> None:
    """Just beyond its boundary a level is reached, just before it is not."""
    from hawq_tvm.core.arith import round_real

    levels = np.arange(-5, 6)
    edges = boundary(levels, rounding)
    assert np.all(round_real(edges + 1e-9, rounding) >= levels)
    assert np.all(round_real(edges - 1e-9, rounding) < levels)
