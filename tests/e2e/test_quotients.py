"""A network that divides by a computed tensor (A32): beside ONNX Runtime, fractions, and what is refused."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from onnx import TensorProto
from tvm import relax

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.threshold_search import round_exactly
from hawq_tvm.verify.reference import evaluate
from relay_passes.lower_to_integer import lower_to_integer

from ..agreement import agreed
from ..frontend.onnx_models import onnxruntime as simulated
from ..models import TYPES, Graph, float_output
from ..passes.modules import S8, dq, module, q

SA, SB, SY = np.float32(0.0197), np.float32(0.0313), np.float32(0.0243)


def quotient(
    kind: str = "uint8",
    zeros: tuple[int, int, int] = (130, 128, 126),
    scales: Any = (SA, SB, SY),
    shapes: Any = ([256, 1], [1, 256]),
    between: Any = lambda g, y: y,
) -> onnx.ModelProto:
    """Two inputs of integers, whose quotient is quantized behind what `between` makes of it."""
    g = Graph(opset=17)
    a, b = (
        g.dq(g.input(n, s, TYPES[kind][0]), scale, zero, kind)
        for n, s, scale, zero in zip("ab", shapes, scales, zeros, strict=False)
    )
    y = g.q(between(g, g.node("Div", [a, b])), scales[2], zeros[2], kind)
    return g.model([(y, TYPES[kind][0])])


def every_pair(kind: str) -> dict[str, np.ndarray]:
    info = np.iinfo(kind)
    x = np.arange(info.min, info.max + 1).astype(kind)
    return {"a": x.reshape(256, 1), "b": x.reshape(1, 256)}


def exactly(model: onnx.ModelProto, feed: dict[str, np.ndarray], zeros: Any, scales: Any, kind: str) -> np.ndarray:
    """The real formula of every pair, whatever divides by 0 left out (-999)."""
    low, high = TYPES[kind][1:]
    ratio = Fraction(float(scales[0])) / (Fraction(float(scales[1])) * Fraction(float(scales[2])))
    a, b = (feed[n].astype(int) - z for n, z in zip("ab", zeros, strict=False))
    return np.array(
        [
            [
                -999 if not d else min(max(round_exactly(Fraction(n, d) * ratio, "half_even") + zeros[2], low), high)
                for d in b.ravel().tolist()
            ]
            for n in a.ravel().tolist()
        ]
    )


@pytest.mark.parametrize(
    ("kind", "zeros", "scales"),
    [
        ("uint8", (130, 128, 126), (SA, SB, SY)),
        ("int8", (0, -128, 3), (SA, SB, SY)),
        ("uint8", (3, 0, 100), (np.float32(0.5), np.float32(0.25), np.float32(0.5))),
    ],
    ids=["all asymmetric", "a divisor of one sign", "ties"],
)
def test_every_pair_of_bytes(kind: str, zeros: Any, scales: Any) -> None:
    """The package is the real formula at every pair; ONNX Runtime's floats differ from it near ties alone."""
    model, feed = quotient(kind, zeros, scales), every_pair(kind)
    package = ht.compile(model)
    (got,), (theirs,) = package.run(feed).values(), simulated(model, feed).values()
    wanted, divided = exactly(model, feed, zeros, scales, kind), (feed["b"].astype(int) != zeros[1]).ravel()
    np.testing.assert_array_equal(got[:, divided], wanted[:, divided])
    np.testing.assert_array_equal(got[:, ~divided], theirs[:, ~divided])  # infinite, and no number at all
    assert (got != theirs).mean() < 1e-4
    certificate = package.certificate()
    assert certificate["ok"] and not certificate["distances"] and certificate["differing"] == 0
    assert list(certificate["nonlinear"].values()) == ["quotient (A32)"]
    assert package.verify(random=1, seed=0).ok


def scaled(g: Graph, y: str) -> str:
    factors = np.array([0.5, -1, 1.7, -0.3, 1], np.float32)
    return g.node("Mul", [y, g.constant(factors, TensorProto.FLOAT)])


def clipped(g: Graph, y: str) -> str:
    return g.node("Clip", [y, g.constant(np.float32(-0.7), 1, []), g.constant(np.float32(1.1), 1, [])])


def moved(g: Graph, y: str) -> str:
    return g.node("Transpose", [g.node("Relu", [g.node("Neg", [y])])], perm=[1, 0])


@pytest.mark.parametrize("between", [scaled, clipped, moved])
def test_what_stands_between_a_quotient_and_its_quantize(between: Any) -> None:
    """Factors, clips and movement leave one rounding, and 0 / 0 the least integer."""
    model = quotient("int8", (3, -5, 7), shapes=([400, 5], [400, 5]), between=between)
    package, rng = ht.compile(model), np.random.default_rng(0)
    feed = {n: rng.integers(-128, 128, (400, 5)).astype(np.int8) for n in "ab"}
    feed["b"][::3], feed["a"][::6, :2] = -5, 3
    (got,), (theirs,) = package.run(feed).values(), simulated(model, feed).values()
    assert (got != theirs).sum() <= 1 and np.abs(got.astype(int) - theirs).max() <= 1
    assert package.verify(random=1, seed=0).ok and not package.certificate()["distances"]


@pytest.mark.parametrize(
    "shapes", [([2, 5, 16], [2, 5, 1]), ([2, 5, 1], [16]), ([1], [2, 3, 4, 4]), ([2, 1, 4], [5, 1])]
)
def test_shapes_that_broadcast(shapes: Any) -> None:
    package, rng = ht.compile(quotient(shapes=shapes)), np.random.default_rng(1)
    feed = {n: rng.integers(0, 256, s).astype(np.uint8) for n, s in zip("ab", shapes, strict=True)}
    (got,), (theirs,) = package.run(feed).values(), simulated(quotient(shapes=shapes), feed).values()
    assert got.shape == theirs.shape and (got != theirs).sum() <= 1
    assert package.verify(random=1, seed=0).ok


def test_a_constant_divided_by_a_tensor() -> None:
    g = Graph(opset=17)
    b = g.dq(g.input("b", [256, 4], TYPES["uint8"][0]), SB, 17)
    values = g.constant(np.array([0.3, -0.7, 0, 2.5], np.float32), TensorProto.FLOAT)
    model = g.model([(g.q(g.node("Div", [values, b]), SY, 120), TYPES["uint8"][0])])
    package, feed = ht.compile(model), {"b": np.repeat(np.arange(256), 4).reshape(256, 4).astype(np.uint8)}
    np.testing.assert_array_equal(*(next(iter(r.values())) for r in (package.run(feed), simulated(model, feed))))


def images(between: Any) -> onnx.ModelProto:
    """A convolution's sums divided by another's result."""
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 3, 9, 9]), 0.0247, 120)
    b = g.node("Relu", [g.conv(x, g.weight([6, 3, 3, 3]))])
    y = g.node("Div", [g.conv(x, g.weight([6, 3, 3, 3])), between(g, b)])
    return g.model([float_output(g.qdq(y, np.float32(0.05), 120))])


def shifted(g: Graph, b: str) -> str:
    return g.node("Add", [b, g.constant(np.float32(0.5), TensorProto.FLOAT, [])])


def compared(model: onnx.ModelProto, step: float) -> tuple[Any, np.ndarray]:
    """The certificate, and by how many steps each element differs from ONNX Runtime's."""
    package, rng = ht.compile(model), np.random.default_rng(5)
    assert package.verify(random=1, seed=0).ok
    feed = {"x": rng.normal(0, 1.5, (1, 3, 9, 9)).astype(np.float32)}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (got,), (theirs,) = package.run(feed).values(), session.run(None, feed)
    return package.certificate(), np.rint(np.abs(got - theirs) / step)


def test_sums_divided_by_bytes() -> None:
    certificate, steps = compared(images(lambda g, b: g.qdq(b, np.float32(0.011), 0)), 0.05)
    assert not certificate["distances"] and (steps > 0).sum() <= 1


@pytest.mark.parametrize("zero", [0, 128])
def test_bytes_that_may_be_0_and_never_below(zero: int) -> None:
    """A division by 0 stops a process: the kernel keeps every divisor from it, whatever bounds the compiler knows."""
    g = Graph(opset=17)
    a, b = (g.qdq(g.input(n, [2, 3, 16], 1), np.float32(0.02), z, "uint8") for n, z in (("a", zero), ("b", 0)))
    model = g.model([float_output(g.qdq(g.node("Div", [a, b]), np.float32(0.01), 3))])
    rng = np.random.default_rng(0)
    feed = {n: rng.uniform(-2, 4, (2, 3, 16)).astype(np.float32) for n in "ab"}
    feed["a"][0, 0, :4], feed["b"][0, 0, 2:6] = 0, 0
    package = ht.compile(model)
    np.testing.assert_array_equal(*(next(iter(r.values())) for r in (package.run(feed), simulated(model, feed))))
    assert package.verify(random=1, seed=0).ok


def test_integers_too_wide_for_the_ratio() -> None:
    """32 bits of both take those that the ratio would have: how far it is off is stated."""
    g = Graph(opset=17)
    a = g.dq(g.input("a", [3, 7], TYPES["int32"][0]), np.float32(1.37e-6), 0, "int32")
    b = g.dq(g.input("b", [3, 7], TYPES["int32"][0]), np.float32(2.11e-6), 0, "int32")
    package = ht.compile(g.model([(g.q(g.node("Div", [a, b]), np.float32(0.0731), 120), TYPES["uint8"][0])]))
    (distance,) = package.certificate()["distances"].values()
    assert 0 < distance < 1e-6 and package.verify(random=1, seed=0).ok


def test_a_divisor_that_nothing_quantizes() -> None:
    """A fixed-point value (A26) that is never near 0."""
    certificate, steps = compared(images(shifted), 0.05)
    (distance,) = certificate["distances"].values()
    assert 0 < distance < 0.05 and (steps > 0).sum() <= 1


def test_a_quotient_that_nothing_quantizes() -> None:
    """It is a fixed-point value itself, where its divisor cannot be 0."""

    def made(kind: str, zero: int) -> onnx.ModelProto:
        g = Graph(3)
        x = g.qdq(g.input("x", [1, 3, 9, 9]), 0.0247, 120)
        b = g.qdq(shifted(g, g.node("Sigmoid", [x])), np.float32(0.011), zero, kind)
        y = g.node("Add", [g.node("Div", [x, shifted(g, g.node("Relu", [b]))]), x])
        return g.model([float_output(g.qdq(y, np.float32(0.05), 120))])

    certificate, steps = compared(made("uint8", 0), 0.05)
    assert max(certificate["distances"].values()) < 0.01 and (steps > 0).sum() <= 1


def refused(y: Any, match: str) -> None:
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 3, 9, 9]), 0.0247, 120)
    error = agreed(g.model([float_output(y(g, x, g.node("Relu", [x])))]))
    assert error is not None and match in str(error), error


def test_what_may_divide_by_zero_must_be_quantized() -> None:
    def unquantized(g: Graph, x: str, b: str) -> str:
        return g.qdq(g.node("Add", [g.node("Div", [x, g.qdq(b, 0.01)]), x]), 0.05, 120)

    def sums(g: Graph, x: str, b: str) -> str:
        y = g.conv(x, g.weight([3, 3, 1, 1]))
        return g.qdq(g.node("Div", [x, g.node("Add", [g.node("Sigmoid", [x]), y])]), 0.05, 120)

    refused(unquantized, "its input is a quotient that nothing quantizes, of a tensor that may be 0")

    def raw(g: Graph, x: str, b: str) -> str:
        return g.qdq(g.node("Div", ["x", g.qdq(b, 0.01)]), 0.05, 120)

    def product(g: Graph, x: str, b: str) -> str:
        both = g.node("Mul", [g.node("Add", [x, g.node("Sigmoid", [turned(g, x)])]), turned(g, x)])
        return g.qdq(g.node("Div", [both, g.qdq(b, 0.01)]), 0.05, 120)

    refused(product, "no quantize gives integers of its own by one that may be 0")

    def summed(kind: str) -> Any:
        def made(g: Graph, x: str, b: str) -> str:
            both = g.node("Mul", [g.node("Add", [x, g.node("Sigmoid", [turned(g, x)])]), turned(g, x)])
            parts = {
                "product": lambda: g.node("ReduceSum", [both, ints(g, 1)]),
                "pool": lambda: g.node("AveragePool", [both], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]),
                "input": lambda: g.node("ReduceSum", ["x", ints(g, 1)]),
            }
            return g.qdq(g.node("Div", [parts[kind](), g.qdq(b, 0.01)]), 0.05, 120)

        return made

    for kind in ("product", "pool", "input"):
        refused(summed(kind), "no quantize gives integers of its own by one that may be 0")
    refused(raw, "no quantize gives integers of its own by one that may be 0")
    refused(sums, "divides by a tensor that may be 0, and no quantize gives it integers of its own")


def test_quotients_that_are_functions_must_be_clipped() -> None:
    """A tensor over itself is a function of one tensor, as 1 / b is, and neither has a value at every byte."""
    refused(
        lambda g, x, b: g.qdq(g.node("Div", [x, x]), 0.01), "its function is not a number for some quantized inputs"
    )

    def inverse(g: Graph, x: str, b: str) -> str:
        return g.qdq(g.node("Mul", [x, g.node("Reciprocal", [g.qdq(b, 0.01)])]), 0.05, 120)

    refused(inverse, "its input is a function that is not bounded where its own input can be")


def channels(g: Graph, *values: float) -> str:
    return g.constant(np.array(values, np.float32).reshape(1, -1, 1, 1), TensorProto.FLOAT)


INVERSES = {
    "by channels, some below 0": lambda g, b: g.node("Mul", [b, channels(g, 0.5, -1.3)]),
    "a sum": lambda g, b: g.node("Add", [b, turned(g, b)]),
    "a border of -0": lambda g, b: bordered(g, b, -0.0),
    "a constant of one channel alone": lambda g, b: g.node(
        "Sub", [g.node("Mul", [b, channels(g, -0.5, -1.3)]), channels(g, 0.0, 1.0)]
    ),
}


def inverted(of: Any) -> onnx.ModelProto:
    g = Graph(opset=17)
    b = g.dq(g.input("b", [1, 2, 16, 16], TYPES["uint8"][0]), np.float32(1 / 64), 7)
    return g.model([(g.q(g.node("Reciprocal", [of(g, b)]), np.float32(0.03), 100), TYPES["uint8"][0])])


@pytest.mark.parametrize("name", INVERSES)
def test_an_inverse_of_a_zero_of_unknown_sign_must_be_quantized(name: str) -> None:
    """1 / x is a function of one tensor, a table; what may be 0 or -0 is refused as divisors are."""
    error = agreed(inverted(INVERSES[name]))
    assert error is not None and "its integers do not tell whether that is 0 or -0" in str(error), error
    assert agreed(inverted(lambda g, b: g.qdq(INVERSES[name](g, b), np.float32(0.0171), 128))) is None


@pytest.mark.parametrize("of", [lambda g, b: b, lambda g, b: g.node("Neg", [b]), lambda g, b: bordered(g, b, 0.0)])
def test_an_inverse_has_the_sign_of_its_zero(of: Any) -> None:
    model = inverted(of)
    feed = {"b": np.arange(512).astype(np.uint8).reshape(1, 2, 16, 16)}
    np.testing.assert_array_equal(
        *(next(iter(r.values())) for r in (ht.compile(model).run(feed), simulated(model, feed)))
    )


def ints(g: Graph, *values: int) -> str:
    return g.constant(np.array(values), TensorProto.INT64)


def number(g: Graph, value: float) -> str:
    return g.constant(np.float32(value), TensorProto.FLOAT, [])


def divided(divisor: Any, dividend: Any = lambda g, a: a) -> onnx.ModelProto:
    """Every byte divided by what is made of every byte, whose zero point is 7; by 64 and 7 steps a 0 can be made."""
    g = Graph(opset=17)
    a = g.dq(g.input("a", [256, 1, 1, 1], TYPES["uint8"][0]), np.float32(0.02), 128)
    b = g.dq(g.input("b", [1, 1, 16, 16], TYPES["uint8"][0]), np.float32(1 / 64), 7)
    y = g.q(g.node("Div", [dividend(g, a), divisor(g, b)]), np.float32(0.03), 100)
    return g.model([(y, TYPES["uint8"][0])])


def bytewise(g: Graph, b: str, weight: int, bias: int) -> str:
    """A convolution of one number, and a bias on its grid."""
    w = g.dq(g.constant(np.array([[[[weight]]]]), TensorProto.INT8), np.float32(1), 0, "int8")
    return g.conv(b, w, g.dq(g.constant(np.array([bias]), TensorProto.INT32), np.float32(1 / 64), 0, "int32"))


def turned(g: Graph, b: str) -> str:
    return g.node("Transpose", [b], perm=[0, 1, 3, 2])


def bordered(g: Graph, b: str, value: float) -> str:
    return g.node(
        "Pad", [g.node("Slice", [b, ints(g, 1), ints(g, 16), ints(g, 2)]), ints(g, *[0] * 6, 1, 0), number(g, value)]
    )


ZEROS = {
    "as it is": lambda g, b: b,
    "negated": lambda g, b: g.node("Neg", [b]),
    "a factor below 0": lambda g, b: g.node("Mul", [b, number(g, -0.5)]),
    "negated, rectified, negated": lambda g, b: g.node("Neg", [g.node("Relu", [b])]),
    "a sum of products": lambda g, b: bytewise(g, b, 1, -64),
    "of products below 0": lambda g, b: bytewise(g, g.node("Neg", [b]), 1, 64),
    "negated behind it": lambda g, b: g.node("Neg", [bytewise(g, b, -1, 64)]),
    "added to itself": lambda g, b: g.node("Sub", [g.node("Mul", [b, number(g, 3)]), b]),
    "a sum of elements": lambda g, b: g.node("ReduceSum", [b, g.constant([3], TensorProto.INT64)]),
    "a border of 0": lambda g, b: bordered(g, b, 0.0),
    "two that are never below 0": lambda g, b: g.node("Mul", [g.node("Relu", [b]), turned(g, g.node("Relu", [b]))]),
}


@pytest.mark.parametrize("name", ZEROS)
def test_the_sign_of_a_zero_is_that_of_the_floats(name: str) -> None:
    model = divided(ZEROS[name])
    feed = {"a": np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)}
    feed["b"] = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    (got,), (theirs,) = ht.compile(model).run(feed).values(), simulated(model, feed).values()
    assert (got != theirs).mean() < 1e-4 and np.abs(got.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    "divisor",
    [
        lambda g, b: g.node("Sub", [number(g, 1), bytewise(g, b, 1, 0)]),
        lambda g, b: g.node("Sub", [number(g, 0), b]),
        lambda g, b: g.node("Add", [g.node("Neg", [b]), number(g, 0)]),
        lambda g, b: g.node("Sub", [b, g.node("Mul", [b, number(g, 3)])]),
        lambda g, b: g.node("Neg", [g.node("Sub", [number(g, 0), b])]),
        lambda g, b: g.node("Mul", [b, turned(g, b)]),
        lambda g, b: g.node("MaxPool", [g.node("Neg", [b])], kernel_shape=[1, 1]),
        lambda g, b: g.node("ReduceSum", [g.node("Neg", [b]), g.constant([3], TensorProto.INT64)]),
        lambda g, b: g.node("Min", [b, number(g, -0.0)]),
        lambda g, b: g.node("Clip", [b, number(g, -1), number(g, -0.0)]),
        lambda g, b: bordered(g, b, -0.0),
    ],
    ids=[
        "c - x",
        "0 - x",
        "-x + 0",
        "x - 3x",
        "-(0 - x)",
        "a product",
        "a maximum",
        "a sum",
        "-0",
        "a clip at -0",
        "-0s",
    ],
)
def test_a_zero_of_unknown_sign_must_be_quantized(divisor: Any) -> None:
    error = agreed(divided(divisor))
    assert error is not None and "its integers do not tell whether that is 0 or -0" in str(error), error
    assert agreed(divided(lambda g, b: g.qdq(divisor(g, b), np.float32(0.0171), 128))) is None


EXTREMA = {
    "a pooling": lambda g, y, b: g.node("MaxPool", [y], kernel_shape=[1, 1]),
    "a reduction": lambda g, y, b: g.node("ReduceMax", [y], axes=[3]),
    "of two tensors": lambda g, y, b: g.node("Min", [b, y]),
    "moved": lambda g, y, b: turned(g, g.node("Max", [turned(g, y), turned(g, b)])),
}


@pytest.mark.parametrize("name", EXTREMA)
@pytest.mark.parametrize("zero", [None, 1 / 64])
def test_extrema_of_quotients(name: str, zero: float | None) -> None:
    """They are integers' where no quotient is 0 / 0, whose maximum is no number."""
    g = Graph(opset=17)
    a, b = (g.dq(g.input(n, [1, 1, 16, 16], TYPES["uint8"][0]), np.float32(1 / 64), 7) for n in "ab")
    below = b if zero is None else g.node("Clip", [b, number(g, zero)])
    y = g.q(EXTREMA[name](g, g.node("Div", [a, below]), b), np.float32(0.0297), 100)
    model, rng = g.model([(y, TYPES["uint8"][0])]), np.random.default_rng(3)
    if zero is None:
        error = agreed(model)
        assert error is not None and "a maximum or minimum of what may be 0 / 0" in str(error), error
        return
    feed = {n: rng.integers(0, 256, (1, 1, 16, 16)).astype(np.uint8) for n in "ab"}
    (got,), (theirs,) = ht.compile(model).run(feed).values(), simulated(model, feed).values()
    assert np.abs(got.astype(int) - theirs).max() <= 1 and (got != theirs).sum() <= 1


@pytest.mark.parametrize(("clip", "defined"), [(False, False), (True, False), (True, True)])
def test_a_scale_of_each_channel(clip: bool, defined: bool) -> None:
    """A clip is at other integers in every channel then, between which 0 / 0 is not."""
    g = Graph(opset=17)
    a = g.dq(g.input("a", [256, 1, 2], TYPES["uint8"][0]), SA, 128)
    b = g.dq(g.input("b", [1, 256, 1], TYPES["uint8"][0]), np.float32(1 / 64), 7)
    y = g.node("Div", [a, g.node("Clip", [b, number(g, 1 / 64)]) if defined else b])
    y = clipped(g, y) if clip else y
    scales, zeros = (g.constant(np.array(v, k), t) for v, k, t in (([0.03, 0.05], "f4", 1), ([100, 100], "u1", 2)))
    model = g.model([(g.node("QuantizeLinear", [y, scales, zeros], axis=2), TYPES["uint8"][0])])
    if clip and not defined:
        error = agreed(model)
        assert error is not None and "several scales behind a clip of what may be 0 / 0" in str(error), error
        return
    x = np.arange(256, dtype=np.uint8)
    feed = {"a": np.stack([x, x], 1).reshape(256, 1, 2), "b": x.reshape(1, 256, 1)}
    (got,), (theirs,) = ht.compile(model).run(feed).values(), simulated(model, feed).values()
    assert (got != theirs).mean() < 1e-4 and np.abs(got.astype(int) - theirs).max() <= 1


def test_a_zero_point_of_each_channel() -> None:
    """PyTorch's quantize makes 0 of 0 / 0, and not each channel's zero point."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.divide(*(dq(bb, v, 0.05, 3, S8) for v in p)))
        return q(bb, y, 0.1, np.array([1, 2, 3]), S8, form="reciprocal")

    with pytest.raises(ModelError, match="several zero points for what may be 0 / 0"):
        lower_to_integer(module(build, {"a": ((3,), "int8"), "b": ((3,), "int8")}))


def test_a_dividend_that_nothing_quantizes() -> None:
    """It may be divided by what is never 0, be that as near as a step."""

    def twice(g: Graph, a: str) -> str:
        return g.node("Add", [a, g.node("Sigmoid", [a])])

    def clipped(g: Graph, b: str) -> str:
        return g.node("Clip", [b, number(g, 1 / 64), number(g, 3)])

    assert agreed(divided(clipped, twice)) is None
    for dividend in (twice, lambda g, a: bytewise(g, a, 1, -(2**31))):
        error = agreed(divided(lambda g, b: b, dividend))
        assert error is not None and "no quantize gives integers of its own by one that may be 0" in str(error), error


def test_layer_norms_whose_every_step_is_quantized() -> None:
    """What the shape of a LayerNorm hides from the compiler: each step is one integer operator."""
    g = Graph(7, opset=17)
    x = g.qdq(g.input("x", [2, 5, 24]), 0.0247, 120)
    for scale in (0.0213, 0.0197):
        mean = g.qdq(g.node("ReduceMean", [x], axes=[-1]), 0.0071, 126)
        centred = g.qdq(g.node("Sub", [x, mean]), 0.0251, 121)
        square = g.qdq(g.node("Pow", [centred, g.constant(np.float32(2), TensorProto.FLOAT, [])]), 0.0287, 0)
        variance = g.qdq(g.node("ReduceMean", [square], axes=[-1]), 0.0113, 0)
        root = g.node("Sqrt", [g.node("Add", [variance, g.constant(np.float32(1e-5), TensorProto.FLOAT, [])])])
        y = g.qdq(g.node("Div", [centred, g.qdq(root, 0.0067, 0)]), scale, 127)
        gamma = g.constant(g.rng.uniform(0.5, 1.5, 24).astype(np.float32), TensorProto.FLOAT)
        x = g.qdq(g.node("Mul", [y, gamma]), 0.0231, 125)
    model = g.model([float_output(x)])
    package, rng = ht.compile(model), np.random.default_rng(2)
    certificate = package.certificate()
    assert certificate["ok"] and not certificate["float_tail"] and not certificate["distances"]
    assert list(certificate["nonlinear"].values()).count("quotient (A32)") == 2
    assert package.verify(random=2, seed=0).ok
    feed = {"x": rng.normal(0, 1, (2, 5, 24)).astype(np.float32)}
    feed["x"][0, :2] = 0.5  # rows of one number, whose deviation is 0
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (theirs,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feed)
    (got,) = package.run(feed).values()
    assert (np.rint(np.abs(got - theirs) / 0.0231) > 1).sum() == 0 and (got != theirs).mean() < 0.02


@pytest.mark.parametrize(("form", "undefined"), [("divide", -128), ("reciprocal", 0)])
def test_what_0_over_0_is(form: str, undefined: int) -> None:
    """ONNX Runtime's quantize makes its least integer of what is no number, PyTorch's 0."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.divide(*(dq(bb, v, 0.05, 3, S8) for v in p))), 0.1, 9, S8, form=form)

    made, _ = lower_to_integer(module(build, {"a": ((3,), "int8"), "b": ((3,), "int8")}))
    (found,) = evaluate(made, {"a": np.array([3, 5, -5], np.int8), "b": np.full(3, 3, np.int8)}).values()
    assert found.tolist() == [undefined, 127, -128]
    if form == "reciprocal":
        nothing = torch.tensor([float("nan")])
        assert int(torch.ops.quantized_decomposed.quantize_per_tensor(nothing, 0.1, 9, -128, 127, torch.int8)) == 0


@pytest.mark.parametrize("form", ["divide", "reciprocal"])
@pytest.mark.parametrize("rounding", ["half_even", "floor", "half_away"])
def test_the_lowering_is_the_real_formula(form: str, rounding: str) -> None:
    """Every pair of bytes and a factor of each row, zeros among them, beside the float network in float64."""
    kinds, feed = {"a": ((256, 1), "uint8"), "b": ((1, 256), "uint8")}, every_pair("uint8")

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.divide(dq(bb, p[0], 0.0197, 130), dq(bb, p[1], 0.0313, 128)))
        factor = relax.const(np.where(np.arange(256) % 2, -0.731, 1.37).astype(np.float32).reshape(256, 1))
        y = bb.emit(relax.op.nn.relu(bb.emit(relax.op.multiply(y, factor))))
        return q(bb, y, 0.0243, 90, form=form, rounding=rounding)

    before = module(build, kinds)
    (wanted,), (got,) = evaluate(before, feed).values(), evaluate(lower_to_integer(before)[0], feed).values()
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"rounding": "half_even", "form": "affine"}, "adds a zero point before it rounds"),
        ({"rounding": "double"}, "or rounds twice"),
        ({"scale": 1e-37}, "divides scales too far apart"),
    ],
)
def test_quantizes_that_no_quotient_has(numbers: dict[str, Any], match: str) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        given = {"scale": 0.1, **numbers}
        y = bb.emit(relax.op.divide(*(dq(bb, v, 0.05, 3, S8) for v in p)))
        return q(bb, y, np.float32(given.pop("scale")), 9, S8, **given)

    with pytest.raises(ModelError, match=match):
        lower_to_integer(module(build, {"a": ((3,), "int8"), "b": ((3,), "int8")}))


def test_a_float_tail_keeps_its_division() -> None:
    """Where nothing quantizes a quotient it is float, if that is asked for; an integer where the divisor is never 0."""
    g = Graph(opset=17)
    a, b = (g.qdq(g.input(n, [2, 6]), 0.0247, 120) for n in "ab")
    model = g.model([float_output(g.node("Div", [a, b]))])
    assert ht.inspect(model, allow_float_tail=True).compilable
    assert "a quotient that nothing quantizes, of a tensor that may be 0" in str(agreed(model))
