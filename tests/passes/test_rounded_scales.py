"""What the rounding of a weight's scales to integers (A10a) loses travels to where the certificate states it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.frontend.onnx import import_onnx
from hawq_tvm.verify.certificate import _requantizes
from hawq_tvm.verify.distances import both
from relay_passes.integer.weights import most_summed

from ..models import TYPES, Graph

F, I8, FLOAT = np.float32, TensorProto.INT8, TensorProto.FLOAT
STEP, SX = F(0.31), F(0.0137)


def product(scales: np.ndarray, end: Any, kind: str = "matmul") -> tuple[onnx.ModelProto, Fraction]:
    """A product of 8-bit data with a weight of one output, whose scale differs along what is summed; and how far the
    integers a_k of (A10a) leave it from the model's own at most, in steps of 0.31.
    """
    g, rng = Graph(1), np.random.default_rng(2)
    w = rng.integers(-127, 128, (scales.size, 1))
    shape = (scales.size, 1) if kind == "matmul" else (1, scales.size, 1, 1)
    weight = g.dq(
        g.constant(w.reshape(shape), I8), scales, np.zeros(scales.size, int), "int8", axis=int(kind != "matmul")
    )
    x = g.dq(g.input("x", [3, scales.size] if kind == "matmul" else [1, scales.size, 4, 4], I8), SX, -5, "int8")
    y = end(g, g.node("MatMul", [x, weight]) if kind == "matmul" else g.conv(x, weight))
    exact = [Fraction(float(s)) for s in scales]
    unit = Fraction(2) ** (max(s.numerator.bit_length() - s.denominator.bit_length() for s in exact) + 1 - 31)
    lost = sum(abs(int(v)) * abs(s - round(s / unit) * unit) for v, s in zip(w.ravel(), exact, strict=True))
    return g.model([y]), lost * 132 * Fraction(float(SX)) / Fraction(float(STEP))


def quantized(g: Graph, y: str) -> tuple[str, int]:
    return g.q(y, STEP, 3, "int8"), TYPES["int8"][0]


def found(model: onnx.ModelProto) -> tuple[dict[str, float], dict[str, float], Any]:
    """Distances of layers and of outputs, and the last requantize."""
    packed = pipeline.to_packed(import_onnx(model))
    return *both(packed), [c for _, c in _requantizes(packed)][-1:]


FAR = F(0.017) * F([1, 2e-3, 0.31, 7e-4, 3e-5, 0.9])


@pytest.mark.parametrize("kind", ["matmul", "conv"])
def test_the_distance_of_digits(kind: str) -> None:
    """Scales far apart: what the a_k lose, and a little for the dyadic numbers of the digits themselves."""
    model, lost = product(FAR, quantized, kind)
    distances, _, (call,) = found(model)
    (distance,) = distances.values()
    assert len(call.args[0].fields) > 1 and int(call.attrs["thresholds"]) == -1
    assert 0 < float(lost) < distance < float(lost) + 2e-5


def test_digits_that_lose_nothing() -> None:
    """Float32 scales less than 2^6 apart are whole numbers of a unit: what is left are the dyadic numbers."""
    model, lost = product(F(0.017) * F([1, 0.3, 0.31, 0.7, 0.05, 0.9]), quantized)
    assert lost == 0
    (distance,) = found(model)[0].values()
    assert 0 < distance < 2e-5


def test_one_wider_weight_is_exact() -> None:
    model, lost = product(F(0.017) * F([1, 2, 0.5, 4, 1, 0.25]), quantized)
    distances, _, (call,) = found(model)
    assert lost == 0 and not distances and int(call.attrs["thresholds"]) > 0


def test_a_factor_and_a_sum_after_them() -> None:
    """It is counted in the units of the integers, so that it is scaled as they are."""

    def end(g: Graph, y: str) -> tuple[str, int]:
        y = g.node("Mul", [y, g.constant(F([-2]), FLOAT)])
        return quantized(g, g.node("Add", [y, y]))

    model, lost = product(FAR, end)
    (distance,) = found(model)[0].values()
    assert 4 * float(lost) < distance < 4 * float(lost) + 5e-5


def test_an_output_and_a_function_of_them() -> None:
    model, lost = product(FAR, lambda g, y: (y, FLOAT))
    (end,) = found(model)[1].values()
    assert float(lost * Fraction(float(STEP))) <= end < float(lost * Fraction(float(STEP))) * 1.01 + 1e-9

    def curved(g: Graph, y: str) -> tuple[str, int]:
        return g.q(g.node("Sigmoid", [y]), F(1 / 256), -128, "int8"), TYPES["int8"][0]

    packed = pipeline.to_packed(import_onnx(product(FAR, curved)[0]))
    (grid,) = (c for _, c in _requantizes(packed) if "bound" in c.attrs)
    assert float(grid.attrs["bound"]) > 0 and max(both(packed)[0].values()) < 0.05
    assert not any(
        int(b.value.attrs.get("thresholds", -1)) >= 0
        for f in stages.private_functions(packed).values()
        for b in stages.bindings(f)
        if ops.op_name(b.value) in ("hawq.lookup", "hawq.interpolate")
    )


def test_a_float_weight_beside_bytes() -> None:
    """Each number is a scale of its own: one of 31 bits, whose rounding is stated."""
    g, rng = Graph(1), np.random.default_rng(3)
    w = (rng.normal(size=(40, 5)) * 10.0 ** rng.uniform(-4, 0, (40, 5))).astype(F)
    x = g.dq(g.input("x", [3, 40], I8), SX, -5, "int8")
    model = g.model([quantized(g, g.node("MatMul", [x, g.constant(w, FLOAT)]))])
    (distance,) = found(model)[0].values()
    top = np.frexp(np.abs(w).max(0))[1]
    scaled = np.ldexp(w.astype(np.float64), 30 - top)
    lost = (np.abs(scaled - np.rint(scaled)).sum(0) * 2.0 ** (top - 30.0)).max() * 132 * float(SX) / float(STEP)
    assert 0 < lost < distance < lost + 2e-5


def test_what_is_divided_has_the_distance_of_digits() -> None:
    def end(g: Graph, y: str) -> tuple[str, int]:
        b = g.dq(g.input("b", [3, 1], TYPES["uint8"][0]), F(1), 0)
        clipped = g.node("Clip", [b, *(g.constant(F(v), FLOAT, []) for v in (1, 3))])
        return quantized(g, g.node("Div", [y, clipped]))

    model, lost = product(FAR, end)
    (distance,) = found(model)[0].values()
    assert 0 < float(lost) < distance < float(lost) + 0.02


def test_a_sum_of_float64_is_never_below_the_exact_one() -> None:
    """However many numbers: added one after another, as along an axis that is not the last, they lose most."""
    parts = np.full((20000, 2), 0.1)
    exact = 20000 * Fraction(0.1)
    assert exact <= Fraction(most_summed(parts, (0,))) < exact * (1 + Fraction(1, 10**11))
