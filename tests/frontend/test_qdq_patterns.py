"""The ways quantized graphs are written in the wild (the QDQ patterns), each imported whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from hawq_tvm.core import ops, stages
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import Array, graph_model, helper, imported, layer_names, normal, onnxruntime, op_names

F = np.float32
X = normal(1, 4, 6, 6)
SCALES: dict[str, Any] = {
    "xs": F(0.05),
    "xz": np.uint8(120),
    "ys": F(0.11),
    "yz": np.uint8(90),
    "ws": (np.abs(normal(8, seed=3)) / 50 + 0.01).astype(F),
}
W, B = np.random.default_rng(1).integers(-127, 128, (8, 4, 3, 3)).astype(np.int8), np.arange(-4, 4, dtype=np.int32) * 50


def q(source: str, target: str, scale: str, zero: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [source, scale, zero], [target], name=f"Q_{target}", **attributes)


def dq(source: str, target: str, scale: str, zero: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        "DequantizeLinear",
        [source, scale, zero] if zero else [source, scale],
        [target],
        name=f"DQ_{target}",
        **attributes,
    )


HEAD = [q("x", "xq", "xs", "xz"), dq("xq", "xd", "xs", "xz")]
TAIL = [q("c", "yq", "ys", "yz"), dq("yq", "y", "ys", "yz")]


def conv(*operands: str, target: str = "c") -> onnx.NodeProto:
    return helper.make_node("Conv", list(operands), [target], name="conv", pads=[1, 1, 1, 1])


def run(
    nodes: list[onnx.NodeProto], constants: dict[str, Any], outputs: list[str] | None = None, opset: int = 17
) -> tuple[list[str], dict[str, Array]]:
    """Import, compare with ONNX Runtime within one step of the output scale, return the operators and the values."""
    model = graph_model(nodes, {"x": X}, outputs or ["y"], {**SCALES, **constants}, opset=opset)
    module = import_onnx(model)
    stages.verify(module, stages.Stage.ANNOTATED)
    got, wanted = imported(model, {"x": X}), onnxruntime(model, {"x": X})
    for name, array in wanted.items():
        # Float32 sums of the oracle fall on the other side of a tie.
        np.testing.assert_allclose(got[name], array, atol=float(SCALES["ys"]) * 1.01, rtol=0)
    return op_names(module), got


def test_weights_as_integers_bias_as_int32() -> None:
    bias_scale = (SCALES["xs"] * SCALES["ws"]).astype(F)
    nodes = [*HEAD, dq("w", "wd", "ws", axis=0), dq("b", "bd", "bs", axis=0), conv("xd", "wd", "bd"), *TAIL]
    names, _ = run(nodes, {"w": W, "b": B, "bs": bias_scale})
    assert names == [
        "quantize",
        "dequantize",
        "dequantize",
        "dequantize",
        "conv2d",
        "reshape",
        "add",
        "quantize",
        "dequantize",
    ]


def test_float_bias() -> None:
    names, _ = run([*HEAD, dq("w", "wd", "ws", axis=0), conv("xd", "wd", "b"), *TAIL], {"w": W, "b": normal(8, seed=5)})
    assert names == ["quantize", "dequantize", "dequantize", "conv2d", "add", "quantize", "dequantize"]


def test_weights_as_quantize_and_dequantize_of_floats() -> None:
    constants = {"w": normal(8, 4, 3, 3, seed=6), "wz": np.zeros(8, np.int8)}
    nodes = [*HEAD, q("w", "wq", "ws", "wz", axis=0), dq("wq", "wd", "ws", "wz", axis=0), conv("xd", "wd"), *TAIL]
    names, _ = run(nodes, constants)
    assert names.count("quantize") == 3 and names.count("dequantize") == 3


def test_weights_clipped_to_four_bits() -> None:
    constants = {"w": normal(8, 4, 3, 3, seed=6), "wz": np.zeros(8, np.int8), "lo": np.int8(-8), "hi": np.int8(7)}
    clip = helper.make_node("Clip", ["wq", "lo", "hi"], ["wc"], name="clip")
    nodes = [*HEAD, q("w", "wq", "ws", "wz", axis=0), clip, dq("wc", "wd", "ws", "wz", axis=0), conv("xd", "wd"), *TAIL]
    names, _ = run(nodes, constants)
    assert "clip" not in names


def test_relu_and_clip_between_operator_and_quantize() -> None:
    for op, inputs in (("Relu", ["r"]), ("Clip", ["r", "zero", "six"])):
        nodes = [
            *HEAD,
            dq("w", "wd", "ws", axis=0),
            conv("xd", "wd", target="r"),
            helper.make_node(op, inputs, ["c"], name="act"),
            *TAIL,
        ]
        names, _ = run(nodes, {"w": W, "zero": F(0), "six": F(6)})
        assert names[-3] == op.lower()


def test_one_dequantize_read_by_several_nodes() -> None:
    nodes = [
        *HEAD,
        helper.make_node("Relu", ["xd"], ["a"], name="a"),
        helper.make_node("Add", ["a", "xd"], ["c"], name="add"),
        *TAIL,
    ]
    names, _ = run(nodes, {})
    assert names == ["quantize", "dequantize", "relu", "add", "quantize", "dequantize"]


def test_quantize_on_one_operand_of_an_addition() -> None:
    nodes = [
        *HEAD,
        dq("w", "wd", "ws", axis=0),
        conv("xd", "wd", target="r"),
        helper.make_node("Add", ["r", "r2"], ["c"], name="add"),
        *TAIL,
    ]
    nodes.insert(2, helper.make_node("Concat", ["xd", "xd"], ["r2"], name="double", axis=1))
    assert run(nodes, {"w": W})[0].count("add") == 1


def test_dequantize_then_quantize_is_a_change_of_scale() -> None:
    names, _ = run([*HEAD, q("xd", "yq", "ys", "yz"), dq("yq", "y", "ys", "yz")], {})
    assert names == ["quantize", "dequantize", "quantize", "dequantize"]


def test_batch_normalization_not_folded() -> None:
    statistics = {
        "g": normal(8, seed=1),
        "b": normal(8, seed=2),
        "m": normal(8, seed=3),
        "v": np.abs(normal(8, seed=4)) + F(0.1),
    }
    norm = helper.make_node("BatchNormalization", ["r", "g", "b", "m", "v"], ["c"], name="bn")
    names, _ = run(
        [*HEAD, dq("w", "wd", "ws", axis=0), conv("xd", "wd", target="r"), norm, *TAIL], {"w": W, **statistics}
    )
    assert "batch_norm" in names


def test_integers_between_quantize_and_dequantize() -> None:
    pool = helper.make_node("MaxPool", ["xq"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2])
    pad = helper.make_node("Pad", ["p", "pads", "xz"], ["padded"], name="pad")
    nodes = [HEAD[0], pool, pad, dq("padded", "y", "xs", "xz")]
    names, _ = run(nodes, {"pads": np.asarray([0, 0, 1, 1, 0, 0, 1, 1])})
    assert names == ["quantize", "max_pool2d", "pad", "dequantize"]


def test_names_of_nodes_are_names_of_layers() -> None:
    nodes = [
        *HEAD,
        helper.make_node("Relu", ["xd"], ["/block.1/relu"]),
        q("/block.1/relu", "yq", "ys", "yz"),
        dq("yq", "y", "ys", "yz"),
    ]
    module = import_onnx(graph_model(nodes, {"x": X}, ["y"], SCALES))
    assert layer_names(module) == ["Q_xq", "DQ_xd", "/block.1/relu", "Q_yq", "DQ_y"]


def test_inputs_outputs_and_attributes_of_main() -> None:
    nodes = [helper.make_node("Add", ["b", "a"], ["s"], name="a"), helper.make_node("Identity", ["b"], ["copy"])]
    module = import_onnx(graph_model(nodes, {"a": X, "b": X}, ["s", "copy", "a"]))
    main = module["main"]
    assert [p.name for p in main.params] == ["a", "b"]
    assert [str(n) for n in main.attrs["hawq.output_names"]] == ["s", "copy", "a"]
    assert layer_names(module) == ["a_1"]
    assert len(main.ret_ty.fields) == 3


def test_functions_are_inlined() -> None:
    body = helper.make_function(
        "local",
        "FakeQuant",
        ["v", "s", "z"],
        ["o"],
        [
            helper.make_node("QuantizeLinear", ["v", "s", "z"], ["i"]),
            helper.make_node("DequantizeLinear", ["i", "s", "z"], ["o"]),
        ],
        [helper.make_opsetid("", 17)],
    )
    model = graph_model(
        [helper.make_node("FakeQuant", ["x", "xs", "xz"], ["y"], domain="local")], {"x": X}, ["y"], SCALES
    )
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert op_names(import_onnx(model)) == ["quantize", "dequantize"]


def test_bias_scale_is_exact() -> None:
    nodes = [helper.make_node("QLinearConv", ["x8", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"], name="c")]
    constants = {**SCALES, "w": W, "wz": np.zeros(8, np.int8), "b": B}
    module = import_onnx(graph_model(nodes, {"x8": (X * 50).astype(np.uint8)}, ["y"], constants))
    bias = next(
        b.value
        for b in stages.bindings(module["main"])
        if ops.op_name(b.value) == "hawq.dequantize" and ops.dtype_of(b.value.args[0]) == "int32"
    )
    np.testing.assert_array_equal(
        ops.const_value(bias.args[1]), SCALES["xs"].astype(np.float64) * SCALES["ws"].astype(np.float64)
    )
