"""Attention and Einsum of quantized tensors, and masks that integers decide, beside ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError

from ..agreement import agreed
from ..frontend.onnx_models import onnx_reference, onnxruntime
from ..models import TYPES, Graph, float_output

F = np.float32
RNG = np.random.default_rng(11)
BATCH, QUERIES, KEYS, DEPTH, STEP = 2, 5, 7, 8, F(0.0213)


class Heads(Graph):
    """Q of four heads, K and V of as many or fewer."""

    def __init__(self, others: int = 4, flat: bool = False) -> None:
        super().__init__(opset=23)
        self.attributes = {"q_num_heads": 4, "kv_num_heads": others} if flat else {}
        for name, heads, length in (("query", 4, QUERIES), ("key", others, KEYS), ("value", others, KEYS)):
            shape = [BATCH, length, heads * DEPTH] if flat else [BATCH, heads, length, DEPTH]
            setattr(self, name, self.dq(self.input(name, shape, TYPES["int8"][0]), F(0.03), 2, "int8"))

    def attended(self, *mask: str, **attributes: Any) -> onnx.ModelProto:
        y = self.node("Attention", [self.query, self.key, self.value, *mask], **self.attributes, **attributes)
        return self.ended(y)

    def ended(self, y: str) -> onnx.ModelProto:
        return self.model([float_output(self.qdq(y, STEP, 1, "int8"))])


def near(model: onnx.ModelProto, oracle: Any = onnxruntime, **feed: np.ndarray) -> np.ndarray:
    """Compile, run beside an oracle, verify and prove."""
    package = ht.compile(model)
    feed = {i.name: RNG.integers(-128, 128, i.shape).astype(i.dtype) for i in package.inputs} | feed
    (got,), (wanted,) = package.run(feed).values(), oracle(model, feed).values()
    # 15 bits of a probability and the oracle's own float32: one step, and that only at a boundary.
    assert np.max(np.abs(got - wanted)) <= 1.01 * STEP and np.mean(np.abs(got - wanted) > STEP / 2) < 0.02
    assert package.verify(random=1, seed=0).ok
    assert package.prove().ok
    return np.asarray(got)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("others, causal", [(4, 0), (2, 1), (1, 0)])
def test_heads(flat: bool, others: int, causal: int) -> None:
    near(Heads(others, flat).attended(is_causal=causal))


@pytest.mark.parametrize("causal", [0, 1])
def test_words_that_see_nothing(causal: int) -> None:
    """Truth values at run time; a row without any gives 0, as ONNX and PyTorch have it."""
    g = Heads(2)
    model = g.attended(g.input("mask", [BATCH, 1, QUERIES, KEYS], TensorProto.BOOL), is_causal=causal)
    mask = RNG.random((BATCH, 1, QUERIES, KEYS)) < 0.5
    mask[0, 0, 2] = False
    got = near(model, mask=mask)
    assert not got[0, :, 2].any()


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_constant_masks(kind: str) -> None:
    g = Heads()
    mask = RNG.random((QUERIES, KEYS)) < 0.6
    mask[:, 0], mask[3] = True, False
    values = mask if kind == "bool" else np.where(mask, 0.5, -np.inf)
    got = near(g.attended(g.constant(values, TensorProto.BOOL if kind == "bool" else TensorProto.FLOAT)))
    assert not got[:, :, 3].any()


def test_a_softcap_is_refused() -> None:
    error = agreed(Heads().attended(softcap=20.0))
    assert isinstance(error, ModelError) and "caps its scores by a tanh" in str(error)


def test_einsum() -> None:
    """Scores and their values by einsum, then heads times a weight of three axes, as in JAX's attention."""
    g = Heads()
    scores = g.node("Einsum", [g.query, g.key], equation="bhqd,bhkd->bhqk")
    p = g.node("Softmax", [g.node("Mul", [scores, g.constant(F(0.35), TensorProto.FLOAT, ())])], axis=-1)
    heads = g.qdq(g.node("Einsum", [p, g.value], equation="bhqk,bhkd->bqhd"), F(0.015), 0, "int8")
    w = g.dq(g.constant(RNG.integers(-127, 128, (4, DEPTH, 6)), TensorProto.INT8), F(0.004), 0, "int8")
    near(g.ended(g.node("Einsum", [heads, w], equation="bqhd,hdo->bqo")))


def causal_and_padding(g: Heads) -> str:
    """What PyTorch's exporters write: position <= row, and the mask of words."""
    mask = g.node("Cast", [g.input("mask", [BATCH, KEYS], TensorProto.INT64)], to=TensorProto.BOOL)
    mask = g.node("Unsqueeze", [mask, g.constant([1, 2], TensorProto.INT64)])
    return g.node("And", [g.constant(np.tril(np.ones((QUERIES, KEYS), np.bool_)), TensorProto.BOOL), mask])


def one_kind_of_word(g: Heads) -> str:
    """Words of one segment see each other; zero is padding."""
    kinds = g.input("mask", [BATCH, KEYS], TensorProto.INT64)
    columns = g.node("Unsqueeze", [kinds, g.constant([1, 2], TensorProto.INT64)])
    rows = g.node("Slice", [kinds, *(g.constant([n], TensorProto.INT64) for n in (0, QUERIES, 1))])
    rows = g.node("Unsqueeze", [rows, g.constant([1, 3], TensorProto.INT64)])
    zero = g.constant(0, TensorProto.INT64, ())
    padding = g.node("Or", [g.node("Equal", [columns, zero]), g.node("Not", [g.node("Greater", [rows, zero])])])
    return g.node("And", [g.node("Equal", [rows, columns]), g.node("Not", [padding])])


def positions(g: Heads) -> str:
    """A window before a position that is an input."""
    at = g.node(
        "Unsqueeze", [g.input("mask", [BATCH, QUERIES], TensorProto.INT64), g.constant([1, 3], TensorProto.INT64)]
    )
    places = g.constant(np.arange(KEYS), TensorProto.INT64)
    last = g.constant(3, TensorProto.INT64, ())
    near = g.node("Xor", [g.node("LessOrEqual", [places, at]), g.node("GreaterOrEqual", [last, places])])
    return g.node("Or", [near, g.node("Less", [places, at])])


@pytest.mark.parametrize("way", [causal_and_padding, one_kind_of_word, positions])
def test_masks_of_integers(way: Any) -> None:
    g = Heads()
    model = g.attended(way(g))
    shape = [d.dim_value for i in model.graph.input if i.name == "mask" for d in i.type.tensor_type.shape.dim]
    near(model, oracle=onnx_reference, mask=RNG.integers(0, 3, shape))


def test_real_numbers_are_not_compared_at_run_time() -> None:
    g = Heads()
    error = agreed(g.ended(g.node("Where", [g.node("Greater", [g.query, g.query]), g.query, g.query])))
    assert isinstance(error, ModelError) and "Greater has a real operand" in str(error)
