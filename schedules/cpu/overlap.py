"""The epilogue of one block of sums under the products of the next: a rewrite of a finished nest.

    for block of a task, and once more:                      instead of
      for half:                                                for block: for half: ...; out = epilogue(acc)
        sums = 0
        for step:
          sums += data . weights                             but for the last time
          out = epilogue(acc), a few pixels                  of the block before, but for the first time
        acc = sums

Products and vectors have units of their own in a processor, but it looks ahead a few hundred instructions only, less
than an epilogue has. The sums of two blocks lie beside each other and are written in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from schedules.emit.emit import immediate

from .borders import looped
from .late_stores import stored_late
from .loops import nodes

Index = Sequence[Any]


@dataclass(frozen=True)
class Chain:
    """The loops of a task: its blocks one after another; those around a step of the products, from inside a block on,
    after each turn of which a part of an epilogue follows; and the innermost around a pixel of the epilogue.

    lines, pixels, channels: of a block.  number: which block of its task an element of the sums belongs to, but for a
    constant.
    """

    blocks: s_tir.schedule.LoopRV
    steps: tuple[s_tir.schedule.LoopRV, ...]
    pixel: s_tir.schedule.LoopRV
    lines: int
    pixels: int
    channels: int
    number: Callable[[Index], tirx.Expr]
    late: bool = False


def overlapped(
    sch: s_tir.Schedule, func: tirx.PrimFunc, chain: Chain, sums: str, have_data: tirx.Expr | None
) -> tirx.PrimFunc:
    """The kernel of a finished schedule, as `func`, with its epilogues under products.

    sums: the name of the buffer of the finished sums [.., line, pixel, channel].  have_data: a condition for the
    products of a step.
    """
    block, *steps = (sch.get(loop) for loop in (chain.blocks, *chain.steps))
    (found,) = (n for n in nodes(tirx.For, func) if n.loop_var.same_as(block.loop_var))
    products, epilogue = found.body.seq
    left = None
    if chain.late:
        assert have_data is None, "a block without a first step"
        products, left = stored_late(products, found)
    first, last, count = block.loop_var > 0, block.loop_var < block.extent, prod(int(s.extent) for s in steps)

    def but_last(statement: tirx.Stmt) -> tirx.Stmt:
        return tirx.IfThenElse(last, statement, None)

    turn: tirx.Expr = immediate(0, "int32")
    for step in steps:
        turn = turn * step.extent + step.loop_var
    part = _part(epilogue, sch.get(chain.pixel).loop_var, block.loop_var, turn, count)

    def rewritten(loop: tirx.For) -> tirx.For:
        at = next((k for k, step in enumerate(steps) if loop.loop_var.same_as(step.loop_var)), None)
        if at is None:
            return loop
        if at == len(steps) - 1:
            body = loop.body if have_data is None else tirx.IfThenElse(have_data, loop.body, None)
            parts = [but_last(body), tirx.IfThenElse(first, part, None)]
        else:
            inner, own = steps[at + 1].loop_var, loop.body
            statements = own.seq if isinstance(own, tirx.SeqStmt) else [own]
            parts = [s if _holds(s, inner) else but_last(s) for s in statements]
        if at == 0 and left is not None:
            parts = [tirx.IfThenElse(block.loop_var.equal(block.extent) & loop.loop_var.equal(0), left, None), *parts]
        return looped(loop, loop.min, loop.extent, tirx.SeqStmt(parts) if len(parts) > 1 else parts[0])

    products = tvm_ffi.structural_map(products, [(tirx.For, rewritten)])

    def replaced(loop: tirx.For) -> tirx.For:
        same = loop.loop_var.same_as(block.loop_var)
        return looped(loop, loop.min, loop.extent + 1, products) if same else loop

    return _in_turns(tvm_ffi.structural_map(func, [(tirx.For, replaced)]), chain, sums, block.loop_var)


def _holds(statement: tirx.Stmt, var: tirx.Var) -> bool:
    return any(loop.loop_var.same_as(var) for loop in nodes(tirx.For, statement))


def _part(epilogue: tirx.Stmt, pixel: tirx.Var, block: tirx.Var, turn: tirx.Expr, turns: int) -> tirx.Stmt:
    """The share of one turn of `turns` in the epilogue of the block before."""
    loops = [epilogue]
    while not loops[-1].loop_var.same_as(pixel):
        loops.append(loops[-1].body)
    units = prod(int(loop.extent) for loop in loops)
    each = -(-units // turns)
    var = tirx.Var("part", "int32")
    unit, left = turn * each + var, units
    values: list[tuple[tirx.Var, tirx.Expr]] = [(block, block - 1)]
    for loop in loops:
        left //= int(loop.extent)
        values.append((loop.loop_var, unit // left % loop.extent))
    body = tvm_ffi.structural_map(
        loops[-1].body, [(tirx.Var, lambda v: next((new for old, new in values if old.same_as(v)), v))]
    )
    if turns * each > units:
        body = tirx.IfThenElse(unit < units, body, None)
    return tirx.For(var, immediate(0, "int32"), immediate(each, "int32"), tirx.ForKind.SERIAL, body)


def _in_turns(func: tirx.PrimFunc, chain: Chain, sums: str, blocks: tirx.Var) -> tirx.PrimFunc:
    """A kernel whose sums are kept for two blocks at a time, in turns."""
    root = func.body.block
    (old,) = (b for b in root.alloc_buffers if b.name == sums)
    sizes = ([chain.lines] if len(old.shape) > 2 else []) + [chain.pixels, chain.channels]
    new = tirx.decl_buffer((2, *sizes), old.dtype, sums)

    def place(index: Index) -> list[tirx.Expr]:
        own = list(index)[len(index) - len(sizes) :]
        return [chain.number(index) % 2, *(i % n for i, n in zip(own, sizes, strict=True))]

    def region(r: Any) -> Any:
        if not r.source.same_as(old):
            return r
        extents = [1, *(d.extent for d in list(r.region)[len(r.region) - len(sizes) :])]
        firsts = place([d.min for d in r.region])
        return tirx.BufferRegion(
            new, [tvm.ir.Range.from_min_extent(f, n) for f, n in zip(firsts, extents, strict=True)]
        )

    def load(node: Any) -> Any:
        return tirx.BufferLoad(new, place(node.indices)) if node.source.same_as(old) else node

    def store(node: Any) -> Any:
        return tirx.BufferStore(new, node.value, place(node.indices)) if node.buffer.same_as(old) else node

    def held(loop: tirx.For) -> tirx.Stmt:
        """With the sums mentioned before the loop, so that they are one piece of memory for all of its turns."""
        mentioned = tirx.Evaluate(tirx.address_of(new[tuple(0 for _ in new.shape)]))
        return tirx.SeqStmt([mentioned, loop]) if loop.loop_var.same_as(blocks) else loop

    body = tvm_ffi.structural_map(
        root.body,
        [
            (tvm.ir.expr.TensorRegion, region),
            (tvm.ir.expr.TensorLoad, load),
            (tirx.BufferStore, store),
            (tirx.For, held),
        ],
    )
    kept = [new if b.same_as(old) else b for b in root.alloc_buffers]
    block = s_tir.SBlock([], [], [], root.name_hint, body, alloc_buffers=kept)
    return tirx.PrimFunc(func.params, s_tir.SBlockRealize([], True, block), attrs=func.attrs)
