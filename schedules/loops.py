"""Schedule steps that several CPU rules share."""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Any

from tvm import s_tir

from .intrinsics import multiply_high

UNROLLED = 32  # vectors of an epilogue that are spelled out: as many as there are registers, so that the sums need no memory


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


def join_lines(sch: s_tir.Schedule, out: s_tir.schedule.SBlockRV, width: int) -> None:
    """Let what follows the sums, of [image, line, column, channel], run over [image, pixel, channel].

    The stage "high" is stored so too: its region could not be found from a pixel otherwise. Addresses of the results stay what they are.
    """

    def joined(n: Any, h: Any, w: Any, c: Any) -> tuple[Any, ...]:
        return n, h * width + w, c

    names = {str(sch.get(b).name_hint) for b in sch.get_child_blocks(sch.get_sblock("root"))}
    if "high" in names:
        high = sch.get_sblock("high")
        sch.transform_layout(high, ("write", 0), joined)
        sch.transform_block_layout(high, joined)
    sch.transform_block_layout(out, joined)


def spells_high_half(channels: int, lanes: int, neon: bool = False) -> bool:
    """Whether a kernel has several whole vectors of channels, so that a stage "high" can be spelled as `multiply_high`.

    A single one leaves a loop of one step, which `reverse_compute_at` does not follow.
    """
    return (lanes >= 8 or neon) and channels > lanes and channels % lanes == 0


def spell_high_half(sch: s_tir.Schedule, lanes: int, neon: bool = False) -> s_tir.schedule.SBlockRV | None:
    """The stage "high" of a kernel spelled as `multiply_high`, if it has one.

    To be called while nothing is computed at anything: `tensorize` takes no block with a condition.
    """
    names = {str(sch.get(b).name_hint) for b in sch.get_child_blocks(sch.get_sblock("root"))}
    if "high" not in names:
        return None
    sch.tensorize(sch.split(sch.get_loops(sch.get_sblock("high"))[-1], [None, lanes])[-1], multiply_high(lanes, neon))
    return sch.get_sblock("high_o")


def schedule_epilogue(
    sch: s_tir.Schedule, high: s_tir.schedule.SBlockRV | None, out: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV, lanes: int
) -> None:
    """Compute what follows the sums where a block of them is complete: vectors of channels, and in them pixels, so that
    LLVM keeps the channels' constants in registers."""
    for block in [out] if high is None else [high, out]:
        sch.reverse_compute_at(block, loop, preserve_unit_loops=True)
    *_, pixel, channel = sch.get_loops(out)
    vector, lane = sch.split(channel, [None, lanes])
    sch.reorder(vector, pixel, lane)
    if high is not None:
        sch.compute_at(high, pixel)
    if extent(sch, pixel) * extent(sch, vector) <= UNROLLED:
        sch.unroll(vector)
        sch.unroll(pixel)
    sch.vectorize(lane)
