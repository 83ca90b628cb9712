"""Pools: ONNX's ceil_mode, count_include_pad, dilations and auto_pad, on floats and on integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import (
    Fixed,
    check_float,
    imported,
    integers,
    node_model,
    normal,
    onnx_reference,
    onnxruntime,
    op_names,
)

X1, X2 = normal(2, 3, 12), normal(2, 3, 10, 13)
WINDOWS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 3]},
    {"kernel_shape": [3, 3], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"kernel_shape": [3, 2], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"kernel_shape": [3, 2], "auto_pad": "VALID", "strides": [3, 3]},
    {"kernel_shape": [2, 2], "strides": [4, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [3, 4], "pads": [0, 0, 1, 1], "ceil_mode": 1},
]


DEEP: list[dict[str, Any]] = [
    {"kernel_shape": [2, 3, 2]},
    {"kernel_shape": [3, 2, 3], "strides": [2, 2, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3, 2], "strides": [2, 1, 2], "pads": [1, 1, 0, 1, 1, 1]},
    {"kernel_shape": [1, 2, 2], "strides": [1, 2, 2]},
    {"kernel_shape": [2, 2, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2, 2]},
]


@pytest.mark.parametrize("attributes", DEEP)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pools_in_depth(op: str, attributes: dict[str, Any]) -> None:
    x = normal(2, 3, 7, 6, 5)
    check_float(op, [x], oracle=onnxruntime, **attributes)
    if op == "AveragePool":
        check_float(op, [x], oracle=onnxruntime, count_include_pad=1, **attributes)
    else:
        model, feed = node_model("MaxPool", [integers("int8", 2, 3, 7, 6, 5)], **attributes)
        np.testing.assert_array_equal(imported(model, feed)["y0"], onnxruntime(model, feed)["y0"])
    check_float(f"Global{op}", [x], oracle=onnxruntime)


@pytest.mark.parametrize("attributes", WINDOWS)
def test_max_pool(attributes: dict[str, Any]) -> None:
    check_float("MaxPool", [X2], oracle=onnxruntime, **attributes)


@pytest.mark.parametrize("attributes", WINDOWS)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_max_pool_of_integers_is_padded_explicitly(attributes: dict[str, Any], dtype: str) -> None:
    model, feed = node_model("MaxPool", [integers(dtype, 2, 3, 10, 13)], **attributes)
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnxruntime(model, feed)["y0"])
    assert set(op_names(import_onnx(model))) <= {"pad", "max_pool2d"}


def test_max_pool_dilated() -> None:
    check_float("MaxPool", [X2], kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 1, 1, 1], oracle=onnxruntime)
    check_float("MaxPool", [X2], kernel_shape=[3, 2], dilations=[2, 3], strides=[2, 2], ceil_mode=1, oracle=onnxruntime)


@pytest.mark.parametrize("attributes", WINDOWS)
@pytest.mark.parametrize("count_include_pad", [0, 1])
def test_average_pool(attributes: dict[str, Any], count_include_pad: int) -> None:
    check_float("AveragePool", [X2], oracle=onnxruntime, count_include_pad=count_include_pad, **attributes)


def test_average_pool_dilated() -> None:
    check_float(
        "AveragePool", [X2], oracle=onnxruntime, opset=19, kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 1, 1, 1]
    )


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_pool_1d(op: str) -> None:
    module = check_float(op, [X1], oracle=onnxruntime, kernel_shape=[3], strides=[2], pads=[1, 0], ceil_mode=1)
    assert op_names(module)[0] == "expand_dims" and op_names(module)[-1] == "squeeze"


@pytest.mark.parametrize("x", [X1, X2])
def test_global_pools(x: Any) -> None:
    assert op_names(check_float("GlobalAveragePool", [x], oracle=onnxruntime)) == ["mean"]
    assert op_names(check_float("GlobalMaxPool", [x], oracle=onnxruntime)) == ["max"]


@pytest.mark.parametrize("op, opset", [("ReduceMean", 13), ("ReduceMax", 13), ("ReduceMin", 13), ("ReduceSum", 11)])
@pytest.mark.parametrize("axes, keepdims", [([2, 3], 1), ([-1], 0), ([1, 2], 0)])
def test_reductions_with_axes_as_attribute(op: str, opset: int, axes: list[int], keepdims: int) -> None:
    check_float(op, [X2], opset=opset, axes=axes, keepdims=keepdims, oracle=onnxruntime)
    check_float(op, [X2], opset=opset, keepdims=keepdims, oracle=onnxruntime)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"])
@pytest.mark.parametrize("axes", [[2, 3], [-1], None, []])
def test_reductions_with_axes_as_input(op: str, axes: list[int] | None) -> None:
    operands = [X2, None if axes is None else Fixed(np.asarray(axes, np.int64))]
    check_float(op, operands, opset=18, keepdims=0)
    check_float(op, operands, opset=18, noop_with_empty_axes=1)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_reduce_max_of_integers(dtype: str) -> None:
    model, feed = node_model("ReduceMax", [integers(dtype, 2, 3, 4)], opset=18)
    np.testing.assert_array_equal(imported(model, feed)["y0"], onnx_reference(model, feed)["y0"])


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("axis, keepdims", [(1, 1), (-1, 0), (0, 1)])
@pytest.mark.parametrize("x", [X2, integers("uint8", 3, 4, 5)])
def test_arg_extrema(op: str, axis: int, keepdims: int, x: Any) -> None:
    check_float(op, [x], axis=axis, keepdims=keepdims)


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("MaxPool", [X2], {"kernel_shape": [3, 3], "pads": [3, 0, 0, 0]}, "as large as its kernel"),
        ("MaxPool", [X2], {}, "lacks its attribute"),
        ("MaxPool", [X2], {"kernel_shape": [11, 3]}, "larger than its padded"),
        ("MaxPool", [X2], {"kernel_shape": [3]}, "kernel_shape"),
        ("MaxPool", [normal(1, 1, 4, 4, 4, 4)], {"kernel_shape": [2, 2, 2, 2]}, "data of 1 to 3 dimensions"),
        ("AveragePool", [integers("int8", 1, 1, 4, 4)], {"kernel_shape": [2, 2]}, "element type"),
        ("AveragePool", [X2], {"kernel_shape": [2, 2], "strides": [0, 0]}, "strides"),
        ("ArgMax", [X2], {"select_last_index": 1}, "last of equal"),
        ("ArgMax", [X2], {"axis": 4}, "out of range"),
        ("ReduceMean", [X2], {"axes": [7]}, "out of range"),
        ("ReduceMean", [X2], {"axes": [1, -3]}, "twice"),
        ("GlobalAveragePool", [normal(2, 3)], {}, "spatial"),
        ("ReduceMean", [integers("int32", 3, 3)], {}, "float tensors only"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, **attributes)[0])
    assert error.value.where == "n"


def test_indices_of_max_pool_are_refused() -> None:
    with pytest.raises(ModelError, match="indices"):
        import_onnx(node_model("MaxPool", [X2], outputs=2, kernel_shape=[2, 2])[0])
