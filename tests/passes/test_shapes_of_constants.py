"""Constants never change a tensor's shape behind its back: where one is larger than its tensor, the tensor is repeated, and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, shape_inference
from tvm import relax

import hawq_tvm as ht
from hawq_tvm import contract, ops, pipeline
from hawq_tvm.arith import QType
from hawq_tvm.errors import StageError
from hawq_tvm.verify.reference import evaluate
from relay_passes.integer.values import Real, Term, fitted

from ..frontend.onnx_models import onnxruntime
from ..models import Graph, float_output


def compared(model: onnx.ModelProto, step: float = 0.0, library: bool = False) -> None:
    """The integer graph has ONNX's shapes and, within a step of the output, ONNX Runtime's values; library: its kernels, too."""
    inferred = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in shape_inference.infer_shapes(model, data_prop=True).graph.output}
    packed = pipeline.to_packed(pipeline.import_annotated(model))
    assert {name: list(shape) for name, _, shape in contract.outputs(packed)} == inferred
    rng = np.random.default_rng(3)
    feed = {p.name: rng.integers(0, 256, ops.shape_of(p), np.uint8) for p in packed["main"].params}
    wanted = onnxruntime(model, feed)
    for name, found in evaluate(packed, feed).items():
        assert found.shape == wanted[name].shape and found.dtype == wanted[name].dtype
        np.testing.assert_allclose(found.astype(np.float64), wanted[name].astype(np.float64), rtol=1e-5, atol=step + 1e-5)
    if library:
        ht.compile(model).verify(feed).raise_if_mismatch()


@pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "float"])
@pytest.mark.parametrize("bias", ["int32", "float", "none"])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("batch, inputs, outputs, groups, spatial", [
    (2, 3, 1, 1, (7,)), (1, 1, 4, 1, (7,)), (2, 1, 1, 1, (7,)), (2, 4, 4, 4, (7,)), (3, 4, 2, 2, (7,)), (2, 3, 1, 1, (6, 7)), (1, 4, 4, 4, (6, 7)),
])  # fmt: skip
def test_convolutions(op: str, bias: str, quantized: bool, batch: int, inputs: int, outputs: int, groups: int, spatial: tuple[int, ...]) -> None:
    g = Graph(1)
    x = g.dq(g.input("x", [batch, inputs, *spatial], TensorProto.UINT8), 0.1, 7)
    shape = [outputs, inputs // groups] if op == "Conv" else [inputs, outputs // groups]
    w = g.weight([*shape, *[3] * len(spatial)], axis=None)
    values = g.rng.integers(-3000, 3000, outputs)
    sx_sw = np.float32(np.float32(0.1) * np.float32(0.01))
    made = {
        "int32": lambda: g.dq(g.constant(values, TensorProto.INT32), sx_sw, 0, "int32"),
        "float": lambda: g.constant(values.astype(np.float32) * np.float32(0.00117), TensorProto.FLOAT), "none": lambda: None,
    }  # fmt: skip
    y = g.node(op, [x, w, *([b] if (b := made[bias]()) else [])], group=groups)
    compared(g.model([(g.q(y, 0.3, 100), TensorProto.UINT8) if quantized else float_output(y)]), 1.0 if quantized else 0.0, outputs == 1 and bias == "int32")


def reshape(g: Graph, x: str, *shape: int) -> str:
    return g.node("Reshape", [x, g.constant(shape, TensorProto.INT64)])


def larger(g: Graph, op: str, x: str, shape: tuple[int, ...]) -> str:
    """x with a constant that has more elements, or more axes, than x."""
    values = g.rng.uniform(0.5, 1.5, shape).astype(np.float32) if op != "Max" else np.zeros(shape, np.float32)
    return g.node(op, [x, g.constant(values, TensorProto.FLOAT)])


@pytest.mark.parametrize("end", ["quantized", "float", "reshaped", "pooled", "joined"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (2, 1, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max"])
def test_constants_larger_than_their_tensor(op: str, shape: tuple[int, ...], end: str) -> None:
    g = Graph(2)
    y = larger(g, op, g.dq(g.input("x", [1, 3], TensorProto.UINT8), 0.01, 7), shape)
    full = np.broadcast_shapes(shape, (1, 3))
    if end == "reshaped":
        y = reshape(g, y, int(np.prod(full)))
    elif end == "pooled":
        y = g.node("ReduceMax", [y, g.constant([-1], TensorProto.INT64)], keepdims=0) if op == "Max" else reshape(g, y, 1, -1)
    elif end == "joined":
        y = g.node("Concat", [y, g.dq(g.constant(g.rng.integers(0, 255, full), TensorProto.UINT8), 0.02, 3)], axis=-1)
    compared(g.model([float_output(y) if end == "float" else (g.q(y, 0.02, 30), TensorProto.UINT8)]), 0.0 if end == "float" else 1.0)


def test_larger_operands_that_cancel() -> None:
    """x + y - x is y, as often as x is long."""
    g = Graph(3)
    x = g.dq(g.input("x", [4, 3], TensorProto.UINT8), 0.1, 7)
    y = g.dq(g.input("y", [1, 3], TensorProto.UINT8), 0.3, 9)
    compared(g.model([(g.q(g.node("Sub", [g.node("Add", [x, y]), x]), 0.4, 30), TensorProto.UINT8)]), 1.0)


def test_prelu_and_batch_normalization_of_one_channel() -> None:
    """Parameters of one channel, behind a 1-D convolution of one output channel."""
    g = Graph(4)
    x = g.dq(g.input("x", [2, 3, 9], TensorProto.UINT8), 0.1, 7)
    bias = g.dq(g.constant([500], TensorProto.INT32), np.float32(np.float32(0.1) * np.float32(0.01)), 0, "int32")
    y = g.conv(x, g.weight([1, 3, 3], axis=None), bias)
    one = [g.constant([v], TensorProto.FLOAT) for v in (1.3, 0.2, 0.1, 0.9)]
    y = g.qdq(g.node("BatchNormalization", [y, *one]), 0.05, 100)
    slope = g.constant([[0.2]], TensorProto.FLOAT)
    compared(g.model([(g.q(g.node("PRelu", [y, slope]), 0.05, 60), TensorProto.UINT8)]), 1.0)


def test_a_sum_along_the_last_axis_is_no_bias_of_channels() -> None:
    """As many numbers as channels, along another axis: BatchNormalization behind it must not take them for a bias."""
    g = Graph(5)
    x = g.dq(g.input("x", [1, 2, 6, 6], TensorProto.UINT8), 0.1, 7)
    y = g.node("Add", [g.conv(x, g.weight([4, 2, 3, 3])), g.constant(np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4), TensorProto.FLOAT)])
    four = [g.constant(g.rng.uniform(0.5, 1.5, 4).astype(np.float32), TensorProto.FLOAT) for _ in range(4)]
    compared(g.model([(g.q(g.node("BatchNormalization", [y, *four]), 0.1, 100), TensorProto.UINT8)]), 1.0)


def test_a_product_with_a_vector_of_blocks() -> None:
    """MatMul by a vector whose scales change along it: every block counts, and the rows stay rows."""
    g = Graph(6, opset=21)
    x = g.dq(g.input("x", [3, 8], TensorProto.UINT8), 0.1, 7)
    w = g.dq(g.constant(g.rng.integers(-128, 128, 8), TensorProto.INT8), np.array([0.01, 0.05], np.float32), [0, 0], "int8", axis=0, block_size=4)
    compared(g.model([(g.q(g.node("MatMul", [x, w]), 0.5, 100), TensorProto.UINT8)]), 1.0)


@pytest.mark.parametrize("array, shape, found", [
    (np.ones((1, 1, 1, 1)), (2, 3), ()), (np.ones((1, 3)), (3,), (3,)), (np.ones((3, 1)), (2, 3, 4), (3, 1)), (np.ones(3), (2, 3), (3,)),
])  # fmt: skip
def test_constants_that_fit(array: Any, shape: tuple[int, ...], found: tuple[int, ...]) -> None:
    assert fitted(array, shape).shape == found


def test_what_does_not_fit_is_an_error_and_no_wider_tensor() -> None:
    data = relax.Var("x", relax.TensorType((2, 3), "int8"))
    with pytest.raises(StageError, match="does not fit its tensor"):
        Real((2, 3), (Term(data, np.zeros((), np.int64), np.ones((2, 2, 3))),))
    with pytest.raises(StageError, match="another shape"):
        Real((4, 2, 3), (Term(data, np.zeros((), np.int64), np.ones(())),))
    for call in (
        ops.requantize([data], [np.ones((4, 1, 1))], 0, 1, qtype=QType.of("int8"), zero_point=0, rounding="half_up"),
        ops.dequantize(data, np.ones((1, 2, 3), np.float32), 0, qmin=-128, qmax=127),
    ):
        with pytest.raises(ValueError, match="does not fit data"):
            relax.BlockBuilder().normalize(call)
