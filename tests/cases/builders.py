"""Small models of situations that compilers met in public bug reports and under attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..models import TYPES, Graph

F = np.float32
U8, I8, U16, I32, FLOAT = TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT32, TensorProto.FLOAT


def quantized(op: str, operands: list[Any], shape: list[int], kind: str = "int8", scale: float = 0.05, zero: int = -17, **attributes: Any) -> onnx.ModelProto:
    """One operator between a dequantize of the input x and a quantize with the same scale and zero point, which gives y."""
    g = Graph()
    x = g.dq(g.input("x", shape, TYPES[kind][0]), F(scale), zero, kind)
    return ending(g, g.node(op, [x, *[g.constant(o, TensorProto.INT64) for o in operands]], **attributes), kind, scale, zero)


def ending(g: Graph, real: str, kind: str, scale: float, zero: int) -> onnx.ModelProto:
    """The graph with a quantize of `real` as its output y."""
    names = [real, g.constant(F(scale), FLOAT, ()), g.constant(zero, TYPES[kind][0], ())]
    g.nodes.append(helper.make_node("QuantizeLinear", names, ["y"], name="last"))
    return g.model([("y", TYPES[kind][0])])


def mean_network() -> onnx.ModelProto:
    """A convolution, a residual sum and two average pools whose windows reach into the padding; all scales are 0.08 by powers of two."""
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 4, 8, 8]), F(0.08), 128)
    w = g.dq(g.constant(g.rng.integers(-20, 20, (4, 4, 3, 3)), I8), F(0.5), 0, "int8")
    b = g.constant(g.rng.normal(size=4).astype(F), FLOAT)
    y = g.qdq(g.conv(x, w, b, pads=[1, 1, 1, 1]), F(0.64), 100)
    s = g.qdq(g.node("Add", [y, x]), F(0.16), 128)
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    p = g.qdq(g.node("AveragePool", [s], **window), F(0.16), 128)
    i = g.qdq(g.node("AveragePool", [s], count_include_pad=1, **window), F(0.16), 128)
    return g.model([(g.qdq(g.node("Add", [p, i]), F(0.32), 128), FLOAT)])


def conv1d(op: str, outputs: int = 1) -> onnx.ModelProto:
    """A convolution (or its transpose) over one dimension with an int32 bias."""
    g = Graph()
    x = g.dq(g.input("x", [2, 3, 4], U8), F(0.02), 0)
    shape = (outputs, 3, 2) if op == "Conv" else (3, outputs, 2)
    w = g.dq(g.constant(np.arange(6 * outputs).reshape(shape), I8), F(0.01), 0, "int8")
    b = g.dq(g.constant(np.arange(outputs) * 100 + 7672, I32), F(0.0002), 0, "int32")
    return ending(g, g.node(op, [x, w, b]), "uint8", 0.03, 0)


def without_kernels(which: str) -> onnx.ModelProto:
    """Nothing to compute: a constant is the output, or the input itself is."""
    g = Graph()
    if which == "constant":
        return g.model([(g.dq(g.constant(np.arange(8), U8), F(0.5), 3), FLOAT)])
    x = g.input("x", [2, 3], U8 if which == "integers" else FLOAT)
    if which == "both":
        return g.model([(g.dq(g.constant(np.arange(8), U8), F(0.5), 3), FLOAT), (g.node("Identity", [x]), FLOAT)])
    y = g.node("Flatten", [x]) if which == "Flatten" else g.node("Identity", [x])
    return g.model([(y, U8 if which == "integers" else FLOAT)])


def doubled(length: int, op: str = "Add") -> onnx.ModelProto:
    """x + x (or max(x, x)), and that of the result, `length` times; the last scale undoes the doubling."""
    g = Graph()
    y = g.dq(g.input("x", [1, 4], U8), F(1), 0)
    for _ in range(length):
        y = g.node(op, [y, y])
    return ending(g, y, "uint8", 2.0**length if op == "Add" else 1.0, 0)


def leaky_depthwise(channels: int) -> onnx.ModelProto:
    g = Graph(5)
    x = g.dq(g.input("x", [1, channels, 8, 8], U8), F(0.02), 128)
    w = g.weight([channels, 1, 3, 3], "int4", scale=0.018)
    return ending(g, g.node("LeakyRelu", [g.conv(x, w, group=channels, pads=[1, 1, 1, 1])], alpha=0.1), "uint8", 0.031, 0)


def leaky_gemm(outputs: int) -> onnx.ModelProto:
    """Two matrix products, the first of two run-time operands; LeakyRelu after the second."""
    g = Graph(6)
    a, b = g.input("x0", [2, 16]), g.input("x1", [16, 5])
    product = g.node("MatMul", [g.qdq(a, F(0.0284788), 237), g.qdq(b, F(0.05), -61, "int8")])
    hidden = g.qdq(g.node("Relu", [product]), F(1 / 255), 0)
    weight = g.dq(g.constant(g.rng.integers(0, 256, (outputs, 5)), U8), g.rng.uniform(0.005, 0.02, outputs).astype(F), np.full(outputs, 128), axis=0)
    return ending(g, g.node("LeakyRelu", [g.node("Gemm", [hidden, weight], transB=1)], alpha=0.1), "int8", 2 / 255, -128)


def padded(value: float, kind: str) -> onnx.ModelProto:
    """Pad with a real number that the quantized type does not hold."""
    g = Graph()
    x = g.qdq(g.input("x", [1, 2, 4, 4]), F(0.5), 0, kind)
    pads = g.constant(np.array([0, 0, 1, 0, 0, 1, 0, 1]), TensorProto.INT64)
    y = g.node("Pad", [x, pads, g.constant(F(value), FLOAT, ())])
    return g.model([(g.qdq(y, F(0.5), 0, kind), FLOAT)])


def resized() -> onnx.ModelProto:
    """A linear resize of uint8 to uint16."""
    g = Graph()
    x = g.dq(g.input("x", [1, 3, 2, 6], U8), F(0.26619494), 0)
    sizes = g.constant(np.array([1, 3, 4, 10]), TensorProto.INT64)
    y = g.node("Resize", [x, "", "", sizes], mode="linear", coordinate_transformation_mode="pytorch_half_pixel")
    return ending(g, y, "uint16", 0.00048828, 0)


def between(write: Any, shape: tuple[int, ...] = (1, 4, 4, 4)) -> onnx.ModelProto:
    """Q, DQ, what `write(graph, tensor)` adds, Q, DQ."""
    g = Graph()
    x = g.qdq(g.input("x", list(shape)), F(0.05), 7)
    return g.model([(g.qdq(write(g, x), F(0.05), 7), FLOAT)])


def added_constant(value: float) -> onnx.ModelProto:
    return between(lambda g, x: g.node("Add", [x, g.constant([value], FLOAT)]))


def sliced(step: int) -> onnx.ModelProto:
    """The last element along an axis: from -1 down in steps too large for a second one."""

    def write(g: Graph, x: str) -> str:
        return g.node("Slice", [x, *(g.constant([v], TensorProto.INT64) for v in (-1, -(2**63), 1, step))])

    return between(write)


def doubled_constant(times: int) -> onnx.ModelProto:
    """A constant that is doubled again and again, then joins the data."""

    def write(g: Graph, x: str) -> str:
        c = g.constant([1.0], FLOAT)
        for _ in range(times):
            c = g.node("Concat", [c, c], axis=0)
        return g.node("Add", [x, g.node("ReduceMax", [c], keepdims=0)])

    return between(write)


def nested_functions(depth: int, op: str = "Relu") -> onnx.ModelProto:
    """Functions that call the one before twice: 2^depth nodes, and as deep."""
    model = between(lambda g, x: g.node(f"F{depth - 1}", [x], "f"))
    for i in range(depth):
        inner, domain = (op, "") if i == 0 else (f"F{i - 1}", "f")
        nodes = [helper.make_node(inner, [a], [b], domain=domain) for a, b in (("a", "b"), ("b", "c"))]
        model.functions.append(helper.make_function("f", f"F{i}", ["a"], ["c"], nodes, [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]))
    return model


def float_bias(value: float, scale: float) -> onnx.ModelProto:
    """A matrix product with a float bias of an extreme size, quantized with a scale."""
    g = Graph()
    x = g.dq(g.input("x", [1, 4], U8), F(0.001), 0)
    w = g.dq(g.constant(np.full((4, 1), 127), I8), F(0.001), 0, "int8")
    return ending(g, g.node("Gemm", [x, w, g.constant([value], FLOAT)]), "int8", scale, 0)


def quantized_bias(value: float) -> onnx.ModelProto:
    """A convolution whose int32 bias stands for a huge real number, and that is added to a common tensor."""
    g = Graph(2)
    x = g.qdq(g.input("x", [1, 3, 6, 6]), F(0.027), 143)
    w = g.dq(g.constant(np.zeros((4, 3, 3, 3), int), I8), np.full(4, value / 2**30 / 0.027, F), np.zeros(4, int), "int8", axis=0)
    b = g.dq(g.constant(np.full(4, 2**30), I32), np.full(4, value / 2**30, F), np.zeros(4, int), "int32", axis=0)
    y = g.qdq(g.conv(x, w, b, pads=[1, 1, 1, 1]), F(value / 255), 0)
    z = g.qdq(g.conv(x, g.weight([4, 3, 3, 3]), pads=[1, 1, 1, 1]), F(0.016), 120)
    return g.model([(g.qdq(g.node("Add", [y, z]), F(value / 255), 0), FLOAT)])


def escape_sequences() -> tuple[onnx.ModelProto, str]:
    """Names that would write a terminal's title and colours, and one of them."""
    name = "X\x1b[31m\x1b]0;owned\x07\x1b[0m"
    g = Graph()
    x = g.qdq(g.input(f"x{name}", [1, 4, 4, 4]), F(0.05), 7)
    y = g.node("Relu", [g.conv(x, g.weight([4, 4, 3, 3]), pads=[1, 1, 1, 1])])
    model = g.model([(g.qdq(y, F(0.05), 7), FLOAT)])
    for node in model.graph.node:
        node.name += name
    model.graph.node[-1].output[0] = model.graph.output[0].name = f"y{name}"
    return model, name


def dead_layer() -> onnx.ModelProto:
    """A float network one of whose ReLUs is never on."""
    rng = np.random.default_rng(4)
    constants = {
        "w0": rng.normal(size=(4, 3, 3, 3)) / 5, "w1": rng.normal(size=(6, 4, 3, 3)) / 6, "b1": np.full(6, -20.0), "w2": rng.normal(size=(6, 6, 3, 3)) / 7,
        "w3": rng.normal(size=(6, 4, 1, 1)) / 2, "w4": rng.normal(size=(5, 6)),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], name="stem", pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="dead", pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="behind", pads=[1, 1, 1, 1]), helper.make_node("Conv", ["r0", "w3"], ["c3"], name="short"),
        helper.make_node("Add", ["c2", "c3"], ["s"]), helper.make_node("GlobalAveragePool", ["s"], ["g"]), helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["y"], name="fc", transB=1),
    ]  # fmt: skip
    return _float_network(nodes, ["n", 3, 8, 8], ["n", 5], constants)


def batch_minus_one() -> onnx.ModelProto:
    """What Paddle's exporter writes: a batch of -1, heights and widths without a name."""
    constants = {"w": np.random.default_rng(0).normal(size=(8, 3, 3, 3)) / 5}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["g"]), helper.make_node("Flatten", ["g"], ["y"]),
    ]  # fmt: skip
    return _float_network(nodes, [-1, 3, "", ""], [-1, 8], constants)


def _float_network(nodes: list[onnx.NodeProto], shape: list[Any], out: list[Any], constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    tensors = [onnx.numpy_helper.from_array(v.astype(F), k) for k, v in constants.items()]
    infos = [helper.make_tensor_value_info("x", FLOAT, shape)], [helper.make_tensor_value_info("y", FLOAT, out)]
    return helper.make_model(helper.make_graph(nodes, "g", *infos, tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
