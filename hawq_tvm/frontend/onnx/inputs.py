"""The run-time inputs of a graph: element types, and shapes with every symbolic dimension fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from hawq_tvm.errors import ModelError, UsageError

from .fold import type_name
from .values import ELEMENT_TYPES

SUPPORTED = frozenset(
    {
        "float32",
        "bool",
        "int2",
        "uint2",
        "int4",
        "uint4",
        "int8",
        "uint8",
        "int16",
        "uint16",
        "int32",
        "uint32",
        "int64",
    }
)
MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class Input:
    """A run-time input: name, ONNX element type, static shape."""

    name: str
    kind: str
    shape: tuple[int, ...]


def runtime_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph inputs without an initializer: those with one are constants with that value."""
    constants = {t.name for t in graph.initializer}
    return [i for i in graph.input if i.name not in constants]


def graph_inputs(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> list[Input]:
    """Every run-time input with its static shape.

    shapes: full shapes by input name; a symbolic dimension fixed for one input is fixed for the others too.
    Raises UsageError for an unknown name or a shape that contradicts the model, ModelError for a dimension left open.
    """
    values = runtime_inputs(graph)
    names = [v.name for v in values]
    for name in shapes:
        if name not in names:
            raise UsageError(
                "is not an input of the model",
                where=f"--shape {name}",
                expected=", ".join(names) or "no inputs",
                found=name,
            )
    fixed: dict[str, int] = {}
    for value in values:
        if value.name in shapes:
            _bind(value, [int(d) for d in shapes[value.name]], fixed)
    return [Input(v.name, _kind(v), _shape(v, shapes.get(v.name), fixed)) for v in values]


def declared_shape(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """The declared shape: sizes, and names (or "?") of symbolic dimensions; None when the rank is unknown."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    dims = value.type.tensor_type.shape.dim
    return [int(d.dim_value) if d.HasField("dim_value") else (d.dim_param or "?") for d in dims]


def _kind(value: onnx.ValueInfoProto) -> str:
    where = f"input {value.name!r}"
    if not value.type.HasField("tensor_type"):
        raise ModelError(
            "is not a tensor", where=where, expected="a dense tensor", found=str(value.type.WhichOneof("value"))
        )
    number = value.type.tensor_type.elem_type
    kind = ELEMENT_TYPES.get(number, "")
    if kind not in SUPPORTED:
        floats = kind in ("float16", "bfloat16", "float64")
        raise ModelError(
            "has an element type that is not supported",
            where=where,
            expected=", ".join(sorted(SUPPORTED)),
            found=type_name(number),
            remedy="convert the model's float tensors to float32" if floats else "",
        )
    return kind


def _bind(value: onnx.ValueInfoProto, given: list[int], fixed: dict[str, int]) -> None:
    where, declared = f"--shape {value.name}", declared_shape(value)
    if any(d < 1 for d in given):
        raise UsageError("has a size below 1", where=where, expected="positive sizes", found=_text(given))
    if declared is None:
        return
    if len(declared) != len(given):
        raise UsageError(
            "has the wrong number of dimensions", where=where, expected=_text(declared), found=_text(given)
        )
    for wanted, size in zip(declared, given, strict=True):
        if isinstance(wanted, int) and wanted != size:
            raise UsageError("contradicts the model", where=where, expected=_text(declared), found=_text(given))
        if isinstance(wanted, str) and wanted != "?" and fixed.setdefault(wanted, size) != size:
            raise UsageError(
                f"gives the dimension {wanted!r} a second size",
                where=where,
                expected=str(fixed[wanted]),
                found=str(size),
            )


def _shape(value: onnx.ValueInfoProto, given: Sequence[int] | None, fixed: Mapping[str, int]) -> tuple[int, ...]:
    where, declared = f"input {value.name!r}", declared_shape(value)
    if given is not None:
        shape = tuple(int(d) for d in given)
    else:
        known = [fixed.get(d, d) if isinstance(d, str) else d for d in declared or []]
        if declared is None or any(isinstance(d, str) for d in known):
            example = (
                "x".join(str(d if isinstance(d, int) else (224 if i > 1 else 1)) for i, d in enumerate(known))
                or "1x3x224x224"
            )
            raise ModelError(
                "has a shape that is not fixed",
                where=where,
                expected="every dimension known",
                found=_text(declared) if declared is not None else "no shape",
                remedy=f"pass --shape {value.name}={example}",
            )
        shape = tuple(int(d) for d in known)
    if any(d < 1 for d in shape) or math.prod(shape) > MAX_ELEMENTS:
        expected = f"sizes of at least 1, at most {MAX_ELEMENTS} elements"
        raise (ModelError if given is None else UsageError)("has an impossible shape", where=where, expected=expected, found=_text(shape))
    return shape


def _text(shape: Sequence[int | str]) -> str:
    return "x".join(str(d) for d in shape) or "a scalar"
