"""float16 and bfloat16 around quantized layers: scales are these numbers exactly, borders round as ONNX says."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx
from hawq_tvm.verify.reference import evaluate

F = np.float32
KINDS: dict[str, tuple[int, Any]] = {
    "float32": (TensorProto.FLOAT, F),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
STEP, LEVEL = 0.0717, 3


def border(kind: str, outside: str, opset: int, size: int) -> onnx.ModelProto:
    """QuantizeLinear and DequantizeLinear in one float type, with Casts where inputs and outputs have another."""
    nodes, x, y = [], "x", "d"
    if outside != kind:
        nodes.append(helper.make_node("Cast", [x], ["xc"], to=KINDS[kind][0], name="in"))
        x = "xc"
    nodes.append(helper.make_node("QuantizeLinear", [x, "s", "z"], ["q"], name="q"))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"))
    if outside != kind:
        nodes.append(helper.make_node("Cast", [y], ["yc"], to=KINDS[outside][0], name="out"))
        y = "yc"
    nodes.append(helper.make_node("Identity", [y], ["y"], name="id"))
    constants = {"s": np.array(STEP).astype(KINDS[kind][1]), "z": np.array(LEVEL, np.int8)}
    infos = [helper.make_tensor_value_info(n, KINDS[outside][0], [size]) for n in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def wanted(x: np.ndarray, kind: str, opset: int) -> np.ndarray:
    """What ONNX says, by NumPy: float32 divides before opset 23, the type of the scale since."""
    half = KINDS[kind][1]
    with np.errstate(over="ignore"):
        scale = np.array(STEP).astype(half).astype(F)
        ratio = x.astype(half).astype(F) / scale
        if opset >= 23:
            ratio = ratio.astype(half).astype(F)
    q = np.clip(np.rint(ratio), -128 - LEVEL, 127 - LEVEL)
    return (q * scale).astype(half).astype(x.dtype)


def every_float16() -> np.ndarray:
    x = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    return np.where(np.isnan(x), np.float16(1), x)


def many_float32() -> np.ndarray:
    """Numbers around every step and half step, subnormal ones, what 16 bits do not hold, and infinity."""
    rng = np.random.default_rng(0)
    near = (np.arange(-300, 300)[:, None] / 2 * F(STEP) * (1 + 2.0**-13 * np.arange(-8, 9))).astype(F).ravel()
    wide = (rng.choice([-1, 1], 4000) * 2.0 ** rng.uniform(-30, 20, 4000)).astype(F)
    return np.concatenate([near, wide, F([0, -0.0, 65519, 65520, 1e30, np.inf, -np.inf, 1e-40])])


@pytest.mark.parametrize("opset", [19, 23])
@pytest.mark.parametrize("kind, outside", [("float16", "float16"), ("float16", "float32"), ("bfloat16", "float32")])
def test_every_number_at_the_border(kind: str, outside: str, opset: int) -> None:
    """The compiled library and the reference, beside NumPy."""
    x = every_float16() if outside == "float16" else many_float32()
    package = ht.compile(border(kind, outside, opset, x.size))
    (y,) = package.run({"x": x}).values()
    assert y.dtype == x.dtype and [s.type for s in (*package.inputs, *package.outputs)] == [outside] * 2
    np.testing.assert_array_equal(y, wanted(x, kind, opset))
    assert package.verify(random=1, seed=0).ok and package.prove().ok


def network(kind: str, cast: bool) -> onnx.ModelProto:
    """A convolution with a ReLU, a mean and a classifier whose float tensors and scales are all of one type."""
    rng, half = np.random.default_rng(3), KINDS[kind][1]
    constants: dict[str, np.ndarray] = {"z": np.array(0, np.int8)}
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op.lower()}{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(array: Any) -> str:
        constants[name := f"c{len(constants)}"] = array
        return name

    def qdq(x: str, scale: float) -> str:
        s = constant(np.array(scale).astype(half))
        return add("DequantizeLinear", [add("QuantizeLinear", [x, s, "z"]), s, "z"])

    def weight(*shape: int) -> str:
        scales = rng.uniform(0.002, 0.01, shape[0]).astype(half)
        zeros = constant(np.zeros(shape[0], np.int8))
        q = constant(rng.integers(-127, 128, shape).astype(np.int8))
        return add("DequantizeLinear", [q, constant(scales), zeros], axis=0)

    x = add("Cast", ["x"], to=KINDS[kind][0]) if cast else "x"
    bias = constant(rng.normal(size=8).astype(half))
    y = add("Relu", [add("Conv", [qdq(x, 0.0185), weight(8, 3, 3, 3), bias])])
    y = qdq(add("GlobalAveragePool", [qdq(y, 0.04)]), 0.0185)
    y = add("Gemm", [add("Flatten", [y]), weight(5, 8), constant(rng.normal(size=5).astype(half))], transB=1)
    y = qdq(y, 0.0185)
    y = add("Cast", [y], to=TensorProto.FLOAT) if cast else y
    nodes[-1].output[0] = "y"
    outside = TensorProto.FLOAT if cast else KINDS[kind][0]
    infos = [
        helper.make_tensor_value_info("x", outside, [1, 3, 12, 12]),
        helper.make_tensor_value_info("y", outside, [1, 5]),
    ]
    graph = helper.make_graph(
        nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("kind, cast", [("float16", False), ("float16", True), ("bfloat16", True)])
def test_a_network(kind: str, cast: bool) -> None:
    """Scales of weights are the 16-bit numbers; what lies between is compared with ONNX Runtime by the fixture."""
    model = network(kind, cast)
    module = import_onnx(model)
    assert [str(t) for t in module["main"].attrs["hawq.output_types"]] == ["float32" if cast else kind]
    packed = pipeline.to_packed(module)
    x = np.random.default_rng(1).normal(size=(1, 3, 12, 12)).astype(F if cast else np.float16)
    (y,) = evaluate(packed, {"x": x}).values()
    scale = np.array(0.0185).astype(KINDS[kind][1]).astype(F)
    integers = np.rint(y.astype(F) / scale)
    assert y.dtype == x.dtype and np.unique(y).size > 2
    np.testing.assert_array_equal(y, (integers * scale).astype(KINDS[kind][1]).astype(y.dtype))


def test_a_float_tail() -> None:
    """It computes in float32, and rounds what it returns."""
    model = border("float16", "float16", 19, 8)
    model.graph.node[-1].op_type = "Sigmoid"
    x = np.linspace(-4, 4, 8).astype(np.float16)
    (y,) = ht.compile(model, allow_float_tail=True).run({"x": x}).values()
    real = wanted(x, "float16", 19).astype(np.float64)
    np.testing.assert_allclose(y.astype(np.float64), 1 / (1 + np.exp(-real)), atol=2.0**-11)
    assert y.dtype == np.float16


@pytest.mark.parametrize("place", ["input", "output"])
def test_bfloat16_inputs_and_outputs_are_refused(place: str) -> None:
    model = border("bfloat16", "float32", 19, 8)
    info = (model.graph.input if place == "input" else model.graph.output)[0]
    info.type.tensor_type.elem_type = TensorProto.BFLOAT16
    with pytest.raises(ModelError, match="put a Cast to"):
        import_onnx(model)


@pytest.mark.parametrize("precision, form", [(1, "divide"), (10, "float16"), (16, "bfloat16"), (0, "float16")])
def test_a_quantize_that_names_its_division(precision: int, form: str) -> None:
    model = border("float16", "float16", 23, 8)
    model.graph.node[0].attribute.append(helper.make_attribute("precision", precision))
    calls = [b.value for b in import_onnx(model)["main"].body.blocks[0].bindings]
    (quantize,) = (c for c in calls if ops.op_name(c) == "hawq.quantize")
    assert str(quantize.attrs["form"]) == form
