"""Float ONNX models as float graphs (opset 10 to 28); operators that `float_operators.py` does not have are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from ..errors import ModelError
from ..frontend.common.inputs import bound_inputs, example
from ..frontend.onnx.inputs import graph_declared, with_shapes
from ..frontend.onnx.reader import Source, opset_of, read_model
from .float_graph import FloatGraph, Input, Layer, Node, folded, named_once
from .float_operators import OPERATORS, Attributes, as_tensor, padding_of, per_axis

Tensor = torch.Tensor
QUANTIZED = ("Quantize", "Dequantize", "QLinear", "Integer", "QGemm", "Quant", "BipolarQuant", "Trunc", "QAttention")


Shapes = Mapping[str, Sequence[int]]


def read_float(source: Source, shapes: Shapes | None = None) -> onnx.ModelProto:
    """A float ONNX model, its open dimensions fixed at the sizes in shapes (full shapes by input name).

    Raises ModelError when it cannot be read or an input has no shape at all, UsageError for shapes that contradict it.
    """
    model = read_model(source)
    declared = graph_declared(model.graph)
    bound = bound_inputs(declared, shapes or {})
    unknown = next((one.name for one in bound if one.dims is None), None)
    if unknown is not None:
        raise ModelError(
            "has no shape", where=f"input {unknown!r}", expected="a number of dimensions",
            remedy=f"pass --shape {unknown}={example(None)}, with your sizes",
        )  # fmt: skip
    fixed = {one.name: [d if isinstance(d, int) else None for d in one.dims or ()] for one in bound}
    return with_shapes(model, fixed) if bound != declared else model


def from_onnx(source: Source, shapes: Shapes | None = None) -> FloatGraph:
    """The graph of a float ONNX model (path, bytes or ModelProto); layers are called as their nodes.

    shapes: as for `read_float`.
    Raises its errors, and ModelError naming the first node that is unknown, quantized or not of the standard domain.
    """
    model = read_float(source, shapes)
    graph, opset = model.graph, opset_of(model) or 0
    parameters = {t.name: as_tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    inputs = tuple(_input(v) for v in graph.input if v.name not in parameters)
    nodes, windows = [], {}
    given = [Attributes(proto, opset) for proto in graph.node]
    unknown = [a for a in given if a.node.domain not in ("", "ai.onnx") or a.node.op_type not in OPERATORS]
    if unknown:
        raise _refused(unknown)
    for attributes in given:
        proto = attributes.node
        if not proto.output:
            raise attributes.fail("has no outputs", remedy="export the model again")
        try:
            compute = OPERATORS[proto.op_type](attributes)
        except (TypeError, ValueError, LookupError) as e:
            raise attributes.fail("has attributes that are not understood", found=str(e)) from e
        nodes.append(Node(attributes.name, proto.op_type, tuple(proto.input), tuple(proto.output), compute))
        windows[proto.output[0]] = attributes
    kept = folded(nodes, parameters)
    layers = [_layer(n, windows[n.outputs[0]], parameters) for n in kept if _weighted(n, parameters)]
    name = graph.name or "model"
    return FloatGraph(name, inputs, tuple(o.name for o in graph.output), kept, named_once(layers, name), parameters)


def _refused(unknown: Sequence[Attributes]) -> ModelError:
    """The error about the first, which names all."""
    attributes = next((a for a in unknown if _quantizes(a.node)), unknown[0])
    node = attributes.node
    if _quantizes(node):
        return attributes.fail("is of a quantized model", expected="a float model", remedy="give the model that was quantized")
    what = f"of the domain {node.domain!r} is not known" if node.domain not in ("", "ai.onnx") else "is not known here"
    others = ", ".join(f"{a.name} ({a.node.op_type})" for a in unknown if a is not attributes)
    remedy = "simplify the model, or export it as a torch program (.pt2)"
    expected = f"one of {', '.join(sorted(OPERATORS))}"
    return attributes.fail(what, expected=expected, found=f"it, and {others}" if others else "", remedy=remedy)


def _quantizes(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith(QUANTIZED) or "Integer" in node.op_type


def _input(value: onnx.ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    shape = tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
    return Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name, shape)


# -- weighted layers ------------------------------------------------------------------------------------------------------


def _weighted(node: Node, parameters: dict[str, Tensor]) -> bool:
    if node.op not in ("Conv", "Gemm", "MatMul"):
        return False
    constant = [n in parameters for n in node.inputs[:2]]
    return constant == [False, True] and parameters[node.inputs[1]].ndim >= 2


def _layer(node: Node, attributes: Attributes, parameters: dict[str, Tensor]) -> Layer:
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] in parameters else ""
    common: dict[str, Any] = {"name": node.name, "node": node.name, "input": node.inputs[0], "output": node.outputs[0], "weight": node.inputs[1], "bias": bias}
    if node.op != "Conv":
        axis = 0 if attributes.get("transB", 0) else parameters[node.inputs[1]].ndim - 1
        return Layer(kind="matmul", channel_axis=axis, **common)
    rank = parameters[node.inputs[1]].ndim - 2
    before, after = padding_of(attributes, rank)
    return Layer(
        kind="conv", channel_axis=0, group=int(attributes.get("group", 1)), strides=per_axis(attributes, "strides", rank),
        dilations=per_axis(attributes, "dilations", rank), before=before, after=after, **common,
    )  # fmt: skip
