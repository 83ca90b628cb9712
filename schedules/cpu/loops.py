"""Schedule steps that several CPU rules share."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Any

import tvm_ffi
from tvm import s_tir

# How the names of stages begin that an element must not compute again: of softmax and layer_norm, which divide there.
ONCE_A_ROW = "row_"


def nodes(kind: type, root: Any) -> list[Any]:
    """The nodes of a kind in a statement, the inner ones first."""
    found: list[Any] = []

    def keep(node: Any) -> Any:
        found.append(node)
        return node

    tvm_ffi.structural_map(root, [(kind, keep)])
    return found


def inline_all(sch: s_tir.Schedule, keep: Collection[str] = ()) -> None:
    """Inline every block into its consumers where the schedule allows it, except those named and what is computed
    once a row.
    """
    root = sch.get_sblock("root")
    results = {str(sch.get(b).name_hint) for b in sch.get_output_blocks(root)}
    for block in sch.get_child_blocks(root):
        made = sch.get(block)
        name = str(made.name_hint)
        if name in keep or name in results or name.startswith(ONCE_A_ROW) or made.init is not None:
            continue
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:
            continue  # a block that writes a part of what is read elsewhere, say


def extent(sch: s_tir.Schedule, loop: s_tir.schedule.LoopRV) -> int:
    """The static extent of a loop."""
    return int(sch.get(loop).extent)


def vectorize_plain(sch: s_tir.Schedule, loop: s_tir.schedule.LoopRV, lanes: int) -> None:
    """Vectorise a loop whose extent has a divisor near `lanes`; others are left to LLVM."""
    width = gcd(extent(sch, loop), lanes)
    if width > 1:
        sch.vectorize(sch.split(loop, [None, width])[-1])


def parallel_outer(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, inner: int = 2) -> None:
    """Run all but the `inner` innermost loops of a block in parallel, fused into one."""
    loops = sch.get_loops(block)
    outer = [lp for lp in loops[: max(len(loops) - inner, 0)]]
    if outer:
        sch.parallel(sch.fuse(*outer))
