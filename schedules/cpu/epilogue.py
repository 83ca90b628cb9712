"""What follows the sums of a block on CPUs: in vectors of channels, where the block is complete.

    for group of channels, for pixel:
      high = the high halves of products with a requantize's multipliers     a vector
      unclamped = the rest of the arithmetic, in int32                       a vector
      out = its clamp to 8 bits                                              2 or 4 vectors at once

Without `unclamped` a vector is clamped at a time. Channels come first, so that LLVM keeps their constants in registers.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir

from schedules.spelling.intrinsics import multiply_high, narrow

from .loops import extent

UNROLLED = (
    32  # vectors of an epilogue that are spelled out: as many as there are registers, so that the sums need no memory
)
TOGETHER = (4, 2)  # vectors that are clamped at once


class Epilogue:
    """The stages after the sums in a schedule that inlines nothing yet, of `channels` in vectors of `lanes`.

    vectors: of a block.  neon: Arm's instructions.  packs: the lanes of registers that the CPU narrows with
    `narrow`, at most.
    """

    def __init__(
        self, sch: s_tir.Schedule, channels: int, lanes: int, vectors: int = 1, packs: int = 0, neon: bool = False
    ) -> None:
        self._sch, self._lanes, self._neon = sch, lanes, neon
        (self._out,) = sch.get_output_blocks(sch.get_sblock("root"))
        self._together = (
            next((n for n in TOGETHER if vectors % n == 0 and _spelled(channels, n * lanes)), 0)
            if 8 <= lanes <= packs
            else 0
        )
        names = {_name(sch, b) for b in sch.get_child_blocks(sch.get_sblock("root"))}
        unclamped = [
            name for name in (_name(sch, b) for b in sch.get_producers(self._out)) if name.startswith("unclamped")
        ]
        self._high = "high" if "high" in names and (lanes >= 8 or neon) and _spelled(channels, lanes) else ""
        self._unclamped = unclamped[0] if unclamped and self._together else ""

    @property
    def kept(self) -> tuple[str, ...]:
        """The stages that are not to be inlined."""
        return tuple(name for name in (self._high, self._unclamped) if name)

    def join_lines(self, width: int) -> None:
        """Run over [image, pixel, channel], where the sums were of [image, line, column, channel].

        The stages between are stored so too: their regions could not be found from a pixel otherwise. Addresses of
        the results stay what they are.
        """

        def joined(n: Any, h: Any, w: Any, c: Any) -> tuple[Any, ...]:
            return n, h * width + w, c

        for name in self.kept:
            block = self._sch.get_sblock(name)
            self._sch.transform_layout(block, ("write", 0), joined)
            self._sch.transform_block_layout(block, joined)
        self._sch.transform_block_layout(self._out, joined)

    def spell(self) -> None:
        """Spell the stages that are instructions. To be called while nothing is computed at anything: `tensorize`
        takes no block with a condition.
        """
        sch = self._sch
        if self._high:
            self._high = self._tensorized(
                sch.get_sblock(self._high), self._lanes, multiply_high(self._lanes, self._neon)
            )
        if self._unclamped:
            dtype, size = str(sch.get(self._out).writes[0].source.dtype), self._together * self._lanes
            self._out = sch.get_sblock(self._tensorized(self._out, size, narrow(self._lanes, self._together, dtype)))

    def _tensorized(self, block: s_tir.schedule.SBlockRV, size: int, intrinsic: str) -> str:
        name = _name(self._sch, block)
        self._sch.tensorize(self._sch.split(self._sch.get_loops(block)[-1], [None, size])[-1], intrinsic)
        return f"{name}_o"

    def compute_at(self, loop: s_tir.schedule.LoopRV, lanes: int) -> None:
        """Compute everything in `loop`, in vectors of `lanes` where the clamp is not spelled."""
        sch = self._sch
        high, unclamped = (sch.get_sblock(name) if name else None for name in (self._high, self._unclamped))
        for block in (high, unclamped, self._out):
            if block is not None:
                sch.reverse_compute_at(block, loop, preserve_unit_loops=True)
        *_, pixel, channel = sch.get_loops(self._out)
        if unclamped is None:
            group, lane = sch.split(channel, [None, lanes])
            sch.reorder(group, pixel, lane)
            vector, size = pixel, 1
        else:
            group = channel
            sch.reorder(group, pixel)
            sch.compute_at(unclamped, pixel)
            vector, lane = sch.split(sch.get_loops(unclamped)[-1], [None, self._lanes])
            size = self._together
        if high is not None:
            sch.compute_at(high, vector)
        if extent(sch, pixel) * extent(sch, group) * size <= UNROLLED:
            sch.unroll(group)
            sch.unroll(pixel)
        if unclamped is not None:
            sch.unroll(vector)
        sch.vectorize(lane)


def _name(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> str:
    return str(sch.get(block).name_hint)


def _spelled(channels: int, size: int) -> bool:
    """Whether channels are several whole vectors: a single one leaves a loop of one step, which `reverse_compute_at`
    does not follow.
    """
    return channels > size and channels % size == 0
