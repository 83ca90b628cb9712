"""What `inspect` prints: the description, and every problem."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from hawq_tvm.frontend.onnx import describe_onnx
from hawq_tvm.inspection import inspect

from .onnx_models import graph_model, normal

F = np.float32


def test_description_of_a_quantized_model() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], name="qx"), helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], name="dx"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="dw", axis=0), helper.make_node("MatMul", ["xd", "wd"], ["y"], name="mm"),
        helper.make_node("DequantizeLinear", ["v", "vs"], ["unused"], name="dv", block_size=2),
    ]  # fmt: skip
    constants = {
        "xs": F(0.1), "xz": np.uint8(3), "w": np.zeros((4, 5), ml_dtypes.int4), "ws": np.ones(4, F), "v": np.zeros((4, 4), np.int8), "vs": np.ones((4, 2), F),
    }  # fmt: skip
    model = graph_model(nodes, {"x": normal(2, 4)}, ["y"], constants, opset=21)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]))
    model.producer_name = "test"
    d = describe_onnx(model)
    json.dumps(d)
    assert d["opsets"] == {"ai.onnx": 21, "com.microsoft": 1} and d["ir_version"] == 10 and d["producer"] == "test"
    assert d["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["N", 4]}]
    assert d["operators"] == {"DequantizeLinear": 3, "MatMul": 1, "QuantizeLinear": 1}
    by_name = {q["name"]: q for q in d["quantized"]}
    assert (by_name["qx"]["type"], by_name["qx"]["bits"], by_name["qx"]["symmetric"], by_name["qx"]["granularity"]) == (
        "uint8",
        8,
        False,
        "per tensor",
    )
    assert (by_name["dw"]["type"], by_name["dw"]["bits"], by_name["dw"]["symmetric"], by_name["dw"]["granularity"]) == (
        "int4",
        4,
        True,
        "per channel (4)",
    )
    assert by_name["dv"]["granularity"] == "blocks of 2 along axis 1"
    assert [q["role"] for q in d["quantized"]] == ["output", "input", "weight", "constant"]


def test_description_of_qoperator_nodes() -> None:
    node = helper.make_node(
        "QLinearAdd", ["a", "s", "z", "b", "s", "z", "s", "z"], ["y"], name="add", domain="com.microsoft"
    )
    model = graph_model(
        [node], {"a": np.zeros(4, np.uint8), "b": np.zeros(4, np.uint8)}, ["y"], {"s": F(1), "z": np.int8(0)}
    )
    d = describe_onnx(model)
    assert [q["role"] for q in d["quantized"]] == ["left", "right", "output"] and d["operators"] == {
        "com.microsoft.QLinearAdd": 1
    }


def test_every_unsupported_node_is_listed_at_once() -> None:
    nodes = [
        helper.make_node("LRN", ["x"], ["a"], name="lrn", size=3), helper.make_node("Relu", ["a"], ["b"], name="relu"), helper.make_node("Det", ["b"], ["c"], name="det"),
        helper.make_node("Resize", ["x", "", "s"], ["d"], name="cubic", mode="cubic"), helper.make_node("Quant", ["x"], ["e"], name="quant", domain="onnx.brevitas"),
    ]  # fmt: skip
    model = graph_model(nodes, {"x": normal(1, 3, 4, 4)}, ["c", "d", "e"], {"s": np.asarray([1, 1, 2, 2], F)})
    found = inspect(model).unsupported
    assert [(u["layer"], u["op"]) for u in found[:4]] == [
        ("lrn", "LRN"),
        ("det", "Det"),
        ("cubic", "Resize"),
        ("quant", "Quant"),
    ]
    assert all((u["reason"] and u["remedy"]) or u["expected"] for u in found)
    json.dumps(found)


def test_a_float_model_is_told_how_it_is_quantized() -> None:
    report = inspect(graph_model([helper.make_node("Relu", ["x"], ["y"])], {"x": normal(3)}, ["y"]))
    (problem,) = report.float_layers
    assert problem["reason"] == "is not quantized" and problem["remedy"].startswith("hawq-tvm quantize") and "not quantized" in report.verdict
    assert inspect(graph_model([helper.make_node("Relu", ["x"], ["y"])], {"x": normal(3)}, ["y"]), allow_float_tail=True).compilable


def test_open_shapes_come_first_and_unknown_operators_after() -> None:
    model = graph_model([helper.make_node("LRN", ["x"], ["y"], name="lrn", size=3)], {"x": normal(1, 3, 4, 4)}, ["y"])
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4, 4]))
    found = inspect(model).unsupported
    assert "--shape x=1x3x4x4" in found[0]["remedy"] and found[1]["layer"] == "lrn"
    assert [u["layer"] for u in inspect(model, {"x": (1, 3, 4, 4)}).unsupported] == ["lrn", "model"]
