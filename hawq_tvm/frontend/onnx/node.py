"""One ONNX node during the import: its attributes beside what every frontend's operators have, and the table of
handlers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import onnx

from hawq_tvm.frontend.common.node import Emit, Operation, expression, scalar

from .values import Result

MICROSOFT = "com.microsoft"
T = TypeVar("T", int, float, str, list[int], list[float])


@dataclass
class Node(Operation):
    """A node being imported; unnamed ones are called after their first output."""

    domain: str
    opset: int
    outputs: list[str]
    attributes: dict[str, onnx.AttributeProto]

    def make_constant(self, name: str) -> str:
        """The remedy for a graph input that must be constant."""
        return f"make {name!r} an initializer of the model"

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
        numbers = [v for v in (value if wanted is list else [value]) if isinstance(v, float)]
        # Clip's bounds alone may be infinite.
        if any(math.isnan(v) or (math.isinf(v) and self.op != "Clip") for v in numbers):
            raise self.fail(
                f"has an attribute {name} that is not a finite number", found=str(value), remedy="correct the model"
            )
        return cast("T", list(value) if wanted is list else value)

    def flag(self, name: str, default: int) -> bool:
        """An attribute that is 0 or 1."""
        value = self.attr(name, default)
        self.need(value in (0, 1), f"has a {name} that is neither 0 nor 1", expected="0 or 1", found=value)
        return bool(value)

    def has(self, name: str) -> bool:
        """Whether an attribute is given."""
        return name in self.attributes


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


__all__ = ["HANDLERS", "MICROSOFT", "Emit", "Entry", "Handler", "Node", "expression", "handles", "scalar"]
