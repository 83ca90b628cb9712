"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear: granularity, types, and every way a scale or zero
point is wrong.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hawq_tvm.core import ops
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import (
    Fixed,
    call,
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
# Ties, negative ties, both ends, and values far outside; 0.25 makes every tie exact.
EDGES = np.asarray([0, 0.125, 0.375, -0.125, -0.375, 31.75, 31.875, 32, 64, -32, -32.125, -1e6, 1e6, 0.1, -0.1, 5.3], F)


def check(op: str, operands: list[Any], *, opset: int = 21, oracle: Any = onnx_reference, **attributes: Any) -> Any:
    """The imported node's values equal the oracle's exactly; returns the module."""
    model, feed = node_model(op, operands, opset=opset, **attributes)
    got, wanted = imported(model, {k: _stored(v) for k, v in feed.items()})["y0"], oracle(model, feed)["y0"]
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(got, wanted.astype(got.dtype))
    return import_onnx(model)


def _stored(array: Any) -> Any:
    name = array.dtype.name
    return array.astype({"int4": "int8", "uint4": "uint8", "int2": "int8", "uint2": "uint8"}.get(name, name))


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", ml_dtypes.uint4, ml_dtypes.int4, ml_dtypes.uint2, ml_dtypes.int2]
)
@pytest.mark.parametrize("zero", [0, 1])
def test_quantize_to_every_type(dtype: Any, zero: int) -> None:
    module = check("QuantizeLinear", [EDGES, Fixed(F(0.25)), Fixed(np.asarray(zero, dtype))], opset=25)
    assert [str(t) for t in module["main"].attrs["hawq.output_types"]] == [np.dtype(dtype).name]
    attrs = call(module, "quantize").attrs
    assert (str(attrs["rounding"]), str(attrs["form"])) == ("half_even", "divide")


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", ml_dtypes.uint4, ml_dtypes.int4, ml_dtypes.uint2, ml_dtypes.int2]
)
def test_dequantize_every_type(dtype: Any) -> None:
    info = ml_dtypes.iinfo(dtype)
    x = np.linspace(int(info.min), int(info.max), 40).astype(np.int64).astype(dtype)
    check("DequantizeLinear", [x, Fixed(F(0.3)), Fixed(np.asarray(1, dtype))], opset=25)
    module = check("DequantizeLinear", [Fixed(x), Fixed(F(0.3))], opset=25)
    attrs = call(module, "dequantize").attrs
    assert (int(attrs["qmin"]), int(attrs["qmax"])) == (int(info.min), int(info.max))


def test_dequantize_int32() -> None:
    check("DequantizeLinear", [integers("int32", 9), Fixed(F(0.5))], opset=13, oracle=onnxruntime)
    check("DequantizeLinear", [integers("int32", 9), Fixed(F(0.5)), Fixed(np.int32(0))], opset=13, oracle=onnxruntime)


def test_quantize_int32_data() -> None:
    check("QuantizeLinear", [np.arange(-300, 300, 7, dtype=np.int32), Fixed(F(2)), Fixed(np.int8(3))], opset=21)


@pytest.mark.parametrize("scale", [F(0.5), np.asarray([0.5], F)])
@pytest.mark.parametrize("zero", [np.uint8(3), np.asarray([3], np.uint8)])
def test_per_tensor_scale_may_be_a_scalar_or_one_value(scale: Any, zero: Any) -> None:
    module = check("QuantizeLinear", [normal(2, 3), Fixed(scale), Fixed(zero)])
    assert ops.shape_of(call(module, "quantize").args[1]) == ()


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3, None])
def test_per_axis(axis: int | None) -> None:
    x, count = normal(2, 3, 4), (2, 3, 4)[1 if axis is None else axis]
    scale, zero = np.linspace(0.1, 0.7, count).astype(F), np.arange(count, dtype=np.int8)
    attributes = {} if axis is None else {"axis": axis}
    check("QuantizeLinear", [x, Fixed(scale), Fixed(zero)], **attributes)
    module = check("DequantizeLinear", [integers("int8", 2, 3, 4), Fixed(scale), Fixed(zero)], **attributes)
    assert ops.const_value(call(module, "dequantize").args[1]).size == count


@pytest.mark.parametrize(
    "axis, shape, scales",
    [(1, (3, 8), (3, 2)), (0, (8, 3), (2, 3)), (1, (3, 7), (3, 2)), (-1, (3, 4), (3, 1)), (1, (2, 6, 2), (2, 3, 2))],
)
def test_blocks(axis: int, shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    block = -(-shape[axis] // scales[axis])
    scale = (np.abs(normal(*scales, seed=4)) + 0.1).astype(F)
    zero = np.arange(scale.size, dtype=np.int8).reshape(scales)
    check("DequantizeLinear", [integers("int8", *shape), Fixed(scale), Fixed(zero)], axis=axis, block_size=block)
    check("QuantizeLinear", [normal(*shape), Fixed(scale), Fixed(zero)], axis=axis, block_size=block)


def test_rank_one_data_has_no_axis_to_choose() -> None:
    check(
        "QuantizeLinear", [normal(4), Fixed(np.asarray([0.1, 0.2, 0.3, 0.4], F)), Fixed(np.zeros(4, np.int8))], axis=0
    )
    model, _ = node_model(
        "QuantizeLinear", [normal(4), Fixed(np.asarray([0.1, 0.2, 0.3, 0.4], F)), Fixed(np.zeros(4, np.int8))]
    )
    assert op_names(import_onnx(model)) == ["quantize"]
    model, _ = node_model("DequantizeLinear", [integers("int8", 4), Fixed(np.asarray([0.1, 0.2, 0.3, 0.4], F))])
    with pytest.raises(ModelError, match="axis out of range"):
        import_onnx(model)


@pytest.mark.parametrize(
    "operands, attributes, kind",
    [
        ([], {}, "uint8"),
        ([Fixed(np.int8(0))], {}, "int8"),
        ([], {"output_dtype": 5}, "int16"),
        ([Fixed(np.int8(0))], {"output_dtype": 3}, "int8"),
        ([], {"output_dtype": 22}, "int4"),
    ],
)
def test_output_type(operands: list[Any], attributes: dict[str, int], kind: str) -> None:
    module = import_onnx(node_model("QuantizeLinear", [normal(4), Fixed(F(1)), *operands], opset=21, **attributes)[0])
    assert [str(t) for t in module["main"].attrs["hawq.output_types"]] == [kind]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float32"])
def test_scales_of_any_float_type_keep_their_value(dtype: str) -> None:
    scale = np.asarray(0.2, F).astype(getattr(ml_dtypes, dtype, dtype))
    module = import_onnx(node_model("QuantizeLinear", [normal(4), Fixed(scale), Fixed(np.int8(0))], opset=23)[0])
    assert ops.const_value(call(module, "quantize").args[1]) == scale.astype(F)


def test_scale_of_float64_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match="float32 cannot hold"):
        import_onnx(node_model("QuantizeLinear", [normal(4), Fixed(np.float64(0.2)), Fixed(np.int8(0))], opset=23)[0])


def test_microsoft_domain() -> None:
    for x, op in ((normal(2, 3), "QuantizeLinear"), (integers("uint16", 2, 3), "DequantizeLinear")):
        zero = np.asarray(np.arange(3), np.uint16 if op == "DequantizeLinear" else np.uint8)
        operands = [x, Fixed(np.asarray([0.1, 0.2, 0.3], F)), Fixed(zero)]
        check(op, operands, opset=17, domain="com.microsoft", axis=1, oracle=onnxruntime)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_dynamic_quantize_linear(shape: tuple[int, ...], shift: float) -> None:
    model, feed = node_model("DynamicQuantizeLinear", [normal(*shape) + F(shift)], outputs=3)
    got, wanted = imported(model, feed), onnxruntime(model, feed)
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        np.testing.assert_array_equal(got[name], wanted[name])


def test_a_constant_is_quantized_in_the_module_not_while_importing() -> None:
    module = import_onnx(node_model("QuantizeLinear", [Fixed(normal(4)), Fixed(F(0.1))])[0])
    assert op_names(module) == ["quantize"] and ops.is_const(call(module, "quantize").args[0])


def qcdq(low: Any, high: Any, *, extra: str = "") -> Any:
    """x -> Q -> Clip(low, high) -> DQ, with the quantized tensor also an output when asked."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
        helper.make_node("Clip", ["q", "low", "high"], ["c"], name="clip"),
        helper.make_node("DequantizeLinear", ["c", "s", "z"], ["y"], name="dequant"),
    ]
    constants = {"s": F(0.25), "z": np.int8(0), "low": np.int8(low), "high": np.int8(high)}
    return graph_model(nodes, {"x": EDGES}, ["y", extra] if extra else ["y"], constants)


def test_qcdq_narrows_the_range_of_the_quantize() -> None:
    model = qcdq(-8, 7)
    module = import_onnx(model)
    assert op_names(module) == ["quantize", "dequantize"] and layer_names(module) == ["clip", "dequant"]
    quantize, dequantize = call(module, "quantize").attrs, call(module, "dequantize").attrs
    assert (int(quantize["qmin"]), int(quantize["qmax"]), str(quantize["out_dtype"])) == (-8, 7, "int8")
    assert (int(dequantize["qmin"]), int(dequantize["qmax"])) == (-8, 7)
    np.testing.assert_array_equal(imported(model, {"x": EDGES})["y"], onnxruntime(model, {"x": EDGES})["y"])


def test_qcdq_keeps_the_wide_quantize_for_its_other_readers() -> None:
    model = qcdq(-8, 7, extra="q")
    assert op_names(import_onnx(model)).count("quantize") == 2
    got, wanted = imported(model, {"x": EDGES}), onnxruntime(model, {"x": EDGES})
    for name in wanted:
        np.testing.assert_array_equal(got[name], wanted[name])


def test_computed_scale_becomes_float_operators() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("QuantizeLinear", ["x", "m"], ["y"], name="n"),
    ]
    model = graph_model(nodes, {"x": np.abs(EDGES[:5]) + 1}, ["y"], opset=13)
    assert "quantize" not in op_names(import_onnx(model))
    feed = {"x": np.abs(EDGES[:5]) + 1}
    np.testing.assert_array_equal(imported(model, feed)["y"], onnx_reference(model, feed)["y"])


X, Q = normal(2, 3), integers("int8", 2, 3)


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("QuantizeLinear", [X, Fixed(F(0))], {}, "not a positive finite number"),
        ("QuantizeLinear", [X, Fixed(F(-1))], {}, "not a positive finite number"),
        ("QuantizeLinear", [X, Fixed(F(np.nan))], {}, "not a positive finite number"),
        ("DequantizeLinear", [Q, Fixed(F(np.inf))], {}, "not a positive finite number"),
        ("DequantizeLinear", [Q, Fixed(np.asarray([1, 0, 1], F))], {}, "at position 1"),
        ("DequantizeLinear", [Q, Fixed(np.zeros(0, F))], {}, "empty scale"),
        ("QuantizeLinear", [X, Fixed(np.ones(4, F))], {}, "wrong length"),
        ("QuantizeLinear", [X, Fixed(np.ones(2, F))], {"axis": 1}, "wrong length"),
        ("QuantizeLinear", [X, Fixed(np.ones(3, F)), Fixed(np.int8(0))], {}, "zero point 'i2' that does not fit"),
        ("QuantizeLinear", [X, Fixed(np.ones(3, F)), Fixed(np.zeros(2, np.int8))], {}, "that does not fit its scale"),
        ("QuantizeLinear", [X, Fixed(np.ones(3, F))], {"axis": 2}, "axis out of range"),
        ("QuantizeLinear", [X, Fixed(np.ones((2, 3), F))], {}, "rank 2"),
        ("DequantizeLinear", [Q, Fixed(F(1)), Fixed(np.uint8(0))], {}, "another type than its data"),
        ("DequantizeLinear", [integers("int32", 3), Fixed(F(1)), Fixed(np.int32(2))], {}, "out of range"),
        ("QuantizeLinear", [X, Fixed(F(1)), Fixed(np.int8(0))], {"output_dtype": 2}, "disagree"),
        ("QuantizeLinear", [X, Fixed(F(1))], {"output_dtype": 17}, "not supported"),
        ("QuantizeLinear", [X, Fixed(F(1)), Fixed(np.zeros((), ml_dtypes.float8_e4m3fn))], {}, "float8e4m3fn"),
        ("QuantizeLinear", [X, Fixed(F(1))], {"output_dtype": 23}, "not supported"),
        ("DequantizeLinear", [integers("int64", 3), Fixed(F(1))], {}, "element type"),
        ("DequantizeLinear", [X, Fixed(F(1))], {}, "element type"),
        ("QuantizeLinear", [Q, Fixed(F(1))], {}, "element type"),
        ("QuantizeLinear", [X, F(1)], {}, "scale 'i1' that is a graph input"),
        ("DequantizeLinear", [Q, Fixed(F(1)), np.int8(0)], {}, "zero point 'i2' that is a graph input"),
        ("DequantizeLinear", [Q, Fixed(np.int32(1))], {}, "scale 'i1' of a type"),
        ("QuantizeLinear", [X, Fixed(np.ones((2, 2), F))], {"block_size": 3}, "blocked scale"),
        ("QuantizeLinear", [X, Fixed(np.ones((2, 2), F))], {"block_size": -2}, "block_size"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, opset=21, **attributes)[0])
    assert error.value.where in ("n", "initializer 'i2'")


def test_division_in_another_precision_is_refused() -> None:
    with pytest.raises(ModelError, match="divides in a type that is not supported"):
        import_onnx(node_model("QuantizeLinear", [X, Fixed(F(1))], opset=23, precision=11)[0])


def test_the_remedy_for_a_scale_that_is_an_input_names_it() -> None:
    with pytest.raises(ModelError) as error:
        import_onnx(node_model("QuantizeLinear", [X, F(1)])[0])
    assert "'i1'" in error.value.remedy and "initializer" in error.value.remedy
