"""Random small quantized graphs: the compiled library against the reference, every layer, exactly."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hawq_tvm as ht
from hawq_tvm.targets import target as targets

from ..models import TYPES, Graph, float_output

PRESETS = {name: targets.parse(name) for name in ("host", *targets.PRESETS)}
RUNNABLE = [
    name
    for name, t in PRESETS.items()
    if targets.architecture(t) == platform.machine() and set(targets.required_features(t)) <= targets.host_features()
]
KINDS = st.sampled_from(["uint8", "int8", "uint4", "int4"])


@st.composite
def graphs(draw: Any) -> onnx.ModelProto:
    """A chain of two to four random operators on a random activation, with residual joins where shapes allow."""
    seed = draw(st.integers(0, 10**6))
    g = Graph(seed)
    channels, height, width = (
        draw(st.sampled_from([1, 2, 3, 4, 6, 17, 32, 65])),
        draw(st.integers(4, 9)),
        draw(st.sampled_from([4, 5, 7, 8, 9, 14, 31])),
    )
    kind = draw(KINDS)

    def zero(k: str) -> int:
        return draw(st.integers(TYPES[k][1], TYPES[k][2]))

    def scale(factor: float = 1.0) -> float:
        return factor * draw(st.sampled_from([0.0123, 0.0317, 0.05, 0.0625, 0.1093, 0.2]))

    def weights() -> str:
        return draw(st.sampled_from(["int8", "int4"]))

    x = g.qdq(g.input("x", [draw(st.sampled_from([1, 3])), channels, height, width]), scale(), zero(kind), kind)
    skip, skip_channels, same_shape = x, channels, True
    for _ in range(draw(st.integers(1, 4))):
        op = draw(
            st.sampled_from(
                [
                    "conv",
                    "depthwise",
                    "transpose",
                    "pool",
                    "average",
                    "add",
                    "mul",
                    "concat",
                    "table",
                    "leaky",
                    "resize",
                ]
            )
        )
        k2 = draw(KINDS)
        if op in ("conv", "depthwise"):
            groups = (
                channels if op == "depthwise" else draw(st.sampled_from([d for d in (1, 2, 3) if channels % d == 0]))
            )
            out = (
                channels * draw(st.sampled_from([1, 2]))
                if op == "depthwise"
                else groups * draw(st.sampled_from([1, 5, 8, 16, 33, 48, 64]))
            )
            k = draw(st.sampled_from([1, 2, 3]))
            pads = [draw(st.integers(0, k - 1)) for _ in range(4)]
            w = g.weight([out, channels // groups, k, k], weights(), scale=0.02, zero=draw(st.sampled_from([0, 0, 3])))
            stride = draw(st.sampled_from([1, 1, 2]))
            y = g.conv(x, w, group=groups, pads=pads, strides=[stride, draw(st.sampled_from([1, stride]))])
            if draw(st.booleans()):
                y = g.node("Relu", [y])
            channels, same_shape = out, False
        elif op == "transpose":
            w = g.weight([channels, 4, 2, 3], weights(), axis=None, scale=0.02)
            y = g.node("ConvTranspose", [x, w], strides=[2, 1], pads=[0, 1, 1, 0])
            channels, same_shape = 4, False
        elif op == "pool":
            y = g.node(
                "MaxPool",
                [x],
                kernel_shape=[3, 3],
                strides=[1, 2],
                pads=[1, 1, 1, 1],
                ceil_mode=draw(st.integers(0, 1)),
            )
            same_shape = False
        elif op == "average":
            y = g.node(
                "AveragePool",
                [x],
                kernel_shape=[2, 3],
                strides=[1, 1],
                pads=[0, 1, 1, 1],
                count_include_pad=draw(st.integers(0, 1)),
            )
            same_shape = False
        elif op in ("add", "mul") and same_shape and channels == skip_channels:
            y = g.node({"add": "Add", "mul": "Mul"}[op], [x, skip])
        elif op == "concat" and same_shape:
            y = g.node("Concat", [x, skip], axis=1)
            channels, same_shape = channels + skip_channels, False
        elif op == "table":
            y = g.node(draw(st.sampled_from(["Sigmoid", "Tanh", "HardSwish"])), [x])
        elif op == "leaky":
            y = g.node("LeakyRelu", [x], alpha=draw(st.sampled_from([0.1, 0.3])))
        elif op == "resize":
            scales = g.constant(np.array([1, 1, 2, 2], np.float32), onnx.TensorProto.FLOAT)
            y = g.node("Resize", [x, "", scales], mode=draw(st.sampled_from(["nearest", "linear"])))
            same_shape = False
        else:
            continue
        x = g.qdq(y, scale(2.0), zero(k2), k2)
        if not same_shape:
            skip, skip_channels, same_shape = x, channels, True
    return g.model([float_output(x)])


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.sampled_from(RUNNABLE))
def test_library_equals_reference(model: onnx.ModelProto, target: str) -> None:
    package = ht.compile(model, target)
    package.verify(random=2, seed=1).raise_if_mismatch()
    package.verify(random=1, seed=3, through="c").raise_if_mismatch()
    assert package.certificate()["ok"]


@pytest.mark.slow
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(graphs(), st.sampled_from(RUNNABLE))
def test_library_equals_reference_many(model: onnx.ModelProto, target: str) -> None:
    ht.compile(model, target).verify(random=1, seed=2).raise_if_mismatch()
