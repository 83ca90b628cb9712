"""Operands that must be constant and are computed of constants: behind DequantizeLinear, or any arithmetic of such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.ops import op_name
from hawq_tvm.core.stages import bindings
from hawq_tvm.frontend.onnx import import_onnx

from ..models import TYPES, Graph

F = np.float32
FLOAT, I8, I64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT64
Write = Callable[[Graph, str], str]


def behind(g: Graph, values: Any, scale: Any, kind: str = "int8") -> str:
    """A DequantizeLinear of an initializer."""
    return g.dq(g.constant(values, TYPES[kind][0]), scale, np.zeros(np.shape(scale), int), kind, axis=0)


def normalized(g: Graph, x: str) -> str:
    """All four parameters of a BatchNormalization behind a dequantize, as ONNX Runtime's quantizer leaves them."""
    scale = behind(g, [127, -40, 53, 9], F(0.01))
    bias = behind(g, [-3013, 8199, 600, 0], F(1e-4), "int32")
    mean = behind(g, [7, 9, 100, 0], F(0.02), "uint8")
    mean = g.node("Sub", [mean, g.constant(F(0.5), FLOAT, ())])
    variance = g.node("Abs", [behind(g, [50, -70, 127, 1], F([0.01, 0.02, 0.03, 0.04]))])
    return g.node("BatchNormalization", [x, scale, bias, mean, variance])


def folded(g: Graph, x: str) -> str:
    """A normalization behind a convolution, which takes it."""
    return normalized(g, g.conv(x, g.weight([4, 4, 3, 3]), pads=[1] * 4))


def chained(g: Graph, x: str) -> str:
    """Bounds of a Clip by arithmetic: 2 * 0.5 * 3 and its negative, moved and quantized on the way."""
    c = g.node("Mul", [behind(g, [100], F([0.02])), g.constant(F(1.5), FLOAT, ())])
    c = g.node("Squeeze", [g.node("Exp", [g.node("Log", [c])])])
    c = g.qdq(c, F(0.1), 3)
    return g.node("Clip", [x, g.node("Neg", [c]), c])


def padded(g: Graph, x: str) -> str:
    pads = g.constant([0, 0, 1, 1, 0, 0, 1, 1], I64)
    return g.node("Pad", [x, pads, g.node("Reshape", [behind(g, [3], F([0.5])), g.constant([], I64, [0])])])


def by_norm(g: Graph, x: str) -> str:
    """Weight normalization: v / |v| * g, which stays a quantized weight."""
    v = g.weight([5, 4, 1, 1], axis=None)
    norm = g.node("ReduceL2", [v, g.constant([1, 2, 3], I64)], keepdims=1)
    length = g.constant(F([0.5, -1, 2, 3, 0.25]).reshape(5, 1, 1, 1), FLOAT)
    return g.conv(x, g.node("Mul", [g.node("Div", [v, norm]), length]))


def sloped(g: Graph, x: str) -> str:
    return g.node("PRelu", [x, g.node("Unsqueeze", [behind(g, [20, -3, 0, 127], F(0.01)), g.constant([1, 2], I64)])])


@pytest.mark.parametrize("write", [normalized, folded, chained, padded, by_norm, sloped], ids=lambda f: f.__name__)
def test_it_compiles_to_integers(write: Write) -> None:
    """ONNX Runtime's results are compared by the fixture of this folder."""
    g = Graph(2)
    x = g.qdq(g.input("x", [2, 4, 5, 5]), F(0.05), 120)
    module = import_onnx(g.model([(g.qdq(write(g, x), F(0.06), 110), FLOAT)]))
    packed = pipeline.to_packed(module)
    calls = [op_name(b.value) for f in packed.functions.values() for b in bindings(f)]
    assert "hawq.requantize" in calls and not [c for c in calls if c.startswith("relax.nn.batch_norm")]


def test_what_depends_on_an_input_is_refused() -> None:
    g = Graph()
    x, s = g.qdq(g.input("x", [1, 2, 3, 3]), F(0.05), 0), g.input("s", [2], I8)
    scale, one = g.dq(s, F(0.01), 0, "int8"), g.constant(F([1, 1]), FLOAT)
    y = g.node("BatchNormalization", [x, scale, one, one, one])
    with pytest.raises(ModelError, match=r"has a scale 'dequantizelinear.*' that is computed at run time"):
        import_onnx(g.model([(g.qdq(y, F(0.1), 0), FLOAT)]))


def test_a_very_long_chain_is_refused() -> None:
    g = Graph()
    x, c = g.qdq(g.input("x", [1, 2, 3, 3]), F(0.05), 0), behind(g, [1], F([0.5]))
    for _ in range(2000):
        c = g.node("Neg", [c])
    y = g.node("Clip", [x, "", g.node("ReduceMax", [c], keepdims=0)])
    with pytest.raises(ModelError, match=r"has a bound max .* that very many operators compute"):
        import_onnx(g.model([(g.qdq(y, F(0.1), 0), FLOAT)]))


def test_what_is_known_is_computed_only_when_asked_for_and_within_bounds() -> None:
    """A weight stays an expression; a bound that would be computed of 2^28 elements is refused before it is."""
    g = Graph()
    x = g.qdq(g.input("x", [1, 2, 3, 3]), F(0.05), 0)
    large = g.node("Expand", [behind(g, [1], F([0.5])), g.constant([1 << 28], I64)])
    y = g.node("Clip", [x, "", g.node("ReduceMax", [large], keepdims=0)])
    with pytest.raises(ModelError, match="very large constant"):
        import_onnx(g.model([(g.qdq(y, F(0.1), 0), FLOAT)]))
