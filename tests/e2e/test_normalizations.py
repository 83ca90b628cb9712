"""Normalizations between quantizes, compiled: every value is the exact real formula of the integers, rounded once."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError

from ..agreement import agreed
from ..models import TYPES, Graph, float_output

RNG = np.random.default_rng(25)
SCALE, STEP, ZERO = np.float32(0.043), np.float32(0.0217), 7
EPSILON = np.float32(1e-5)


def parameters(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    return RNG.normal(1, 0.5, shape).astype(np.float32), RNG.normal(0, 0.4, shape).astype(np.float32)


def exact(x: np.ndarray, zero: int, axes: tuple[int, ...], gamma: Any, beta: Any, centered: bool) -> np.ndarray:
    """The int8 result, from 60 digits; gamma and beta broadcast against x."""
    q = x.astype(object) - zero
    n = int(np.prod([x.shape[a] for a in axes]))
    total = q.sum(axis=axes, keepdims=True) * centered
    spread = n * (q * q).sum(axis=axes, keepdims=True) - total * total
    scale, step = Fraction(float(SCALE)), Fraction(float(STEP))
    with localcontext() as context:
        context.prec = 60

        def value(d: int, v: int, g: float, b: float) -> int:
            within = v + n * n * Fraction(float(EPSILON)) / scale**2
            root = (Decimal(within.numerator) / Decimal(within.denominator)).sqrt()
            parts = [Fraction(float(p)) / step for p in (g, b)]
            factor, addend = (Decimal(p.numerator) / Decimal(p.denominator) for p in parts)
            steps = (Decimal(d) / root * factor + addend).to_integral_value(ROUND_HALF_EVEN)
            return min(max(int(steps) + ZERO, -128), 127)

        return np.frompyfunc(value, 4, 1)(n * q - total, spread, gamma, beta).astype(np.int8)


def layer(op: str, shape: tuple[int, ...], kind: str, bias: bool = True, **attributes: Any) -> tuple[Any, Any]:
    """A model of one operator from x to the integers y, and what y must be."""
    g = Graph(opset=23 if op == "RMSNormalization" else 21)
    zero = {"int8": -3, "uint8": 130, "int16": 11}[kind]
    x = g.dq(g.input("x", list(shape), TYPES[kind][0]), SCALE, zero, kind)
    rank, axis = len(shape), attributes.get("axis", -1) % len(shape)
    tail = shape[axis:] if op in ("LayerNormalization", "RMSNormalization") else (shape[1],)
    gamma, beta = parameters(tail)
    operands = [x, g.constant(gamma, TensorProto.FLOAT)] + ([g.constant(beta, TensorProto.FLOAT)] if bias else [])
    y = g.node(op, operands, epsilon=float(EPSILON), **attributes)
    g.nodes.append(g_quantize(g, y))
    if op in ("InstanceNormalization", "GroupNormalization"):
        gamma, beta = (p.reshape((-1,) + (1,) * (rank - 2)) for p in (gamma, beta))

    def wanted(data: np.ndarray) -> np.ndarray:
        b = beta if bias else np.zeros_like(beta)
        if op == "GroupNormalization":
            groups = (shape[0], attributes["num_groups"], -1)
            parts = [np.broadcast_to(p, shape).reshape(groups) for p in (gamma, b)]
            return exact(data.reshape(groups), zero, (2,), *parts, centered=True).reshape(shape)
        axes = tuple(range(2 if op == "InstanceNormalization" else axis, rank))
        return exact(data, zero, axes, gamma, b, centered=op != "RMSNormalization")

    return g.model([("y", TensorProto.INT8)]), wanted


def g_quantize(g: Graph, real: str) -> onnx.NodeProto:
    names = [real, g.constant(STEP, TensorProto.FLOAT, ()), g.constant(ZERO, TensorProto.INT8, ())]
    return onnx.helper.make_node("QuantizeLinear", names, ["y"], name="last")


CASES = {
    "layer 8": ("LayerNormalization", (2, 5, 48), "int8", {}),
    "layer unsigned, two axes": ("LayerNormalization", (3, 4, 9), "uint8", {"axis": 1}),
    "layer 16": ("LayerNormalization", (4, 96), "int16", {}),
    "rms": ("RMSNormalization", (2, 5, 48), "uint8", {}),
    "instance": ("InstanceNormalization", (2, 3, 5, 7), "int8", {}),
    "group": ("GroupNormalization", (2, 6, 4, 5), "uint8", {"num_groups": 3}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_the_exact_formula_rounded(case: str) -> None:
    op, shape, kind, attributes = CASES[case]
    model, wanted = layer(op, shape, kind, bias=op != "RMSNormalization", **attributes)
    assert agreed(model) is None
    package = ht.compile(model)
    info = np.iinfo(kind)
    x = RNG.integers(info.min, info.max, shape, endpoint=True).astype(kind)
    x[0] = 9
    x[0].reshape(-1)[-1] = info.max
    np.testing.assert_array_equal(package.run({"x": x})["y"], wanted(x))
    assert package.verify(random=2, seed=0).ok
    proof = package.prove()
    assert proof.ok and proof.differing == 0 and set(proof.distances) == {"last"}
    assert 0 < proof.distances["last"] < 1e-4


def test_parameters_behind_dequantize() -> None:
    """gamma in 8 bits and beta in 32, as ONNX Runtime writes them."""
    g = Graph()
    x = g.dq(g.input("x", [3, 32], TYPES["int8"][0]), SCALE, -3, "int8")
    gamma, beta = RNG.integers(-128, 128, 32), RNG.integers(-5000, 5000, 32)
    operands = [g.dq(g.constant(gamma, TensorProto.INT8), np.float32(0.01), 0, "int8")]
    operands.append(g.dq(g.constant(beta, TensorProto.INT32), np.float32(0.0001), 0, "int32"))
    y = g.node("LayerNormalization", [x, *operands], epsilon=float(EPSILON))
    g.nodes.append(g_quantize(g, y))
    package = ht.compile(g.model([("y", TensorProto.INT8)]))
    x_values = RNG.integers(-128, 128, (3, 32)).astype(np.int8)
    # The products are float64 numbers: 8 and 13 bits times 24.
    real = (gamma * float(np.float32(0.01)), beta * float(np.float32(0.0001)))
    wanted = exact(x_values, -3, (1,), *real, centered=True)
    np.testing.assert_array_equal(package.run({"x": x_values})["y"], wanted)


@pytest.mark.parametrize("centered", [True, False])
def test_written_out_as_its_steps(centered: bool) -> None:
    g = Graph()
    x = g.dq(g.input("x", [2, 5, 24], TYPES["int8"][0]), SCALE, -3, "int8")
    last = g.constant([-1], TensorProto.INT64)
    d = g.node("Sub", [x, g.node("ReduceMean", [x, last])]) if centered else x
    square = g.node("Pow", [d, g.constant(np.float32(2), TensorProto.FLOAT, ())])
    v = g.node("Add", [g.node("ReduceMean", [square, last]), g.constant(EPSILON, TensorProto.FLOAT, ())])
    y = g.node("Div", [d, g.node("Sqrt", [v])])
    gamma, beta = parameters((24,))
    y = g.node("Add", [g.node("Mul", [y, g.constant(gamma, 1)]), g.constant(beta, 1)])
    g.nodes.append(g_quantize(g, y))
    model = g.model([("y", TensorProto.INT8)])
    assert agreed(model) is None
    package = ht.compile(model)
    data = RNG.integers(-128, 128, (2, 5, 24)).astype(np.int8)
    data[1, 2] = 77
    np.testing.assert_array_equal(package.run({"x": data})["y"], exact(data, -3, (2,), gamma, beta, centered))


def test_what_nothing_quantizes_is_a_term_of_a_sum() -> None:
    """A residual sum behind a normalization is rounded once."""
    g = Graph()
    x = g.dq(g.input("x", [3, 32], TYPES["int8"][0]), SCALE, -3, "int8")
    gamma, _ = parameters((32,))
    y = g.node("LayerNormalization", [x, g.constant(gamma, 1)], epsilon=float(EPSILON))
    y = g.node("Add", [g.node("Relu", [g.qdq(y, 0.05, 3, "int8")]), g.node("Add", [y, x])])
    package = ht.compile(g.model([float_output(g.qdq(y, 0.1, 3, "int8"))]))
    assert package.verify(random=2, seed=0).ok and package.prove().ok


@pytest.mark.parametrize(
    "shape, text",
    [([1, 1 << 18], "rows of 262144 integers"), ([2, 16], "computed at run time")],
)
def test_refusals(shape: list[int], text: str) -> None:
    g = Graph()
    x = g.dq(g.input("x", shape, TYPES["int16"][0]), SCALE, 0, "int16")
    gamma = g.constant(np.ones(shape[1:], np.float32), 1) if "rows" in text else g.input("gamma", shape[1:])
    y = g.qdq(g.node("LayerNormalization", [x, gamma]), 0.02, 0, "int8")
    error = agreed(g.model([float_output(y)]))
    assert isinstance(error, ModelError) and text in str(error)
