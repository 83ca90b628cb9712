"""Softmax and normalizations a row at a time."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from tvm import relax

import schedules
from hawq_tvm.core import arith, ops, softmax_wide
from hawq_tvm.core.layer_norm import Norm, normalized
from hawq_tvm.targets import target

from .one_layer import lower, packed, run

HOST = target.host()
U8 = arith.QType.of("uint8")
rng = np.random.default_rng(8)
LAST, MIDDLE = (3, 5, 37), (2, 64, 3)


def rows(*shape: int) -> np.ndarray:
    """Rows of 8 bits, among them constant ones and rows of the two extremes."""
    x = rng.integers(0, 256, shape, dtype=np.uint8)
    x[0] = 255
    return np.where(rng.random(shape) < 0.2, rng.choice(np.array([0, 255], np.uint8), shape), x)


@pytest.mark.parametrize("shape", [LAST, (2, 128), (4, 1, 1000), (7, 1)], ids=str)
@pytest.mark.parametrize("scale", [0.001, 0.05, 1.0])
def test_softmax(shape, scale):
    x, table = rows(*shape), arith.softmax_table(Fraction(scale), 256)
    m, k = arith.softmax_dyadic(Fraction(256), shape[-1])

    def body(emit, v):
        made = ops.softmax(v, table, axis=len(shape) - 1, multiplier=m, shift=k, qtype=U8, zero_point=2)
        return ops.requantize([emit(made)], [3], 1, 2, qtype=U8, zero_point=0, rounding="half_even")

    (out,) = run(body, x, target=HOST, rule="cpu.rows")
    made = arith.softmax(x, table, len(shape) - 1, m, k, zero_point=2, qmin=0, qmax=255)
    expected = arith.requantize([made], [3], 1, 2, rounding="half_even", zero_point=0, qmin=0, qmax=255)
    np.testing.assert_array_equal(out, expected.astype(np.uint8), strict=True)


@pytest.mark.parametrize("moved", [0, 1000])
def test_wide_scores_that_the_kernel_computes(moved):
    """Where registers hold the tables of (A24), vectors are made of scores as they are stored, and of no others."""
    x, (m, k) = rng.integers(0, 20000, (5, 32)).astype(np.int32), arith.softmax_dyadic(Fraction(256), 32)
    asked = {"axis": -1, "multiplier": m, "shift": k, "zero_point": 0}

    def body(emit, v):
        v = emit(relax.op.subtract(v, ops.const(moved, "int32"))) if moved else v
        return ops.softmax_wide(v, softmax_wide.tables(12), fraction=12, qtype=U8, **asked)

    (out,) = run(body, x, target=HOST, rule="cpu.rows")
    coarse, fine = (t.astype(np.int64) for t in softmax_wide.tables(12))
    e = softmax_wide.exponents(x.astype(np.int64), 1, 12, coarse, fine)
    want = arith.normalize_exponents(e, qmin=0, qmax=255, rounding="half_even", **{**asked, "axis": 1})
    np.testing.assert_array_equal(out, want.astype(np.uint8))


def test_softmax_rounded_down():
    x, table = rows(*LAST), arith.softmax_table(Fraction(1, 20), 256)
    m, k = arith.softmax_dyadic(Fraction(256), 37)
    asked = {"axis": 2, "multiplier": m, "shift": k, "zero_point": 0, "rounding": "floor"}
    (out,) = run(lambda emit, v: ops.softmax(v, table, qtype=U8, **asked), x, target=HOST, rule="cpu.rows")
    e = table.astype(np.int64)[x.max(axis=2, keepdims=True).astype(np.int64) - x]
    np.testing.assert_array_equal(out, arith.normalize_exponents(e, qmin=0, qmax=255, **asked))
    below = np.minimum(e / e.sum(axis=2, keepdims=True) * 256, 255.5) - out
    assert below.min() > -1e-4 and below.max() < 1 + 1e-4


@pytest.mark.parametrize(("shape", "axes"), [(LAST, [2]), (LAST, [1, 2]), ((2, 384), [1]), ((6, 1, 33), [2])], ids=str)
@pytest.mark.parametrize("centered", [True, False])
def test_normalization_by_a_factor_and_an_addend_of_each_channel(shape, axes, centered):
    x, n = rows(*shape), int(np.prod([shape[a] for a in axes]))
    norm = Norm.of(n, (0, 255), Fraction(1, 20), Fraction(1, 10**5), None if centered else 128)
    m, b = rng.integers(1, 2**20, shape[-1]), rng.integers(0, 2**40, shape[-1])
    kept = {"zero_point": 128, "rounding": "half_even"}
    (out,) = run(
        lambda emit, v: ops.requantize([emit(ops.layer_norm(v, axes, norm))], [m], b, 40, qtype=U8, **kept),
        x,
        target=HOST,
        rule="cpu.rows",
    )
    expected = arith.requantize([normalized(x, axes, norm)], [m], b, 40, qmin=0, qmax=255, **kept)
    np.testing.assert_array_equal(out, expected.astype(np.uint8), strict=True)


@pytest.mark.parametrize(
    ("shape", "axis", "why"),
    [(MIDDLE, 1, "a row does not lie in one piece."), ((40,), 0, "a single row.")],
    ids=str,
)
def test_other_softmaxes_are_refused_with_a_sentence(shape, axis, why):
    m, k = arith.softmax_dyadic(Fraction(256), shape[axis])
    table = arith.softmax_table(Fraction(1, 20), 256)
    made = lambda e, v: ops.softmax(v, table, axis=axis, multiplier=m, shift=k, qtype=U8, zero_point=0)  # noqa: E731
    (entry,) = schedules.report(lower(packed(made, [(shape, "uint8")]), HOST))
    assert entry["rule"] == "cpu.generic" and f"cpu.rows: {why}" in entry["refused"]


def test_what_moves_the_result_is_refused():
    m, k = arith.softmax_dyadic(Fraction(256), 37)
    table = arith.softmax_table(Fraction(1, 20), 256)

    def body(emit, v):
        made = emit(ops.softmax(v, table, axis=2, multiplier=m, shift=k, qtype=U8, zero_point=0))
        return relax.op.permute_dims(made, [0, 2, 1])

    (entry,) = schedules.report(lower(packed(body, [(LAST, "uint8")]), HOST))
    assert "relax.permute_dims after the hawq.softmax" in entry["refused"]
