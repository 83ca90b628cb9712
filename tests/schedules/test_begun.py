"""Sums that begin at constants (A9e), against the 64-bit formula they replace."""

from __future__ import annotations

import numpy as np
import pytest

from hawq_tvm.core import arith
from schedules.emit.begun import begun_at

rng = np.random.default_rng(21)


def results(x, m, b, t, bounds):
    """clamp((x m + b) >> (32 + t)) in integers of any size."""
    return min(max((x * m + b) >> (32 + t), bounds[0]), bounds[1])


def begun(x, m, k, h, t, bounds, short):
    """(A9e), in integers of any size that saturate where the instructions do."""

    def kept(v):
        assert short or -(2**31) <= v < 2**31
        return min(max(v, -(2**15)), 2**15 - 1) if short else v

    assert -(2**31) <= x + k < 2**31 or abs(x) > 2**30
    return min(max(kept(kept(((x + k) * m) >> 32) + h) >> t, bounds[0]), bounds[1])


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("zero_point", [0, 1, 100])
@pytest.mark.parametrize("exact", [True, False])
def test_thresholds_stay_where_they_are(dtype, short, zero_point, exact):
    """On both sides of every threshold and far away; `exact`: offsets are those of a bias, or else any."""
    n, bounds = 24, arith.RANGES[dtype]
    m = rng.integers(2**25, 2**31, n)
    t = rng.integers(1, (arith.PACKED_SHIFTS[dtype] - 32 if short else 12) + 1, n)
    b = rng.integers(-(2**18), 2**18, n) * m + (np.int64(1) << 31 + t) + (np.int64(zero_point) << 32 + t)
    if not exact:
        b += rng.integers(-(m // 2), m // 2)
    found = begun_at(m, b, t, zero_point, bounds, short)
    if found is None:  # a zero point of int8 is beyond what saturates
        assert short and dtype == "int8" and zero_point > 0
        return
    for m_, b_, t_, k, h in zip(*(v.tolist() for v in (m, b, t, *found)), strict=True):
        steps = [-((b_ - (y << 32 + t_)) // m_) for y in range(bounds[0] - 1, bounds[1] + 3)]
        for x in {x + d for x in [*steps, -(2**29), 0, 2**29] for d in (-1, 0, 1)}:
            assert begun(x, m_, k, h, t_, bounds, short) == results(x, m_, b_, t_, bounds)


@pytest.mark.parametrize(("m", "b", "t"), [(0, 1 << 35, 4), (-5, 1 << 35, 4), (2**30, 1 << 31, 0), (2**30, 0, 21)])
def test_what_has_no_such_constants(m, b, t):
    one = (np.array([v]) for v in (m, b, t))
    assert begun_at(*one, 0, (0, 255), True) is None
