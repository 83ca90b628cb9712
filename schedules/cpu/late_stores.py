"""Finished sums stored right before the next ones begin: a rewrite of a task's nest under which epilogues lie.

    first step of the products of a half:                       instead of
      load data, weights                                          zero all tiles
      for each tile of sums:                                      .. all steps ..
        store it, zero it, multiply                               store all tiles

A product takes 52 cycles until its tile can be stored, and a tile is not another's register until it is: four tiles,
each stored, zeroed and multiplied into, take 88 to 93 cycles, and 133 where all are stored first.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from schedules.emit.emit import immediate

from .borders import copied, looped
from .loops import nodes

UPDATE = "acc_update_o"  # the block of a product


def stored_late(halves: tirx.For, blocks: tirx.For) -> tuple[tirx.For, tirx.Stmt]:
    """A loop over the halves of a block whose body is [zero, steps, store], in which a half's first step stores what
    the half before has summed up; and the stores that are left after the last block, for the half 0 of one more.

    blocks: the loop around it.  What the first step of all stores is overwritten before it is read.
    """
    zero, steps, store = halves.body.seq
    block, half, count = blocks.loop_var, halves.loop_var, int(halves.extent)
    before = block * count + half - 1
    store = _into(store, {block: before // count, half: before % count})
    around = [loop for loop in nodes(tirx.For, steps) if loop.kind == tirx.ForKind.SERIAL and _multiplies(loop)]
    innermost = around[0]
    first: tirx.Expr = immediate(True, "bool")
    for loop in around:
        first = first & loop.loop_var.equal(0)

    def rewritten(loop: tirx.For) -> tirx.For:
        if not loop.loop_var.same_as(innermost.loop_var):
            return loop
        *loads, products = loop.body.seq
        begin = copied(tirx.SeqStmt([*loads, _beside([store, zero, products])]))
        return looped(loop, loop.min, loop.extent, tirx.IfThenElse(first, begin, loop.body))

    steps = tvm_ffi.structural_map(steps, [(tirx.For, rewritten)])
    return looped(halves, halves.min, halves.extent, steps), store


def _into(store: tirx.Stmt, earlier: dict[tirx.Var, tirx.Expr]) -> tirx.Stmt:
    """Stores of the same tiles to where they belong at other values of loops' variables."""

    def moved(realize: s_tir.SBlockRealize) -> s_tir.SBlockRealize:
        (written,) = realize.block.writes
        values = {
            axis.var: tvm_ffi.structural_map(value, [(tirx.Var, lambda v: earlier.get(v, v))])
            for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
        }

        def region(r: Any) -> Any:
            if not r.source.same_as(written.source):
                return r
            ranges = [
                tvm.ir.Range.from_min_extent(
                    tvm_ffi.structural_map(d.min, [(tirx.Var, lambda v: values.get(v, v))]), d.extent
                )
                for d in r.region
            ]
            return tirx.BufferRegion(r.source, ranges)

        return tvm_ffi.structural_map(realize, [(tvm.ir.expr.TensorRegion, region)])

    return tvm_ffi.structural_map(store, [(s_tir.SBlockRealize, moved)])


def _multiplies(loop: tirx.For) -> bool:
    return any(r.block.name_hint == UPDATE for r in nodes(s_tir.SBlockRealize, loop))


def _beside(nests: list[tirx.Stmt]) -> tirx.Stmt:
    """Nests over the same tiles as one, in whose innermost loop they follow each other; the last one's loops."""
    if not all(isinstance(nest, tirx.For) for nest in nests):
        return tirx.SeqStmt(nests)
    nests = list(nests)
    for k, nest in enumerate(nests):
        while isinstance(nest, tirx.For) and int(nest.extent) == 1:
            nest = _at(nest, immediate(0, "int32"))
        nests[k] = nest
    if not isinstance(nests[-1], tirx.For):
        return tirx.SeqStmt(nests)
    last = nests[-1]
    assert all(isinstance(n, tirx.For) and int(n.extent) == int(last.extent) for n in nests)
    inner = [*(_at(n, last.loop_var) for n in nests[:-1]), last.body]
    return looped(last, last.min, last.extent, _beside(inner))


def _at(loop: tirx.For, value: tirx.Expr) -> tirx.Stmt:
    """The body of a loop at a value of its variable."""
    own = loop.loop_var
    return tvm_ffi.structural_map(loop.body, [(tirx.Var, lambda v: value if v.same_as(own) else v)])
