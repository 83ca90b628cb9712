"""The run-time inputs of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.inputs import SUPPORTED, Declared, Input, fixed_inputs

from .fold import type_name
from .values import ELEMENT_TYPES


def runtime_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs without an initializer: those with one are constants with that value."""
    constants = {t.name for t in graph.initializer}
    return [i for i in graph.input if i.name not in constants]


def graph_inputs(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> tuple[list[Input], list[ModelError]]:
    """The run-time inputs with static shapes, and what is wrong with the others; see `fixed_inputs`."""
    return fixed_inputs(graph_declared(graph), shapes)


def graph_declared(graph: onnx.GraphProto) -> list[Declared]:
    """The run-time inputs as the model declares them."""
    return [Declared(v.name, _kind(v), declared_shape(v)) for v in runtime_inputs(graph)]


def declared_shape(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """The declared shape: sizes, and names (or "?") of symbolic dimensions; None when the rank is unknown.

    A size below 1 is one that the exporter did not know: a tensor without elements is no input.
    """
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return [int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or "?") for d in dims]


def with_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | None]]) -> onnx.ModelProto:
    """A copy of a model with sizes given to open dimensions of its inputs; None leaves one open.

    A dimension of the same name has the same size in outputs and between them; sizes below 1 become open.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    sizes: dict[str, int] = {}
    for value in runtime_inputs(made.graph):
        dims = value.type.tensor_type.shape.dim
        if value.name in shapes and not value.type.tensor_type.HasField("shape"):
            dims.extend(onnx.TensorShapeProto.Dimension() for _ in shapes[value.name])
        for dim, size in zip(dims, shapes.get(value.name, ())):
            if size is not None:
                sizes[dim.dim_param] = dim.dim_value = size
    for value in (*made.graph.input, *made.graph.output, *made.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in sizes:
                dim.dim_value = sizes[dim.dim_param]
            elif dim.HasField("dim_value") and dim.dim_value < 1:
                dim.Clear()
    return made


def _kind(value: onnx.ValueInfoProto) -> str:
    """The element type of a dense tensor, else what it is."""
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value") or "no_type")
    number = value.type.tensor_type.elem_type
    return ELEMENT_TYPES.get(number) or type_name(number)


__all__ = ["SUPPORTED", "Declared", "Input", "declared_shape", "graph_inputs", "runtime_inputs"]
