"""Stages that look numbers up, in vectors: `tensorize` compares no element whose place is an element itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.sym.analyzer import Analyzer

from .loops import nodes

Spelling = Callable[[Sequence[tirx.Expr], Sequence[tirx.Buffer]], list[tirx.Expr]]


def spelled(func: tirx.PrimFunc, loops: Sequence[tirx.For], spelling: Spelling) -> tirx.PrimFunc:
    """A scheduled kernel whose `loops`, each around one block that stores one element, store a vector in one step.

    spelling: the vector, in pieces that are stored one after another, by what the block loads, in the order in which it
    does: its operands, vectors where they move with the loop and else scalars; then the buffers in which it looks up.
    """
    done = []

    def rewrite(loop: tirx.For) -> Any:
        if not any(loop.loop_var.same_as(other.loop_var) for other in loops):
            return loop
        done.append(loop)
        return _vector(loop, spelling)

    new = tvm_ffi.structural_map(func, [(tirx.For, rewrite)])
    assert len(done) == len(loops), "a loop is gone"
    return new


def _vector(loop: tirx.For, spelling: Spelling) -> s_tir.SBlockRealize:
    realize, lanes = loop.body, int(loop.extent)
    block, store = realize.block, realize.block.body
    assert isinstance(store, tirx.BufferStore)
    first = _substituted(list(realize.iter_values), loop.loop_var, tirx.const(0, "int32"))
    moving = [
        axis.var for axis, at in zip(block.iter_vars, realize.iter_values, strict=True) if _uses(at, loop.loop_var)
    ]
    (var,) = moving
    analyzer = Analyzer()

    def at(indices: Sequence[tirx.Expr], first: int = 0, count: int = lanes) -> list[Any]:
        """Where so many elements are of a vector whose first has these indices."""
        *before, last = indices
        if not any(_uses(i, var) for i in indices):
            return [*before, last]
        step = analyzer.simplify(last - var)
        assert not any(_uses(i, var) for i in (*before, step)), "a vector does not lie in one piece"
        return [*before, tirx.Ramp(last + first, 1, count)]

    operands: list[Any] = []
    tables: list[Any] = []
    for load in _loads(store.value):
        inside = [n for i in load.indices for n in _loads(i)]
        (tables if inside else operands).append(load)
    loaded = [tirx.BufferLoad(x.source, at(x.indices)) for x in _distinct(operands)]
    pieces = spelling(loaded, list(dict.fromkeys(x.source for x in tables)))
    count = lanes // len(pieces)
    stores = [tirx.BufferStore(store.buffer, v, at(store.indices, k * count, count)) for k, v in enumerate(pieces)]
    body = stores[0] if len(stores) == 1 else tirx.SeqStmt(stores)

    def widened(region: Any) -> Any:
        ranges = [tvm.ir.Range.from_min_extent(r.min, lanes) if _uses(r.min, var) else r for r in region.region]
        return tirx.BufferRegion(region.source, ranges)

    reads, writes = ([widened(r) for r in regions] for regions in (block.reads, block.writes))
    whole = s_tir.SBlock(block.iter_vars, reads, writes, block.name_hint, body, annotations=block.annotations)
    return s_tir.SBlockRealize(first, realize.predicate, whole)


def _substituted(exprs: list[tirx.Expr], var: tirx.Var, value: tirx.Expr) -> list[tirx.Expr]:
    return [tvm_ffi.structural_map(e, [(tirx.Var, lambda v: value if v.same_as(var) else v)]) for e in exprs]


def _loads(expr: tirx.Expr) -> list[tvm.ir.TensorLoad]:
    return nodes(tvm.ir.TensorLoad, expr)


def _uses(expr: Any, var: tirx.Var) -> bool:
    return any(v.same_as(var) for v in nodes(tirx.Var, expr))


def _distinct(loads: Sequence[tvm.ir.TensorLoad]) -> list[tvm.ir.TensorLoad]:
    kept: list[tvm.ir.TensorLoad] = []
    for load in loads:
        if not any(tvm_ffi.structural_equal(load, other) for other in kept):
            kept.append(load)
    return kept
