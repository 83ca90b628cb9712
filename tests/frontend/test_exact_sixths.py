"""What ONNX divides by 3 or 6 is divided, and not multiplied by a float: ties fall where fractions put them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from onnx import TensorProto

from hawq_tvm.pipeline import import_annotated, to_packed
from hawq_tvm.verify.reference import evaluate

from ..models import Graph

EVERY = np.arange(256, dtype=np.uint8)


def rounded(values: list[Fraction], zero: int) -> np.ndarray:
    return np.array([min(max(round(v) + zero, 0), 255) for v in values])


@pytest.mark.parametrize("step", [Fraction(1, 16), Fraction(1, 4)])
@pytest.mark.parametrize("op", ["HardSwish", "HardSigmoid by hand"])
def test_hard_functions(op: str, step: Fraction) -> None:
    """With x = q / 8, x (x + 3) / 6 is q (q + 24) / 24 steps of 1 / 16: a tie at q = 6."""
    g = Graph(0)
    x = g.dq(g.input("x", [256], TensorProto.UINT8), 1 / 8, 128)
    if op == "HardSwish":
        y = g.node("HardSwish", [x])
    else:
        three, six = (g.constant(v, TensorProto.FLOAT) for v in (3.0, 6.0))
        y = g.node("Div", [g.node("Clip", [g.node("Add", [x, three]), g.constant(0.0, TensorProto.FLOAT), six]), six])
        y = g.node("Mul", [x, y])
    model = g.model([(g.q(y, float(step), 20), TensorProto.UINT8)])
    (got,) = evaluate(to_packed(import_annotated(model)), {"x": EVERY}).values()
    reals = [Fraction(int(v) - 128, 8) for v in EVERY]
    exact = [r * min(max((r + 3) / 6, Fraction(0)), Fraction(1)) / step for r in reals]
    assert any(v.denominator == 2 for v in exact)
    np.testing.assert_array_equal(got, rounded(exact, 20))


@pytest.mark.parametrize("count", [3, 6])
def test_mean_of_tensors(count: int) -> None:
    g = Graph(0)
    rng = np.random.default_rng(1)
    inputs = {f"x{i}": rng.integers(100, 156, 4096).astype(np.uint8) for i in range(count)}
    reals = [g.dq(g.input(name, [4096], TensorProto.UINT8), 0.05, 128) for name in inputs]
    model = g.model([(g.q(g.node("Mean", reals), 0.05, 128), TensorProto.UINT8)])
    packed = to_packed(import_annotated(model))
    (got,) = evaluate(packed, inputs).values()
    total = sum(v.astype(int) - 128 for v in inputs.values())
    np.testing.assert_array_equal(got, rounded([Fraction(int(t), count) for t in total], 128))
