"""Softmax of scores that nothing quantizes, and of masked ones in every way that exporters write a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.core.errors import InputError

from ..agreement import agreed
from ..frontend.onnx_models import onnxruntime
from ..models import TYPES, Graph, float_output

F = np.float32
RNG = np.random.default_rng(31)
LENGTH, DEPTH = 9, 8
CAUSAL = np.triu(np.ones((LENGTH, LENGTH)), 1) > 0
INFINITE, LEAST, LARGE = -np.inf, float(np.finfo(F).min), -1e4


class Scores(Graph):
    """Q K^T times a constant, in float."""

    def __init__(self) -> None:
        super().__init__()
        a = self.dq(self.input("a", [2, LENGTH, DEPTH], TYPES["int8"][0]), F(0.05), 3, "int8")
        b = self.dq(self.input("b", [2, DEPTH, LENGTH], TYPES["int8"][0]), F(0.04), 0, "int8")
        self.scores = self.node("Mul", [self.node("MatMul", [a, b]), self.number(0.35)])

    def number(self, value: float) -> str:
        return self.constant(F(value), TensorProto.FLOAT, ())

    def ended(self, scores: str, scale: float | None = None) -> onnx.ModelProto:
        """The softmax, of scores with a quantize of their own or without."""
        scores = scores if scale is None else self.qdq(scores, F(scale), 1, "int8")
        p = self.node("Softmax", [scores], axis=-1)
        return self.model([float_output(self.qdq(p, F(1 / 256), 0, "uint8"))])


def added(g: Scores, value: float) -> str:
    return g.node("Add", [g.scores, g.constant(np.where(CAUSAL, value, 0).astype(F), TensorProto.FLOAT)])


def chosen(g: Scores, value: float) -> str:
    return g.node("Where", [g.constant(CAUSAL, TensorProto.BOOL), g.number(value), g.scores])


def inverted(g: Scores, value: float) -> str:
    """(1 - mask) C, of integers."""
    mask = g.node("Unsqueeze", [g.input("mask", [2, LENGTH], TensorProto.INT64), g.constant([1], TensorProto.INT64)])
    rest = g.node("Sub", [g.number(1), g.node("Cast", [mask], to=TensorProto.FLOAT)])
    return g.node("Add", [g.scores, g.node("Mul", [rest, g.number(value)])])


def chosen_by_integers(g: Scores, value: float) -> str:
    mask = g.node("Cast", [g.input("mask", [2, 1, LENGTH], TensorProto.INT64)], to=TensorProto.BOOL)
    return g.node("Add", [g.scores, g.node("Where", [mask, g.number(0), g.number(value)])])


def chosen_at_run_time(g: Scores, value: float) -> str:
    return g.node("Where", [g.input("mask", [2, 1, LENGTH], TensorProto.BOOL), g.scores, g.number(value)])


WAYS = [added, chosen, inverted, chosen_by_integers, chosen_at_run_time]


def inputs(package: ht.Package) -> dict[str, np.ndarray]:
    feed = {i.name: RNG.integers(-128, 128, i.shape).astype(i.dtype) for i in package.inputs}
    if "mask" in feed:
        mask = np.ones((2, LENGTH))
        mask[0, 5:] = mask[1, 2:4] = 0
        feed["mask"] = mask.reshape(feed["mask"].shape).astype(feed["mask"].dtype)
    return feed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [INFINITE, LEAST, LARGE])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_masked_scores_have_no_probability(way: Any, value: float, scale: float | None) -> None:
    if way is inverted and value == INFINITE:
        pytest.skip("0 times infinity is no number")
    g = Scores()
    model = g.ended(way(g, value), scale)
    package = ht.compile(model)
    feed = inputs(package)
    (got,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
    # Both are 1/2 and some millionths from the real values: at most one step apart, where one lies at a boundary.
    assert np.max(np.abs(got - wanted)) * 256 <= 1 and np.mean(got != wanted) < 0.01
    if scale is None:  # what 8 bits of scale 0.1 hold is not so low
        shown = feed["mask"].reshape(2, 1, LENGTH) != 0 if "mask" in feed else ~CAUSAL
        assert not np.any(got[~np.broadcast_to(shown, got.shape)])
    assert package.verify(random=1, seed=0).ok
    proof = package.prove()
    assert proof.ok and proof.differing == 0 and max(proof.distances.values()) < 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_one_verdict(way: Any) -> None:
    g = Scores()
    assert agreed(g.ended(way(g, LEAST))) is None


def test_a_mask_is_0_or_1() -> None:
    g = Scores()
    package = ht.compile(g.ended(inverted(g, LEAST)))
    feed = inputs(package)
    assert {i.name: i.range for i in package.inputs}["mask"] == (0, 1)
    with pytest.raises(InputError, match=r"input mask: leaves the range that the model takes; expected 0\.\.1"):
        package.run({**feed, "mask": feed["mask"] * 2})


@pytest.mark.parametrize("value", [LEAST, LARGE, -100.0])
def test_a_mask_leaves_scores_their_digits(value: float) -> None:
    g = Scores()
    package = ht.compile(g.ended(inverted(g, value)).SerializeToString())
    assert max(package.prove().distances.values()) < 1e-3


def test_a_mask_that_is_quantized_step_by_step() -> None:
    g = Scores()
    kept = g.qdq(g.node("Cast", [g.input("mask", [2, 1, LENGTH], TensorProto.INT64)], to=TensorProto.FLOAT), F(1 / 255))
    rest = g.qdq(g.node("Sub", [g.qdq(g.number(1), F(1 / 255)), kept]), F(1 / 255))
    added = g.qdq(g.node("Mul", [rest, g.number(LARGE)]), F(-LARGE / 255), 255)
    package = ht.compile(g.ended(g.node("Add", [g.scores, added])).SerializeToString())
    assert {i.name: i.range for i in package.inputs}["mask"] == (0, 1)
    package.verify(random=1).raise_if_mismatch()


def test_integers_that_are_no_mask_keep_their_range() -> None:
    g = Scores()
    number = g.node("Cast", [g.input("n", [2, 1, LENGTH], TensorProto.INT32)], to=TensorProto.FLOAT)
    y = g.qdq(g.node("Sub", [number, number]), F(0.5))
    package = ht.compile(g.model([float_output(y)]).SerializeToString())
    assert {i.name: i.range for i in package.inputs}["n"] is None


def test_probabilities_that_nothing_quantizes() -> None:
    """P V without a quantize between: P has 15 bits."""
    g = Scores()
    v = g.dq(g.input("v", [2, LENGTH, 4], TYPES["int8"][0]), F(0.03), 2, "int8")
    p = g.node("Softmax", [added(g, LEAST)], axis=-1)
    model = g.model([float_output(g.qdq(g.node("MatMul", [p, v]), F(0.03), 0, "int8"))])
    package = ht.compile(model)
    feed = inputs(package)
    (got,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
    # 2^-16 of a probability is 1e-3 of a step of 128 V here.
    assert np.max(np.abs(got - wanted)) <= 0.031 and np.mean(got != wanted) < 0.05
    assert package.verify(random=1, seed=0).ok
    proof = package.prove()
    (distance,) = proof.distances.values()
    # Half of 1/32767 of a probability beside each of LENGTH values of V, at most 130 steps from its zero point.
    assert proof.ok and LENGTH * 130 / 2 / 32767 < distance < LENGTH * 130 / 32767


def test_probabilities_beside_what_nothing_quantizes() -> None:
    """P (V + W): a fixed-point value beside another, of 22 bits and not of 15."""
    g = Scores()
    v, w = (
        g.dq(g.input(n, [2, LENGTH, 4], TYPES["int8"][0]), F(s), 2, "int8") for n, s in (("v", 0.03), ("w", 0.0171))
    )
    p = g.node("Softmax", [added(g, LEAST)], axis=-1)
    model = g.model([float_output(g.qdq(g.node("MatMul", [p, g.node("Add", [v, w])]), F(0.05), 0, "int8"))])
    package = ht.compile(model)
    (distance,) = package.prove().distances.values()
    # Half of 2^-22 beside each of LENGTH values below 2^23, and as much of these: far below what 15 bits would be.
    assert 0 < distance < LENGTH * 130 / 32767 / 16
    feed = inputs(package)
    (got,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
    assert np.max(np.abs(got - wanted)) <= 0.051 and np.mean(got != wanted) < 0.01
    assert package.verify(random=1, seed=0).ok


def negated(g: Graph) -> str:
    return g.node("Neg", [g.dq(g.input("x", [3, 5], TYPES["int8"][0]), F(0.05), 3, "int8")])


def with_a_bias(g: Graph) -> str:
    x = g.dq(g.input("x", [3, 5], TYPES["int8"][0]), F(0.05), 3, "int8")
    weight = g.dq(g.constant(RNG.integers(-20, 20, (5, 4)), TensorProto.INT8), F(0.01), 0, "int8")
    bias = g.dq(g.constant(RNG.integers(-8000, 8000, 4), TensorProto.INT32), F(0.05) * F(0.01), 0, "int32")
    return g.node("Add", [g.node("MatMul", [x, weight]), bias])


def with_zero_points(g: Graph) -> str:
    numbers = [g.constant(np.full(5, 0.05, F), TensorProto.FLOAT), g.constant([0, 40, -30, 7, 90], TensorProto.INT8)]
    return g.node("DequantizeLinear", [g.input("x", [3, 5], TYPES["int8"][0]), *numbers], axis=1)


@pytest.mark.parametrize("scores", [negated, with_a_bias, with_zero_points])
def test_scores_whose_integers_do_not_rise_with_them(scores: Any) -> None:
    """Integers of few bits that are no scores by themselves: they fall, or are added to before."""
    g = Graph()
    p = g.node("Softmax", [scores(g)], axis=-1)
    model = g.model([float_output(g.qdq(p, F(1 / 256), 0, "uint8"))])
    package = ht.compile(model)
    x = {"x": RNG.integers(-128, 128, (3, 5)).astype(np.int8)}
    (got,), (wanted,) = package.run(x).values(), onnxruntime(model, x).values()
    np.testing.assert_array_equal(got, wanted)
    assert package.verify(random=1, seed=0).ok and max(package.prove().distances.values()) < 1e-3


@pytest.mark.parametrize("op", ["Sigmoid", "Softmax"])
def test_scores_that_are_a_function(op: str) -> None:
    g = Graph()
    x = g.dq(g.input("x", [3, 5], TYPES["int8"][0]), F(0.05), 3, "int8")
    scores = g.node("Concat", [x, g.node(op, [x])], axis=1)
    for read in (scores, g.node(op, [x])):
        p = g.node("Softmax", [read], axis=-1)
        model = g.model([float_output(g.qdq(p, F(1 / 256), 0, "uint8"))])
        package = ht.compile(model)
        feed = {"x": RNG.integers(-128, 128, (3, 5)).astype(np.int8)}
        (got,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
        np.testing.assert_array_equal(got, wanted)
        assert package.verify(random=1, seed=0).ok and max(package.prove().distances.values()) < 1e-3


def test_scores_that_are_too_large() -> None:
    g = Scores()
    error = agreed(g.ended(g.node("Mul", [g.scores, g.number(1e6)])))
    assert "exponents have no integers" in str(error)


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_residual_stream_that_nothing_quantizes(blocks: int) -> None:
    """Pre-norm blocks: every normalization reads a sum of all before it, in fixed point."""
    g, width = Graph(), 96
    x = g.dq(g.input("x", [2, 7, width], TYPES["int8"][0]), F(0.05), 3, "int8")

    def normalized(x: str) -> str:
        gamma, beta = (g.constant(RNG.normal(m, 0.3, width).astype(F), TensorProto.FLOAT) for m in (1, 0))
        return g.qdq(g.node("LayerNormalization", [x, gamma, beta]), F(0.03), 0, "int8")

    for _ in range(blocks):
        x = g.node("Add", [x, g.node("MatMul", [normalized(x), g.weight([width, width], axis=1)])])
    model = g.model([float_output(normalized(x))])
    package = ht.compile(model)
    feed = inputs(package)
    (got,), (wanted,) = package.run(feed).values(), onnxruntime(model, feed).values()
    assert np.max(np.abs(got - wanted)) <= 0.031 and np.mean(got != wanted) < 0.01
    assert package.verify(random=1, seed=0).ok
    proof = package.prove()
    assert proof.differing == 0
    # The first reads what the model quantizes. The last reads a sum in fixed point: rows of nearly equal elements
    # would show what that rounds, divided by the root of epsilon.
    distances = list(proof.distances.values())
    assert distances[0] < 1e-5 and 0.1 < distances[-1] < 20


def test_integers_that_an_output_returns_as_real_numbers() -> None:
    g = Graph()
    y = g.node("Cast", [g.input("n", [2, 3], TensorProto.INT32)], to=TensorProto.FLOAT)
    package = ht.compile(g.model([float_output(y)]).SerializeToString())
    assert package.inputs[0].range is None
