"""NaN, infinities and extreme numbers, wherever a model can hold them: a sentence that names the node, or the right
integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

import hawq_tvm as ht

from .models import F, between, graph, node, refusal, weight

W, WC = weight()


def numbers(v: float) -> dict[str, onnx.ModelProto]:
    """Models that hold the number v in many places; the key names the node."""
    one, full = np.array([v], F), np.full(4, v, F)
    spots = {
        "add": between([node("Add", ["d", "c"], ["o"], name="add")], {"c": one}),
        "mul": between([node("Mul", ["d", "c"], ["o"], name="mul")], {"c": one}),
        "div": between([node("Div", ["d", "c"], ["o"], name="div")], {"c": one}),
        "sub": between([node("Sub", ["c", "d"], ["o"], name="sub")], {"c": one}),
        "prelu": between([node("PRelu", ["d", "c"], ["o"], name="prelu")], {"c": one}),
        "conv": between([*W, node("Conv", ["d", "w", "c"], ["o"], name="conv")], {**WC, "c": full}),
        "leaky": between([node("LeakyRelu", ["d"], ["o"], name="leaky", alpha=v)], {}),
        "elu": between([node("Elu", ["d"], ["o"], name="elu", alpha=v)], {}),
        "bn": between(
            [node("BatchNormalization", ["d", "g", "c", "g", "g"], ["o"], name="bn")], {"g": np.ones(4, F), "c": full}
        ),
        "dqw": between(
            [node("DequantizeLinear", ["wq", "ws"], ["w"], name="dqw"), node("Conv", ["d", "w"], ["o"], name="conv")],
            {**WC, "ws": F(v)},
        ),
    }
    return spots


# An infinite addend is a mask's: the quantize behind it saturates.
ADDENDS = ("add", "sub", "conv")


@pytest.mark.parametrize("v", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spot", list(numbers(1.0)))
def test_what_is_no_number_is_refused_by_name(spot: str, v: float) -> None:
    if spot in ADDENDS and np.isinf(v):
        package = ht.compile(numbers(v)[spot])
        (found,) = package.run(package.random_inputs(1, 1)[0]).values()
        assert np.all(found == F(0.05) * F(255 - 7 if v > 0 else 0 - 7)) and package.verify(random=1).ok
    else:
        assert refusal(numbers(v)[spot]).startswith(f"{spot}: ")


def test_a_quantized_constant_must_be_a_number() -> None:
    nodes = [
        node("QuantizeLinear", ["c", "s", "z"], ["cq"], name="qc"),
        node("DequantizeLinear", ["cq", "s", "z"], ["cd"]),
        node("Add", ["d", "cd"], ["o"]),
    ]
    assert refusal(between(nodes, {"c": np.full(4, np.nan, F)})).startswith(
        "qc: quantizes a constant that is not a number"
    )
    assert refusal(
        between([node("Concat", ["d", "c"], ["o"], axis=1)], {"c": np.full((1, 4, 4, 4), np.nan, F)})
    ).startswith("qo: ")


def equals_onnx(model: onnx.ModelProto, count: int = 3) -> ht.Package:
    """The package of a model, verified, proven, and equal to ONNX's reference."""
    package = ht.compile(model)
    assert package.verify(random=2, through="c").ok and package.verify(random=2).ok and package.prove().ok
    for x in package.random_inputs(count, 1):
        for found, wanted in zip(package.run(x).values(), ReferenceEvaluator(model).run(None, x), strict=True):
            assert found.shape == np.shape(wanted) and np.array_equal(found, wanted)
    return package


@pytest.mark.parametrize(
    "value, kind", [(-1.0, "uint8"), (100.0, "int8"), (0.26, "uint8"), (-0.3, "int8"), (1e6, "int8")]
)
def test_pads_outside_the_type_or_off_the_grid(value: float, kind: str) -> None:
    constants = {"s": F(0.5), "z": np.zeros((), kind), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "c": F(value)}
    model = between([node("Pad", ["d", "p", "c"], ["o"], name="pad")], constants, out_scale=0.5)
    equals_onnx(model)


def test_a_pad_outside_the_type_before_a_convolution_is_summed() -> None:
    constants = {**WC, "s": F(0.5), "z": np.uint8(0), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "c": F(-64)}
    nodes = [*W, node("Pad", ["d", "p", "c"], ["pd"], name="pad"), node("Conv", ["pd", "w"], ["o"], name="conv")]
    package = ht.compile(between(nodes, constants, out_scale=0.5))
    assert package.verify(random=2).ok and package.prove().ok


def test_a_bias_that_drowns_the_sum() -> None:
    nodes, constants = weight((4, 1), 0.001)
    gemm = between(
        [*nodes, node("Gemm", ["d", "w", "b"], ["o"], name="gemm")],
        {**constants, "b": F([3e38])},
        (1, 4),
        out_scale=1e30,
    )
    package = equals_saturated(gemm, 255)
    assert package.prove().ok
    equals_saturated(between([node("Add", ["d", "b"], ["o"], name="add")], {"b": F([-3e38])}, (1, 4)), 0)


def equals_saturated(model: onnx.ModelProto, level: int) -> ht.Package:
    package = ht.compile(model)
    scale = next(float(onnx.numpy_helper.to_array(t)) for t in model.graph.initializer if t.name == "so")
    for x in package.random_inputs(2, 0):
        assert np.array_equal(package.run(x)["y"], np.full_like(package.run(x)["y"], F(level - 7) * F(scale)))
    return package


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e30, 3e38])
@pytest.mark.parametrize("op", ["Conv", "Add", "GlobalAveragePool", "Sigmoid", "Mul", "Concat"])
def test_extreme_scales(op: str, scale: float) -> None:
    nodes = {
        "Conv": [*W, node("Conv", ["d", "w"], ["o"])],
        "Add": [node("Add", ["d", "d"], ["o"])],
        "GlobalAveragePool": [node("GlobalAveragePool", ["d"], ["o"])],
        "Sigmoid": [node("Sigmoid", ["d"], ["o"])],
        "Mul": [node("Relu", ["d"], ["r"]), node("Mul", ["d", "r"], ["o"])],
        "Concat": [node("Relu", ["d"], ["r"]), node("Concat", ["d", "r"], ["o"], axis=1)],
    }[op]
    refusal(between(nodes, WC, out_scale=scale))


EXTREMES = (2**63 - 1, -(2**63), 2**31, 2**40, -1, 0)


@pytest.mark.parametrize("step", EXTREMES)
def test_extreme_steps_of_slices(step: int) -> None:
    constants = {"a": np.array([3]), "b": np.array([-(2**63)]), "axes": np.array([2]), "t": np.array([step])}
    model = between([node("Slice", ["d", "a", "b", "axes", "t"], ["o"], name="cut")], constants)
    if step < 0:
        equals_onnx(model)
    else:
        assert refusal(model).startswith("cut: Slice ")


def extreme_windows(v: int) -> dict[str, onnx.ModelProto]:
    pool = {"kernel_shape": [2, 2]}
    made: dict[str, Any] = {}
    for field, values in (("strides", [v, v]), ("pads", [v] * 4), ("dilations", [v, v]), ("kernel_shape", [v, v])):
        made[f"pool {field}"] = between([node("MaxPool", ["d"], ["o"], name="n", **{**pool, field: values})], {})
        made[f"conv {field}"] = between([*W, node("Conv", ["d", "w"], ["o"], name="n", **{field: values})], WC)
        made[f"deconv {field}"] = between(
            [*W, node("ConvTranspose", ["d", "w"], ["o"], name="n", **{field: values})], WC
        )
    made["group"] = between([*W, node("Conv", ["d", "w"], ["o"], name="n", group=v)], WC)
    made["axis"] = between([node("Concat", ["d", "d"], ["o"], name="n", axis=v)], {})
    return made


@pytest.mark.parametrize("v", [2**63 - 1, -(2**63), 2**40])
def test_extreme_windows_are_refused_by_name(v: int) -> None:
    for name, model in extreme_windows(v).items():
        said = refusal(model)
        assert said.startswith("n: ") and "Check failed" not in said, (name, said)


def test_graphs_without_a_kernel_run() -> None:
    u8 = onnx.TensorProto.UINT8, [1, 4]
    f32 = onnx.TensorProto.FLOAT, [1, 4]
    constant = {"w": np.arange(8, dtype=np.uint8), "s": F(0.5), "z": np.uint8(3)}
    equals_onnx(graph([node("DequantizeLinear", ["w", "s", "z"], ["y"])], {}, ["y"], constant), 1)
    equals_onnx(graph([node("Identity", ["x"], ["y"])], {"x": f32}, ["y"], {}))
    equals_onnx(graph([node("Flatten", ["x"], ["y"])], {"x": u8}, ["y"], {}))
    equals_onnx(graph([node("Identity", ["c"], ["y"])], {"x": f32}, ["y"], {"c": np.ones(4, F)}))


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Add", "Unsqueeze", "Clip"])
def test_scalar_inputs(op: str) -> None:
    more = {"Add": ["d"], "Unsqueeze": ["a"], "Clip": ["low"]}.get(op, [])
    equals_onnx(between([node(op, ["d", *more], ["o"], name="n")], {"a": np.array([0]), "low": F(0.2)}, ()))


def test_scalars_where_there_must_be_an_axis() -> None:
    assert refusal(between([node("Softmax", ["d"], ["o"], name="n")], {}, ())).startswith("n: Softmax needs an axis")
    assert refusal(between([node("Concat", ["d", "d"], ["o"], name="n", axis=0)], {}, ())).startswith(
        "n: Concat needs an axis"
    )
