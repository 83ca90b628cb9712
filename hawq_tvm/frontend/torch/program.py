"""An exported program without PyTorch: plain names, numbers and arrays, which is all that the importer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hawq_tvm.contract import Promise

from ..common.inputs import Declared
from ..common.values import Array

# The operators of PT2E quantization; torch.ao registers them, no model defines them.
QUANTIZATION = "quantized_decomposed."


@dataclass(frozen=True)
class Ref:
    """The result of another call, a constant or an input, by its name in the program."""

    name: str


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    name: what the program calls its result.  layer: what the user calls it, its module's path where one operator alone has it.
    op: the operator without its overload, "aten.conv2d" for example.  arguments: by the names of the operator's schema, defaults
    filled in; tensors are Refs, dtypes their names.
    """

    name: str
    layer: str
    op: str
    overload: str
    arguments: dict[str, Any]

    def refs(self) -> list[Ref]:
        """Every name among the arguments, in the schema's order."""
        return [r for v in self.arguments.values() for r in (v if isinstance(v, list) else [v]) if isinstance(r, Ref)]


@dataclass(frozen=True)
class Program:
    """A model.

    constants: parameters, buffers and lifted tensors by name.  titles: what the user calls the constants.  literals: inputs that were
    exported as numbers.  limits: the smallest and largest size of symbolic dimensions.  outputs: their names and what they are.
    promises: what the exporter says of a result's type and sizes, by the call's name.
    """

    inputs: tuple[Declared, ...]
    constants: dict[str, Array]
    titles: dict[str, str]
    literals: dict[str, Any]
    limits: dict[str, tuple[int, int]]
    calls: tuple[Call, ...]
    outputs: tuple[tuple[str, Any], ...]
    torch_version: str
    promises: dict[str, Promise]
