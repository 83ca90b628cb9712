"""Element-wise operators, activations, Clip and Cast: float values against ONNX, integers exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import (
    Fixed,
    call,
    check_float,
    imported,
    integers,
    node_model,
    normal,
    onnx_reference,
    onnxruntime,
    op_names,
)

X = normal(2, 3, 4, 5)


@pytest.mark.parametrize(
    "op",
    [
        "Abs",
        "Neg",
        "Floor",
        "Ceil",
        "Round",
        "Exp",
        "Sin",
        "Cos",
        "Erf",
        "Tanh",
        "Sigmoid",
        "Relu",
        "Softsign",
        "Softplus",
        "Elu",
        "Celu",
        "Selu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Reciprocal",
        "Identity",
    ],
)
def test_unary(op: str) -> None:
    check_float(op, [X * 3])


@pytest.mark.parametrize("op", ["Sqrt", "Log"])
def test_unary_of_positive_numbers(op: str) -> None:
    check_float(op, [np.abs(X) + 0.1])


@pytest.mark.parametrize(
    "op, attributes, opset",
    [
        ("Elu", {"alpha": 0.7}, 17),
        ("Celu", {"alpha": 0.7}, 17),
        ("Selu", {"alpha": 0.7, "gamma": 1.3}, 17),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, 17),
        ("LeakyRelu", {"alpha": 0.3}, 17),
        ("Mish", {}, 18),
        ("Gelu", {}, 20),
        ("Gelu", {"approximate": "tanh"}, 20),
        ("Swish", {}, 24),
        ("Swish", {"alpha": 0.7}, 24),
    ],
)
def test_activation_attributes(op: str, attributes: dict[str, Any], opset: int) -> None:
    check_float(op, [X * 3], opset=opset, **attributes)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 1, 1), (5,), ()])
def test_binary_with_constant_or_tensor(op: str, shape: tuple[int, ...]) -> None:
    other = np.asarray(normal(*shape, seed=1) + 3, np.float32)
    oracle = onnxruntime if op == "Mean" else onnx_reference  # the reference cannot broadcast the first operand of Mean
    check_float(op, [X, Fixed(other)], oracle=oracle)
    check_float(op, [other, X], oracle=oracle)


@pytest.mark.parametrize("op", ["Max", "Min", "Sum", "Mean"])
def test_three_operands(op: str) -> None:
    check_float(op, [X, normal(4, 1, seed=1), Fixed(normal(1, 3, 1, 1, seed=2))])


def test_pow_takes_an_integer_exponent() -> None:
    check_float("Pow", [np.abs(X), Fixed(np.float32(1.5))])
    check_float("Pow", [X, Fixed(np.int64(3))])


@pytest.mark.parametrize("shape", [(1,), (3, 1, 1), (1, 3, 1, 1), (5,), (4, 5), (2, 3, 4, 5)])
def test_prelu_slope_of_any_broadcasting_shape(shape: tuple[int, ...]) -> None:
    module = check_float("PRelu", [X, Fixed(normal(*shape, seed=1))])
    assert ("prelu" in op_names(module)) == (shape in [(3, 1, 1), (1, 3, 1, 1)])


@pytest.mark.parametrize(
    "bounds, op",
    [
        ((-1.0, 1.0), "clip"),
        ((0.0, None), "relu"),
        ((None, 0.5), "minimum"),
        ((-0.5, None), "maximum"),
        ((0.0, np.inf), "relu"),
    ],
)
def test_clip_of_floats(bounds: tuple[float | None, float | None], op: str) -> None:
    operands = [X, *(None if b is None else Fixed(np.float32(b)) for b in bounds)]
    assert op_names(check_float("Clip", operands)) == [op]


def test_clip_of_opset_10_has_attributes() -> None:
    assert op_names(check_float("Clip", [X], opset=10, oracle=onnxruntime, min=0.0, max=6.0)) == ["clip"]
    assert op_names(check_float("Clip", [X], opset=10, oracle=onnxruntime, min=0.0)) == ["relu"]


def test_clip_without_bounds_vanishes() -> None:
    assert op_names(import_onnx(node_model("Clip", [X])[0])) == []


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_softmax_flattens_before_opset_13(op: str, axis: int) -> None:
    check_float(op, [X], axis=axis)
    check_float(op, [X], axis=axis, opset=11, oracle=onnxruntime)


def test_softmax_default_axis() -> None:
    check_float("Softmax", [X])
    check_float("Softmax", [X], opset=11, oracle=onnxruntime)


def test_batch_normalization() -> None:
    statistics = [Fixed(normal(3, seed=s) ** 2 + 0.5) for s in range(1, 5)]
    module = check_float("BatchNormalization", [X, *statistics], epsilon=0.01)
    assert "batch_norm" in op_names(module)
    assert float(call(module, "batch_norm").attrs.epsilon) == pytest.approx(0.01)


def test_dropout_and_identity_vanish() -> None:
    assert op_names(import_onnx(node_model("Dropout", [X, Fixed(np.float32(0.5)), Fixed(np.bool_(False))])[0])) == []
    assert op_names(import_onnx(node_model("Dropout", [X], opset=11, ratio=0.5)[0])) == []


@pytest.mark.parametrize(
    "op, dtype",
    [("Add", "int32"), ("Sub", "int32"), ("Mul", "int32"), ("Max", "int8"), ("Min", "uint8"), ("Max", "int32")],
)
def test_integer_arithmetic(op: str, dtype: str) -> None:
    a, b = (integers("int8", 2, 3, 4, seed=s).astype(dtype) for s in (0, 1))
    model, feed = node_model(op, [a, Fixed(b)])
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnx_reference(model, feed)["y0"])


@pytest.mark.parametrize("dtype", ["int8", "int32"])
def test_relu_of_integers(dtype: str) -> None:
    model, feed = node_model("Relu", [integers(dtype, 2, 3)])
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnx_reference(model, feed)["y0"])


@pytest.mark.parametrize("low, high", [(-8, 7), (None, 7), (-8, None), (100, 3)])
def test_clip_of_integers(low: int | None, high: int | None) -> None:
    operands = [integers("int8", 40), *(None if b is None else Fixed(np.int8(b)) for b in (low, high))]
    model, feed = node_model("Clip", operands)
    np.testing.assert_array_equal(
        imported(model, feed)["y0"], np.clip(feed["i0"], -128 if low is None else low, 127 if high is None else high)
    )


@pytest.mark.parametrize(
    "source, to", [("int32", 1), ("int8", 1), ("uint8", 6), ("int8", 7), ("bool", 1), ("float32", 6), ("float32", 3)]
)
def test_cast(source: str, to: int) -> None:
    x = (X * 20).astype(source)
    model, feed = node_model("Cast", [x], to=to)
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnx_reference(model, feed)["y0"])


def test_where() -> None:
    check_float("Where", [Fixed(X[0] > 0), X, normal(5, seed=3)])


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("Cast", [integers("int32", 4)], {"to": 3}, "may not fit"),
        ("Cast", [X], {"to": 8}, "not supported"),
        ("Add", [X, normal(2, seed=1)], {}, "broadcast"),
        ("Div", [integers("int32", 4), integers("int32", 4)], {}, "float tensors only"),
        ("PRelu", [X, Fixed(normal(7, 1, 1))], {}, "broadcast"),
        ("Softmax", [X], {"axis": 4}, "axis out of range"),
        ("Clip", [X, normal()], {}, "graph input"),
        ("Clip", [X, Fixed(np.float32(np.nan))], {}, "not a number"),
        ("Celu", [X], {"alpha": -1.0}, "not positive"),
        ("Tanh", [X, X], {}, "number of inputs"),
        ("BatchNormalization", [X, *[Fixed(normal(4))] * 4], {}, "does not fit"),
        ("BatchNormalization", [X, *[normal(3)] * 4], {}, "graph input"),
        ("BatchNormalization", [X, *[Fixed(-(normal(3) ** 2) - 1)] * 4], {}, "variance"),
        ("LeakyRelu", [X], {"beta": 1.0}, "does not know"),
        ("Dropout", [X, None, Fixed(np.bool_(True))], {}, "training"),
        ("Sqrt", [integers("int32", 3)], {}, "element type"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, **attributes)[0])
    assert error.value.where == "n"
