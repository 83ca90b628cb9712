"""One list of operators: what `compile` imports, `quantize` takes, and what it writes compiles to integers alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import known_operators
from hawq_tvm.frontend.onnx.importer import QUANTIZING
from hawq_tvm.quantize.ptq.quantizer import post_training

from .networks import FloatNet, images

INTS = np.int64
Build = Callable[[FloatNet, str], str]


def plain(op: str, *constants: Any, **attrs: Any) -> Build:
    """One node of the data and these constants."""
    return lambda g, x: g.node(op, x, *(g.constant(c, np.asarray(c).dtype) for c in constants), **attrs)


def f(*values: float) -> Any:
    return np.array(values, np.float32)


def i(*values: int) -> Any:
    return np.array(values, INTS)


def resized(**attrs: Any) -> Build:
    return lambda g, x: g.node("Resize", x, "", g.constant([1, 1, 2, 2]), **attrs)


def kept(op: str, *more: Any) -> Build:
    """A comparison that chooses between the data and a constant: its condition is constant."""

    def build(g: FloatNet, x: str) -> str:
        condition = g.node(op, g.random(4, 1, 1), *(g.constant(c, np.asarray(c).dtype) for c in more))
        return g.node("Where", condition, x, g.constant(0.0))

    return build


def shaped(op: str, *constants: Any, **attrs: Any) -> Build:
    """Arithmetic on constants that ends in a Reshape."""

    def build(g: FloatNet, x: str) -> str:
        made = g.node(op, *(g.constant(c, np.asarray(c).dtype) for c in constants), **attrs)
        return g.node("Mul", x, g.node("Cast", made, to=1))

    return build


def positive(op: str) -> Build:
    return lambda g, x: g.node(op, g.node("Add", g.node("Relu", x), g.constant(0.5)))


def normalized(g: FloatNet, x: str) -> str:
    """LayerNormalization as PyTorch's older exporter writes it: the compiler knows it as one operator."""
    axis = g.constant([-1], INTS)
    centred = g.node("Sub", x, g.node("ReduceMean", x, axis))
    variance = g.node("ReduceMean", g.node("Pow", centred, g.constant(2.0)), axis)
    y = g.node("Div", centred, g.node("Sqrt", g.node("Add", variance, g.constant(1e-5))))
    return g.node("Add", g.node("Mul", y, g.random(6)), g.random(6))


POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
BUILDERS: dict[str, Build] = {
    "Add": lambda g, x: g.node("Add", x, g.node("Relu", x)),
    "And": shaped("And", np.array([True]), np.array([True])),
    "Attention": lambda g, x: g.node("Attention", x, g.node("Relu", x), g.node("Neg", x)),
    "AveragePool": plain("AveragePool", **POOL),
    "BatchNormalization": lambda g, x: g.norm(g.node("Relu", x), 4),
    "Cast": plain("Cast", to=1),
    "CastLike": plain("CastLike", f(0)),
    "Clip": plain("Clip", f(-0.5)[0], f(0.7)[0]),
    "Concat": lambda g, x: g.node("Concat", x, g.node("Relu", x), axis=1),
    "Constant": lambda g, x: g.node("Mul", x, g.node("Constant", value_float=0.5)),
    "ConstantOfShape": lambda g, x: g.node("Add", x, g.node("ConstantOfShape", g.constant([1], INTS))),
    "Conv": lambda g, x: g.conv(x, 4, 4, 3, "again", group=2),
    "ConvTranspose": lambda g, x: g.node(
        "ConvTranspose", x, g.random(4, 2, 3, 3), g.random(4), strides=[2, 2], group=2
    ),
    "CumSum": shaped("CumSum", f(1, 2, 3, 1, 2, 1), i(0)[0]),
    "DepthToSpace": plain("DepthToSpace", blocksize=2),
    "Div": plain("Div", f(3)),
    "Einsum": lambda g, x: g.node("Einsum", x, g.node("Relu", x), equation="abcd,abed->abce"),
    "Equal": kept("Equal", f(1)),
    "Expand": lambda g, x: g.node("Expand", g.node("GlobalAveragePool", x), g.constant([1, 4, 3, 2], INTS)),
    "Gather": plain("Gather", i(0, 2), axis=1),
    "GatherElements": shaped("GatherElements", f(1, 2, 3, 1, 2, 1), i(5, 4, 3, 2, 1, 0)),
    "Gemm": lambda g, x: g.node("Gemm", g.node("Flatten", x), g.random(144, 5), g.random(5)),
    "Greater": kept("Greater", f(0)),
    "GreaterOrEqual": kept("GreaterOrEqual", f(0)),
    "GroupNormalization": plain("GroupNormalization", f(1, 2, 1, 2), f(0, 1, 0, 1), num_groups=2),
    "InstanceNormalization": plain("InstanceNormalization", f(1, 2, 1, 2), f(0, 1, 0, 1)),
    "IsInf": kept("IsInf"),
    "IsNaN": kept("IsNaN"),
    "LayerNormalization": plain("LayerNormalization", f(1, 2, 1, 2, 1, 2)),
    "Less": kept("Less", f(0)),
    "LessOrEqual": kept("LessOrEqual", f(0)),
    "Log": positive("Log"),
    "MatMul": lambda g, x: g.node("MatMul", x, g.node("Transpose", g.node("Relu", x), perm=[0, 1, 3, 2])),
    "Max": lambda g, x: g.node("Max", x, g.node("Neg", x)),
    "MaxPool": plain("MaxPool", pads=[1, 1, 1, 1], **POOL),
    "Mean": lambda g, x: g.node("Mean", x, g.node("Relu", x)),
    "Min": lambda g, x: g.node("Min", x, g.node("Neg", x)),
    "Mod": shaped("Mod", f(5), f(3), fmod=1),
    "Mul": lambda g, x: g.node("Mul", x, g.node("Sigmoid", x)),
    "Not": shaped("Not", np.array([False])),
    "Or": shaped("Or", np.array([True]), np.array([False])),
    "PRelu": plain("PRelu", f(0.1, 0.2, 0.3, 0.4).reshape(4, 1, 1)),
    "Pad": plain("Pad", i(0, 0, 1, 1, 0, 0, 1, 2), f(0)[0]),
    "Pow": plain("Pow", f(2)[0]),
    "RMSNormalization": plain("RMSNormalization", f(1, 2, 1, 2, 1, 2)),
    "Range": shaped("Range", f(0)[0], f(6)[0], f(1)[0]),
    "Reciprocal": positive("Reciprocal"),
    "ReduceMax": plain("ReduceMax", i(2, 3)),
    "ReduceMean": plain("ReduceMean", i(2, 3)),
    "ReduceMin": plain("ReduceMin", i(1)),
    **{f"Reduce{n}": shaped(f"Reduce{n}", f(1, 2), i(0)) for n in ("L1", "L2", "Prod", "SumSquare")},
    "ReduceSum": plain("ReduceSum", i(2)),
    "Reshape": plain("Reshape", i(1, -1)),
    "Resize": resized(mode="linear"),
    "Shape": lambda g, x: g.node(
        "Reshape", x, g.node("Concat", g.node("Shape", x, end=1), g.constant([-1], INTS), axis=0)
    ),
    "Sign": shaped("Sign", f(2)),
    "Size": lambda g, x: g.node("Reshape", x, g.node("Reshape", g.node("Size", x), g.constant([1], INTS))),
    "Slice": plain("Slice", i(1), i(-1), i(2)),
    "Softmax": plain("Softmax", axis=1),
    "SpaceToDepth": plain("SpaceToDepth", blocksize=2),
    "Split": lambda g, x: g.several("Split", 2, x, axis=1, num_outputs=2)[1],
    "Sqrt": positive("Sqrt"),
    "Squeeze": plain("Squeeze", i(0)),
    "Sub": lambda g, x: g.node("Sub", x, g.node("Relu", x)),
    "Sum": lambda g, x: g.node("Sum", x, g.node("Relu", x), g.node("Neg", x)),
    "Tile": plain("Tile", i(1, 1, 2, 1)),
    "Transpose": plain("Transpose", perm=[0, 2, 3, 1]),
    "Trilu": shaped("Trilu", np.ones((6, 6), np.float32)),
    "Unsqueeze": plain("Unsqueeze", i(0)),
    "Where": kept("Less", f(0)),
    "Xor": shaped("Xor", np.array([True]), np.array([False])),
}
# Attributes that make another operator of one, beside it.
VARIANTS: dict[str, Build] = {
    "Resize nearest": resized(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "Resize align_corners": resized(mode="linear", coordinate_transformation_mode="align_corners"),
    "Pad reflect": plain("Pad", i(0, 0, 1, 1, 0, 0, 1, 2), mode="reflect"),
    "Pad edge": plain("Pad", i(0, 0, 1, 1, 0, 0, 1, 2), mode="edge"),
    "Pad 0.5": plain("Pad", i(0, 0, 1, 1, 0, 0, 1, 2), f(0.5)[0]),
    "LayerNormalization written out": normalized,
    "Div of two": lambda g, x: g.node(
        "Div", x, g.node("Add", g.node("Sigmoid", g.node("Transpose", x, perm=[0, 1, 3, 2])), g.constant(0.5))
    ),
    "Div by rows": lambda g, x: g.node(
        "Div", x, g.node("Add", g.node("ReduceMax", g.node("Relu", x), g.constant([3], INTS)), g.constant(0.5))
    ),
    "Clip above": lambda g, x: g.node("Clip", x, "", g.constant(0.7)),
    "ConvTranspose SAME": lambda g, x: g.node(
        "ConvTranspose", x, g.random(4, 3, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]
    ),
    "MatMul constant": lambda g, x: g.node("MatMul", g.random(3, 6), x),
    "MatMul stacked": lambda g, x: g.node("MatMul", x, g.random(4, 6, 3)),
    "Mul channels": lambda g, x: g.node("Mul", x, g.random(4, 1, 1)),
    "Concat constant": lambda g, x: g.node("Concat", x, g.random(1, 2, 6, 6), axis=1),
    "Where two": lambda g, x: g.node("Where", g.constant([True, False] * 3, bool), x, g.node("Relu", x)),
    "Softmax last": plain("Softmax", axis=-1),
}
# What has no integer form where nothing but it and a quantize stand: refused in the compiler's words, or written.
MAY_BE_REFUSED = {"ArgMax", "ArgMin", "LogSoftmax", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
NOT_FLOAT = {"If", "Upsample"}


def known() -> list[str]:
    groups = known_operators()
    names = [*groups["ai.onnx"], *groups["ai.onnx, on constants only"]]
    return [n for n in names if n not in QUANTIZING and not n.startswith("QLinear") and n not in NOT_FLOAT]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("every") / "in.npz"
    np.savez(place, x=images(8, 6))
    return place


@pytest.mark.parametrize("op", [*known(), *VARIANTS])
def test_what_quantize_writes_compiles(op: str, data: Path) -> None:
    opset = {"Swish": 24, "RMSNormalization": 23, "Attention": 23}.get(op, 21)
    g = FloatNet([1, 3, 6, 6], seed=1, opset=opset)
    build = VARIANTS.get(op) or BUILDERS.get(op) or plain(op)
    net = g.model(build(g, g.conv("x", 4, 3, 3, "first", pads=[1] * 4)))
    if op == "GroupNormalization":  # of which ONNX infers no shape
        net.graph.output[0].CopyFrom(helper.make_tensor_value_info(net.graph.output[0].name, 1, [1, 4, 6, 6]))
    try:
        found = post_training(net, data).model
    except ModelError as e:
        assert op in MAY_BE_REFUSED and "cannot be quantized to integers alone" in str(e)
        return
    report = ht.inspect(found)
    assert report.compilable and not report.float_tail, report.verdict
    x = images(4, 6, seed=3)
    real, integer = (
        np.concatenate([onnxruntime.InferenceSession(m.SerializeToString()).run(None, {"x": v[None]})[0] for v in x])
        for m in (net, found)
    )
    assert ((real - integer) ** 2).sum() <= 0.03 * (real**2).sum()  # 8 bits, of which Round shows every step
