"""The run-time inputs of a model: element types, and shapes with every symbolic dimension fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.limits import MAX_ELEMENTS

SUPPORTED = frozenset(
    {
        "float32",
        "float16",
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
# Channels that pictures have.
COLOURS = (1, 3, 4)


@dataclass(frozen=True)
class Declared:
    """An input as the model declares it: sizes, and names (or "?") of symbolic dimensions; None when the rank is
    unknown.
    """

    name: str
    kind: str
    dims: list[int | str] | None


@dataclass(frozen=True)
class Input:
    """A run-time input: name, element type, static shape."""

    name: str
    kind: str
    shape: tuple[int, ...]


def fixed_inputs(
    inputs: Sequence[Declared], shapes: Mapping[str, Sequence[int]]
) -> tuple[list[Input], list[ModelError]]:
    """The inputs with static shapes, and what is wrong with the others.

    shapes: full shapes by input name; a symbolic dimension fixed for one input is fixed for the others too.
    Raises UsageError for an unknown name or a shape that contradicts the model.
    """
    found: list[Input] = []
    failures: list[ModelError] = []
    for value in bound_inputs(inputs, shapes):
        try:
            found.append(Input(value.name, value.kind, _shape(_checked(value), value.name in shapes)))
        except ModelError as e:
            failures.append(e)
    return found, failures


def bound_inputs(inputs: Sequence[Declared], shapes: Mapping[str, Sequence[int]]) -> list[Declared]:
    """Every input with the sizes that `shapes` gives in place of its symbolic dimensions; others may stay open.

    shapes: full shapes by input name; a symbolic dimension fixed for one input is fixed for the others too.
    Raises UsageError for an unknown name or a shape that contradicts the model.
    """
    names = [v.name for v in inputs]
    for name in shapes:
        if name not in names:
            known = ", ".join(names) or "no inputs"
            raise UsageError("is not an input of the model", where=f"--shape {name}", expected=known, found=name)
    sizes: dict[str, int] = {}
    for value in inputs:
        if value.name in shapes:
            _bind(value, [int(d) for d in shapes[value.name]], sizes)
    bound = []
    for value in inputs:
        dims: list[int | str] | None = value.dims
        if value.name in shapes:
            dims = [int(d) for d in shapes[value.name]]
        elif dims is not None:
            dims = [sizes.get(d, d) if isinstance(d, str) else d for d in dims]
        bound.append(Declared(value.name, value.kind, dims))
    return bound


def _checked(value: Declared) -> Declared:
    if value.kind.endswith("_type"):
        raise ModelError("is not a tensor", where=f"input {value.name!r}", expected="a dense tensor", found=value.kind)
    if value.kind not in SUPPORTED:
        remedies = {
            "float64": "convert the model's float tensors to float32",
            "bfloat16": "declare it float32 and put a Cast to bfloat16 behind it: .npy files and C know no bfloat16",
        }
        raise ModelError(
            "has an element type that is not supported",
            where=f"input {value.name!r}",
            expected=f"a dense tensor of {', '.join(sorted(SUPPORTED))}",
            found=value.kind,
            remedy=remedies.get(value.kind, ""),
        )
    return value


def _bind(value: Declared, given: list[int], fixed: dict[str, int]) -> None:
    where, declared = f"--shape {value.name}", value.dims
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


def _shape(value: Declared, given: bool) -> tuple[int, ...]:
    """The static shape; given: by the user, not by the model."""
    where, dims = f"input {value.name!r}", value.dims
    if dims is None or any(isinstance(d, str) for d in dims):
        raise ModelError(
            "has a shape that is not fixed",
            where=where,
            expected="every dimension known",
            found=_text(dims) if dims is not None else "no shape",
            remedy=f"pass --shape {value.name}={example(dims)}",
        )
    shape = tuple(int(d) for d in dims)
    if any(d < 1 for d in shape) or math.prod(shape) > MAX_ELEMENTS:
        expected = f"sizes of at least 1, at most {MAX_ELEMENTS} elements"
        error = UsageError if given else ModelError
        raise error("has an impossible shape", where=where, expected=expected, found=_text(shape))
    return shape


def example(dims: Sequence[int | str] | None) -> str:
    """A shape to suggest for dimensions of which some are open: a picture where there are four of them."""
    rank = 4 if dims is None else len(dims)
    dims = dims or ["?"] * rank
    sizes = ("1", *["128"] * (rank - 1)) if rank != 4 else ("1", "3", "224", "224")
    if rank == 4 and isinstance(dims[3], int):
        alone = isinstance(dims[1], str) and isinstance(dims[2], str)
        if alone or (dims[3] in COLOURS and dims[1] not in COLOURS):
            sizes = ("1", "224", "224", "3")  # channels last
    return "x".join(str(d) if isinstance(d, int) else size for d, size in zip(dims, sizes, strict=True))


def _text(shape: Sequence[int | str]) -> str:
    return "x".join(str(d) for d in shape) or "a scalar"
