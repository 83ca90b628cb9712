"""Attention as a layer: two products of run-time tensors with a softmax between them.

scores = a b,  p = softmax(what is done to them, element by element),  p c and what is done to it, then movements
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import relax

from . import arith, ops
from .operators import is_anchor, is_elementwise

SOFTMAXES = ("hawq.softmax", "hawq.softmax_wide", "hawq.i_softmax")
RESHAPES = ("relax.reshape", "relax.flatten", "relax.squeeze", "relax.expand_dims")
MOVES = (*RESHAPES, "relax.permute_dims")
Values = Mapping[relax.Var, relax.Expr]


@dataclass(frozen=True, eq=False)
class Side:
    """A factor of a product: `data` less `zero`, 8-bit data as they are stored where that is how it is made."""

    data: relax.Expr
    zero: int = 0

    @staticmethod
    def of(values: Values, expr: relax.Expr) -> Side:
        """The side that an expression is: int16(x) - z is x less z; values: what variables stand for."""

        def definition(x: relax.Expr) -> relax.Expr:
            return values.get(x, x) if isinstance(x, relax.Var) else x

        value, zero = definition(expr), 0
        if ops.op_name(value) == "relax.subtract" and ops.is_const(value.args[1]):
            constant = ops.const_value(value.args[1])
            if constant.size != 1:
                return Side(expr)
            zero, value = int(constant.flat[0]), definition(value.args[0])
        if ops.op_name(value) != "relax.astype" or ops.dtype_of(value) != "int16":
            return Side(expr)
        return Side(value.args[0], zero) if ops.dtype_of(value.args[0]) in ("int8", "uint8") else Side(expr)

    @property
    def dtype(self) -> str:
        """The type of the data."""
        return ops.dtype_of(self.data)

    @property
    def reach(self) -> int:
        """The largest magnitude of an element."""
        return max(abs(end - self.zero) for end in arith.RANGES[self.dtype])


@dataclass(frozen=True, eq=False)
class Attention:
    """The parts of such a layer.

    before: what does not depend on the scores.  first, softmax, second: its anchors.  rows: what is computed of the
    scores, element by element, the anchors among it.  after: the movements at the end.  factors: of the first product,
    then of the second.
    """

    before: tuple[relax.VarBinding, ...]
    first: relax.VarBinding
    softmax: relax.VarBinding
    second: relax.VarBinding
    rows: tuple[relax.VarBinding, ...]
    after: tuple[relax.VarBinding, ...]
    factors: tuple[tuple[Side, Side], tuple[Side, Side]]

    @property
    def lead(self) -> tuple[int, ...]:
        """The dimensions before the last two: batch and heads."""
        return ops.shape_of(self.first.var)[:-2]

    @property
    def count(self) -> int:
        """Rows of the scores."""
        return int(ops.shape_of(self.first.var)[-2])

    @staticmethod
    def of(bindings: Sequence[relax.VarBinding]) -> Attention | str:
        """The parts of a layer, whose result is the last of its bindings, or a sentence that says why it is no
        attention.
        """
        anchors = [b for b in bindings if is_anchor(ops.op_name(b.value))]
        names = [ops.op_name(b.value) for b in anchors]
        if len(names) != 3 or names[0] != "relax.matmul" or names[1] not in SOFTMAXES or names[2] != names[0]:
            return "not a product, its softmax, and the product of that."
        first, softmax, second = anchors
        shape, result = ops.shape_of(first.var), ops.shape_of(second.var)
        factors = [*first.value.args, *second.value.args]
        if len(shape) < 3 or any(ops.shape_of(x)[:-2] != shape[:-2] for x in factors):
            return "factors without batches, or of different ones."
        if any(ops.dtype_of(b.var) != "int32" for b in (first, second)) or any(
            arith.RANGES[ops.dtype_of(x)][1] >= 1 << 15 for x in factors
        ):
            return "factors of more than 16 bits, or sums of more than 32."
        if int(softmax.value.attrs["axis"]) % len(shape) != len(shape) - 1:
            return "a softmax along another axis than the last."
        of_rows: set[relax.Var] = {first.var}
        before, rows, after = [], [first], []
        for b in bindings:
            name = ops.op_name(b.value)
            if b.var.same_as(first.var):
                continue
            if not any(v in of_rows for v in ops.variables(b.value)):
                before.append(b)
                continue
            of_rows.add(b.var)
            if name in MOVES:
                after.append(b)
            elif after or not (is_elementwise(name) or b.var.same_as(softmax.var) or b.var.same_as(second.var)):
                return f"{name} on rows or after a movement."
            elif ops.shape_of(b.var) != (shape if second not in rows and b is not second else result):
                return "rows of different lengths."
            else:
                rows.append(b)
        if any(x in of_rows for x in (*first.value.args, second.value.args[1])) or second.value.args[0] not in of_rows:
            return "a second product of something else."
        values = {b.var: b.value for b in bindings}
        a, b, p, c = (Side.of(values, x) for x in factors)
        return Attention(tuple(before), first, softmax, second, tuple(rows), tuple(after), ((a, b), (p, c)))
