"""Opsets 7 to 9, in which the QONNX models of the zoo are written: what was an attribute then, and what had another name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.errors import ModelError

from .onnx_models import Fixed, check_float, graph_model, imported, normal, onnxruntime

F = np.float32
X = normal(1, 3, 4, 6)
BRING = "onnx.brevitas"


@pytest.mark.parametrize("opset", [7, 8, 9])
@pytest.mark.parametrize("op, attributes", [
    ("Slice", {"starts": [1, -3], "ends": [2**63 - 1, -1], "axes": [1, 3]}), ("Slice", {"starts": [0, 1], "ends": [1, 3]}),
    ("Pad", {"pads": [0, 0, 1, 0, 0, 0, 2, 1], "value": 0.5}), ("Pad", {"pads": [0, 0, 1, 1, 0, 0, 1, 1], "mode": "reflect"}),
    ("Clip", {"min": -0.5, "max": 0.25}), ("Dropout", {"ratio": 0.3}), ("Squeeze", {"axes": [0]}), ("Unsqueeze", {"axes": [0, 5]}), ("Flatten", {"axis": 2}),
    ("ReduceMean", {"axes": [2, 3], "keepdims": 0}), ("Softmax", {"axis": 1}), ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}), ("LeakyRelu", {"alpha": 0.1}), ("Transpose", {"perm": [0, 2, 3, 1]}),
])  # fmt: skip
def test_attributes_of_old_opsets(op: str, attributes: dict[str, object], opset: int) -> None:
    check_float(op, [X], opset=opset, oracle=onnxruntime, **attributes)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9])
def test_upsample(opset: int, mode: str) -> None:
    scales = [1.0, 1.0, 2.0, 3.0]
    if opset < 9:
        check_float("Upsample", [X], opset=opset, oracle=onnxruntime, mode=mode, scales=scales)
    else:
        check_float("Upsample", [X, Fixed(np.array(scales, F))], opset=opset, oracle=onnxruntime, mode=mode)


@pytest.mark.parametrize("opset", [7, 9])
def test_layers_of_old_opsets(opset: int) -> None:
    check_float("BatchNormalization", [X, *(Fixed(np.abs(normal(3, seed=i)) + F(0.1)) for i in range(4))], opset=opset, oracle=onnxruntime)
    check_float("Gemm", [normal(2, 3), Fixed(normal(3, 4)), Fixed(normal(4))], opset=opset, oracle=onnxruntime)
    check_float("Sum", [X, Fixed(normal(1, 3, 4, 6, seed=2))], opset=opset, oracle=onnxruntime)


def test_statistics_for_every_pixel_are_refused() -> None:
    nodes = [helper.make_node("BatchNormalization", ["x", "a", "a", "a", "a"], ["y"], name="bn", spatial=0)]
    with pytest.raises(ModelError, match="bn: BatchNormalization has statistics for every pixel"):
        imported(graph_model(nodes, {"x": X}, ["y"], {"a": np.ones(3, F)}, opset=7, ir=3), {"x": X})


def test_upsample_ends_with_opset_9() -> None:
    nodes = [helper.make_node("Upsample", ["x", "s"], ["y"], name="up")]
    with pytest.raises(ModelError, match="up: Upsample does not exist in this opset any more"):
        imported(graph_model(nodes, {"x": X}, ["y"], {"s": np.ones(4, F)}, opset=11), {"x": X})


def test_shapes_are_folded_in_old_opsets() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Slice", ["s"], ["n"], starts=[0], ends=[1]), helper.make_node("Constant", [], ["m"], value=numpy_helper.from_array(np.array([-1]))),
        helper.make_node("Concat", ["n", "m"], ["to"], axis=0), helper.make_node("Reshape", ["x", "to"], ["y"]),
    ]  # fmt: skip
    model = graph_model(nodes, {"x": X}, ["y"], {}, opset=9, ir=4)
    assert imported(model, {"x": X})["y"].shape == (1, 72)


def test_a_qonnx_network_of_opset_9() -> None:
    """As the zoo's are: Quant of weights and activations in a domain of its own, attributes of opset 9, initializers among the inputs."""
    rng = np.random.default_rng(0)
    quant = {"domain": BRING, "narrow": 0, "rounding_mode": "ROUND", "signed": 1}
    nodes = [
        helper.make_node("Quant", ["x", "s", "z", "b"], ["xq"], name="qx", **quant), helper.make_node("Quant", ["w", "sw", "z", "b4"], ["wq"], name="qw", **quant),
        helper.make_node("Pad", ["xq"], ["xp"], name="pad", pads=[0, 0, 1, 1, 0, 0, 1, 1]), helper.make_node("Conv", ["xp", "wq"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "g", "g", "m", "g"], ["n"], name="bn"), helper.make_node("Clip", ["n"], ["r"], name="clip", min=0.0, max=6.0),
        helper.make_node("Quant", ["r", "s", "z", "b"], ["rq"], name="qr", **quant), helper.make_node("Slice", ["rq"], ["cut"], name="cut", starts=[1], ends=[4], axes=[2]),
        helper.make_node("Upsample", ["cut", "up"], ["u"], name="up", mode="nearest"), helper.make_node("Dropout", ["u"], ["y"], name="drop", ratio=0.5),
    ]  # fmt: skip
    constants = {
        "s": F(0.0625), "sw": F(0.125), "z": F(0), "b": F(8), "b4": F(4), "w": (rng.integers(-8, 8, (4, 3, 3, 3)) * 0.125).astype(F), "g": np.ones(4, F),
        "m": rng.normal(size=4).astype(F), "up": np.array([1, 1, 2, 2], F),
    }  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, np.shape(v)) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "zoo", inputs, [onnx.ValueInfoProto(name="y")], [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9), helper.make_opsetid(BRING, 1)], ir_version=3)
    assert ht.inspect(model).compilable
    package = ht.compile(model)
    assert package.verify(random=2).ok and package.prove().ok
    x = (rng.integers(-128, 128, (1, 3, 6, 6)) * 0.0625).astype(F)
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    sums = np.array([[[(padded[0, :, i : i + 3, j : j + 3] * constants["w"][o]).sum() for j in range(6)] for i in range(6)] for o in range(4)])
    normal_ = (sums - constants["m"][:, None, None]) / np.sqrt(1 + 1e-5) + 1
    levels = np.clip(np.rint(np.clip(normal_, 0, 6) / 0.0625), -128, 127) * 0.0625
    assert np.array_equal(package.run({"x": x})["y"][0], levels[:, 1:4].repeat(2, 1).repeat(2, 2).astype(F))
