"""What ONNX's own shape inference says of a model's tensors, with the inputs' sizes fixed; nothing where it cannot tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto

from hawq_tvm.contract import CORRECT, Promise

from ..common.inputs import Input
from .node import MICROSOFT
from .qonnx import DOMAINS
from .values import ELEMENT_TYPES

# Larger constants are not shapes: inference needs their type and sizes alone.
MOST_ELEMENTS = 1024
# A domain that nobody has: inference says nothing of its nodes.
UNKNOWN = "hawq_tvm.unknown"
NUMBERS = {kind: number for number, kind in ELEMENT_TYPES.items()}


def inferred(model: onnx.ModelProto, inputs: Sequence[Input]) -> dict[str, Promise]:
    """Promises by the name of the tensor.  Declared shapes of the model are no part of it."""
    try:
        found = onnx.shape_inference.infer_shapes(_outline(model, inputs), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError, DecodeError, EncodeError):
        return {}
    return _promises([*found.value_info, *found.output], "ONNX's shape inference")


def declared(outputs: Iterable[onnx.ValueInfoProto]) -> dict[str, Promise]:
    """What the model itself declares of its outputs."""
    return _promises(outputs, "the model's own declaration", CORRECT)


def _promises(values: Iterable[onnx.ValueInfoProto], by: str, *remedy: str) -> dict[str, Promise]:
    return {v.name: Promise(by, ELEMENT_TYPES.get(v.type.tensor_type.elem_type, ""), _dims(v), *remedy) for v in values if v.type.HasField("tensor_type")}


def _dims(value: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    if not value.type.tensor_type.HasField("shape"):
        return None
    # Exporters write 0 and -1 for what they do not know.
    return tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim)


def _outline(model: onnx.ModelProto, inputs: Sequence[Input]) -> onnx.ModelProto:
    """The model without the contents of its weights, without declared shapes but the inputs', and in operators that ONNX knows."""
    outline = onnx.ModelProto(ir_version=max(4, model.ir_version))
    outline.opset_import.extend(o for o in model.opset_import if o.domain != UNKNOWN)
    outline.opset_import.append(onnx.helper.make_opsetid(UNKNOWN, 1))
    graph = outline.graph
    graph.name = "outline"
    graph.input.extend(onnx.helper.make_tensor_value_info(i.name, NUMBERS[i.kind], i.shape) for i in inputs)
    graph.output.extend(onnx.ValueInfoProto(name=o.name) for o in model.graph.output)
    graph.initializer.extend(_light(t) for t in model.graph.initializer)
    graph.node.extend(_known(n) for n in model.graph.node)
    return outline


def _light(tensor: onnx.TensorProto) -> onnx.TensorProto:
    count = 1
    for d in tensor.dims:
        count *= max(0, int(d))
    if count <= MOST_ELEMENTS:
        return tensor
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)


def _known(node: onnx.NodeProto) -> onnx.NodeProto:
    """The node, or one of the standard operators that has its shapes and types."""
    if node.domain in DOMAINS:
        return onnx.helper.make_node("Identity", list(node.input)[:1], list(node.output))
    if node.domain == MICROSOFT and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return onnx.helper.make_node(node.op_type, list(node.input), list(node.output))
    if node.op_type.endswith("Pool") and any(a.name == "ceil_mode" and a.i for a in node.attribute):
        # ONNX's inference counts windows that begin in the padding; ONNX Runtime, PyTorch and the operator's later text leave them out.
        return onnx.helper.make_node(node.op_type, list(node.input), list(node.output), domain=UNKNOWN)
    if node.op_type == "Constant" and any(a.HasField("t") and len(a.t.raw_data) > 8 * MOST_ELEMENTS for a in node.attribute):
        return onnx.helper.make_node("Constant", [], list(node.output), value=_light(node.attribute[0].t))
    return node
