"""Bad input (files, graphs, shapes, types): one ModelError that says where, what was expected and found, and the
remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hawq_tvm.core.errors import HawqError, ModelError, UsageError
from hawq_tvm.frontend.onnx import describe_onnx, import_onnx

from .onnx_models import Fixed, graph_model, integers, node_model, normal, op_names

X = normal(1, 3, 4, 4)
RELU = helper.make_node("Relu", ["x"], ["y"], name="relu")


def good() -> onnx.ModelProto:
    return graph_model([RELU], {"x": X}, ["y"])


def refused(source: Any, words: str, kind: type[HawqError] = ModelError, **options: Any) -> HawqError:
    with pytest.raises(kind, match=words) as error:
        import_onnx(source, **options)
    assert error.value.exit_code == (3 if kind is ModelError else 2)
    assert "Traceback" not in str(error.value) and str(error.value).count("\n") == 0
    return error.value


# -- files ------------------------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.onnx", "no such file").remedy


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert "m.onnx" in refused(tmp_path, "is a directory").remedy


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b"PK\x03\x04 not onnx at all", "not a"),
        (b"\x00" * 100, "not a"),
        (b"\x08\x0e", "not an ONNX model"),
        (b"\xff" * 64, "not a readable"),
    ],
)
def test_bytes_that_are_no_model(tmp_path: Path, data: bytes, words: str) -> None:
    refused(data, words)
    (tmp_path / "m.onnx").write_bytes(data)
    refused(tmp_path / "m.onnx", words)
    with pytest.raises(ModelError):
        describe_onnx(tmp_path / "m.onnx")


def test_devices_are_not_read() -> None:
    refused("/dev/zero", "not a regular file")


def test_foreign_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(b"\x1c\x00\x00\x00TFL3" + b"\xff" * 40)
    error = refused(tmp_path / "m.tflite", "not a readable")
    assert "TensorFlow Lite" in error.found and "tf2onnx.convert --opset 18 --tflite /" in error.remedy
    (tmp_path / "renamed").write_bytes((tmp_path / "m.tflite").read_bytes())
    assert "--tflite" in refused(tmp_path / "renamed", "not a readable").remedy


def test_truncated_file(tmp_path: Path) -> None:
    data = graph_model(
        [helper.make_node("Add", ["x", "w"], ["y"])], {"x": normal(1, 64)}, ["y"], {"w": normal(1, 64)}
    ).SerializeToString()
    for cut in (len(data) // 4, len(data) // 2, len(data) - 3):
        with pytest.raises(ModelError):
            import_onnx(data[:cut])


def test_another_type_of_source() -> None:
    refused(42, "is not a model")


def test_external_data(tmp_path: Path) -> None:
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": normal(8, 64)}, ["y"], {"w": normal(8, 64)})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert op_names(import_onnx(tmp_path / "m.onnx")) == ["add"]
    refused((tmp_path / "m.onnx").read_bytes(), "external file")
    (tmp_path / "m.data").write_bytes(b"short")
    refused(tmp_path / "m.onnx", "cannot be read|does not fit")
    (tmp_path / "m.data").unlink()
    error = refused(tmp_path / "m.onnx", "missing")
    assert "'w'" in str(error) and "m.data" in error.expected


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda m: setattr(m, "ir_version", 15), "IR version"),
        (lambda m: setattr(m, "ir_version", 2), "IR version"),
        (lambda m: setattr(m.opset_import[0], "version", 6), "operator set"),
        (lambda m: setattr(m.opset_import[0], "version", 29), "operator set"),
        (lambda m: m.ClearField("opset_import"), "which operator set"),
        (lambda m: m.graph.ClearField("output"), "no output"),
    ],
)
def test_versions_and_empty_graphs(change: Any, words: str) -> None:
    model = good()
    change(model)
    refused(model, words)


@pytest.mark.parametrize("opset, ir", [(7, 3), (9, 3), (10, 3), (13, 7), (19, 9), (23, 11), (25, 13), (28, 14)])
def test_every_supported_version(opset: int, ir: int) -> None:
    assert op_names(import_onnx(graph_model([RELU], {"x": X}, ["y"], opset=opset, ir=ir))) == ["relu"]


# -- graphs -----------------------------------------------------------------------------------------------


def test_cycle() -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    error = refused(graph_model(nodes, {"x": X}, ["y"]), "its own output")
    assert "first" in error.found and "second" in error.found


def test_nodes_in_any_order() -> None:
    nodes = [helper.make_node("Relu", ["a"], ["y"]), helper.make_node("Sigmoid", ["x"], ["a"])]
    assert op_names(import_onnx(graph_model(nodes, {"x": X}, ["y"]))) == ["sigmoid", "relu"]


@pytest.mark.parametrize(
    "nodes, words",
    [
        ([helper.make_node("Relu", ["ghost"], ["y"], name="n")], "does not exist: 'ghost'"),
        ([RELU, helper.make_node("Tanh", ["x"], ["y"], name="t")], "second time"),
        ([helper.make_node("Relu", ["x"], ["x"], name="n")], "second time"),
        ([helper.make_node("Relu", ["x"], ["z"])], "nothing computes"),
        ([helper.make_node("Frobnicate", ["x"], ["y"], name="n")], "operator Frobnicate is not supported"),
        (
            [helper.make_node("FloatQuant", ["x"], ["y"], name="n", domain="onnx.brevitas")],
            "onnx.brevitas.FloatQuant is not supported",
        ),
        (
            [helper.make_node("Quant", ["x"], ["y"], name="n", domain="onnx.brevitas")],
            "Quant has the wrong number of inputs; expected 4 to 4; found 1",
        ),
        ([helper.make_node("Det", ["x"], ["y"], name="n")], "Det is not supported"),
        ([helper.make_node("LRN", ["x"], ["y"], name="n", size=3)], "LRN is not supported"),
        ([helper.make_node("Relu", [], ["y"], name="n")], "number of inputs"),
        ([helper.make_node("Relu", [""], ["y"], name="n")], "lacks its input"),
        ([helper.make_node("Gelu", ["x"], ["y"], name="n")], "does not exist in this opset|not supported"),
        ([helper.make_node("Concat", ["x", "x"], ["y"], name="n")], "lacks its attribute axis"),
        ([helper.make_node("Concat", ["x", "x"], ["y"], name="n", axis=1.5)], "wrong type"),
        ([helper.make_node("Relu", ["x"], ["y", "z"], name="n")], "too many outputs"),
    ],
)
def test_nodes_that_do_not_fit(nodes: list[onnx.NodeProto], words: str) -> None:
    refused(graph_model(nodes, {"x": X}, ["y"]), words)


def test_names_defined_twice() -> None:
    model = good()
    model.graph.input.append(model.graph.input[0])
    refused(model, "second time")
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": X}, ["y"], {"w": X})
    model.graph.initializer.append(model.graph.initializer[0])
    refused(model, "initialized twice")
    model = good()
    model.graph.output.append(model.graph.output[0])
    refused(model, "output twice")


def test_nodes_of_one_name_are_told_apart() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["a"], name="same"), helper.make_node("Tanh", ["a"], ["y"], name="same")]
    assert op_names(import_onnx(graph_model(nodes, {"x": X}, ["y"]))) == ["relu", "tanh"]


def test_an_input_with_an_initializer_is_a_constant() -> None:
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": X, "w": X}, ["y"], {"w": X}, ir=3)
    assert [p.name for p in import_onnx(model)["main"].params] == ["x"]


def branch(op: str) -> onnx.GraphProto:
    return helper.make_graph(
        [helper.make_node(op, ["x"], [f"{op}_out"], name=op)], op, [], [onnx.ValueInfoProto(name=f"{op}_out")]
    )


def test_control_flow() -> None:
    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch("Relu"), else_branch=branch("Tanh"))
    for condition, op in ((True, "relu"), (False, "tanh")):
        assert op_names(import_onnx(graph_model([node], {"x": X}, ["y"], {"c": np.bool_(condition)}))) == [op]
    refused(graph_model([node], {"x": X, "c": np.bool_(True)}, ["y"]), "condition 'c' that is a graph input")
    loop = helper.make_node("Loop", ["", "", "x"], ["y"], name="loop", body=branch("Relu"))
    assert "control flow" in refused(graph_model([loop], {"x": X}, ["y"]), "Loop is not supported").remedy


# -- inputs, shapes, types ----------------------------------------------------------------------------------


def symbolic(*dims: int | str | None) -> onnx.ModelProto:
    model = good()
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
    return model


def test_symbolic_dimension() -> None:
    error = refused(symbolic("N", 3, "H", "W"), "not fixed")
    assert error.remedy == "pass --shape x=1x3x224x224" and error.found == "Nx3xHxW"
    refused(symbolic(None, 3), "not fixed")
    module = import_onnx(symbolic("N", 3, "H", "W"), shapes={"x": (2, 3, 5, 7)})
    assert [int(d) for d in module["main"].params[0].ty.shape.values] == [2, 3, 5, 7]


def test_a_dimension_fixed_for_one_input_holds_for_all() -> None:
    model = graph_model([helper.make_node("Add", ["a", "b"], ["y"])], {}, ["y"])
    for name in ("a", "b"):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]))
    assert [int(p.ty.shape.values[0]) for p in import_onnx(model, {"a": (6, 4)})["main"].params] == [6, 6]
    refused(model, "second size", UsageError, shapes={"a": (6, 4), "b": (7, 4)})


@pytest.mark.parametrize(
    "shapes, words",
    [
        ({"y": (1, 3)}, "not an input"),
        ({"x": (1, 3)}, "number of dimensions"),
        ({"x": (1, 4, 5, 5)}, "contradicts"),
        ({"x": (0, 3, 5, 5)}, "below 1"),
        ({"x": (-1, 3, 5, 5)}, "below 1"),
        ({"x": (10**6, 3, 10**6, 10**6)}, "impossible shape"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    assert refused(symbolic("N", 3, "H", "W"), words, UsageError, shapes=shapes).where


def test_rank_unknown() -> None:
    model = good()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    refused(model, "not fixed")
    assert op_names(import_onnx(model, {"x": (2, 3)})) == ["relu"]


@pytest.mark.parametrize(
    "kind",
    [
        TensorProto.BFLOAT16,
        TensorProto.DOUBLE,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT4E2M1,
        TensorProto.STRING,
        TensorProto.COMPLEX64,
        TensorProto.UINT64,
        0,
        99,
    ],
)
def test_input_types_that_are_refused(kind: int) -> None:
    model = good()
    model.graph.input[0].type.tensor_type.elem_type = kind
    assert refused(model, "element type").expected


def test_inputs_that_are_not_dense_tensors() -> None:
    model = good()
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1]))
    refused(model, "not a tensor")


def test_output_of_another_type_than_declared() -> None:
    model = good()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT8, [1]))
    refused(model, "another type than declared")
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1]))
    refused(model, "another type than declared")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: setattr(t, "raw_data", t.raw_data[:-4]), "fit its shape"),
        (lambda t: t.dims.append(-1), "negative dimension"),
        (lambda t: t.dims.append(2), "fit its shape"),
        (lambda t: setattr(t, "data_type", 8), "element type|fit"),
        (lambda t: setattr(t, "data_type", 17), "element type"),
        (lambda t: setattr(t, "data_type", 99), "element type"),
        (lambda t: t.dims.append(10**12), "fit its shape"),
    ],
)
def test_damaged_initializer(change: Any, words: str) -> None:
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"], name="n")], {"x": X}, ["y"], {"w": X})
    change(model.graph.initializer[0])
    assert "'w'" in refused(model, words).where


def test_operands_of_different_types() -> None:
    model, _ = node_model("Add", [integers("int8", 4), Fixed(integers("int32", 4))])
    refused(model, "one element type|element type")


def test_huge_constants_are_not_made() -> None:
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"], name="fill"), helper.make_node("Add", ["x", "c"], ["y"])]
    refused(graph_model(nodes, {"x": X}, ["y"], {"s": np.asarray([10**5, 10**5, 10**5])}), "very large constant")
    nodes[0] = helper.make_node("Range", ["a", "b", "d"], ["c"], name="range")
    refused(
        graph_model(nodes, {"x": X}, ["y"], {"a": np.int64(0), "b": np.int64(10**15), "d": np.int64(1)}),
        "very large constant",
    )
    nodes[0] = helper.make_node("Add", ["a", "b"], ["c"], name="outer")
    refused(graph_model(nodes, {"x": X}, ["y"], {"a": normal(10**5, 1), "b": normal(1, 10**5)}), "very large constant")


def test_the_first_failure_is_the_one_reported() -> None:
    nodes = [
        helper.make_node("LRN", ["x"], ["a"], name="first", size=3),
        helper.make_node("Det", ["a"], ["y"], name="second"),
    ]
    assert refused(graph_model(nodes, {"x": X}, ["y"]), "LRN").where == "first"


def test_an_attribute_of_a_later_opset_names_that_opset() -> None:
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"], name="n", axis=1)
    error = refused(
        graph_model([node], {"x": integers("int8", 2, 3)}, ["y"], {"s": np.ones(3, np.float32)}, opset=11), "know"
    )
    assert "opset 13" in error.remedy


def test_more_outputs_than_an_operator_has() -> None:
    node = helper.make_node("Gelu", ["x"], ["a", "y"], name="n", domain="com.microsoft")
    assert refused(graph_model([node], {"x": X}, ["y"]), "too many outputs").where == "n"
    node = helper.make_node("If", ["c"], ["a", "y"], name="if", then_branch=branch("Relu"), else_branch=branch("Tanh"))
    refused(graph_model([node], {"x": X}, ["y"], {"c": np.bool_(True)}), "too many outputs")
