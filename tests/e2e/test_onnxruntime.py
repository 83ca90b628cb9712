"""ONNX Runtime as a second oracle: operators of its own domain, and every layer of whole quantized networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.bench import zoo
from hawq_tvm.frontend.onnx import import_onnx

from ..models import Graph
from ..oracle import Oracle, explained

MICROSOFT = "com.microsoft"


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def exposed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the output of every QuantizeLinear among its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    have = {o.name for o in copy.graph.output}
    for node in copy.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] not in have:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("resnet18", 64), ("resnet50", 64), ("mobilenetv2", 64), ("inceptionv3", 139)])
def test_every_layer_of_a_network(name: str, size: int, tmp_path: Path) -> None:
    path = zoo.make(name, tmp_path / "q.onnx", size=size)
    model = onnx.load(str(path))
    x = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    sess = session(exposed(model))
    by_tensor = dict(zip([o.name for o in sess.get_outputs()], sess.run(None, {"input": x}), strict=True))
    theirs = {n.name: by_tensor[n.output[0]] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    oracle = Oracle(import_onnx(model), theirs)
    oracle.run({"input": x})
    elements, different, unexplained = oracle.total()
    assert len(oracle.rows) > 20

    package = ht.compile(model)
    package.verify({"input": x}).raise_if_mismatch()
    ours, wanted = package.run({"input": x})["output"], by_tensor["output"]
    scale = package.manifest["outputs"][0]["quantization"]["scale"][0]
    steps = np.rint(np.abs(ours - wanted) / scale)
    print(
        f"\n{name}: {len(oracle.rows)} layers, {different} of {elements} elements ({different / elements:.2e}) differ"
        f" from ONNX Runtime, {unexplained} not at a rounding boundary; end to end {np.mean(steps > 0):.1%} of outputs"
        f" differ, by at most {int(steps.max())} steps"
    )
    assert unexplained == 0, {k: r for k, r in oracle.rows.items() if r[2]}
    assert different / elements < 1e-3  # rounding boundaries are rare: more would be a misread rule


@pytest.mark.slow
def test_a_qoperator_network(tmp_path: Path) -> None:
    path = zoo.make("resnet18", tmp_path / "q.onnx", size=64, qoperator=True)
    x = np.random.default_rng(1).standard_normal((1, 3, 64, 64)).astype(np.float32)
    package = ht.compile(path)
    package.verify({"input": x}).raise_if_mismatch()
    (wanted,) = session(onnx.load(str(path))).run(None, {"input": x})
    scale = package.manifest["outputs"][0]["quantization"]["scale"][0]
    # One tie early on moves later layers by a few steps.
    assert np.max(np.abs(package.run({"input": x})["output"] - wanted)) <= 8 * scale


def _scalars(g: Graph, scale: float, zero: int, kind: int = TensorProto.UINT8) -> list[str]:
    return [g.constant(np.float32(scale), TensorProto.FLOAT, ()), g.constant(zero, kind, ())]


def _u8(g: Graph, name: str, shape: list[int]) -> str:
    return g.input(name, shape, TensorProto.UINT8)


def _binary(op: str) -> Any:
    def build(g: Graph) -> str:
        a, b = _u8(g, "a", [2, 3, 4, 5]), _u8(g, "b", [1, 3, 1, 5])
        return g.node(
            op, [a, *_scalars(g, 0.0317, 100), b, *_scalars(g, 0.0213, 7), *_scalars(g, 0.0519, 120)], MICROSOFT
        )

    return build


def _unary(op: str, **attrs: Any) -> Any:
    def build(g: Graph) -> str:
        return g.node(
            op, [_u8(g, "a", [16, 16]), *_scalars(g, 0.0417, 130), *_scalars(g, 0.0111, 20)], MICROSOFT, **attrs
        )

    return build


def _pool(op: str, **attrs: Any) -> Any:
    def build(g: Graph) -> str:
        return g.node(
            op, [_u8(g, "a", [2, 3, 7, 6]), *_scalars(g, 0.0417, 130), *_scalars(g, 0.0293, 90)], MICROSOFT, **attrs
        )

    return build


def _concat(g: Graph) -> str:
    a, b = _u8(g, "a", [2, 3, 4, 4]), _u8(g, "b", [2, 2, 4, 4])
    return g.node(
        "QLinearConcat",
        [*_scalars(g, 0.05, 100), a, *_scalars(g, 0.0317, 9), b, *_scalars(g, 0.0713, 200)],
        MICROSOFT,
        axis=1,
    )


def _gemm(g: Graph) -> str:
    weight = g.constant(g.rng.integers(-128, 128, (6, 5)), TensorProto.INT8)
    bias = g.constant(g.rng.integers(-900, 900, 5), TensorProto.INT32)
    return g.node(
        "QGemm",
        [
            _u8(g, "a", [3, 6]),
            *_scalars(g, 0.0317, 100),
            weight,
            *_scalars(g, 0.0077, 0, TensorProto.INT8),
            bias,
            *_scalars(g, 0.1931, 130),
        ],
        MICROSOFT,
        transB=0,
        alpha=1.0,
    )


def _qlinear_conv(g: Graph) -> str:
    weight = g.constant(g.rng.integers(-128, 128, (8, 2, 3, 3)), TensorProto.INT8)
    scales = g.constant(g.rng.uniform(0.001, 0.01, 8).astype(np.float32), TensorProto.FLOAT)
    zeros = g.constant(np.zeros(8, int), TensorProto.INT8)
    bias = g.constant(g.rng.integers(-900, 900, 8), TensorProto.INT32)
    return g.node(
        "QLinearConv",
        [_u8(g, "a", [2, 4, 7, 6]), *_scalars(g, 0.0317, 100), weight, scales, zeros, *_scalars(g, 0.1931, 130), bias],
        pads=[1, 0, 1, 2],
        group=2,
        strides=[2, 1],
    )


def _qlinear_matmul(g: Graph) -> str:
    b = g.constant(g.rng.integers(0, 256, (6, 5)), TensorProto.UINT8)
    return g.node(
        "QLinearMatMul",
        [_u8(g, "a", [2, 3, 6]), *_scalars(g, 0.0317, 100), b, *_scalars(g, 0.0077, 130), *_scalars(g, 0.1931, 120)],
    )


BUILDERS = {
    "QLinearAdd": _binary("QLinearAdd"),
    "QLinearMul": _binary("QLinearMul"),
    "QLinearSigmoid": _unary("QLinearSigmoid"),
    "QLinearLeakyRelu": _unary("QLinearLeakyRelu", alpha=0.1),
    "QLinearGlobalAveragePool": _pool("QLinearGlobalAveragePool"),
    "QLinearAveragePool": _pool("QLinearAveragePool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "QLinearConcat": _concat,
    "QGemm": _gemm,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
}


@pytest.mark.parametrize("op", BUILDERS)
def test_quantized_operators(op: str) -> None:
    g = Graph(11, opset=13)
    model = g.model([(BUILDERS[op](g), TensorProto.UINT8)], ir_version=8)
    package = ht.compile(model)
    sess, different, elements = session(model), 0, 0
    for inputs in package.random_inputs(8, 5):
        ours = next(iter(package.run(inputs).values()))
        (theirs,) = sess.run(None, inputs)
        steps = np.abs(ours.astype(int) - theirs.astype(int))
        assert steps.max() <= 1
        different, elements = different + int((steps > 0).sum()), elements + ours.size
    package.verify(random=2).raise_if_mismatch()
    print(f"\n{op}: {different} of {elements} differ from ONNX Runtime")
    # Their table and pool kernels compute in float32 or with truncated constants; sums and products must agree but for
    # ties.
    assert different <= (0.02 * elements if "Pool" in op or "Sigmoid" in op or "Leaky" in op else 0.005 * elements)


@pytest.mark.parametrize(
    "op, attrs",
    [
        ("AveragePool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Resize", {"mode": "linear"}),
    ],
    ids=["AveragePool 3x3 stride 2 ceil_mode", "AveragePool 2x2 stride 2", "Resize linear x2"],
)
@pytest.mark.parametrize("out_scale", [0.05, 0.0317])
def test_means_that_meet_ties(op: str, attrs: dict[str, Any], out_scale: float) -> None:
    """Means of few integers lie on rounding boundaries often, and there float32 falls to either side."""
    import torch
    from torch.nn import functional

    pool = (
        {"kernel_size": attrs["kernel_shape"], "stride": attrs["strides"], "ceil_mode": bool(attrs.get("ceil_mode"))}
        if op == "AveragePool"
        else {}
    )
    g = Graph(13)
    x = g.dq(_u8(g, "x", [4, 16, 32, 32]), np.float32(0.05), 120)
    extra = [] if op == "AveragePool" else ["", g.constant(np.float32([1, 1, 2, 2]), TensorProto.FLOAT)]
    y = g.q(g.node(op, [x, *extra], **attrs), np.float32(out_scale), 120)
    model = g.model([(y, TensorProto.UINT8)])
    package, sess = ht.compile(model), session(model)
    elements = different = unexplained = ties = 0
    for inputs in package.random_inputs(4, 5):
        (theirs,) = sess.run(None, inputs)
        ours = package.run(inputs)[y]
        real = torch.tensor((inputs["x"] - 120.0) * (float(np.float32(0.05)) / float(np.float32(out_scale))))
        real = (
            functional.avg_pool2d(real, **pool)
            if pool
            else functional.interpolate(real, scale_factor=2, mode="bilinear")
        )
        steps = np.clip(real.numpy(), -120, 135)
        elements, different = elements + ours.size, different + int(np.count_nonzero(ours != theirs))
        unexplained += int(np.count_nonzero((ours != theirs) & ~explained(steps, ours, theirs)))
        ties += int(np.count_nonzero(np.abs(steps - np.floor(steps) - 0.5) < 1e-9))
    print(
        f"\n{op}, scale 0.05 to {out_scale}: {different} of {elements} ({different / elements:.2%}) differ from ONNX"
        f" Runtime, {unexplained} not at a rounding boundary; {ties / elements:.2%} are ties"
    )
    assert unexplained == 0 and different <= 0.03 * elements
    package.verify(random=1).raise_if_mismatch()


def test_softmax_is_within_a_step_of_onnxruntime() -> None:
    g = Graph(12, opset=13)
    y = g.node(
        "QLinearSoftmax",
        [_u8(g, "a", [4, 50]), *_scalars(g, 0.0417, 130), *_scalars(g, 1 / 256, 0)],
        MICROSOFT,
        axis=-1,
        opset=13,
    )
    model = g.model([(y, TensorProto.UINT8)], ir_version=8)
    package = ht.compile(model)
    for inputs in package.random_inputs(4, 5):
        (theirs,) = session(model).run(None, inputs)
        ours = next(iter(package.run(inputs).values()))
        real = np.exp(inputs["a"] * 0.0417)
        exact = real / real.sum(axis=-1, keepdims=True) * 256
        assert np.max(np.abs(ours - exact)) < 0.51  # half a step, and the 22-bit table's error
        assert np.max(np.abs(ours.astype(int) - theirs.astype(int))) <= 1  # theirs rounds its own table
    package.verify(random=2).raise_if_mismatch()
