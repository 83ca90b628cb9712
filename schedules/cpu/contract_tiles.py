"""Blocks of accumulators for convolutions and matrix products on a CPU: which there are, and which a cost model
prefers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import ClassVar

from tvm import relax

from .contraction import Shape, flat_shape_of, shape_of
from .vector_unit import VectorUnit

ALIKE, ENOUGH = 1.05, 14
L2_BYTES = 256 * 1024
TASKS = 8
# Lines are joined where that leaves so much of the estimated work at most: less than a measurement can tell apart is no
# reason.
JOIN = 0.98
# What an epilogue takes longer for a vector of sums, in units of half a product, where vectors do not become bytes by
# twos or fours, and where only those of two pixels do (see `Epilogue`).
APART, IN_ROWS = 8, 2
# Blocks of SHORT are preferred while the weights of one fit in half of a first cache: the processor then works on an
# epilogue while the next block's products wait for it.
SHORT, SHORT_BYTES = (2, 4), 16 * 1024
# The space of tiles: blocks whose estimated work is at most so many times the least, so many at most; tiles in all.
WORTH_TRYING, BLOCKS, TILES = 1.4, 10, 24


@dataclass(frozen=True)
class Step:
    """One step of a kernel's innermost loop: `depth` products per lane of sums and instruction.

    loaded: whole vectors of data are loaded first, each for `inner` instructions, which take `together` pixels at once.
    weights: the registers that must be left for weights then.
    """

    depth: int
    inner: int = 1
    together: int = 1
    loaded: bool = False
    weights: int = 4

    @property
    def length(self) -> int:
        """The elements of a pixel's data that a step multiplies."""
        return self.depth * self.inner

    def tile(self, pixels: int, vectors: int, lanes: int, rows: int) -> ContractTile:
        """A block of accumulators for such steps."""
        if self.loaded:
            return LoadedTile(pixels, vectors, lanes, self.depth, rows, self.inner, self.together)
        return ContractTile(pixels, vectors, lanes, self.depth, rows)


@dataclass(frozen=True)
class ContractTile:
    """Accumulators of `pixels` x `vectors` registers of `lanes` int32 each.

    depth: products per lane and step (2 or 4 where an instruction adds so many, 8 to 32 for several).  rows:
    output rows per task, or blocks of pixels per task where all lines of an image are one row.
    """

    pixels: int
    vectors: int
    lanes: int
    depth: int
    rows: int

    inner: ClassVar[int] = 1
    together: ClassVar[int] = 1

    @property
    def length(self) -> int:
        """The elements of a pixel's data that a step multiplies."""
        return self.depth * self.inner

    def pixels_of_task(self, s: Shape) -> int:
        """The pixels that a task has of each of its channels."""
        return min(s.pixels, self.rows * self.pixels) if s.width else self.rows * s.pixels

    def __post_init__(self) -> None:
        if self.depth not in (1, 2, 4, 8, 16, 32) or min(self.pixels, self.vectors, self.lanes, self.rows) < 1:
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{self.pixels}x{self.vectors} vectors of {self.lanes}, depth {self.depth}, {self.rows} rows"


@dataclass(frozen=True)
class LoadedTile(ContractTile):
    """A block whose steps load vectors of data first: `inner` instructions per vector, for `together` pixels at
    once.
    """

    inner: int = 1  # type: ignore[misc]
    together: int = 1  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.inner, self.together) < 1 or self.pixels % self.together:
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.inner} x {self.together} pixels a load"


def choose_tile(shape: Shape, unit: VectorUnit, step: Step) -> ContractTile:
    """The block of accumulators with the least estimated work for a shape, and the rows that suit the second level
    cache.
    """
    return tiles_of(shape, unit, step)[0]


def tiles_of(shape: Shape, unit: VectorUnit, step: Step) -> list[ContractTile]:
    """The tiles worth trying for a shape, the most promising first: good blocks with several numbers of rows each."""
    blocks = _blocks(shape, unit, step)
    least = min(work for work, *_ in blocks)
    ranked = []
    for i, (work, pixels, vectors) in enumerate(blocks[:BLOCKS]):
        if work <= WORTH_TRYING * least:
            block = step.tile(pixels, vectors, unit.lanes, 1)
            ranked += [(i + j, i, replace(block, rows=rows)) for j, rows in enumerate(_rows(shape, block))]
    # A prefix of the space, all that few trials allow, holds other blocks and other rows than the first.
    return [tile for *_, tile in sorted(ranked, key=lambda r: r[:2])[:TILES]]


def _blocks(shape: Shape, unit: VectorUnit, step: Step) -> list[tuple[float, int, int]]:
    """(estimated work, pixels, vectors) of the blocks of accumulators that fit the registers, the least work first.

    Work per step and block: one multiply-add per accumulator (at least eight to hide its latency), one load per
    pixel and one and a half per vector of weights; blocks that stick out of the tensor count in full. Whole vectors
    of channels make whole blocks, so that their epilogue can be spelled out. Where estimates hardly differ, fewer
    accumulators go first, as long as they hide the latency: a shorter epilogue at a time disturbs the caches less. A
    prime number of blocks in a joined row makes tasks of a single block or one of all, neither of which is good.
    Loaded steps keep a vector of data per pixel and their weights, and load both once.
    With VNNI products are so fast that an epilogue counts, too.
    """
    found = []
    steps = prod(shape.taps) * -(-shape.run // step.length)
    # Weights of one step, data, and for those of fewer bits their mask.
    wanted, held = -(-shape.channels // unit.lanes), 2 if step.depth >= 8 and not step.loaded else 1
    for vectors in range(1, 9):
        if (shape.channels % unit.lanes == 0 and wanted % vectors) or (
            step.loaded and vectors > 1 and shape.groups > 1
        ):
            continue
        for pixels in range(step.together, 15, step.together):
            live = pixels + step.weights if step.loaded else held * vectors + 1 + held
            if pixels * vectors + live > unit.registers:
                continue
            blocks = -(-shape.pixels // pixels) * -(-wanted // vectors)
            if step.loaded:
                work = blocks * (
                    2 * step.inner * max(pixels * vectors, 4)
                    + 1.5 * (pixels * step.together + step.inner * step.together * vectors)
                )
            else:
                work = blocks * (max(2 * pixels * vectors, 8) + pixels + 1.5 * vectors)
                if unit.quads and vectors % 2:
                    rows = wanted % 2 and unit.packs == 16 and pixels % 2 == 0 and shape.pixels % pixels == 0
                    work += blocks * pixels * vectors * (IN_ROWS if rows else APART) / steps
            found.append((work, pixels, vectors))
    least = min(work for work, *_ in found)

    def rank(block: tuple[float, int, int]) -> tuple[int, float]:
        work, pixels, vectors = block
        if (pixels, vectors) == SHORT and unit.quads and unit.packs == 16 and _is_short(shape, steps, step, unit.lanes):
            return -1, work
        alike = (
            unit.quads
            and work <= ALIKE * least
            and pixels * vectors >= ENOUGH
            and not (shape.width and is_prime(-(-shape.pixels // pixels)))
        )
        return (0, pixels * vectors) if alike else (1, work)

    return sorted(found, key=rank)


def _is_short(shape: Shape, steps: int, step: Step, lanes: int) -> bool:
    """Whether blocks of SHORT suit a shape."""
    pixels, vectors = SHORT
    whole = shape.channels % (vectors * lanes) == 0 and shape.channels > vectors * lanes
    size = steps * step.length * vectors * lanes
    return whole and step.length == 4 and size <= SHORT_BYTES and (shape.pixels % pixels == 0 or shape.pixels > 16)


def is_prime(n: int) -> bool:
    """Whether a positive number has no divisor but 1 and itself."""
    return all(n % d for d in range(2, isqrt(n) + 1))


def _rows(shape: Shape, tile: ContractTile) -> list[int]:
    """Rows per task: as many as keep their data in the second level cache while the vectors of channels change, in
    TASKS or more.

    Then what else is worth trying: the next divisors below and above, a single row, and all.
    """
    lines, length = shape.lead[-1] if shape.lead else 1, shape.row_length
    groups = -(-shape.channels // (tile.lanes * tile.vectors)) * prod(shape.lead[:-1])
    if shape.width:
        lines, length, groups = -(-shape.pixels // tile.pixels), tile.pixels * shape.step, groups * shape.lead[-1]
    most = max(1, min(L2_BYTES // (2 * length), lines * groups // TASKS))
    divisors = [n for n in range(1, lines + 1) if lines % n == 0]
    at = max(i for i, n in enumerate(divisors) if n <= most)
    return list(dict.fromkeys([divisors[at], *divisors[max(at - 1, 0) : at], *divisors[at + 1 : at + 2], 1, lines]))


def form_of(call: relax.Call, unit: VectorUnit, step: Step) -> Shape:
    """The sizes of a contraction: with the lines of an image joined to one row where blocks of pixels stick out of a
    line and then waste less.
    """
    plain, flat = shape_of(call, unit.lanes), flat_shape_of(call)
    if flat is None or plain.pixels % choose_tile(plain, unit, step).pixels == 0:
        return plain
    joined, apart = (prod(s.lead) * min(work for work, *_ in _blocks(s, unit, step)) for s in (flat, plain))
    return flat if joined <= JOIN * apart else plain
