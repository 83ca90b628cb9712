"""What a model contains and what of it cannot be imported, for `inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from hawq_tvm import arith

from . import fold
from .graph import node_name
from .inputs import declared_shape, runtime_inputs
from .qonnx import DOMAINS
from .reader import Source, graphs_of, read_model
from .values import ELEMENT_TYPES


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def describe_onnx(source: Source) -> dict[str, Any]:
    """A JSON-ready description: versions, inputs, outputs, node counts, every quantized tensor's bits and grain."""
    model = read_model(source)
    graph = model.graph
    constants = _constants(graph)
    readers = {name: (n.op_type, i) for n in graph.node for i, name in enumerate(n.input)}
    counts = Counter(f"{_domain(n)}.{n.op_type}".lstrip(".") for g in graphs_of(graph) for n in g.node)
    return {
        "format": "ONNX",
        "ir_version": int(model.ir_version),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {o.domain or "ai.onnx": int(o.version) for o in model.opset_import},
        "inputs": [_value(v) for v in runtime_inputs(graph)],
        "outputs": [_value(v) for v in graph.output],
        "nodes": len(graph.node),
        "operators": dict(sorted(counts.items())),
        "parameters": sum(_count(t.dims) for t in graph.initializer),
        "quantized": [q for n in graph.node for q in _quantized(n, constants, readers)],
    }


def _count(dims: Sequence[int]) -> int:
    total = 1
    for d in dims:
        total *= max(0, int(d))
    return total


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    number = value.type.tensor_type.elem_type
    return {
        "name": value.name,
        "dtype": ELEMENT_TYPES.get(number) or fold.type_name(number),
        "shape": declared_shape(value),
    }


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {t.name: t for t in graph.initializer}
    for n in graph.node:
        values = [a.t for a in n.attribute if a.name == "value" and a.HasField("t")]
        if n.op_type == "Constant" and n.output and values:
            found[n.output[0]] = values[0]
    return found


# Where scales and zero points of the result (QuantizeLinear) or of each operand are among the inputs.
_ROLES: dict[str, dict[str, tuple[int, int]]] = {
    "QuantizeLinear": {"output": (1, 2)},
    "DequantizeLinear": {"input": (1, 2)},
    "QLinearConv": {"input": (1, 2), "weight": (4, 5), "output": (6, 7)},
    "QLinearMatMul": {"input": (1, 2), "weight": (4, 5), "output": (6, 7)},
    "QGemm": {"input": (1, 2), "weight": (4, 5), "output": (7, 8)},
    "QLinearAdd": {"left": (1, 2), "right": (4, 5), "output": (6, 7)},
    "QLinearMul": {"left": (1, 2), "right": (4, 5), "output": (6, 7)},
    "QLinearConcat": {"output": (0, 1)},
    "QLinearWhere": {"left": (2, 3), "right": (5, 6), "output": (7, 8)},
    **{
        name: {"input": (1, 2), "output": (3, 4)}
        for name in (
            "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearSigmoid",
            "QLinearLeakyRelu", "QLinearSoftmax",
        )
    },
}  # fmt: skip


# What a dequantized constant is to the node that reads it, by operator and place among its operands.
_CONSTANTS: dict[tuple[str, int], str] = {
    (op, place): role
    for op in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    for place, role in enumerate(("weight", "weight", "bias"))
}


def _quantized(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], readers: Mapping[str, tuple[str, int]]
) -> list[dict[str, Any]]:
    if _domain(node) in DOMAINS:
        return _qonnx_quantized(node, constants, readers)
    roles = _ROLES.get(node.op_type, {})
    if node.op_type == "DequantizeLinear" and node.input[0] in constants:
        wide = constants[node.input[0]].data_type == onnx.TensorProto.INT32
        reader = readers.get(node.output[0], ("", 0))
        roles = {"bias" if wide else _CONSTANTS.get(reader, "constant"): roles["input"]}
    return [
        {"name": node_name(node), "op": node.op_type, "role": role, **_format(node, scale, zero, constants)}
        for role, (scale, zero) in roles.items()
        if scale < len(node.input) and node.input[scale]
    ]


# Where QONNX's operators have their scale, their zero point and the bit width of their result.
_QONNX: dict[str, tuple[int, int | None, int | None]] = {
    "Quant": (1, 2, 3), "IntQuant": (1, 2, 3), "BipolarQuant": (1, None, None), "Trunc": (1, 2, 4),
}  # fmt: skip


def _qonnx_quantized(
    node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], readers: Mapping[str, tuple[str, int]]
) -> list[dict[str, Any]]:
    if node.op_type not in _QONNX:
        return []
    scale, zero, width = _QONNX[node.op_type]
    second = node.op_type == "Trunc" and len(node.input) == 6  # version 2 puts its scale before the width
    tensors = [constants.get(node.input[i]) if i is not None and i < len(node.input) else None for i in (4 if second else scale, zero, 5 if second else width)]
    bits = 1 if width is None else _first(tensors[2])
    signed = {a.name: a.i for a in node.attribute}.get("signed", 1)
    kind = "bipolar" if width is None or (bits == 1 and signed) else f"{'int' if signed else 'uint'}{bits or ' of unknown width'}"
    role = _CONSTANTS.get(readers.get(node.output[0], ("", 0)), "constant") if node.input[0] in constants else "output"
    symmetric = True if zero is None else None if tensors[1] is None else not fold.read_tensor(tensors[1], node_name(node)).any()
    return [{
        "name": node_name(node), "op": node.op_type, "role": role, "type": kind, "bits": bits, "granularity": _granularity(tensors[0], {}),
        "symmetric": symmetric,
    }]  # fmt: skip


def _first(tensor: onnx.TensorProto | None) -> int | None:
    """The bit width that a tensor names, None where it is computed or no whole number."""
    values = fold.read_tensor(tensor, tensor.name).ravel().tolist() if tensor is not None else []
    return int(values[0]) if values and float(values[0]).is_integer() else None


def _format(node: onnx.NodeProto, scale: int, zero: int, constants: Mapping[str, onnx.TensorProto]) -> dict[str, Any]:
    zero_tensor = constants.get(node.input[zero]) if zero < len(node.input) else None
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    number = (
        zero_tensor.data_type
        if zero_tensor
        else attributes.get("output_dtype", 0)
        if node.op_type == "QuantizeLinear"
        else 0
    )
    data = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    kind = ELEMENT_TYPES.get(number) or ELEMENT_TYPES.get(data.data_type if data else 0) or "uint8"
    scale_tensor = constants.get(node.input[scale])
    return {
        "type": kind,
        "bits": arith.QType.of(kind).bits if kind in arith.RANGES else None,
        "granularity": _granularity(scale_tensor, attributes),
        "symmetric": _symmetric(node, zero, zero_tensor),
    }


def _granularity(scale: onnx.TensorProto | None, attributes: Mapping[str, Any]) -> str:
    if scale is None:
        return "computed at run time"
    if attributes.get("block_size"):
        return f"blocks of {attributes['block_size']} along axis {attributes.get('axis', 1)}"
    return "per tensor" if _count(scale.dims) == 1 else f"per channel ({_count(scale.dims)})"


def _symmetric(node: onnx.NodeProto, index: int, zero: onnx.TensorProto | None) -> bool | None:
    if index >= len(node.input) or not node.input[index]:
        return True
    return None if zero is None else not fold.read_tensor(zero, node_name(node)).astype("int64").any()
