"""Float ONNX models as float graphs: every operator that `compile` knows, and no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from hawq_tvm.core.errors import ModelError, first_of
from hawq_tvm.frontend.common.inputs import bound_inputs, example
from hawq_tvm.frontend.onnx.cut import End
from hawq_tvm.frontend.onnx.importer import supported, unsupported_operator
from hawq_tvm.frontend.onnx.inputs import graph_declared, with_shapes
from hawq_tvm.frontend.onnx.reader import Source, opset_of, read_model

from . import float_movement, float_rows
from .float_graph import FloatGraph, Input, Layer, Node, folded, named_once
from .float_operators import OPERATORS, Attributes, as_tensor, padding_of, per_axis
from .float_reference import by_reference

# Importing them registers their operators.
OTHERS = float_movement, float_rows
Tensor = torch.Tensor
REPLACED = "replace it by supported operators"
NAMED = 5  # of the outputs to end a model with
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
            "has no shape",
            where=f"input {unknown!r}",
            expected="a number of dimensions",
            remedy=f"pass --shape {unknown}={example(None)}, with your sizes",
        )
    fixed = {one.name: [d if isinstance(d, int) else None for d in one.dims or ()] for one in bound}
    return with_shapes(model, fixed) if bound != declared else model


def from_onnx(source: Source, shapes: Shapes | None = None) -> FloatGraph:
    """The graph of a float ONNX model (path, bytes or ModelProto); layers are called as their nodes.

    shapes: as for `read_float`.
    Raises its errors, and ModelError naming the first node that is unknown, quantized or not of the standard domain.
    """
    model = read_float(source, shapes)
    graph, opset = model.graph, opset_of(model) or 0
    given = [Attributes(proto, opset) for proto in graph.node]
    quantized = [a for a in given if _quantizes(a.node)]
    unknown = [a for a in quantized[:1] or given if _refused(a) is not None]
    if unknown:
        remedy = _without(model, [e for a in unknown if (e := _refused(a))]) if not quantized else ""
        raise first_of([e for a in unknown if (e := _refused(a, remedy))])
    parameters = {t.name: as_tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    inputs = tuple(_input(v) for v in graph.input if v.name not in parameters)
    nodes, windows = [], {}
    for attributes in given:
        proto = attributes.node
        if not proto.output:
            raise attributes.fail("has no outputs", remedy="export the model again")
        known = OPERATORS.get((attributes.domain, proto.op_type))
        try:
            compute = (known or by_reference)(attributes)
        except (TypeError, ValueError, LookupError) as e:
            raise attributes.fail("has attributes that are not understood", found=str(e)) from e
        names = tuple(proto.input), tuple(proto.output)
        nodes.append(Node(attributes.name, proto.op_type, *names, compute, attributes.values, known is not None))
        windows[proto.output[0]] = attributes
    kept = folded(nodes, parameters)
    layers = [_layer(n, windows[n.outputs[0]], parameters) for n in kept if _weighted(n, parameters)]
    name = graph.name or "model"
    return FloatGraph(name, inputs, tuple(o.name for o in graph.output), kept, named_once(layers, name), parameters)


def _without(model: onnx.ModelProto, unknown: Sequence[ModelError]) -> str:
    """What to do about unknown nodes: end the model before them, where weights are before them and none behind."""
    end = End(model, weighted=True)
    if not end.grows(first_of(unknown)):
        return REPLACED
    outputs = [*end.tensors(), *(o.name for o in end.head().graph.output if o.name not in end.tensors())]
    more = f", ... ({len(outputs)} in all)" if len(outputs) > NAMED else ""
    return (
        f"end the model before it, with the outputs {', '.join(outputs[:NAMED])}{more} (onnx.utils.extract_model), and"
        " compute the rest elsewhere; `hawq-tvm quantize` leaves it in float"
    )


def _refused(attributes: Attributes, remedy: str = "") -> ModelError | None:
    """Why a node cannot be in a float network, None for one that can; remedy: for an unknown standard operator."""
    error = _reason(attributes, remedy)
    if error is not None:
        error.op = attributes.node.op_type
    return error


def _reason(attributes: Attributes, remedy: str) -> ModelError | None:
    node = attributes.node
    if _quantizes(node):
        return attributes.fail(
            "is of a quantized model", expected="a float model", remedy="give the model that was quantized"
        )
    if node.op_type == "If":
        return attributes.fail("chooses at run time", remedy="export the model without control flow")
    known = supported(attributes.domain, node.op_type)
    if known:
        return None
    return unsupported_operator(attributes.name, attributes.domain, node.op_type, attributes.opset, remedy)


def quantized_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that no float network has."""
    return [n for n in model.graph.node if _quantizes(n)]


def _quantizes(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith(QUANTIZED) or "Integer" in node.op_type


def _input(value: onnx.ValueInfoProto) -> Input:
    kind = value.type.tensor_type
    shape = tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
    return Input(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)).name, shape)


# -- weighted layers
# ------------------------------------------------------------------------------------------------------


def _weighted(node: Node, parameters: dict[str, Tensor]) -> bool:
    if node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return False
    constant = [n in parameters for n in node.inputs[:2]]
    return constant == [False, True] and parameters[node.inputs[1]].ndim >= 2


def _layer(node: Node, attributes: Attributes, parameters: dict[str, Tensor]) -> Layer:
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] in parameters else ""
    common: dict[str, Any] = {
        "name": node.name,
        "node": node.name,
        "input": node.inputs[0],
        "output": node.outputs[0],
        "weight": node.inputs[1],
        "bias": bias,
    }
    if node.op in ("Gemm", "MatMul"):
        axis = 0 if attributes.get("transB", 0) else parameters[node.inputs[1]].ndim - 1
        return Layer(kind="matmul", channel_axis=axis, **common)
    rank = parameters[node.inputs[1]].ndim - 2
    transposed = node.op == "ConvTranspose"
    # What a transposed convolution cuts off to reach a size hangs on that of its input.
    sized = transposed and (
        attributes.get("auto_pad", "NOTSET").startswith("SAME") or "output_shape" in attributes.values
    )
    before, after = ((), ()) if sized else padding_of(attributes, rank)
    return Layer(
        kind="deconv" if transposed else "conv",
        channel_axis=1 if transposed else 0,
        group=int(attributes.get("group", 1)),
        strides=per_axis(attributes, "strides", rank),
        dilations=per_axis(attributes, "dilations", rank),
        before=before,
        after=after,
        extra=tuple(int(v) for v in attributes.get("output_padding", [0] * rank)) if transposed else (),
        **common,
    )
