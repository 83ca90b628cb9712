"""Layer, instance and group normalisation: values against ONNX, and compiled in a float tail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx

from ..models import Graph, float_output
from .onnx_models import Fixed, check_float, node_model, normal, onnxruntime

X = normal(2, 6, 4, 5)


@pytest.mark.parametrize("axis, shape", [(-1, (5,)), (1, (6, 4, 5)), (2, (4, 5)), (-1, (1,)), (-2, (5,))])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(axis: int, shape: tuple[int, ...], bias: bool) -> None:
    operands: list[Any] = [X, Fixed(normal(*shape, seed=1))] + ([Fixed(normal(*shape, seed=2))] if bias else [])
    check_float("LayerNormalization", operands, oracle=onnxruntime, axis=axis, epsilon=0.01)


def test_scale_at_run_time() -> None:
    check_float("LayerNormalization", [X, normal(5, seed=1), normal(5, seed=2)], oracle=onnxruntime)


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 7)])
def test_instance_and_group_normalization(shape: tuple[int, ...]) -> None:
    x, per_channel, per_group = normal(*shape), normal(6, seed=1), normal(3, seed=1)
    check_float("InstanceNormalization", [x, Fixed(per_channel), Fixed(normal(6, seed=2))], epsilon=0.02)
    check_float(
        "GroupNormalization",
        [x, Fixed(per_channel), Fixed(normal(6, seed=2))],
        oracle=onnxruntime,
        opset=21,
        num_groups=3,
    )
    check_float(
        "GroupNormalization",
        [x, Fixed(per_group), Fixed(normal(3, seed=2))],
        oracle=onnxruntime,
        opset=18,
        num_groups=3,
    )


@pytest.mark.parametrize(
    "op, operands, attributes, opset, text",
    [
        ("LayerNormalization", [X, Fixed(normal(4))], {}, 17, "scale that does not fit"),
        ("LayerNormalization", [X, Fixed(normal(5))], {"axis": 4}, 17, "axis"),
        ("InstanceNormalization", [X, Fixed(normal(6)), Fixed(normal(5))], {}, 17, "bias that does not fit"),
        ("GroupNormalization", [X, Fixed(normal(4)), Fixed(normal(4))], {"num_groups": 4}, 18, "do not divide"),
    ],
)
def test_refused(op: str, operands: list[Any], attributes: dict[str, Any], opset: int, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        import_onnx(node_model(op, operands, opset=opset, **attributes)[0])


def test_behind_the_last_quantize() -> None:
    g = Graph()
    y = g.qdq(g.node("MatMul", [g.qdq(g.input("x", [2, 6]), 0.02, 128), g.weight([6, 8], axis=None)]), 0.05, 128)
    scale = g.constant(np.linspace(0.5, 2, 8).tolist(), 1)
    y = g.node("Softplus", [g.node("LayerNormalization", [y, scale])])
    model = g.model([float_output(y)])
    feed = {"x": normal(2, 6, seed=3)}
    for tail in (True, False):
        package = ht.compile(model, allow_float_tail=tail)
        assert (y in package.manifest["float_tail"]) is tail and package.verify(random=1).ok
        np.testing.assert_allclose(package.run(feed)[y], onnxruntime(model, feed)[y], rtol=1e-4, atol=1e-4)


def test_rms_normalization() -> None:
    x = normal(2, 6, 5)
    for axis, shape in ((-1, (5,)), (1, (6, 5))):
        check_float("RMSNormalization", [x, Fixed(normal(*shape, seed=1))], opset=23, axis=axis, epsilon=0.01)
