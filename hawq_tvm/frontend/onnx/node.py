"""One ONNX node during the import: its operands, attributes and errors, and the table of operator handlers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from tvm import relax

from hawq_tvm import ops
from hawq_tvm.errors import ModelError

from .values import FLOAT_KINDS, Array, Constant, Result, Tensor, Value, storage_of

MICROSOFT = "com.microsoft"
T = TypeVar("T", int, float, str, list[int], list[float])
Emit = Callable[[relax.Expr, str], relax.Var]


@dataclass
class Node:
    """A node being imported.

    name: its name, or its first output's when unnamed.  inputs: one value per input, None where an optional one is
    left out.  sources: the names of the inputs, for messages.  graph_inputs: the names of the run-time inputs.
    bind: binds an expression to a new variable of a given name.
    """

    name: str
    op: str
    domain: str
    opset: int
    inputs: list[Value | None]
    sources: list[str]
    outputs: list[str]
    attributes: dict[str, onnx.AttributeProto]
    graph_inputs: frozenset[str]
    bind: Emit

    # -- errors --------------------------------------------------------------------------------------------

    def fail(self, message: str, *, expected: Any = "", found: Any = "", remedy: str = "") -> ModelError:
        """An error about this node."""
        text = f"{self.op} {message}"
        return ModelError(text, where=self.name, expected=str(expected), found=str(found), remedy=remedy)

    def need(self, condition: bool, message: str, *, expected: Any = "", found: Any = "", remedy: str = "") -> None:
        """Raise an error about this node unless the condition holds."""
        if not condition:
            raise self.fail(message, expected=expected, found=found, remedy=remedy)

    # -- attributes ----------------------------------------------------------------------------------------

    def attr(self, name: str, default: T) -> T:
        """An attribute, of the type of its default (a list of integers for [])."""
        if name not in self.attributes:
            return default
        value: Any = onnx.helper.get_attribute_value(self.attributes[name])
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        wanted = list if isinstance(default, list) else type(default)
        fits = isinstance(value, wanted) or (
            isinstance(value, Sequence) and wanted is list and not isinstance(value, str)
        )
        if not fits or (wanted is list and any(not isinstance(v, int | float) for v in value)):
            raise self.fail(
                f"has an attribute {name} of the wrong type", expected=wanted.__name__, found=type(value).__name__
            )
        result: Any = list(value) if wanted is list else value
        return result

    def flag(self, name: str, default: int) -> bool:
        """An attribute that is 0 or 1."""
        value = self.attr(name, default)
        self.need(value in (0, 1), f"has a {name} that is neither 0 nor 1", expected="0 or 1", found=value)
        return bool(value)

    def has(self, name: str) -> bool:
        """Whether an attribute is given."""
        return name in self.attributes

    # -- operands ------------------------------------------------------------------------------------------

    def given(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """Input `index`, which must be given."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise self.fail(f"lacks its input {index}")
        return value

    def optional(self, index: int) -> Value | None:
        """Input `index`, None when left out."""
        return self.inputs[index] if self.given(index) else None

    def source(self, index: int) -> str:
        """The name of input `index` in the model."""
        return self.sources[index] if index < len(self.sources) else f"input {index}"

    def expr(self, index: int) -> relax.Expr:
        """Input `index` as a Relax expression; constants in their Relax dtype."""
        return expression(self.value(index))

    def exprs(self) -> list[relax.Expr]:
        """All inputs as Relax expressions."""
        return [self.expr(i) for i in range(len(self.inputs))]

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of input `index`."""
        return self.value(index).shape

    def is_float(self, index: int = 0) -> bool:
        """Whether input `index` is a float tensor."""
        return self.value(index).kind in FLOAT_KINDS

    def constant(self, index: int, what: str) -> Array:
        """The array of input `index`; what: its role, for the error when it is not constant."""
        value = self.value(index)
        if isinstance(value, Constant):
            return value.array
        name = self.source(index)
        origin = "a graph input" if name in self.graph_inputs else "computed at run time"
        raise self.fail(
            f"has a {what} {name!r} that is {origin}", expected="a constant", found=f"{value.kind}{list(value.shape)}",
            remedy=f"make {name!r} an initializer of the model" if name in self.graph_inputs
            else "quantize the model statically, or fold the computation into a constant",
        )  # fmt: skip

    def ints(self, index: int, what: str) -> list[int]:
        """The integers of a constant input of rank 0 or 1."""
        array = self.constant(index, what)
        if array.dtype.kind not in "iu" or array.ndim > 1:
            raise self.fail(
                f"has a {what} that is not a list of integers", found=f"{array.dtype.name}{list(array.shape)}"
            )
        return [int(v) for v in array.ravel()]

    def axis(self, axis: int, rank: int) -> int:
        """An axis counted from the front; negative axes count from the end."""
        if not -rank <= axis < rank:
            raise self.fail("has an axis out of range", expected=f"{-rank} to {rank - 1}", found=str(axis))
        return axis % rank

    def axes(self, axes: Sequence[int], rank: int) -> list[int]:
        """Distinct axes counted from the front."""
        result = [self.axis(a, rank) for a in axes]
        self.need(len(set(result)) == len(result), "names an axis twice", found=list(axes))
        return result

    # -- results -------------------------------------------------------------------------------------------

    def emit(self, expr: relax.Expr, suffix: str) -> relax.Var:
        """Bind an intermediate result to a variable named after this node and a suffix."""
        return self.bind(expr, f"{self.name}.{suffix}")

    def like(self, expr: relax.Expr, index: int = 0) -> Tensor:
        """A result whose elements all come from input `index`: same element type, same bounds."""
        value = self.value(index)
        return Tensor(expr, value.kind, value.bounds if isinstance(value, Tensor) else None)


def expression(value: Value) -> relax.Expr:
    """A value as a Relax expression."""
    return value.expr if isinstance(value, Tensor) else ops.const(value.stored(), storage_of(value.kind))


def scalar(value: float, like: relax.Expr) -> relax.Expr:
    """A constant scalar in the dtype of an expression."""
    return relax.const(np.asarray(value, ops.dtype_of(like)), ops.dtype_of(like))


Handler = Callable[[Node], Result | list[Result]]


@dataclass(frozen=True)
class Entry:
    """A handler with what ONNX's own schemas do not say: arity outside the standard domain, and type checks of its own.

    inputs: least and most number of inputs.  checks_types: the handler checks the element types itself.
    """

    handler: Handler
    inputs: tuple[int, int] | None
    checks_types: bool


HANDLERS: dict[tuple[str, str], Entry] = {}


def handles(
    *names: str, domain: str = "", inputs: tuple[int, int] | None = None, checks_types: bool = False
) -> Callable[[Handler], Handler]:
    """Register a function as the handler of one or more operators of a domain."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[domain, name] = Entry(handler, inputs, checks_types)
        return handler

    return register
