"""One operator of a model during the import: its operands, errors and intermediate results, whatever the dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.core.errors import ModelError

from .values import FLOAT_KINDS, Array, Constant, Tensor, Value, storage_of

Emit = Callable[[relax.Expr, str], relax.Var]


@dataclass
class Operation:
    """An operator being imported.

    name: its layer's name.  op: what its dialect calls it.  inputs: one value per input, None where an optional one is
    left out.  sources: the names of the inputs, for messages.  graph_inputs: the names of the run-time inputs.
    bind: binds an expression to a new variable of a given name.
    """

    name: str
    op: str
    inputs: list[Value | None]
    sources: list[str]
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
        if value.known is not None:
            try:
                return value.known()
            except RecursionError:
                raise self.fail(
                    f"has a {what} {name!r} that very many operators compute", remedy="fold them into a constant"
                ) from None
        outside = name in self.graph_inputs
        raise self.fail(
            f"has a {what} {name!r} that is {'a graph input' if outside else 'computed at run time'}",
            expected="a constant",
            found=f"{value.kind}{list(value.shape)}",
            remedy=self.make_constant(name)
            if outside
            else "quantize the model statically, or fold the computation into a constant",
        )

    def make_constant(self, name: str) -> str:
        """The remedy for a run-time input that must be constant."""
        return f"make {name!r} a constant of the model"

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
        self.need(rank > 0, "needs an axis", expected="a tensor of rank 1 or more", found="a scalar")
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
