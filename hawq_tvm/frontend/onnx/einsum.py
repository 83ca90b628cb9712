"""Einsum of one or two tensors, as permutations and one product of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax

from hawq_tvm.core import ops

from .node import Node, handles

FORM = "two tensors whose letters are kept or summed over, as in 'bhqd,bhkd->bhqk'"


@dataclass(frozen=True)
class _Lettered:
    """A tensor whose axes have letters."""

    expr: relax.Expr
    letters: str

    def size(self, letters: Sequence[str]) -> int:
        shape = ops.shape_of(self.expr)
        return math.prod(shape[self.letters.index(c)] for c in letters)

    def sizes(self, letters: Sequence[str]) -> list[int]:
        return [self.size(c) for c in letters]


@handles("Einsum")
def einsum(node: Node) -> relax.Expr:
    """Products of elements summed over the letters that the result lacks."""
    terms, result = _equation(node)
    operands = [_Lettered(node.expr(i), term) for i, term in enumerate(terms)]
    sizes: dict[str, set[int]] = {}
    for o in operands:
        for letter in o.letters:
            sizes.setdefault(letter, set()).add(o.size(letter))
    uneven = sorted(c for c, found in sizes.items() if len(found) > 1)
    node.need(not uneven, "gives a letter several sizes", expected="one size", found=f"{uneven}: {sizes}")
    summed = [
        _summed(node, o, result + "".join(p.letters for p in operands if p is not o), i) for i, o in enumerate(operands)
    ]
    whole = summed[0] if len(summed) == 1 else _product(node, summed[0], summed[1], result)
    return _ordered(node, whole, result, "result").expr


def _equation(node: Node) -> tuple[list[str], str]:
    """The letters of every operand and of the result, an ellipsis spelled out in letters of its own."""
    equation = node.attr("equation", "").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms, ranks = left.split(","), [len(node.shape(i)) for i in range(len(node.inputs))]
    node.need(len(ranks) <= 2, "multiplies several tensors", expected=FORM, found=equation)
    node.need(len(terms) == len(ranks), "has an equation of other operands", expected=len(ranks), found=equation)
    dots = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    spare = "0123456789"[: max([0, *(d for d, t in zip(dots, terms, strict=True) if "..." in t)])]
    spelled = [t.replace("...", spare[len(spare) - d :] if d > 0 else "") for t, d in zip(terms, dots, strict=True)]
    if not arrow:
        letters = "".join(terms).replace(".", "")
        result = spare + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    result = result.replace("...", spare)
    known = set("".join(spelled))
    node.need(
        all(len(t) == r and len(set(t)) == r for t, r in zip(spelled, ranks, strict=True))
        and len(set(result)) == len(result)
        and set(result) <= known
        and all(c.isalpha() or c in spare for c in known),
        "has an equation that is not supported",
        expected=FORM,
        found=f"{equation} of ranks {ranks}",
        remedy="write diagonals and broadcasts as operators of their own",
    )
    return spelled, result


def _summed(node: Node, x: _Lettered, kept: str, index: int) -> _Lettered:
    """Without the letters that nothing else has."""
    alone = [i for i, c in enumerate(x.letters) if c not in kept]
    if not alone:
        return x
    letters = "".join(c for c in x.letters if c in kept)
    return _Lettered(node.emit(relax.op.sum(x.expr, alone), f"sum{index}"), letters)


def _product(node: Node, a: _Lettered, b: _Lettered, result: str) -> _Lettered:
    both = [c for c in a.letters if c in b.letters]
    batch, inner = [c for c in both if c in result], [c for c in both if c not in result]
    if not inner:
        return _multiplied(node, a, b, result)
    rows, columns = ([c for c in x.letters if c not in both] for x in (a, b))
    if not batch and len(columns) > len(rows):  # what has more axes keeps them in front of a matrix
        a, b, rows, columns = b, a, columns, rows
    left = _ordered(node, a, [*batch, *rows, *inner], "left")
    right = _ordered(node, b, [*batch, *inner, *columns], "right")
    front = left.sizes(batch)
    # Without a batch the axes of the left side stay as they are: a matrix multiplies every row.
    height = [left.size(rows)] if batch or not rows else left.sizes(rows)
    x = _reshaped(node, left.expr, [*front, *height, left.size(inner)], "rows")
    y = _reshaped(node, right.expr, [*front, right.size(inner), right.size(columns)], "columns")
    shape = [*front, *left.sizes(rows), *right.sizes(columns)]
    made = node.emit(relax.op.matmul(x, y), "product")
    return _Lettered(_reshaped(node, made, shape, "apart"), "".join([*batch, *rows, *columns]))


def _multiplied(node: Node, a: _Lettered, b: _Lettered, result: str) -> _Lettered:
    """Nothing is summed over: both broadcast to the result."""
    x, y = (
        _reshaped(node, o.expr, [o.size(c) if c in o.letters else 1 for c in result], f"{name}.spread")
        for name, o in (
            (n, _ordered(node, o, [c for c in result if c in o.letters], n)) for n, o in (("left", a), ("right", b))
        )
    )
    return _Lettered(node.emit(relax.op.multiply(x, y), "product"), result)


def _ordered(node: Node, x: _Lettered, letters: Sequence[str], suffix: str) -> _Lettered:
    order = [x.letters.index(c) for c in letters]
    if order == list(range(len(order))):
        return x
    return _Lettered(node.emit(relax.op.permute_dims(x.expr, order), suffix), "".join(letters))


def _reshaped(node: Node, x: relax.Expr, shape: Sequence[int], suffix: str) -> relax.Expr:
    return x if tuple(shape) == ops.shape_of(x) else node.emit(relax.op.reshape(x, tuple(shape)), suffix)
