"""Attention in blocks of rows, and where the movements at the end put them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.sym.analyzer import Analyzer

from hawq_tvm.core import ops
from hawq_tvm.core.attention import Attention, Side
from schedules.emit.emit_movement import ravel, unravel
from schedules.layer import Layer


def in_blocks(layer: Layer, found: Attention, height: int) -> Layer:
    """The layer with its rows in blocks of `height`, [.., block, row, element]; a row beyond the last is the last once
    more.  Its products are those of the sides' data, of which no zero is taken.
    """
    count, rank = found.count, len(found.lead) + 2
    blocks = -(-count // height)
    places = np.minimum(np.arange(blocks * height), count - 1)
    builder = ops.Builder()
    emit = builder.emit
    names: dict[relax.Var, relax.Expr] = {p: p for p in layer.func.params}

    def cut(x: relax.Expr) -> relax.Expr:
        """A tensor of rows in blocks; one that is the same in every row has a block of one row."""
        shape = ops.shape_of(x)
        if len(shape) < 2:
            return x
        if shape[-2] == 1:
            return emit(relax.op.expand_dims(x, len(shape) - 2))
        if blocks * height != count:
            x = emit(relax.op.take(x, ops.const(places.astype(np.int32), "int32"), axis=len(shape) - 2))
        return emit(relax.op.reshape(x, (*shape[:-2], blocks, height, shape[-1])))

    def constant(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if array.ndim < 2:
            return array
        if array.shape[-2] == 1:
            return np.expand_dims(array, array.ndim - 2)
        return array[..., places, :].reshape(*array.shape[:-2], blocks, height, array.shape[-1])

    own: dict[relax.Var, relax.Expr] = {}

    def operand(expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return own[expr] if expr in own else cut(names[expr])
        return ops.const(constant(ops.const_value(expr)), ops.dtype_of(expr)) if ops.is_const(expr) else expr

    with builder.function("blocks", list(layer.func.params)):
        with builder.dataflow():
            for b in found.before:
                names[b.var] = emit(ops.renamed(b.value, names))
            left, right, values = (ops.renamed(s.data, names) for s in (*found.factors[0], found.factors[1][1]))
            right, values = (emit(relax.op.expand_dims(x, rank - 2)) for x in (right, values))
            for b in found.rows:
                if b is found.first:
                    new: relax.Expr = relax.op.matmul(cut(left), right, out_dtype=ops.dtype_of(b.var))
                elif b is found.second:
                    new = relax.op.matmul(own[found.factors[1][0].data], values, out_dtype=ops.dtype_of(b.var))
                elif b is found.softmax:
                    attrs = {str(k): b.value.attrs[k] for k in b.value.attrs.keys()} | {"axis": rank}  # noqa: SIM118
                    args = [operand(b.value.args[0]), *b.value.args[1:]]
                    new = relax.Call(b.value.op, args, attrs=tvm.ir.make_node("ir.DictAttrs", **attrs))
                elif ops.op_name(b.value) == "hawq.lookup":
                    new = relax.Call(b.value.op, [operand(b.value.args[0]), b.value.args[1]], attrs=b.value.attrs)
                else:
                    new = ops.replaced(b.value, operand)
                own[b.var] = emit(new)
            result = builder.emit_output(own[found.rows[-1].var])
        builder.emit_func_output(result)
    return Layer(layer.name, builder.get()["blocks"])


def place_of(found: Attention, height: int, index: Sequence[tirx.Var]) -> list[Any]:
    """Where the movements at the end put an element of the last block, [.., block, row, element]."""
    *lead, block, own, element = index
    row = tirx.Var("row", "int32")
    last = ops.shape_of(found.rows[-1].var)
    analyzer = Analyzer()
    for var, extent in zip([*lead, row, element], (*found.lead, found.count, last[-1]), strict=True):
        analyzer.bind(var, tvm.ir.Range(0, extent))
    at, shape = [*lead, row, element], last
    for b in found.after:
        to = ops.shape_of(b.var)
        if ops.op_name(b.value) == "relax.permute_dims":
            axes = b.value.attrs.axes
            at = [at[int(a)] for a in axes] if axes is not None else at[::-1]
        else:
            at = unravel(ravel(at, shape), to)
        at, shape = [analyzer.simplify(i) for i in at], to
    real = block * height + own
    return [tvm_ffi.structural_map(i, [(tirx.Var, lambda v: real if v.same_as(row) else v)]) for i in at]


def reach(depth: int, left: Side, right: Side) -> int:
    """The largest magnitude of the sums of `depth` products in 8 bits, together with what corrects them."""
    above_a, above_b = (abs(s.zero) + 128 for s in (left, right))
    return depth * (255 * 128 + above_b * 255 + above_a * (128 + above_b))
