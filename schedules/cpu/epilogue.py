"""What follows the sums of a block on CPUs: in vectors of channels, where the block is complete.

    for group of channels, for pixel:
      scaled_bytes = the bytes of a requantize (A9c)                         2 or 4 vectors at once
      pair_sum = those and a residual, added (A9d)                           as many

or, where these do not apply,

      high = the high halves of products with a requantize's multipliers     a vector
      unclamped = the rest of the arithmetic, in int32                       a vector
      out = its clamp to 8 bits                                              2 or 4 vectors at once

or, behind either, with AVX-512,

      wide_lookup = what a table of 16 or 32 bits has for a byte             as many, for a requantize of its own
      out = what a table of 8 bits has for a byte                            as many

Where blocks have an odd number of vectors, those of two pixels are scaled_bytes together, if nothing follows. Without
either a vector is clamped at a time. Channels come first, so that LLVM keeps their constants in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tvm import s_tir, tirx

from schedules.emit.emit import Emission
from schedules.emit.emit_requantize import SHIFT
from schedules.spelling.byte_intrinsics import narrow, pair_sum, requantize, requantize_rows
from schedules.spelling.intrinsics import multiply_high
from schedules.spelling.lookup_intrinsics import WIDE, looked_up, wide_looked_up

from .loops import extent
from .vectors import spelled

UNROLLED = (
    32  # vectors of an epilogue that are spelled out: as many as there are registers, so that the sums need no memory
)
BYTES = ("scaled_bytes", "pair_sum")  # how stages are called that are spelled from their operands on
TOGETHER = (4, 2)  # vectors that are clamped at once


class Epilogue:
    """The stages after the sums in a schedule that inlines nothing yet, of `channels` in vectors of `lanes`.

    vectors: of a block.  neon: Arm's instructions.  packs: the lanes of registers that the CPU narrows with
    `narrow`, at most.  dot: it has vpdpwssd.  whole: blocks are whole in every direction.
    stored: sums lie in memory, not in registers.  permutes: what the CPU looks up in registers (VectorUnit).
    ahead: the pixels by which a residual is fetched before it is read.  woven: sums are in the order of `Order`.
    """

    def __init__(
        self,
        sch: s_tir.Schedule,
        channels: int,
        lanes: int,
        vectors: int = 1,
        packs: int = 0,
        neon: bool = False,
        dot: bool = False,
        whole: bool = False,
        stored: bool = False,
        permutes: str = "",
        ahead: int = 0,
        woven: bool = False,
    ) -> None:
        self._sch, self._lanes, self._neon, self._dot, self._stored, self._ahead = sch, lanes, neon, dot, stored, ahead
        self._woven = woven
        (out,) = sch.get_output_blocks(sch.get_sblock("root"))
        self._out = _name(sch, out)
        self._together = at_once(channels, lanes, vectors, packs, whole)
        # A loop of one step around an instruction is more than `reverse_compute_at` follows; without a condition, which
        # `tensorize` does not take, the instruction can be spelled afterwards.
        self._late = woven or self._together * lanes == channels
        names = [_name(sch, b) for b in sch.get_child_blocks(sch.get_sblock("root"))]
        self._stages = frozenset(names)
        self._high = "high" if "high" in names and (lanes >= 8 or neon) and _spelled(channels, lanes) else ""
        self._unclamped, self._bytes = list[str](), list[str]()
        self._tables = [name for name in names if name.startswith(WIDE)]
        if self._together:
            self._bytes = [name for name in names if name.startswith(BYTES)]
            # Of the stages that clamp to bytes, what ends the chain and what a table or a sum of bytes reads.
            ends = (self._out, *self._bytes, *self._tables)
            for name in dict.fromkeys(n for end in ends for n in (end, *self._producers(end))):
                before = [n for n in self._producers(name) if n.startswith("unclamped")]
                if before and name not in self._bytes:
                    self._unclamped += before
                    self._bytes.append(name)
            self._bytes.sort(key=names.index)
        # Nothing else makes this stage where vectors are odd.
        self._rows = not self._together and self._out == "scaled_bytes"
        self._permutes = permutes
        if permutes and self._looks_up():
            self._tables.append(self._out)
        self._looking: list[tuple[s_tir.schedule.LoopRV, str]] = []

    def _looks_up(self) -> bool:
        """Whether the last stage is a table of 8 bits of what a stage of bytes makes, and of nothing else."""
        before = self._producers(self._out)
        eight = self._dtype(self._out) in ("int8", "uint8")
        return self._out == "lookup" and eight and len(before) == 1 and before[0] in self._bytes

    def _producers(self, name: str) -> list[str]:
        return [_name(self._sch, b) for b in self._sch.get_producers(self._sch.get_sblock(name))]

    def _dtype(self, name: str) -> str:
        return str(self._sch.get(self._sch.get_sblock(name)).writes[0].source.dtype)

    @property
    def kept(self) -> tuple[str, ...]:
        """The stages that are not to be inlined."""
        return tuple(
            name for name in (self._high, *self._unclamped, *self._bytes, *self._tables) if name and name != self._out
        )

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
        self._sch.transform_block_layout(self._sch.get_sblock(self._out), joined)

    def spell(self) -> None:
        """Spell the stages that are instructions. To be called while nothing is computed at anything: `tensorize`
        takes no block with a condition.
        """
        sch = self._sch
        if self._high:
            self._high = self._tensorized(
                sch.get_sblock(self._high), self._lanes, multiply_high(self._lanes, self._neon)
            )
        for i, name in enumerate([] if self._late else self._bytes):
            block = sch.get_sblock(name)
            self._bytes[i] = self._tensorized(block, self._together * self._lanes, self._narrowing(name, block))
            self._out = self._bytes[i] if name == self._out else self._out

    def _narrowing(self, name: str, block: s_tir.schedule.SBlockRV) -> str:
        """The intrinsic of a stage of bytes."""
        form, own = (self._lanes, self._together), self._sch.get(block)
        dtype = str(own.writes[0].source.dtype)
        if name.startswith("pair_sum"):
            first, _, second, *_ = (str(r.source.dtype) for r in own.reads)
            further = self._ahead * int(own.writes[0].source.shape[-1])
            ahead = [0 if str(own.reads[k].source.name) in self._stages else further for k in (0, 2)]
            fetched = (*ahead, further) if further else ()
            return pair_sum(*form, int(own.annotations[SHIFT]), (first, second), dtype, self._dot, fetched)
        if not name.startswith("scaled_bytes"):
            return narrow(*form, dtype)
        sums, *_, shifts = own.reads
        wide = str(sums.source.name).startswith(WIDE)
        short = str(shifts.source.dtype) == "int16"
        begun = str(own.reads[2].source.dtype) != "int64"
        return requantize(*form, dtype, short, self._stored and not wide, self._woven and not wide, begun)

    def _tensorized(self, block: s_tir.schedule.SBlockRV, size: int, intrinsic: str) -> str:
        name = _name(self._sch, block)
        self._sch.tensorize(self._sch.split(self._sch.get_loops(block)[-1], [None, size])[-1], intrinsic)
        return f"{name}_o"

    def compute_at(self, loop: s_tir.schedule.LoopRV, lanes: int, spelled_out: bool = True) -> s_tir.schedule.LoopRV:
        """Compute everything in `loop`, in vectors of `lanes` where the clamp is not spelled; spelled_out: with short
        loops unrolled. The result: the innermost loop around a pixel.
        """
        sch, size = self._sch, self._together * self._lanes
        out = sch.get_sblock(self._out)
        order = [_name(sch, b) for b in sch.get_child_blocks(sch.get_sblock("root"))]
        before = sorted(self.kept, key=order.index)
        for name in (*before, self._out):
            sch.reverse_compute_at(sch.get_sblock(name), loop, preserve_unit_loops=True)
        *_, pixel, channel = sch.get_loops(out)
        if self._rows:
            return self._in_rows(pixel, channel)
        vectors, group, lane = 1, channel, None
        if not self._bytes:
            group, lane = sch.split(channel, [None, lanes])
            sch.reorder(group, pixel, lane)
        else:
            vectors = self._together
            if self._late or self._out not in self._bytes:
                group, channel = sch.split(channel, [None, size])
            if self._out in self._tables:
                self._looking.append((channel, self._dtype(self._out)))
            elif self._out not in self._bytes:
                _, lane = sch.split(channel, [None, lanes])
            sch.reorder(group, pixel)
        vector, unrolled = pixel, []
        for name in before[::-1]:
            sch.compute_at(sch.get_sblock(name), vector if name == self._high else pixel)
            if name in self._unclamped:
                vector, inner = sch.split(sch.get_loops(sch.get_sblock(name))[-1], [None, self._lanes])
                sch.vectorize(inner)
                unrolled.append(vector)
            if name in self._tables:
                self._looking.append((sch.get_loops(sch.get_sblock(name))[-1], self._dtype(name)))
        if spelled_out and extent(sch, pixel) * extent(sch, group) * vectors <= UNROLLED:
            unrolled += [group, pixel]
        for each in unrolled:
            sch.unroll(each)
        if lane is not None:
            sch.vectorize(lane)
        for name in self._bytes if self._late else []:
            block = sch.get_sblock(name)
            sch.tensorize(sch.get_loops(block)[-1], self._narrowing(name, block))
        return pixel

    def _in_rows(self, pixel: s_tir.schedule.LoopRV, channel: s_tir.schedule.LoopRV) -> s_tir.schedule.LoopRV:
        """Make bytes of one vector of two pixels at a time."""
        sch = self._sch
        group, lane = sch.split(channel, [None, self._lanes])
        pair, row = sch.split(pixel, [None, 2])
        sch.reorder(group, pair, row, lane)
        if 2 * extent(sch, pair) * extent(sch, group) <= UNROLLED:
            sch.unroll(group)
            sch.unroll(pair)
        sch.tensorize(row, requantize_rows(self._lanes, self._dtype(self._out)))
        return pair

    def finished(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        """The kernel of the finished schedule, with vectors of what tables have."""
        size = self._together * self._lanes
        for loop, dtype in self._looking:
            func = spelled(func, [self._sch.get(loop)], partial(self._entries, dtype, size))
        return func

    def _entries(
        self, dtype: str, size: int, operands: Sequence[tirx.Expr], tables: Sequence[tirx.Buffer]
    ) -> list[tirx.Expr]:
        if dtype in ("int8", "uint8"):
            return [looked_up(operands[0], tables[0], size, self._permutes)]
        return wide_looked_up(operands[0], tables[0], size, self._permutes, dtype)


def at_once(channels: int, lanes: int, vectors: int, packs: int, whole: bool = False) -> int:
    """The vectors of sums that become bytes at once in blocks of `vectors`; 0 where it is one at a time.

    whole: as for `Epilogue`.
    """
    if not 8 <= lanes <= packs:
        return 0

    def fits(size: int) -> bool:
        return _spelled(channels, size) or (whole and channels == size)

    return next((n for n in TOGETHER if vectors % n == 0 and fits(n * lanes)), 0)


def in_rows(pixels: int, channels: int, lanes: int, vectors: int, packs: int, whole: bool) -> bool:
    """Whether vectors of two pixels may become bytes together, in blocks of an odd number of vectors."""
    return lanes == packs == 16 and whole and vectors % 2 == 1 and pixels % 2 == 0 and channels % lanes == 0


def is_in_rows(emission: Emission) -> bool:
    """Whether a layer's results are bytes of sums, and nothing else, so that they may."""
    return [t.op.name for t in emission.results] == ["scaled_bytes"]


def _name(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> str:
    return str(sch.get(block).name_hint)


def _spelled(channels: int, size: int) -> bool:
    """Whether channels are several whole vectors: a single one leaves a loop of one step, which `reverse_compute_at`
    does not follow.
    """
    return channels > size and channels % size == 0
