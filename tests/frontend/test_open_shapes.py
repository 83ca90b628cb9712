"""Inputs whose sizes the model leaves open, in every way that exporters write it, and tensors without elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from hawq_tvm.compiler.inspection import inspect
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.frontend.onnx import import_onnx
from hawq_tvm.verify.reference import evaluate

from ..models import Graph, float_output

SHAPE = (2, 3, 4, 4)


def network(dims: list[Any]) -> onnx.ModelProto:
    """A convolution; its result is an output twice, as the input is."""
    g = Graph()
    x = g.qdq(g.input("x", dims), np.float32(0.05), 128)
    y = g.qdq(g.conv(x, g.weight([4, 3, 3, 3])), np.float32(0.1), 128)
    return g.model([float_output(y), float_output(g.node("Identity", [y])), float_output("x")])


@pytest.mark.parametrize("dims", [[0, 3, 4, 4], [-1, 3, 4, 4], ["N", 3, 4, 4], [-1, 3, -1, 0], ["N", 3, "H", "W"]])
def test_an_open_size_is_fixed_by_a_shape(dims: list[Any]) -> None:
    model = network(dims)
    with pytest.raises(ModelError, match=r"input 'x': has a shape that is not fixed.*pass --shape x=1x3x"):
        import_onnx(model)
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    first, second, same = evaluate(import_onnx(model, {"x": SHAPE}), {"x": x}).values()
    assert first.shape == (2, 4, 2, 2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(same, x)


def test_no_size_is_zero() -> None:
    with pytest.raises(UsageError, match="has a size below 1"):
        import_onnx(network(["N", 3, 4, 4]), {"x": (0, 3, 4, 4)})


def ints(g: Graph, *values: int) -> str:
    return g.constant(np.array(values), TensorProto.INT64)


EMPTY = {
    "Slice": lambda g, x: g.node("Slice", [x, ints(g, 2), ints(g, 2), ints(g, 1)]),
    "Split": lambda g, x: g.node("Split", [x, ints(g, 3, 0)], outputs=2, axis=1),
    "Tile": lambda g, x: g.node("Tile", [x, ints(g, 1, 1, 1, 0)]),
    "Conv": lambda g, x: g.conv(x, g.dq(g.constant(np.zeros((0, 3, 1, 1)), TensorProto.INT8), 0.1, 0, "int8")),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_leaves_no_element_is_refused_before_anything_is_built(name: str) -> None:
    g = Graph()
    x = g.qdq(g.input("x", SHAPE), np.float32(0.05), 128)
    model = g.model([float_output(g.qdq(EMPTY[name](g, x), np.float32(0.1), 128))])
    with pytest.raises(ModelError) as refused:
        import_onnx(model)
    assert inspect(model).error == str(refused.value) and "\n" not in str(refused.value)


def test_an_empty_part_of_a_join_is_left_out() -> None:
    g = Graph()
    x = g.qdq(g.input("x", SHAPE), np.float32(0.05), 128)
    empty = g.constant(np.zeros((2, 0, 4, 4)), TensorProto.FLOAT)
    model = g.model([float_output(g.qdq(g.node("Concat", [x, empty], axis=1), np.float32(0.05), 128))])
    (got,) = evaluate(import_onnx(model), {"x": np.ones(SHAPE, np.float32)}).values()
    np.testing.assert_array_equal(got, np.full(SHAPE, np.float32(0.05) * np.float32(20)))
