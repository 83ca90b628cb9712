"""What the name of a tensor stands for during the import: a constant array or a Relax expression."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.core import arith, ops

Array = NDArray[Any]

FLOAT_KINDS = frozenset({"float32", "float16", "bfloat16"})
QUANTIZED = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16")
NARROW = {"int2": "int8", "int4": "int8", "uint2": "uint8", "uint4": "uint8"}


def storage_of(kind: str) -> str:
    """The Relax dtype that holds an element type: 8 bits for fewer, float32 for every float.

    A float16 or bfloat16 tensor stands for real numbers; only inputs and outputs have its own bits (`Writer`).
    """
    return "float32" if kind in FLOAT_KINDS else NARROW.get(kind, kind)


@dataclass(frozen=True)
class Constant:
    """An array known while importing, in the element type of the model (sub-byte types as ml_dtypes arrays)."""

    array: Array

    @property
    def kind(self) -> str:
        """The element type, "float32" or "int4" for example."""
        return str(self.array.dtype.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.array.shape)

    def stored(self) -> Array:
        """The array in its Relax dtype."""
        return np.ascontiguousarray(self.array.astype(storage_of(self.kind))).reshape(self.array.shape)


@dataclass(frozen=True)
class Tensor:
    """A value that the module computes, most often at run time.

    kind: its element type.  bounds: a narrower range its integers are known to keep.  narrow: how to
    quantize again with other bounds, when this is the output of a quantize.  known: computes what it holds, for one
    that depends on constants alone: quantized weights stay expressions, and other operands may need their values.
    """

    expr: relax.Expr
    kind: str
    bounds: tuple[int, int] | None = None
    narrow: Callable[[int, int], relax.Call] | None = None
    known: Callable[[], Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The static shape of the expression."""
        return ops.shape_of(self.expr)

    @property
    def range(self) -> tuple[int, int]:
        """The integers the tensor may hold."""
        return self.bounds or arith.RANGES[self.kind]


@dataclass(frozen=True)
class Failed:
    """The output of a node that could not be imported; what reads it is skipped."""


Value: TypeAlias = Constant | Tensor
Result: TypeAlias = Constant | Tensor | relax.Expr
