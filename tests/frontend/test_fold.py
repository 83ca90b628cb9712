"""Shape arithmetic and constants are computed while importing; quantized constants are not."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, parser

from hawq_tvm.core import ops, stages
from hawq_tvm.frontend.onnx import import_onnx

from .onnx_models import graph_model, imported, normal, onnx_reference, op_names


def test_the_flatten_that_exporters_write_as_shape_arithmetic() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3, 4, 5] x) => (float[N, M] y) {
            s = Shape(x)
            zero = Constant<value = int64 {0}>()
            n = Gather<axis = 0>(s, zero)
            axes = Constant<value_ints = [0]>()
            n1 = Unsqueeze(n, axes)
            rest = Constant<value = int64[1] {-1}>()
            shape = Concat<axis = 0>(n1, rest)
            y = Reshape(x, shape)
        }
    """)
    x = normal(2, 3, 4, 5)
    assert op_names(import_onnx(model)) == ["reshape"]
    np.testing.assert_array_equal(imported(model, {"x": x})["y"], x.reshape(2, 60))


def test_upsampling_to_a_computed_size() -> None:
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[1, 2, 4, 5] x) => (float[1, 2, 8, 10] y) {
            s = Shape(x)
            a = Constant<value = int64[1] {2}>()
            b = Constant<value = int64[1] {4}>()
            two = Constant<value = float[2] {2.0, 2.0}>()
            spatial = Slice(s, a, b)
            head = Shape<start = 0, end = 2>(x)
            f = Cast<to = 1>(spatial)
            scaled = Mul(f, two)
            floored = Floor(scaled)
            i = Cast<to = 7>(floored)
            sizes = Concat<axis = 0>(head, i)
            y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
                       nearest_mode = "floor">(x, , , sizes)
        }
    """)
    x = normal(1, 2, 4, 5)
    assert op_names(import_onnx(model)) == ["take", "take"]
    np.testing.assert_array_equal(imported(model, {"x": x})["y"], onnx_reference(model, {"x": x})["y"])


def test_constant_subgraph_of_floats_becomes_one_constant() -> None:
    nodes = [
        helper.make_node(
            "ConstantOfShape", ["shape"], ["c"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [2.0])
        ),
        helper.make_node("Sqrt", ["c"], ["r"]),
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("Mul", ["r", "t"], ["m"]),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    x, w = normal(3, 4), normal(4, 3, seed=1)
    model = graph_model(nodes, {"x": x}, ["y"], {"shape": np.asarray([3, 4]), "w": w})
    assert op_names(import_onnx(model)) == ["add"]
    # The sum is float64 here.
    np.testing.assert_allclose(imported(model, {"x": x})["y"], x + np.sqrt(np.float32(2)) * w.T, rtol=1e-6)


def test_quantized_constants_stay() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"]),
        helper.make_node("Add", ["x", "t"], ["y"]),
    ]
    model = graph_model(nodes, {"x": normal(3, 4)}, ["y"], {"w": np.ones((4, 3), np.int8), "s": np.float32(0.5)})
    assert op_names(import_onnx(model)) == ["dequantize", "permute_dims", "add"]


def test_an_output_may_be_constant_or_an_input() -> None:
    model = graph_model([helper.make_node("Shape", ["x"], ["s"])], {"x": normal(3, 4)}, ["s", "x"])
    got = imported(model, {"x": normal(3, 4)})
    np.testing.assert_array_equal(got["s"], [3, 4])
    np.testing.assert_array_equal(got["x"], normal(3, 4))


def test_dead_nodes_leave_no_binding() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Tanh", ["x"], ["unused"])]
    module = import_onnx(graph_model(nodes, {"x": normal(3)}, ["y"]))
    assert op_names(module) == ["relu"]
    assert all(not ops.is_const(b.value) for b in stages.bindings(module["main"]))
