"""One call of an operator during the import: its arguments by name, and the table of operator handlers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from ..common.node import Operation, expression, scalar
from ..common.values import FLOAT_KINDS, Array, Constant, Result, Tensor, Value


@dataclass
class Node(Operation):
    """A call being imported; `inputs` are its tensors in the order of the schema.

    arguments: everything by the schema's names, tensors as values.
    """

    overload: str
    arguments: dict[str, Any]

    def make_constant(self, name: str) -> str:
        """The remedy for a graph input that must be constant."""
        return f"make {name!r} a parameter or buffer of the model"

    def has(self, name: str) -> bool:
        """Whether an argument is there and not None."""
        return self.arguments.get(name) is not None

    def number(self, name: str, default: float | None = None) -> float:
        """A number among the arguments."""
        value = self.arguments.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(f"has an argument {name} that is no number", expected="a number", found=_shown(value))
        # Bounds alone may be infinite; a scale is judged by who reads it.
        if name != "scale" and (math.isnan(value) or (math.isinf(value) and name not in ("min", "max", "min_val", "max_val"))):
            raise self.fail(f"has an argument {name} that is not a finite number", found=str(value), remedy="correct the model")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer among the arguments."""
        value = self.number(name, default)
        self.need(isinstance(value, int), f"has an argument {name} that is no integer", expected="an integer", found=value)
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A truth value among the arguments."""
        value = self.arguments.get(name)
        return default if value is None else bool(value)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A list of integers among the arguments; a lone integer is a list of one."""
        value = self.arguments.get(name)
        value = default if value is None else value
        values = [value] if isinstance(value, int) else value
        if not isinstance(values, list | tuple) or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise self.fail(f"has an argument {name} that is no list of integers", expected="integers", found=_shown(value))
        return list(values)

    def sizes(self, name: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """One positive integer or zero per spatial axis; a lone one stands for all, an empty list for the default."""
        values = self.integers(name, None if default is None else [default])
        values = [default] if not values and default is not None else values
        values = values * count if len(values) == 1 else values
        if len(values) != count or any(v < 0 for v in values):
            raise self.fail(f"has a {name} that does not fit", expected=f"{count} integers of at least 0", found=str(values))
        return tuple(values)

    def tensor(self, name: str) -> Value | None:
        """A tensor among the arguments, None when it is left out."""
        value = self.arguments.get(name)
        if value is not None and not isinstance(value, Constant | Tensor):
            raise self.fail(f"has an argument {name} that is no tensor", expected="a tensor", found=_shown(value))
        return value

    def array(self, name: str) -> Array:
        """The array of a constant tensor among the arguments."""
        value = self.tensor(name)
        if value is None:
            raise self.fail(f"lacks its {name}")
        return self.constant(next(i for i, v in enumerate(self.inputs) if v is value), name)

    def operand(self, name: str) -> relax.Expr:
        """A float tensor or number among the arguments, as an expression."""
        value = self.arguments.get(name)
        if isinstance(value, Constant | Tensor):
            self.need_float(value)
            return expression(value)
        return relax.const(np.float32(self.number(name)), "float32")

    def need_float(self, value: Value) -> None:
        """Raise ModelError unless a value is a float tensor."""
        self.need(
            value.kind in FLOAT_KINDS, "is supported on float tensors only", expected="float32", found=value.kind,
            remedy="dequantize its operands first",
        )  # fmt: skip

    def x(self) -> relax.Expr:
        """Input 0, a float tensor."""
        self.need_float(self.value(0))
        return self.expr(0)


def _shown(value: Any) -> str:
    if isinstance(value, Constant | Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return "nothing" if value is None else str(value)[:80]


Handler = Callable[[Node], Result | list[Result]]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a function as the handler of operators, named without their overloads."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


__all__ = ["HANDLERS", "Handler", "Node", "expression", "handles", "scalar"]
