"""Blocks of AMX tiles: which there are for a shape, and which a cost model prefers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm import relax

from hawq_tvm.core import ops
from schedules.spelling.tile_intrinsics import BYTES, LANES, Tiles

from .amx_model import CACHED_BYTES, SECOND_BYTES, cycles
from .contract_tiles import TASKS
from .contraction import Shape

ROWS = 3  # numbers of rows that are worth a measurement
INSIDE = ("channels", "pixels")
AT_ONCE = 4  # groups of pixels of a block that reads weights once: its other tiles take turns
# What the lines of a block are: those of the output; equal parts of all of its pixels; whole images (images.py).
FORMS = ("lines", "parts", "images")
# When the tiles of a half are stored: after its last step, or, where the next block's products hide the epilogue, each
# right before the next sums begin in it (late_stores.py).
STORES = ("after", "before")
# Steps of products under which the epilogue of the block before is worth hiding: fewer take less time than it does.
FEWEST_STEPS = 8
# Tasks that are enough then: a task should have several blocks, as nothing hides the epilogue of its last.
FEWEST_TASKS = 4


@dataclass(frozen=True)
class AmxTile:
    """A block of sums of `lines` output rows x `columns` groups of `pixels` x `vectors` of 16 channels.

    rows: output rows per task.  halves: blocks that share an epilogue.  inside: what a task's inner loop goes over,
    "channels", all of them for each block of pixels, or "pixels" of the channels that belong to the task.
    form: one of FORMS, what a line is.  stores: when a tile of finished sums is stored, one of STORES.
    """

    lines: int
    columns: int
    pixels: int
    vectors: int
    rows: int
    halves: int = 1
    inside: str = "pixels"
    form: str = "lines"
    stores: str = "after"

    def __post_init__(self) -> None:
        if (self.lines > 1 and self.columns > 1) or self.rows % self.lines or self.rows < 1 or self.pixels < 2:
            raise ValueError(f"not a tile: {self}")
        if self.halves not in (1, 2, 4) or self.inside not in INSIDE or self.form not in FORMS:
            raise ValueError(f"not a tile: {self}")
        if self.stores not in STORES:
            raise ValueError(f"not a tile: {self}")
        self.tiles()

    def tiles(self, emulated: bool = False) -> Tiles:
        """Its tile registers."""
        return Tiles(self.lines * self.columns, self.pixels, self.vectors, emulated)

    @property
    def channels(self) -> int:
        """The output channels of a block."""
        return LANES * self.vectors

    @property
    def fetches(self) -> bool:
        """Whether it reads weights once, in sequence, and asks for them in advance: its data take turns in tiles."""
        tiles = self.tiles()
        return tiles.turns < tiles.groups

    def overlaps(self, s: Shape) -> bool:
        """Whether a block has so many steps of products that the epilogue of the block before is worth hiding."""
        return self.halves * prod(s.taps) * -(-s.run // BYTES) >= FEWEST_STEPS

    def blocks(self, s: Shape) -> tuple[int, int, int]:
        """Those of a task: its lines, along a line, and of channels."""
        channels = -(-s.channels // (self.halves * self.channels)) if self.inside == "channels" else 1
        return self.rows // self.lines, -(-s.pixels // (self.columns * self.pixels)), channels

    def steps_of_a_part(self, s: Shape) -> int:
        """The steps of the products after which a part of the last block's epilogue follows, as small a part as may be;
        0 where it follows the block itself.
        """
        if not self.overlaps(s) or prod(self.blocks(s)) == 1:
            return 0
        run, outer, results = -(-s.run // BYTES), self.halves * prod(s.taps), self.lines * self.columns * self.pixels
        return next((n for n in range(1, run) if run % n == 0 and outer * (run // n) <= results), run)

    def numbering(self, s: Shape) -> tuple[int, int, int, Callable[[Sequence[Any]], Any]]:
        """The lines, pixels and channels of a block, and which of its task the one with an element of the sums is."""
        pixels, channels = self.columns * self.pixels, self.halves * self.channels

        _, along, across = self.blocks(s)

        def number(index: Sequence[Any]) -> Any:
            *lead, w, c = index
            block = (lead[-1] // self.lines if lead else 0) * along + w // pixels
            return block if self.inside == "pixels" else block * across + c // channels

        return self.lines, pixels, channels, number

    def __str__(self) -> str:
        channels = f"{self.halves} x {self.vectors}" if self.halves > 1 else str(self.vectors)
        late = ", stored late" if self.stores == "before" else ""
        return (
            f"{self.lines}x{self.columns} groups of {self.pixels} pixels x {channels} tiles of 16, "
            f"{self.rows} {self.form}, {self.inside} inside{late}"
        )


def vectors_of(call: relax.Call) -> int:
    """The tiles of channels in a block."""
    return 2 if ops.shape_of(call)[-1] > LANES else 1


def tiles_of(
    shape: Shape,
    vectors: int,
    pairs_rows: bool,
    opens_weights: bool = False,
    form: str = "lines",
    late: bool = True,
) -> list[AmxTile]:
    """The blocks for a shape, with several numbers of rows, the least estimated time first.

    pairs_rows: its output rows share their weights.  opens_weights: a task first opens the weights of its channels,
    which are narrow, so that it should have few of them.  form: what its rows are.
    late: every block has a first step, as lines above the data that are left out are not, so that sums may be stored
    there.
    """
    lines = shape.lead[-1] if shape.lead else 1
    halves = 2 if shape.channels % (2 * LANES * vectors) == 0 else 1

    def tile(both: tuple[int, int]) -> AmxTile:
        columns = -(-shape.pixels // (LANES * both[1])) * both[1]
        # At least two: TVM leaves out the loop over a single pixel, and with it the intrinsics' form.
        return AmxTile(*both, max(2, -(-shape.pixels // columns)), vectors, both[0], halves, form=form)

    blocks = [tile(b) for b in [(1, 2), (1, 1), *([(2, 1)] if pairs_rows and lines > 1 else [])]]
    if _reads_weights_once(shape) and not opens_weights:
        blocks.append(AmxTile(1, AT_ONCE, -(-shape.pixels // AT_ONCE), 1, 1, halves=4, form=form))
    ordered = [(b, ["pixels"] if opens_weights else _orders(shape, b, lines)) for b in blocks]
    tiles = [
        replace(block, rows=rows, inside=inside)
        for block, orders in sorted(ordered, key=lambda b: cycles(shape, replace(b[0], inside=b[1][0])))
        for inside in orders
        for rows in _rows(shape, block, lines, inside)
    ]
    found = [replace(t, stores="before") if late and t.steps_of_a_part(shape) else t for t in tiles]
    # Which order of stores is faster is measured for the best block alone.
    return found if found[0] == tiles[0] else [found[0], tiles[0], *found[1:]]


def _reads_weights_once(shape: Shape) -> bool:
    """Whether a block of AT_ONCE groups has all pixels, so that weights which no cache holds are not read again."""
    few = prod(shape.lead) == 1 and 2 * LANES < shape.pixels <= AT_ONCE * LANES and shape.groups == 1
    weights = shape.channels * prod(shape.taps) * shape.run
    return few and shape.channels % (4 * LANES) == 0 and weights > SECOND_BYTES


def _orders(shape: Shape, block: AmxTile, lines: int) -> list[str]:
    """What is inside, the more promising first: channels, unless weights are large or pixels make too few tasks."""
    tasks = prod(shape.lead[:-1]) * -(-lines // block.lines)
    weights = shape.channels * prod(shape.taps) * shape.run
    return list(INSIDE if weights <= CACHED_BYTES and tasks >= TASKS else INSIDE[::-1])


def _rows(shape: Shape, block: AmxTile, lines: int, inside: str) -> list[int]:
    """Output rows per task, the most promising first: as in Contract, for multiples of the block's."""
    steps = -(-lines // block.lines)
    blocks = -(-shape.channels // (block.channels * block.halves)) if inside == "pixels" else 1
    tasks = steps * blocks * prod(shape.lead[:-1])
    fewest = FEWEST_TASKS if block.overlaps(shape) else TASKS
    most = max(1, min(CACHED_BYTES // (2 * shape.row_length * block.lines), tasks // fewest))
    fitting = [block.lines * n for n in range(1, steps + 1) if steps % n == 0 and n <= most]
    return fitting[::-1][:ROWS]
