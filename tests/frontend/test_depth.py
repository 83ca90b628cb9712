"""Chains of a thousand operators: compiled in a time that grows with their length, or refused with a sentence."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import ModelError
from hawq_tvm.verify.reference import evaluate

DEPTH = 1000
Step = Callable[[str, str], list[onnx.NodeProto]]


def node(op: str, inputs: list[str], out: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [out], name=out, **attributes)


def chain(step: Step, depth: int = DEPTH) -> bytes:
    """x (uint8, scale 1/4, zero point 3) through `depth` steps, each from one name to the next, and quantized with
    the scale 1/2.
    """
    constants = {
        "s": np.float32(0.25),
        "t": np.float32(0.5),
        "z": np.uint8(3),
        "half": np.float32(0.5),
        "less": np.float32(0.999),
        "column": np.array([4, 1]),
        "row": np.array([1, 4]),
        "zero": np.array([0]),
        "four": np.array([4]),
        "one": np.array([1]),
    }
    nodes = [node("DequantizeLinear", ["x", "s", "z"], "k0")]
    for i in range(depth):
        nodes += step(f"k{i}", f"k{i + 1}")
    nodes.append(node("QuantizeLinear", [f"k{depth}", "t", "z"], "y"))
    info = (
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
    )
    graph = helper.make_graph(
        nodes, "g", *info, [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def outputs(module: tvm.IRModule, x: np.ndarray) -> list[int]:
    """The reference's result."""
    return next(iter(evaluate(module, {"x": x}).values())).ravel().tolist()


STEPS: dict[str, Step] = {
    "the mean of x and x": lambda a, b: [node("Add", [a, a], b + "a"), node("Mul", [b + "a", "half"], b)],
    "twice x less x": lambda a, b: [node("Add", [a, a], b + "a"), node("Sub", [b + "a", a], b)],
    "relu": lambda a, b: [node("Relu", [a], b)],
    "maximum of x and x": lambda a, b: [node("Max", [a, a], b)],
    "reshape": lambda a, b: [node("Reshape", [a, "column"], b + "a"), node("Reshape", [b + "a", "row"], b)],
    "transpose": lambda a, b: [node("Transpose", [a], b, perm=[1, 0])],
    "quantize": lambda a, b: [
        node("QuantizeLinear", [a, "s", "z"], b + "q"),
        node("DequantizeLinear", [b + "q", "s", "z"], b),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_thousand_steps_that_change_nothing_below_zero(name: str) -> None:
    start = time.process_time()
    packed = pipeline.to_packed(pipeline.import_annotated(chain(STEPS[name])))
    x = np.array([[3, 9, 200, 255]], np.uint8)
    assert outputs(packed, x) == [3, 6, 101, 129]  # 98.5 goes to the even 98
    assert time.process_time() - start < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, says",
    [
        (lambda a, b: [node("Add", [a, a], b)], r"ratio that no dyadic number holds; found a ratio of about 2\^999"),
        (
            lambda a, b: [node("Mul", [a, "less"], b + "m"), node("Max", [a, b + "m"], b)],
            "joins very many tensors|concatenation",
        ),
        (
            lambda a, b: [node("Relu", [a], b + "m"), node("Max", [a, b + "m"], b)],
            "joins very many tensors|concatenation",
        ),
    ],
)
def test_a_thousand_steps_that_no_integers_hold(step: Step, says: str) -> None:
    start = time.process_time()
    with pytest.raises(ModelError, match=says):
        pipeline.to_packed(pipeline.import_annotated(chain(step)))
    assert time.process_time() - start < 60


@pytest.mark.slow
def test_a_thousand_products_are_one_table() -> None:
    packed = pipeline.to_packed(pipeline.import_annotated(chain(lambda a, b: [node("Mul", [a, "k0"], b)])))
    assert outputs(packed, np.array([[3, 7, 8, 0]], np.uint8)) == [3, 5, 255, 3]
