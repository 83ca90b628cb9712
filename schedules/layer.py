"""A fused layer function as the rules see it: one anchor, its prologue and its epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.operators import is_anchor, is_elementwise, reads_tables

from .narrow import width_of


@dataclass(frozen=True, eq=False)
class Layer:
    """One private Relax function of a PACKED module.

    name: the layer's name in the user's model.  func: parameters are the tensors from other layers; constants
    live in the body.
    """

    name: str
    func: relax.Function

    @staticmethod
    def of(gv: tvm.ir.GlobalVar, func: relax.Function) -> Layer:
        """The layer of a private function; the function's own name stands in where no layer name is given."""
        attrs = func.attrs or {}
        return Layer(str(attrs["hawq.layer"]) if "hawq.layer" in attrs else gv.name_hint, func)

    @cached_property
    def bindings(self) -> tuple[relax.VarBinding, ...]:
        """The bindings in order of execution."""
        return tuple(stages.bindings(self.func))

    @cached_property
    def anchors(self) -> tuple[relax.VarBinding, ...]:
        """The bindings whose operator reduces."""
        return tuple(b for b in self.bindings if is_anchor(ops.op_name(b.value)))

    @property
    def anchor(self) -> relax.VarBinding | None:
        """The only binding that reduces, or None when there is none or several."""
        return self.anchors[0] if len(self.anchors) == 1 else None

    @property
    def anchor_call(self) -> relax.Call | None:
        """The call of the only anchor."""
        return self.anchor.value if self.anchor is not None else None

    def definition(self, expr: relax.Expr) -> relax.Expr:
        """The expression that a variable of the body stands for; other expressions as they are."""
        values = {b.var: b.value for b in self.bindings}
        while isinstance(expr, relax.Var) and expr in values:
            expr = values[expr]
        return expr

    def is_parameter(self, expr: relax.Expr) -> bool:
        """Whether an expression is a tensor from another layer, as it is."""
        return self.definition(expr) in set(self.func.params)

    def is_four_bits(self, expr: relax.Expr) -> bool:
        """Whether an expression is a constant stored in 4 bits."""
        value = self.definition(expr)
        return ops.op_name(value) == "hawq.unpack_int4" and ops.is_const(value.args[0])

    def is_constant(self, expr: relax.Expr) -> bool:
        """Whether an expression is a constant, 4-bit ones included."""
        return ops.is_const(self.definition(expr)) or self.is_four_bits(expr)

    def constant(self, expr: relax.Expr) -> np.ndarray[Any, Any]:
        """The values of a constant expression; 4-bit ones opened, once, so that they are read-only."""
        value = self.definition(expr)
        if not self.is_four_bits(expr):
            return ops.const_value(value)
        if value not in self._opened:
            signed = bool(int(value.attrs["signed"]))
            values = arith.unpack_int4(ops.const_value(value.args[0]), ops.shape_of(value), signed)
            values.flags.writeable = False
            self._opened[value] = values
        return self._opened[value]

    @cached_property
    def _opened(self) -> dict[relax.Expr, np.ndarray[Any, Any]]:
        return {}

    def width(self, expr: relax.Expr) -> int:
        """The bits that a constant's values need, of those that kernels store; 8 where it is none."""
        return width_of(self.constant(expr)) if self.is_constant(expr) else 8

    @property
    def packs_result(self) -> bool:
        """Whether the layer's last step is to pack its elements two to a byte."""
        return ops.op_name(self.definition(self.func.body.body)) == "hawq.pack_int4"

    @property
    def epilogue(self) -> tuple[relax.VarBinding, ...]:
        """The bindings after the only anchor."""
        anchor = self.anchor
        assert anchor is not None
        return self.bindings[self.bindings.index(anchor) + 1 :]

    def epilogue_moves_data(self, packs: bool = False) -> str | None:
        """None when everything after the anchor is element-wise on the anchor's shape, else a sentence.

        packs: the last step may be to pack the result.
        """
        anchor = self.anchor
        assert anchor is not None
        for b in self.epilogue:
            name = ops.op_name(b.value)
            if packs and name == "hawq.pack_int4" and self.packs_result:
                continue
            if name and (not is_elementwise(name) or ops.shape_of(b.var) != ops.shape_of(anchor.var)):
                return f"{name} after the {ops.op_name(anchor.value)} is not element-wise on its shape."
        return None

    def constants_over_rows(self) -> str | None:
        """A sentence where the epilogue has a constant that differs from row to row of its last dimension."""
        for b in self.epilogue:
            if isinstance(b.value, relax.Call) and not reads_tables(ops.op_name(b.value)):
                for arg in _flat(b.value.args):
                    if ops.is_const(arg) and ops.const_value(arg).size not in (1, *ops.shape_of(arg)[-1:]):
                        return "a constant that differs from pixel to pixel."
        return None


def _flat(args: Sequence[relax.Expr]) -> list[relax.Expr]:
    return [f for a in args for f in (_flat(a.fields) if isinstance(a, relax.Tuple) else [a])]


def reach_of(weights: np.ndarray[Any, Any], largest: int) -> int:
    """The largest magnitude of a partial sum of data of at most `largest` times the weights of one output (the last
    axis).
    """
    columns = weights.reshape(-1, weights.shape[-1]).astype(np.int64)
    return largest * int(np.abs(columns).sum(0).max(initial=0))
