"""QOperator nodes, standard and com.microsoft: expansion under the node's name, values against ONNX Runtime,
refusals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import (
    Fixed,
    graph_model,
    helper,
    imported,
    integers,
    layer_names,
    node_model,
    normal,
    onnx_reference,
    onnxruntime,
    op_names,
)

F = np.float32
MS = {"domain": "com.microsoft"}


def s(value: Any) -> Fixed:
    return Fixed(np.asarray(value, F))


def z(value: Any, dtype: Any) -> Fixed:
    return Fixed(np.asarray(value, dtype))


def check(op: str, operands: list[Any], *, oracle: Any = onnxruntime, share: float = 0.02, **attributes: Any) -> Any:
    """Values equal the oracle's but for a small share that is off by one; returns the imported module."""
    model, feed = node_model(op, operands, **attributes)
    got, wanted = imported(model, feed)["y0"], oracle(model, feed)["y0"]
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    if wanted.dtype.kind == "f":
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)  # the oracle adds in float32
        return import_onnx(model)
    off = np.abs(got.astype(np.int64) - wanted.astype(np.int64))
    # The oracle rounds float32 products, which moves values near a tie.
    assert off.max(initial=0) <= 1 and np.mean(off) <= share
    return import_onnx(model)


@pytest.mark.parametrize("x_type, w_type", [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")])
@pytest.mark.parametrize(
    "attributes",
    [{}, {"strides": [2, 1], "pads": [1, 0, 2, 1]}, {"group": 2}, {"auto_pad": "SAME_UPPER"}, {"dilations": [2, 2]}],
)
@pytest.mark.parametrize("bias", [False, True])
def test_qlinear_conv(x_type: str, w_type: str, attributes: dict[str, Any], bias: bool) -> None:
    x, w = integers(x_type, 1, 4, 8, 7), integers(w_type, 6, 4 // attributes.get("group", 1), 3, 2, seed=1)
    zero = 7 if w_type == "uint8" else 0
    operands = [x, s(0.03), z(5, x_type), Fixed(w), s(0.02), z(zero, w_type), s(1.7), z(100, x_type)]
    operands += [Fixed(np.arange(-3, 3, dtype=np.int32) * 900)] if bias else []
    module = check("QLinearConv", operands, **attributes)
    assert layer_names(module)[-1] == "n" and op_names(module)[-1] == "quantize"


@pytest.mark.parametrize("zeros", [[0] * 6, None])
def test_qlinear_conv_per_channel(zeros: list[int] | None) -> None:
    x, w = integers("uint8", 1, 4, 8, 7), integers("int8", 6, 4, 3, 3, seed=1)
    scales = np.linspace(0.01, 0.03, 6)
    operands = [
        x,
        s(0.03),
        z(128, "uint8"),
        Fixed(w),
        s(scales),
        z(zeros or [1, -2, 3, 0, 5, -128], "int8"),
        s(1.7),
        z(100, "uint8"),
    ]
    check("QLinearConv", operands, oracle=onnxruntime if zeros else onnx_reference)


def test_qlinear_conv_1d_and_runtime_weight() -> None:
    operands = [
        integers("uint8", 1, 4, 9),
        s(0.03),
        z(5, "uint8"),
        integers("int8", 6, 4, 3, seed=1),
        s(0.02),
        z(0, "int8"),
        s(1.1),
        z(100, "uint8"),
    ]
    module = check("QLinearConv", operands)
    assert [p.name for p in module["main"].params] == ["i0", "i3"]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("a, b", [((5, 4), (4, 3)), ((2, 5, 4), (2, 4, 3)), ((2, 5, 4), (4, 3))])
def test_qlinear_matmul(dtype: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    zero = 3
    operands = [
        integers(dtype, *a),
        s([0.02]),
        z([zero], dtype),
        integers(dtype, *b, seed=1),
        s([0.03]),
        z([zero + 1], dtype),
        s([0.4]),
        z([9], dtype),
    ]
    check("QLinearMatMul", operands)
    columns = [
        operands[0],
        s(0.02),
        z(3, dtype),
        Fixed(operands[3]),
        s([0.01, 0.02, 0.03]),
        z([0, 0, 0], dtype),
        s(0.4),
        z(9, dtype),
    ]
    if len(b) == 2:
        check("QLinearMatMul", columns)


def test_qlinear_matmul_scale_per_row() -> None:
    operands = [
        integers("uint8", 2, 4),
        s([0.02, 0.5]),
        z([3, 9], "uint8"),
        integers("uint8", 4, 3, seed=1),
        s(0.03),
        z(3, "uint8"),
        s(0.4),
        z(9, "uint8"),
    ]
    model, feed = node_model("QLinearMatMul", operands)
    a = (feed["i0"].astype(int) - [[3], [9]]) * np.asarray([[0.02], [0.5]], F).astype(float)
    b = (feed["i3"].astype(int) - 3) * float(F(0.03))
    np.testing.assert_array_equal(
        imported(model, feed)["y0"], np.clip(np.rint(a @ b / float(F(0.4))) + 9, 0, 255).astype(np.uint8)
    )


@pytest.mark.parametrize("a_type, b_type", [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8")])
def test_matmul_integer_is_exact(a_type: str, b_type: str) -> None:
    a, b = integers(a_type, 3, 7), integers(b_type, 7, 5, seed=1)
    for operands in ([a, b], [a, b, z(5, a_type)], [a, Fixed(b), z(5, a_type), z([1, 0, 2, 3, 4], b_type)]):
        model, feed = node_model("MatMulInteger", operands)
        got, wanted = imported(model, feed)["y0"], onnx_reference(model, feed)["y0"]
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == np.int32


def test_matmul_integer_zero_point_per_row() -> None:
    model, feed = node_model("MatMulInteger", [integers("uint8", 3, 4), integers("uint8", 4, 2), z([1, 2, 3], "uint8")])
    wanted = (feed["i0"].astype(np.int32) - np.asarray([[1], [2], [3]])) @ feed["i1"].astype(np.int32)
    np.testing.assert_array_equal(imported(model, feed)["y0"], wanted)


@pytest.mark.parametrize(
    "attributes", [{}, {"pads": [1, 2, 0, 1]}, {"strides": [2, 2], "auto_pad": "SAME_LOWER"}, {"group": 2}]
)
def test_conv_integer_is_exact(attributes: dict[str, Any]) -> None:
    x, w = integers("uint8", 1, 4, 6, 5), integers("uint8", 4, 4 // attributes.get("group", 1), 3, 2, seed=1)
    model, feed = node_model("ConvInteger", [x, w, z(9, "uint8"), z(3, "uint8")], **attributes)
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnxruntime(model, feed)["y0"])


def test_conv_integer_zero_point_per_channel() -> None:
    x, w = integers("uint8", 1, 2, 5, 5), integers("uint8", 3, 2, 2, 2, seed=1)
    model, feed = node_model("ConvInteger", [x, Fixed(w), z(9, "uint8"), z([1, 2, 3], "uint8")], pads=[1, 1, 1, 1])
    wanted = onnxruntime(
        *node_model(
            "Conv",
            [x.astype(F) - 9, Fixed(w.astype(F) - np.asarray([1, 2, 3], F).reshape(3, 1, 1, 1))],
            pads=[1, 1, 1, 1],
        )
    )["y0"]
    np.testing.assert_array_equal(imported(model, feed)["y0"], wanted.astype(np.int32))


# -- com.microsoft ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (5,), (3, 1, 1)])
def test_qlinear_binary(op: str, dtype: str, shape: tuple[int, ...]) -> None:
    a, b = integers(dtype, 1, 3, 4, 5), integers(dtype, *shape, seed=1)
    check(op, [a, s(0.021), z(7, dtype), b, s(0.037), z(3, dtype), s(0.11), z(9, dtype)], **MS)
    without, feed = node_model(op, [a, s(0.021), None, b, s(0.037), None, s(0.11), z(9, dtype)], **MS)
    zeros, _ = node_model(op, [a, s(0.021), z(0, dtype), b, s(0.037), z(0, dtype), s(0.11), z(9, dtype)], **MS)
    np.testing.assert_array_equal(imported(without, feed)["y0"], imported(zeros, feed)["y0"])


@pytest.mark.parametrize(
    "op, attributes", [("QLinearSigmoid", {}), ("QLinearLeakyRelu", {"alpha": 0.3}), ("QLinearLeakyRelu", {})]
)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_qlinear_unary(op: str, attributes: dict[str, Any], dtype: str) -> None:
    x = np.arange(256).astype(np.uint8).view(dtype)
    check(op, [x, s(0.0431), z(11, dtype), s(0.0207), z(3, dtype)], **MS, **attributes)


@pytest.mark.parametrize("axis, opset", [(1, 13), (-1, 13), (1, 12), (2, 12)])
def test_qlinear_softmax(axis: int, opset: int) -> None:
    constants = {"xs": F(0.05), "xz": np.uint8(3), "ys": F(1 / 256), "yz": np.uint8(0)}
    node = helper.make_node("QLinearSoftmax", ["x", *constants], ["y"], name="n", axis=axis, opset=opset, **MS)
    feed = {"x": integers("uint8", 2, 6, 3)}
    model = graph_model([node], feed, ["y"], constants)
    off = imported(model, feed)["y"].astype(int) - onnxruntime(model, feed)["y"]
    assert np.abs(off).max() <= 1 and np.mean(off != 0) < 0.1  # the oracle sums a table of float32 exponentials


POOL = {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2]},
        POOL,
        {**POOL, "count_include_pad": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ],
)
def test_qlinear_average_pool(attributes: dict[str, Any]) -> None:
    check(
        "QLinearAveragePool",
        [integers("uint8", 1, 3, 7, 8), s(0.02), z(9, "uint8"), s(0.017), z(4, "uint8")],
        **MS,
        **attributes,
    )


def test_channels_last() -> None:
    x = integers("uint8", 1, 7, 8, 3)
    module = check(
        "QLinearAveragePool", [x, s(0.02), z(9, "uint8"), s(0.017), z(4, "uint8")], channels_last=1, **POOL, **MS
    )
    assert op_names(module) == ["permute_dims", "dequantize", "avg_pool2d", "quantize", "permute_dims"]
    check("QLinearGlobalAveragePool", [x, s(0.02), z(9, "uint8"), s(0.017), z(4, "uint8")], channels_last=1, **MS)
    weight = [Fixed(integers("int8", 5, 3, 3, 3)), s(0.02), z(0, "int8"), s(1.1), z(100, "uint8")]
    check("QLinearConv", [x, s(0.02), z(9, "uint8"), *weight], channels_last=1, pads=[1, 1, 1, 1], **MS)


def test_qlinear_means() -> None:
    x = integers("uint8", 2, 3, 5, 4)
    check("QLinearGlobalAveragePool", [x, s(0.02), z(9, "uint8"), s(0.017), z(4, "uint8")], **MS)
    model, feed = node_model(
        "QLinearReduceMean", [x, s(0.5), z(9, "uint8"), s(0.25), z(4, "uint8")], axes=[2, -1], keepdims=0, **MS
    )
    mean = (x.astype(float) - 9).mean(axis=(2, 3)) * 2
    np.testing.assert_array_equal(imported(model, feed)["y0"], np.clip(np.rint(mean) + 4, 0, 255).astype(np.uint8))


def test_qlinear_concat() -> None:
    parts = [integers("uint8", 1, n, 3, seed=n) for n in (2, 3, 4)]
    triples = [v for i, p in enumerate(parts) for v in (p, s(0.02 + i / 100), z(3 * i, "uint8"))]
    check("QLinearConcat", [s(0.031), z(7, "uint8"), *triples], axis=1, **MS)


def test_qlinear_where() -> None:
    condition = np.asarray([[True, False, True]])
    operands = [
        condition,
        integers("uint8", 2, 3),
        s(0.02),
        z(3, "uint8"),
        integers("uint8", 2, 3, seed=1),
        s(0.03),
        z(5, "uint8"),
        s(0.025),
        z(9, "uint8"),
    ]
    check("QLinearWhere", operands, **MS)


@pytest.mark.parametrize("attributes", [{}, {"transA": 1}, {"transB": 1}, {"alpha": 0.5}])
@pytest.mark.parametrize("output", [True, False])
def test_qgemm(attributes: dict[str, Any], output: bool) -> None:
    a = integers("uint8", *((4, 3) if attributes.get("transA") else (3, 4)))
    b = integers("int8", *((5, 4) if attributes.get("transB") else (4, 5)), seed=1)
    tail = [s(0.7), z(100, "uint8")] if output else []
    bias = Fixed(np.arange(5, dtype=np.int32) * 500)
    check("QGemm", [a, s(0.02), z(9, "uint8"), Fixed(b), s(0.03), z(0, "int8"), bias, *tail], **attributes, **MS)
    scales = np.linspace(0.01, 0.05, 5)
    check(
        "QGemm",
        [a, s(0.02), z(9, "uint8"), Fixed(b), s(scales), z(np.zeros(5), "int8"), None, *tail],
        **attributes,
        **MS,
    )


def test_matmul_integer_to_float() -> None:
    operands = [
        integers("uint8", 3, 4),
        Fixed(integers("int8", 4, 5)),
        s(0.02),
        s(np.linspace(0.01, 0.05, 5)),
        z(9, "uint8"),
        z(np.zeros(5), "int8"),
        Fixed(normal(5)),
    ]
    check("MatMulIntegerToFloat", operands, **MS)


def test_a_dynamic_tail_imports_as_a_cast() -> None:
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w", "xz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=1),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    x, w = integers("uint8", 2, 4), integers("int8", 4, 3)
    model = graph_model(nodes, {"x": x}, ["y"], {"w": w, "xz": np.uint8(3), "s": F(0.01)})
    assert op_names(import_onnx(model))[-2:] == ["astype", "multiply"]
    # Float32 product in the oracle.
    np.testing.assert_allclose(imported(model, {"x": x})["y"], onnxruntime(model, {"x": x})["y"], rtol=1e-6)


X8, W8 = integers("uint8", 1, 4, 6, 6), Fixed(integers("int8", 6, 4, 3, 3))
CONV: list[Any] = [X8, s(0.1), z(1, "uint8"), W8, s(0.1), z(0, "int8"), s(1), z(0, "uint8")]
ADD: list[Any] = [X8, s(0.1), z(1, "uint8"), X8, s(0.1), z(0, "uint8"), s(1), z(0, "uint8")]


def with_(operands: list[Any], index: int, value: Any) -> list[Any]:
    return [value if i == index else o for i, o in enumerate(operands)]


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("QLinearConv", with_(CONV, 1, s(0)), {}, "positive finite"),
        ("QLinearConv", with_(CONV, 1, s([0.1, 0.2])), {}, "one value for the tensor"),
        ("QLinearConv", with_(CONV, 4, s([0.1] * 5)), {}, "wrong length"),
        ("QLinearConv", with_(CONV, 5, z(0, "uint8")), {}, "another type"),
        ("QLinearConv", with_(CONV, 6, np.asarray(1, F)), {}, "graph input"),
        ("QLinearConv", [*CONV, Fixed(np.zeros(5, np.int32))], {}, "bias"),
        ("QLinearConv", [*CONV, Fixed(np.zeros(6, F))], {}, "bias of the wrong type"),
        ("QLinearConv", with_(CONV, 0, normal(1, 4, 6, 6)), {}, "element type"),
        ("QLinearConv", CONV[:6], {}, "number of inputs"),
        ("QLinearMatMul", CONV, {}, "cannot be multiplied"),
        ("MatMulInteger", [X8[0, 0], W8, z(0, "uint8")], {}, "cannot be multiplied"),
        ("ConvInteger", [X8, W8, z([0, 1], "uint8")], {}, "not one number"),
        ("MatMulInteger", [X8[0, 0], Fixed(X8[0, 1]), np.asarray(0, np.uint8)], {}, "graph input"),
        ("MatMulInteger", [X8[0, 0], Fixed(X8[0, 1]), z([0] * 5, "uint8")], {}, "wrong length"),
        ("QLinearAdd", with_(ADD, 3, integers("uint8", 5)), MS, "broadcast"),
        ("QLinearAdd", ADD[:5], MS, "number of inputs"),
        ("QLinearAdd", with_(ADD, 7, z(0, "int32")), MS, "type that is not supported"),
        ("QLinearConcat", [s(1), z(0, "uint8"), X8, s(1)], MS, "number of inputs|triples"),
        (
            "QGemm",
            [X8[0, 0], s(1), z(0, "uint8"), Fixed(X8[0, 1]), s(1), z(0, "uint8"), None, s(1), z(0, "uint8")],
            {**MS, "alpha": -1.0},
            "alpha",
        ),
        ("QGemm", [X8[0, 0], s(1), z(0, "uint8"), Fixed(X8[0, 1]), s(1), z(0, "uint8"), None, s(1)], MS, "only one of"),
        ("DynamicQuantizeMatMul", [normal(2, 2), Fixed(X8[0, 0]), s(1)], MS, "not supported"),
        ("QLinearAdd", ADD, {}, "not supported"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, **attributes)[0])
    assert error.value.where == "n"
