"""A product of two tensors of bytes that are computed at run time, as instructions for bytes multiply it.

With A and B what the factors are too large by as they are multiplied (a zero point, and 128 where a sign is turned),

    sum (a - A) (b - B) = sum a b - B sum a - A sum (b - B)

exactly: sums along the rows of the left factor and down the columns of the right one make up for A and B (A10b).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import relax, te, tirx

from hawq_tvm.core import arith, ops
from hawq_tvm.core.attention import Side
from schedules.emit.emit import Operand, immediate
from schedules.layer import Layer

BYTES = ("uint8", "int8")
TURN = {("uint8", "int8"): -128, ("int8", "uint8"): 128}
Operands = Callable[[relax.Expr], Operand]


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a matrix product, their types as they are multiplied, and what is added to them first.

    length: of what is summed.
    """

    left: Side
    right: Side
    types: tuple[str, str]
    length: int
    added: tuple[int, int] = (0, 0)

    @staticmethod
    def of(layer: Layer, call: relax.Call) -> Factors | None:
        """The factors of a product of two tensors that are computed at run time, both of bytes; None of any other."""
        if ops.op_name(call) != "relax.matmul" or ops.dtype_of(call) != "int32":
            return None
        values = {b.var: b.value for b in layer.bindings}
        left, right = (Side.of(values, x) for x in call.args)
        known = any(layer.is_constant(x) for x in (*call.args, left.data, right.data))
        if known or left.dtype not in BYTES or right.dtype not in BYTES:
            return None
        return Factors(left, right, (left.dtype, right.dtype), ops.shape_of(call.args[0])[-1])

    def turned(self, left: str, right: str) -> Factors:
        """The same as bytes of other signs, or in 16 bits, which need no zero point."""
        added = [
            -side.zero if to == "int16" else TURN.get((side.dtype, to), 0)
            for side, to in ((self.left, left), (self.right, right))
        ]
        return replace(self, types=(left, right), added=(added[0], added[1]))

    @property
    def stored(self) -> tuple[str, str]:
        """The types of the left factor as it lies in memory and of the right one as it is packed."""
        return self.left.dtype, self.types[1]

    @property
    def above(self) -> tuple[int, int]:
        """What the factors are too large by as they are multiplied."""
        return self.left.zero + self.added[0], self.right.zero + self.added[1]

    def too_long(self) -> str | None:
        """A sentence where a sum, or one that makes up for it, may leave 32 bits."""

        def largest(side: Side, added: int) -> int:
            return max(abs(bound + added) for bound in arith.RANGES[side.dtype])

        a, b = largest(self.left, self.added[0]), largest(self.right, self.added[1])
        above_a, above_b = map(abs, self.above)
        reach = self.length * (a * b + above_b * a + above_a * largest(self.right, -self.right.zero))
        return "sums of bytes that may leave 32 bits." if reach > arith.RANGES["int32"][1] else None

    def element(self, operand: Operands, number: int) -> Callable[[Sequence[Any]], tirx.Expr]:
        """An element of the left (0) or the right (1) factor as it is multiplied; operand: what the data are."""
        side, added, to = (self.left, self.right)[number], self.added[number], self.types[number]
        x = operand(side.data)

        def at(index: Sequence[Any]) -> tirx.Expr:
            value = x.at(index)
            return (value.astype("int32") + immediate(added, "int32")).astype(to) if added else value.astype(to)

        return at

    def sums(self, operand: Operands) -> dict[str, te.Tensor]:
        """The stages "across", of rows, and "down", of columns, as far as there is something to make up for."""
        above_a, above_b = self.above
        (*rows, _), (*own, _, width) = (ops.shape_of(side.data) for side in (self.left, self.right))
        k, made = te.reduce_axis((0, self.length), "k"), {}
        if above_b:
            left = self.element(operand, 0)
            made["across"] = te.compute(rows, lambda *i: te.sum(left([*i, k]).astype("int32"), axis=k), name="across")
        if above_a:
            right, zero = operand(self.right.data), immediate(self.right.zero, "int32")
            made["down"] = te.compute(
                (*own, width),
                lambda *i: te.sum(right.at([*i[:-1], k, i[-1]]).astype("int32") - zero, axis=k),
                name="down",
            )
        return made

    def finished(self, raw: tirx.Expr, index: Sequence[Any], sums: Mapping[str, te.Tensor]) -> tirx.Expr:
        """An element of the product from that of the factors as they are multiplied, and the sums.

        index: of the element; the sums' first dimensions are those of the factors, of one element where they
        broadcast.
        """

        def at(stage: te.Tensor, *own: Any) -> tirx.Expr:
            sizes = [int(n) for n in stage.shape]
            return stage(*(0 if n == 1 else i for n, i in zip(sizes, own[len(own) - len(sizes) :], strict=True)))

        for name, above in zip(("down", "across"), self.above, strict=True):
            if name in sums:
                own = (*index[:-2], index[-1] if name == "down" else index[-2])
                raw = raw - at(sums[name], *own) * immediate(above, "int32")
        return raw
