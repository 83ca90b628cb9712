"""The run-time inputs of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from hawq_tvm.errors import ModelError

from ..common.inputs import SUPPORTED, Declared, Input, fixed_inputs
from .fold import type_name
from .values import ELEMENT_TYPES


def runtime_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs without an initializer: those with one are constants with that value."""
    constants = {t.name for t in graph.initializer}
    return [i for i in graph.input if i.name not in constants]


def graph_inputs(
    graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]
) -> tuple[list[Input], list[ModelError]]:
    """The run-time inputs with static shapes, and what is wrong with the others; see `fixed_inputs`."""
    return fixed_inputs([Declared(v.name, _kind(v), declared_shape(v)) for v in runtime_inputs(graph)], shapes)


def declared_shape(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """The declared shape: sizes, and names (or "?") of symbolic dimensions; None when the rank is unknown."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return [int(d.dim_value) if d.HasField("dim_value") else (d.dim_param or "?") for d in dims]


def _kind(value: onnx.ValueInfoProto) -> str:
    """The element type of a dense tensor, else what it is."""
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value") or "no_type")
    number = value.type.tensor_type.elem_type
    return ELEMENT_TYPES.get(number) or type_name(number)


__all__ = ["SUPPORTED", "Declared", "Input", "declared_shape", "graph_inputs", "runtime_inputs"]
