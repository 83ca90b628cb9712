"""TE stages of I-BERT's arithmetic: i-GELU element by element, i-softmax and i-LayerNorm by rows."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import relax, te, tirx

from hawq_tvm.core import ibert, ibert_ops, ops
from schedules.cpu.loops import ONCE_A_ROW

from .emit import Emission, emitter, immediate
from .emit_reduce import normalized, row_maximum


@emitter("hawq.i_erf", "hawq.i_gelu")
def _polynomial(e: Emission, call: relax.Call) -> te.Tensor:
    """(A28)"""
    x, corner, constant, *one = (e.operand(a) for a in call.args)
    dtype = str(call.attrs["out_dtype"])
    zero, shift = immediate(0, dtype), immediate(int(call.attrs["shift"]), dtype)

    def element(*i: Any) -> tirx.Expr:
        q = x.at(i).astype(dtype)
        rest = tirx.Min(tirx.Max(q, zero - q), corner.at(i)) - corner.at(i)
        square = rest * rest - constant.at(i)
        if one:
            # An integer 0 makes the product 0, whatever its sign is.
            return q * (one[0].at(i) - (tirx.Select(q < zero, zero - square, square) >> shift))
        signed = tirx.Select(q < zero, zero - square, tirx.Select(q > zero, square, zero))
        return zero - (signed >> shift)

    return te.compute(x.shape, element, name=ops.op_name(call)[5:])


@emitter("hawq.i_softmax")
def _i_softmax(e: Emission, call: relax.Call) -> te.Tensor:
    """(A29): the maximum, exponents by a division, a square and a shift, then (A17) from the sum on."""
    x, numbers = e.operand(call.args[0]), ibert_ops.softmax_numbers(call)
    axis = int(call.attrs["axis"]) % len(x.shape)
    maximum = row_maximum(x, axis)
    wide = "int32" if numbers.shifted**2 + numbers.constant <= ibert_ops.WORD else "int64"
    left, up = (immediate(v, kind) for v, kind in ((numbers.left, "int32"), (abs(numbers.up), wide)))
    ln2, last = immediate(numbers.ln2, "int32"), immediate(31, "int32")

    def exponent(*i: Any) -> tirx.Expr:
        difference = maximum(*i[:axis], *i[axis + 1 :]).astype("int32") - x.at(i).astype("int32")
        d = tirx.Min(difference, immediate(numbers.furthest, "int32")) << left
        z = tirx.truncdiv(d, ln2)
        rest = (z * ln2 - d + immediate(numbers.shifted, "int32")).astype(wide)
        square = rest * rest + immediate(numbers.constant, wide)
        scaled = (square << up if numbers.up >= 0 else square >> up).astype("int32")
        return scaled >> tirx.Min(z, last)

    return normalized(call, te.compute(x.shape, exponent, name="exponents"), ibert.WORD_BITS)


def _root(value: tirx.Expr) -> tirx.Expr:
    """Algorithm 4: Newton from the power of two above the root; after five steps it is at most one too many."""
    steps: list[tuple[tirx.Var, tirx.Expr]] = []

    def let(name: str, expression: tirx.Expr) -> tirx.Var:
        steps.append((tirx.Var(name, "int64"), expression))
        return steps[-1][0]

    one = immediate(1, "int64")
    number = let("number", tirx.Max(value, one))
    bits = immediate(64, "int64") - tirx.clz(number).astype("int64")
    root: tirx.Expr = let("root", one << ((bits + one) >> one))
    for step in range(5):
        root = let(f"root{step}", (root + tirx.truncdiv(number, root)) >> one)
    result = root - (root * root > number).astype("int64")
    for var, expression in reversed(steps):
        result = tirx.Let(var, expression, result)
    return result


@emitter("hawq.i_layer_norm")
def _i_layer_norm(e: Emission, call: relax.Call) -> te.Tensor:
    """(A30): the mean, the sum of squares, its root and 2^31 divided by that once a row; a product an element."""
    x, axes, n = e.operand(call.args[0]), [int(a) for a in call.attrs["axes"]], ibert_ops.row_length(call)
    shape, zero_point = x.shape, immediate(int(call.attrs["zero_point"]), "int64")
    outer = tuple(d for i, d in enumerate(shape) if i not in axes)
    assert n == prod(shape[a] for a in axes)

    def row(index: Any) -> tuple[Any, ...]:
        return tuple(v for i, v in enumerate(index) if i not in axes)

    def summed(name: str, element: Any) -> te.Tensor:
        along = {a: te.reduce_axis((0, shape[a]), f"k{a}") for a in axes}

        def total(*i: Any) -> tirx.Expr:
            kept = iter(i)
            index = [along[a] if a in along else next(kept) for a in range(len(shape))]
            return te.sum(element(index), axis=list(along.values()))

        return te.compute(outer, total, name=name)

    total = summed("total", lambda i: x.at(i).astype("int64") - zero_point)
    count, one = immediate(n, "int64"), immediate(1, "int64")

    def middle(*i: Any) -> tirx.Expr:
        twice = total(*i) * immediate(2, "int64") + count
        mean, rest = (f(twice, count * immediate(2, "int64")) for f in (tirx.floordiv, tirx.floormod))
        return mean - (rest.equal(immediate(0, "int64"))).astype("int64") * (mean & one)

    mean = te.compute(outer, middle, name=f"{ONCE_A_ROW}mean")

    def centred(index: Any) -> tirx.Expr:
        return x.at(index).astype("int64") - zero_point - mean(*row(index))

    squares = summed("squares", lambda i: centred(i) * centred(i))
    dividend = immediate(1 << 31, "int64")
    factor = te.compute(outer, lambda *i: tirx.truncdiv(dividend, _root(squares(*i))), name=f"{ONCE_A_ROW}factor")
    return te.compute(shape, lambda *i: ((centred(i) * factor(*row(i))) >> one).astype("int32"), name="i_layer_norm")
