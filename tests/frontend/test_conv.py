"""Conv and ConvTranspose in one and two dimensions: attributes against ONNX, and what does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import Fixed, call, check_float, node_model, normal, onnxruntime, op_names

X1, X2 = normal(2, 4, 11), normal(2, 4, 9, 8)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 1]},
        {"dilations": [2, 3]},
        {"pads": [1, 0, 2, 3]},
        {"group": 2},
        {"group": 4},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
        {"auto_pad": "SAME_LOWER", "strides": [2, 3]},
        {"auto_pad": "VALID"},
        {"auto_pad": "SAME_LOWER"},
        {"kernel_shape": [3, 2], "pads": [0, 1, 0, 0]},
        {"strides": [3, 2], "dilations": [2, 1], "pads": [2, 2, 1, 1]},
    ],
)
def test_conv_2d(attributes: dict[str, Any]) -> None:
    weight, bias = normal(8, 4 // attributes.get("group", 1), 3, 2, seed=1), normal(8, seed=2)
    check_float("Conv", [X2, Fixed(weight), Fixed(bias)], oracle=onnxruntime, **attributes)
    check_float("Conv", [X2, weight], oracle=onnxruntime, **attributes)


def test_auto_pad_counts_the_dilated_kernel() -> None:
    module = import_onnx(
        node_model("Conv", [X2, Fixed(normal(8, 4, 3, 2))], auto_pad="SAME_UPPER", dilations=[2, 3])[0]
    )
    assert [int(p) for p in call(module, "conv2d").attrs.padding] == [2, 1, 2, 2]
    assert [int(d) for d in call(module, "conv2d").ty.shape.values] == [2, 8, 9, 8]


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 1, 3]},
        {"dilations": [2, 1, 2], "pads": [1, 0, 2, 2, 1, 0]},
        {"group": 2, "strides": [3, 2, 1]},
        {"group": 4, "pads": [0, 0, 0, 1, 0, 0]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 3, 1]},
    ],
)
def test_conv_3d_is_a_conv_of_all_that_a_window_holds_along_the_depth(attributes: dict[str, Any]) -> None:
    x, weight = normal(2, 4, 7, 6, 8), normal(8, 4 // attributes.get("group", 1), 3, 2, 2, seed=1)
    check_float("Conv", [x, Fixed(weight), Fixed(normal(8, seed=2))], oracle=onnxruntime, **attributes)
    check_float("Conv", [x, Fixed(weight[:, :, :1])], oracle=onnxruntime, **attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2]},
        {"dilations": [3]},
        {"pads": [2, 1]},
        {"group": 4},
        {"auto_pad": "SAME_LOWER", "strides": [2]},
    ],
)
def test_conv_1d_is_a_conv_of_height_one(attributes: dict[str, Any]) -> None:
    weight, bias = normal(8, 4 // attributes.get("group", 1), 3, seed=1), normal(8, seed=2)
    module = check_float("Conv", [X1, Fixed(weight), Fixed(bias)], oracle=onnxruntime, **attributes)
    assert op_names(module) == ["expand_dims", "expand_dims", "conv2d", "add", "squeeze"]


def test_conv_is_one_relax_convolution_with_its_own_padding() -> None:
    module = import_onnx(
        node_model("Conv", [X2, Fixed(normal(8, 2, 3, 3))], group=2, pads=[1, 2, 3, 4], strides=[2, 1])[0]
    )
    attrs = call(module, "conv2d").attrs
    assert (
        [int(p) for p in attrs.padding] == [1, 2, 3, 4]
        and [int(s) for s in attrs.strides] == [2, 1]
        and int(attrs.groups) == 2
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 3]},
        {"strides": [3, 2], "output_padding": [1, 1]},
        {"pads": [1, 0, 1, 1]},
        {"dilations": [2, 1]},
        {"group": 2},
        {"strides": [2, 2], "output_shape": [18, 16]},
        {"strides": [2, 2], "output_shape": [17, 16], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID", "strides": [2, 2]},
        {"strides": [2, 2], "pads": [1, 1, 0, 0], "output_padding": [1, 0]},
    ],
)
def test_conv_transpose_2d(attributes: dict[str, Any]) -> None:
    weight, bias = normal(4, 6 // attributes.get("group", 1), 3, 2, seed=1), normal(6, seed=2)
    check_float("ConvTranspose", [X2, Fixed(weight), Fixed(bias)], oracle=onnxruntime, **attributes)


@pytest.mark.parametrize(
    "attributes", [{}, {"strides": [2]}, {"strides": [3], "output_padding": [2], "pads": [1, 0]}, {"group": 2}]
)
def test_conv_transpose_1d(attributes: dict[str, Any]) -> None:
    weight = normal(4, 6 // attributes.get("group", 1), 3, seed=1)
    check_float("ConvTranspose", [X1, Fixed(weight), Fixed(normal(6, seed=2))], oracle=onnxruntime, **attributes)


W = Fixed(normal(8, 4, 3, 3))


@pytest.mark.parametrize(
    "op, operands, attributes, words",
    [
        ("Conv", [X2, Fixed(normal(8, 3, 3, 3))], {}, "input channels"),
        ("Conv", [X2, Fixed(normal(8, 2, 3, 3))], {"group": 3}, "input channels"),
        ("Conv", [X2, Fixed(normal(7, 2, 3, 3))], {"group": 2}, "multiple of 2"),
        ("Conv", [X2, W, Fixed(normal(7))], {}, "bias that does not fit"),
        ("Conv", [X2, W], {"pads": [1, 1]}, "pads that do not fit"),
        ("Conv", [X2, W], {"pads": [1, 1, -1, 0]}, "pads that do not fit"),
        ("Conv", [X2, W], {"strides": [0, 1]}, "strides that do not fit"),
        ("Conv", [X2, W], {"dilations": [9, 9]}, "larger than its padded input"),
        ("Conv", [X2, W], {"kernel_shape": [3, 2]}, "kernel_shape"),
        ("Conv", [X2, W], {"auto_pad": "SAME"}, "unknown auto_pad"),
        ("Conv", [X2, W], {"group": 0}, "group"),
        ("Conv", [normal(1, 4, 3, 3, 3, 3), Fixed(normal(8, 4, 1, 1, 1, 1))], {}, "data of 1 to 3 dimensions"),
        ("Conv", [X2, Fixed(normal(8, 4, 3))], {}, "another rank"),
        ("Conv", [X2, Fixed(normal(8, 4, 3, 3).astype(np.float64))], {}, "element type"),
        ("ConvTranspose", [X2, Fixed(normal(3, 8, 3, 3))], {}, "input channels"),
        ("ConvTranspose", [X2, W], {}, "input channels"),
        ("ConvTranspose", [X2, Fixed(normal(4, 8, 3, 3))], {"output_shape": [90, 90]}, "output_shape"),
        ("ConvTranspose", [X2, Fixed(normal(4, 8, 3, 3))], {"output_padding": [1, 1]}, "output_padding"),
        ("ConvTranspose", [X2, Fixed(normal(4, 8, 3, 3))], {"pads": [9, 9, 9, 9]}, "pads larger"),
    ],
)
def test_refusals(op: str, operands: list[Any], attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(node_model(op, operands, **attributes)[0])
    assert error.value.where == "n"
