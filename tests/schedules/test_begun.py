"""Sums that begin at constants (A9e), against the 64-bit formula they replace."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.targets import target
from schedules.emit.begun import begun_at

from .one_layer import Body, lower, packed

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


def requantized(times: int) -> Body:
    """Half of the sums of a matrix product as bytes, or added to a quarter of them."""

    def body(emit, p):
        sums = emit(relax.op.matmul(p, relax.const(np.ones((16, 64), np.int8)), out_dtype="int32"))
        m, q = np.full((1, 64), 2**30), arith.QType.of("uint8")
        made = [
            emit(ops.requantize([sums], [m], 0, np.full((1, 64), 36 + k), qtype=q, zero_point=0, rounding="half_up"))
            for k in range(times)
        ]
        return ops.requantize(made, [1 << 28] * times, 0, 29, qtype=q, zero_point=0, rounding="half_up")

    return body


def test_sums_that_begin_at_constants_have_no_other_reader() -> None:
    """Whose constants would be others, or none: no pass makes such a layer."""
    shape = [((5, 16), "uint8")]
    assert "begin" in lower(packed(requantized(1), shape), target.parse("x86-vnni")).script()
    with pytest.raises(AssertionError, match="reads sums that begin at constants, and does not know"):
        lower(packed(requantized(2), shape), target.parse("x86-vnni"))
