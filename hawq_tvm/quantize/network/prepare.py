"""A float ONNX model made ready to be quantized: opset 21, every node named, constants computed, BatchNormalization
folded into its layer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Error as ProtobufError
from onnx import numpy_helper, version_converter

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx.reader import Source, opset_of

from .float_graph import FloatGraph
from .float_onnx import Shapes, from_onnx, read_float

Array = np.ndarray[Any, Any]
# Four bits came with opset 21 and IR 10; ONNX Runtime reads files up to IR 11.
OPSET, IR_VERSION = 21, 10


def prepare(source: Source, shapes: Shapes | None = None) -> tuple[onnx.ModelProto, FloatGraph]:
    """A copy of a float ONNX model to write quantizations into, and its graph; layers keep the names of `allocate`.

    shapes: of inputs, as for `from_onnx`.
    Raises ModelError and UsageError for what `from_onnx` refuses, ModelError when onnx cannot convert it to opset 21.
    """
    given = read_float(source, shapes)
    names = [layer.name for layer in from_onnx(given).layers]  # refuses what is unknown, in the user's own file
    model = onnx.ModelProto()
    model.CopyFrom(given)
    for node in model.graph.node:
        node.name = node.name or node.output[0]
    model = converted(model)
    _drop_constants(model, from_onnx(model))
    _skip_identities(model.graph)
    _fold_scalars(model.graph)
    _fold_batch_norms(model.graph)
    _drop_unused(model.graph)
    del model.graph.value_info[:]
    graph = from_onnx(model)
    lost = set(names) - {layer.name for layer in graph.layers}
    if lost:
        raise ModelError(
            "was lost in the conversion to opset 21", where=sorted(lost)[0], remedy="export the model with opset 21"
        )
    return model, graph


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model in opset 21 whose outputs have types and shapes.

    Raises ModelError when onnx cannot convert it, or does not know them.
    """
    opset = opset_of(model) or OPSET
    if opset < OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except (RuntimeError, ValueError, ProtobufError) as e:
            first = (str(e).strip().splitlines() or [type(e).__name__])[0]
            raise ModelError(
                f"cannot be converted from opset {opset} to {OPSET}",
                where=model.graph.name or "model",
                found=first,
                remedy="export it with opset 21",
            ) from e
    if _untyped(model):  # exporters may leave that to inference
        model = onnx.shape_inference.infer_shapes(model)
    if _untyped(model):
        remedy = "declare its element type and its dimensions in the model"
        raise ModelError("is an output without a type or a shape", where=_untyped(model), remedy=remedy)
    model.ir_version = max(IR_VERSION, min(model.ir_version, IR_VERSION + 1)) if opset <= 24 else model.ir_version
    return model


def _untyped(model: onnx.ModelProto) -> str:
    """The first output whose type or shape the model leaves out, "" where none does."""
    kinds = {o.name: o.type.tensor_type for o in model.graph.output}
    return next((name for name, kind in kinds.items() if not kind.elem_type or not kind.HasField("shape")), "")


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    """The initializers as arrays."""
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def set_constant(graph: onnx.GraphProto, name: str, value: Array) -> None:
    """Add an initializer, or replace the one of that name."""
    for i, tensor in enumerate(graph.initializer):
        if tensor.name == name:
            del graph.initializer[i]
            break
    graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))


def _drop_constants(model: onnx.ModelProto, graph: FloatGraph) -> None:
    """Replace nodes that read constants only by their results; initializers are no inputs."""
    kept = {name for node in graph.nodes for name in node.outputs}
    for node in list(model.graph.node):
        if not any(o in kept for o in node.output):
            for name in filter(None, node.output):
                set_constant(model.graph, name, graph.parameters[name].numpy())
            model.graph.node.remove(node)
    inputs = [i for i in model.graph.input if i.name in graph.parameters]
    for value in inputs:
        model.graph.input.remove(value)


def _skip_identities(graph: onnx.GraphProto) -> None:
    outputs = {o.name for o in graph.output}
    for node in list(graph.node):
        if node.op_type in ("Identity", "Dropout") and node.output[0] not in outputs and not any(node.output[1:]):
            for other in graph.node:
                for i, name in enumerate(other.input):
                    if name == node.output[0]:
                        other.input[i] = node.input[0]
            graph.node.remove(node)


def _fold_scalars(graph: onnx.GraphProto) -> None:
    """Gemm's alpha and beta go into its constants."""
    known = constants(graph)
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] not in known:
            continue
        for name, position in (("alpha", 1), ("beta", 2)):
            factor = next((a.f for a in node.attribute if a.name == name), 1.0)
            if factor != 1.0 and len(node.input) > position and node.input[position] in known:
                _own(graph, node, position, known[node.input[position]] * np.float32(factor))
                node.attribute.remove(next(a for a in node.attribute if a.name == name))


def _own(graph: onnx.GraphProto, node: onnx.NodeProto, position: int, value: Array) -> None:
    """Give a node a constant of its own, as others may read the one that it had."""
    name = f"{node.name}_{('input', 'weight', 'bias')[position]}_folded"
    set_constant(graph, name, value.astype(np.float32))
    while len(node.input) <= position:
        node.input.append("")
    node.input[position] = name


def _fold_batch_norms(graph: onnx.GraphProto) -> None:
    """BatchNormalization after a layer that nobody else reads: w' = w g / sqrt(v + e), b' = (b - m) g / sqrt(v + e)
    + beta.
    """
    readers = Counter(name for node in graph.node for name in node.input) + Counter(o.name for o in graph.output)
    makers = {node.output[0]: node for node in graph.node}
    known = constants(graph)
    for norm in [n for n in graph.node if n.op_type == "BatchNormalization"]:
        layer = makers.get(norm.input[0])
        if layer is None or layer.op_type not in ("Conv", "ConvTranspose", "Gemm") or readers[norm.input[0]] != 1:
            continue
        has_bias = len(layer.input) > 2 and bool(layer.input[2])
        if (
            layer.input[1] not in known
            or any(n not in known for n in norm.input[1:5])
            or (has_bias and layer.input[2] not in known)
        ):
            continue
        gamma, beta, mean, variance = (known[n].astype(np.float64) for n in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gain = gamma / np.sqrt(variance + epsilon)
        weight = known[layer.input[1]]
        first = layer.op_type == "Conv" or any(a.name == "transB" and a.i for a in layer.attribute)
        shape = (-1, *[1] * (weight.ndim - 1)) if first else (1, -1)
        if layer.op_type == "ConvTranspose":  # every group's inputs by that group's outputs
            group = next((a.i for a in layer.attribute if a.name == "group"), 1)
            rows = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)
            factor, shape = rows, (*rows.shape, *[1] * (weight.ndim - 2))
        bias = np.broadcast_to(known[layer.input[2]], gamma.shape) if has_bias else np.zeros_like(gamma)
        _own(graph, layer, 1, weight * factor.reshape(shape))
        _own(graph, layer, 2, (bias - mean) * gain + beta)
        known.update({n: numpy_helper.to_array(t) for t in graph.initializer for n in [t.name] if n in layer.input})
        layer.output[0] = norm.output[0]
        graph.node.remove(norm)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)


def names_of(graph: onnx.GraphProto) -> set[str]:
    """Every tensor name in use."""
    return (
        {t.name for t in graph.initializer}
        | {i.name for i in graph.input}
        | {n for node in graph.node for n in (*node.input, *node.output)}
    )
