"""The study of correct rounding on fewer rows: no value differs from the real formula, and a wrong one is counted."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core import arith
from hawq_tvm.studies import rounding


def test_no_value_is_rounded_the_wrong_way() -> None:
    found = rounding.counts(rows=512, seed=3, fine=8, coarse=1, every=7, widths=(64,))
    assert all(c.values > 5000 for c in found.values())
    assert {name: c.wrong for name, c in found.items()} == dict.fromkeys(found, 0)


def test_ties_are_decided_by_decimals() -> None:
    """A row of 512 equal integers is 1/2 of a step each, which falls to 0."""
    count = rounding.Count()
    rounding.softmax(count, np.zeros((1, 512), np.int64), Fraction(1, 10), Fraction(1, 256))
    assert (count.values, count.wrong, count.close) == (512, 0, 512)


def test_a_coarser_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = arith.softmax_table
    monkeypatch.setattr(arith, "softmax_table", lambda *a: exact(*a) >> 12 << 12)
    count = rounding.Count()
    rounding.softmax(count, rounding.rows_of(3, 3), Fraction(1, 50), Fraction(1, 256))
    assert count.wrong > 0
