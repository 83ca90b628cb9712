"""What of a model is float: outputs, and the operators of a head or tail that `--allow-float-tail` leaves outside the
integer region.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import ops, stages

from . import border
from .values import TENSORS, Constant, Context, Joined, Moved, NotLowered, Value


class _Failed:
    """Stands for the result of a layer that failed, so that its consumers do not complain again."""


FAILED = _Failed()


def is_cast(call: relax.Call) -> bool:
    """Whether a movement only changes the type."""
    return ops.op_name(call) == "relax.astype"


def is_float(value: Any) -> bool:
    """Whether a value is a float tensor of the new module."""
    return isinstance(value, relax.Var) and stages.is_float(value)


class Floats:
    """Float tensors of the new module.

    allowed: whether a head or tail is.  outside: the names of its operators.  made: which operator made a value: a
    tail joins it under that name.
    """

    def __init__(self, ctx: Context, allowed: bool) -> None:
        self.ctx, self.allowed = ctx, allowed
        self.outside: list[str] = []
        self.made: dict[Joined, str] = {}
        # What an output and a tail read is converted once.
        self.converted: dict[Value, relax.Expr] = {}

    def keep(self, call: relax.Call, values: list[Any], resolve: Callable[[relax.Expr], Any]) -> relax.Expr:
        """An operator of the head or tail, of arguments that `resolve` gives where they are fields of a tuple."""
        layer = self.ctx.layer
        args: list[relax.Expr] = []
        for i, v in enumerate(values):
            self.ctx.layer = f"{layer}.in{i}"
            fields = [self.expression(resolve(f), "input") for f in v.fields] if isinstance(v, relax.Tuple) else None
            args.append(relax.Tuple(fields) if fields is not None else self.expression(v, "input"))
        self.ctx.layer = layer
        var = self.ctx.emit_float(relax.Call(call.op, args, attrs=call.attrs))
        self.outside.append(var.name)
        return var

    def expression(self, value: Any, role: str) -> relax.Expr:
        """A Relax expression for a value where the integer region ends: integers are dequantized (A1)."""
        if value is FAILED:
            return relax.const(0.0)
        if isinstance(value, Constant):
            return relax.const(value.doubles.astype(np.float32))
        if isinstance(value, Moved):
            expr = value.base
            if value.ends is not None:
                expr = self.ctx.emit_float(relax.op.clip(expr, *value.ends))
                self.outside.append(expr.name)
            for m in value.moves:
                expr = self.ctx.emit(relax.Call(m.op, [expr, *m.args[1:]], attrs=m.attrs))
                self.outside.append(expr.name)
            return expr
        if not isinstance(value, TENSORS):
            return value
        if value not in self.converted:
            try:
                self.converted[value] = border.dequantized(self.ctx, value, f"dequantize for the {role}")
            except NotLowered:
                if not self.allowed or not isinstance(value, Joined):
                    raise
                self.converted[value] = self._joined(value)
        return self.converted[value]

    def _joined(self, value: Joined) -> relax.Expr:
        """What only a float tail joins, under the name of the operator that made it: its parts have other scales."""
        asked, layer = self.ctx.layer, self.made.get(value, self.ctx.layer)
        parts = []
        for i, part in enumerate(value.parts):
            self.ctx.layer = f"{layer}.in{i}"
            parts.append(self.expression(part, "input"))
        self.ctx.layer = layer
        joined = self.ctx.emit_float(value.join(parts))
        self.outside.append(joined.name)
        self.ctx.layer = asked
        return joined
