"""A kernel that chooses where it writes its result, which TE cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx

Digits = Sequence[tirx.Var]


def stored(
    func: tirx.PrimFunc,
    shape: tuple[int, ...],
    place: Callable[[Digits], Sequence[Any]],
    exists: Callable[[Digits], Sequence[tirx.Expr]] = lambda _: (),
) -> tirx.PrimFunc:
    """A function with its last parameter, a tensor of tiles, inside and as last parameter a result of `shape`, to which
    one more block, "store", copies it.

    place: where an element of the tiles goes, by its index.  exists: the conditions under which it is one.
    """
    *params, tile = func.params
    root = func.body.block
    extents = [int(d) for d in tile.shape]
    out = tirx.decl_buffer(shape, tile.dtype, "out")
    loops = [tirx.Var(f"d{i}", "int32") for i in range(len(extents))]
    axes = [
        tirx.IterVar(tvm.ir.Range(0, n), tirx.Var(f"v{i}", "int32"), tirx.IterVar.DataPar)
        for i, n in enumerate(extents)
    ]
    d = [a.var for a in axes]
    index = place(d)
    body = tirx.BufferStore(out, tirx.BufferLoad(tile, d), index)
    if conditions := exists(d):
        body = tirx.IfThenElse(tirx.all(*conditions), body, None)
    reads, writes = (
        tirx.BufferRegion(b, [tvm.ir.Range.from_min_extent(i, 1) for i in at]) for b, at in ((tile, d), (out, index))
    )
    stmt = s_tir.SBlockRealize(loops, True, s_tir.SBlock(axes, [reads], [writes], "store", body))
    for var, extent in zip(reversed(loops), reversed(extents), strict=True):
        stmt = tirx.For(var, 0, extent, tirx.ForKind.SERIAL, stmt)
    blocks = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    whole = s_tir.SBlock([], [], [], "root", tirx.SeqStmt([*blocks, stmt]), alloc_buffers=[*root.alloc_buffers, tile])
    return tirx.PrimFunc([*params, out], s_tir.SBlockRealize([], True, whole), attrs=func.attrs)
