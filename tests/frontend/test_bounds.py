"""Models that would take gigabytes or hours: refused with one sentence that names the node, or compiled in seconds."""

from __future__ import annotations

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import ModelError

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8


def network(
    nodes: list[onnx.NodeProto], shape: list[int], out: str, constants: dict[str, object], functions=(), opset: int = 21
) -> bytes:  # type: ignore[no-untyped-def]
    """Quantized `x` of that shape, dequantized as `d`; the nodes; their result `out` quantized as the output `y`."""
    values = {"s": np.float32(0.05), "z": np.uint8(7), **constants}
    init = [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()]
    first = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["d"])
    last = helper.make_node("QuantizeLinear", [out, "s", "z"], ["y"])
    info = [helper.make_tensor_value_info("x", UINT8, shape)], [helper.make_tensor_value_info("y", UINT8, None)]
    graph = helper.make_graph([first, *nodes, last], "g", *info, init)
    domains = [helper.make_opsetid("", opset), *([helper.make_opsetid("f", 1)] if functions else [])]
    return helper.make_model(graph, opset_imports=domains, functions=list(functions), ir_version=10).SerializeToString()


def node(op: str, inputs: list[str], out: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [out], name=out, **attributes)


def refused(model: bytes, where: str, says: str) -> None:
    """`inspect` and `compile` both refuse it at once, with the same sentence."""
    start = time.process_time()
    with pytest.raises(ModelError, match=says) as e:
        ht.compile(model)
    assert where in e.value.where
    assert ht.inspect(model).error == str(e.value)
    assert time.process_time() - start < 20


@pytest.mark.slow
def test_constants_that_double_are_refused_before_memory_is_taken() -> None:
    chain = [node("Concat", [f"k{i}", f"k{i}"], f"k{i + 1}", axis=0) for i in range(40)]
    last = [node("ReduceSum", ["k40"], "sum", keepdims=0), node("Mul", ["d", "sum"], "o")]
    refused(network([*chain, *last], [1, 4], "o", {"k0": np.ones(1, np.float32)}), "k25", "very large constant")


@pytest.mark.slow
def test_many_large_constants_are_refused_together() -> None:
    chain = [node("Add", [f"k{i}", "one"], f"k{i + 1}") for i in range(60)]
    first = node("Expand", ["one", "size"], "k0")
    last = [node("ReduceSum", ["k60"], "sum", keepdims=0), node("Mul", ["d", "sum"], "o")]
    model = network([first, *chain, *last], [1, 4], "o", {"one": np.ones(1, np.float32), "size": np.array([1 << 23])})
    refused(model, "k", "very large constant")


def test_a_gather_from_a_large_table_is_no_large_constant() -> None:
    table = np.zeros((5000, 64), np.float32)
    nodes = [node("Gather", ["table", "at"], "row", axis=0), node("Add", ["d", "row"], "o")]
    assert pipeline.to_packed(
        pipeline.import_annotated(network(nodes, [1, 64], "o", {"table": table, "at": np.array([3])}))
    )


def test_an_input_of_a_billion_elements_is_refused() -> None:
    refused(network([node("Relu", ["d"], "o")], [1 << 30], "o", {}), "input 'x'", "impossible shape")


@pytest.mark.parametrize(
    "made, constants, shape",
    [
        (node("Tile", ["d", "n"], "big"), {"n": np.array([1, 1, 1 << 20, 1 << 20])}, [1, 1, 4, 4]),
        (node("Expand", ["d", "n"], "big"), {"n": np.array([1 << 40, 1, 4, 4])}, [1, 1, 4, 4]),
        (node("Pad", ["d", "n"], "big"), {"n": np.array([0, 0, 1 << 40, 0, 0, 0, 0, 0])}, [1, 1, 4, 4]),
        (node("Pad", ["d", "n"], "big"), {"n": np.array([0, 0, 1 << 62, 0, 0, 0, 1 << 62, 0])}, [1, 1, 4, 4]),
        (
            node("Resize", ["d", "", "f"], "big", mode="linear"),
            {"f": np.array([1, 1, 1 << 20, 1 << 20], np.float32)},
            [1, 1, 4, 4],
        ),
        (
            node("Resize", ["d", "", "f"], "big", mode="nearest"),
            {"f": np.array([1, 1, 1, 2.0**40], np.float32)},
            [1, 1, 4, 4],
        ),
        (node("ConvTranspose", ["d", "w"], "big", strides=[1 << 20, 1 << 20]), {}, [1, 1, 4, 4]),
        (node("MaxPool", ["d"], "big", kernel_shape=[1 << 30, 1], pads=[1 << 29, 0, 1 << 29, 0]), {}, [1, 1, 4, 4]),
        (node("AveragePool", ["d"], "big", kernel_shape=[1 << 30, 1], pads=[1 << 29, 0, 1 << 29, 0]), {}, [1, 1, 4, 4]),
        (node("Conv", ["d", "w"], "big", dilations=[1 << 40, 1 << 40], pads=[1 << 40] * 4), {}, [1, 1, 4, 4]),
    ],
)
def test_extreme_sizes_are_refused(made: onnx.NodeProto, constants: dict[str, object], shape: list[int]) -> None:
    weight = [node("DequantizeLinear", ["wq", "s", "zw"], "w")]
    more = {"wq": np.ones((1, 1, 2, 2), np.uint8), "zw": np.uint8(0)}
    refused(
        network([*weight, made], shape, "big", {**constants, **more}),
        "big",
        "impossible|large|different values|exceeds",
    )


def test_a_step_beyond_all_data_takes_one_element() -> None:
    numbers = {"a": np.array([-1]), "b": np.array([-(2**63)]), "c": np.array([1]), "e": np.array([-(2**63)])}
    model = network([node("Slice", ["d", "a", "b", "c", "e"], "o")], [1, 4], "o", numbers)
    package = ht.compile(model)
    assert package.run({"x": np.array([[1, 2, 3, 4]], np.uint8)})["y"].tolist() == [[4]]


def doubling(depth: int) -> list[onnx.FunctionProto]:
    ids = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    functions = [helper.make_function("f", "F0", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], ids)]
    for i in range(1, depth):
        calls = [helper.make_node(f"F{i - 1}", [a], [b], domain="f") for a, b in (("a", "t"), ("t", "b"))]
        functions.append(helper.make_function("f", f"F{i}", ["a"], ["b"], calls, ids))
    return functions


@pytest.mark.slow
def test_functions_that_call_functions() -> None:
    def calling(depth: int) -> bytes:
        return network([node(f"F{depth - 1}", ["d"], "o", domain="f")], [1, 4], "o", {}, doubling(depth))

    assert pipeline.to_packed(pipeline.import_annotated(calling(12)))
    refused_functions = calling(40)
    with pytest.raises(ModelError, match="very many nodes") as e:
        ht.compile(refused_functions)
    assert e.value.where == "o" and e.value.found == str(2**39)


def test_a_function_that_calls_itself() -> None:
    ids = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    again = helper.make_function("f", "F", ["a"], ["b"], [helper.make_node("F", ["a"], ["b"], domain="f")], ids)
    with pytest.raises(ModelError, match="without end"):
        ht.compile(network([node("F", ["d"], "o", domain="f")], [1, 4], "o", {}, [again]))
