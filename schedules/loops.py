"""Schedule steps that several CPU rules share."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd

from tvm import s_tir

from .intrinsics import multiply_high


def inline_all(sch: s_tir.Schedule, keep: Collection[str] = ()) -> None:
    """Inline every block into its consumers where the schedule allows it, except those named."""
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if sch.get(block).name_hint in keep:
            continue
        try:
            sch.compute_inline(block)
        except s_tir.ScheduleError:
            continue  # a reduction, or a block that writes a result


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




def spells_high_half(channels: int, lanes: int) -> bool:
    """Whether a kernel's vectors of channels are whole, so that stages "high" can be spelled as `multiply_high`."""
    return lanes >= 8 and channels % lanes == 0


def attach_epilogue(sch: s_tir.Schedule, out: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> None:
    """Compute what follows the sums, the result last, where a block of sums is complete."""
    for block in [*_high_halves(sch, out), out]:
        sch.reverse_compute_at(block, loop, preserve_unit_loops=True)


def schedule_epilogue(sch: s_tir.Schedule, out: s_tir.schedule.SBlockRV, lanes: int) -> None:
    """Vectors of channels outside pixels, so that LLVM keeps their constants in registers; stages "high" spelled out."""
    *_, pixel, channel = sch.get_loops(out)
    vector, lane = sch.split(channel, [None, lanes])
    sch.reorder(vector, pixel, lane)
    for block in _high_halves(sch, out):
        sch.compute_at(block, pixel)
        sch.tensorize(sch.get_loops(block)[-1], multiply_high(lanes))
    sch.vectorize(lane)


def _high_halves(sch: s_tir.Schedule, out: s_tir.schedule.SBlockRV) -> list[s_tir.schedule.SBlockRV]:
    return [p for p in sch.get_producers(out) if str(sch.get(p).name_hint) == "high"]
