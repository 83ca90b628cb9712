"""Which tiles of a tensor-core product are worth trying, and what each is estimated to take: a model, in clock
cycles, of how a GPU's multiprocessors share the blocks. It ranks; a measurement on the GPU (`hawq-tvm tune`)
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from .mma_pack import LANES
from .mma_tiles import MmaTile, Problem

WARPS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (2, 4), (4, 2))
# 4 x 8 fragments are too many sums for the registers of a thread: nvcc keeps them in memory.
FRAGMENTS = ((1, 2), (1, 4), (2, 2), (2, 4), (1, 8), (4, 2), (2, 8), (4, 4))
SLICES = (1, 2, 4, 8)
DEPTHS = (2, 4)
STAGES = (4, 3, 2)
MOST_WARPS = 8
TILES = 24


@dataclass(frozen=True)
class Gpu:
    """multiprocessors: of the smallest common product.  products: 8-bit multiply-adds of a multiprocessor per cycle.

    shared: bytes of shared memory of a multiprocessor, and of one block at most.  registers, warps: of a
    multiprocessor. int4: how much faster 4-bit products are, 1 where they are opened in registers.
    """

    multiprocessors: int
    products: int
    shared: int
    int4: int
    registers: int = 65536
    warps: int = 32


# T4; A100; A10; L4; H100 and H200 (the mma instruction's rate; wgmma's is higher). NVIDIA's tuning guides and data
# sheets.
GPUS = {
    "sm_75": Gpu(40, 1024, 64 << 10, 2),
    "sm_80": Gpu(108, 2048, 160 << 10, 2, warps=64),
    "sm_86": Gpu(72, 1024, 99 << 10, 2, warps=48),
    "sm_89": Gpu(58, 1024, 99 << 10, 2, warps=48),
    "sm_90": Gpu(132, 2048, 224 << 10, 1, warps=64),
}
FROM_L2 = 48  # bytes per cycle that a multiprocessor gets of data in the second level cache
# Cycles until the first data is there, per step for its barriers, and of a block's beginning and end.
FILL, BARRIER, LAUNCH = (
    900,
    90,
    1500,
)
ENOUGH_WARPS = 6  # to keep the four tensor cores of a multiprocessor busy
FINISH = 16  # results of an epilogue per cycle


def gpu_of(architectures: Sequence[str]) -> Gpu:
    """The GPU to choose tiles for: the second oldest of several architectures, with no more shared memory than the
    smallest.
    """
    chosen = GPUS[architectures[min(1, len(architectures) - 1)]]
    return Gpu(
        chosen.multiprocessors,
        chosen.products,
        min(GPUS[a].shared for a in architectures),
        chosen.int4,
        chosen.registers,
        chosen.warps,
    )


def ranked_tiles(problem: Problem, gpu: Gpu, most: int | None = TILES) -> list[MmaTile]:
    """The tiles worth trying for a problem, or all that fit it (None), the least estimated time first."""
    return sorted(_tiles(problem, gpu), key=lambda t: (cycles(problem, t, gpu), t.threads, t.stages))[:most]


def _tiles(problem: Problem, gpu: Gpu) -> list[MmaTile]:
    found = []
    for warps, (rows, columns), slices, depth, stages in product(WARPS, FRAGMENTS, SLICES, DEPTHS, STAGES):
        if warps[0] * warps[1] * slices > MOST_WARPS or 2 * columns % slices:
            continue
        tile = MmaTile(warps, rows, columns, slices, depth, stages)
        # Half of the shared memory, so that two blocks hide each other's waiting.
        if tile.shared_bytes(problem.form) <= min(gpu.shared // 2, 96 << 10) and stages <= max(2, problem.steps(tile)):
            found.append(tile)
    return found


def cycles(problem: Problem, tile: MmaTile, gpu: Gpu) -> float:
    """The estimated cycles of a kernel.

    The blocks of a multiprocessor share its tensor cores and its way to the second level cache; a block alone waits
    for its data, for barriers and for its last results, which other blocks of the multiprocessor hide.
    """
    groups, pixels, channels = problem.blocks(tile)
    steps, form = problem.steps(tile), problem.form
    per_byte = 2 if form.is_packed else 1
    multiply = (
        tile.pixels
        * tile.channels
        * tile.step_bytes
        * per_byte
        * tile.slices
        / (gpu.products * (gpu.int4 if form.is_packed else 1))
    )
    # Every fragment is loaded by each warp that needs it: 128 bytes of shared memory per cycle.
    read = (
        tile.slices
        * tile.warps[0]
        * tile.warps[1]
        * tile.depth
        * (tile.rows * 512 + tile.columns * LANES * form.width)
        / 128
    )
    copy = tile.slices * (tile.pixels * tile.step_bytes + tile.channels * tile.depth * 4 * form.width) / FROM_L2
    finish = tile.pixels * tile.channels / FINISH
    busy = steps * max(multiply, read, copy) + finish
    waiting = LAUNCH + FILL + steps * BARRIER / min(tile.stages, 3) + finish
    each = -(-groups * pixels * channels // gpu.multiprocessors)
    together = min(each, _resident(problem, tile, gpu))
    used = min(1.0, together * tile.threads / LANES / ENOUGH_WARPS)
    return each * busy / used + -(-each // together) * waiting


def _resident(problem: Problem, tile: MmaTile, gpu: Gpu) -> int:
    """Blocks that a multiprocessor holds at a time."""
    registers = tile.threads * (48 + 5 * tile.rows * tile.columns + 8 * tile.rows)
    fits = (
        gpu.shared // max(1, tile.shared_bytes(problem.form)),
        gpu.registers // registers,
        gpu.warps * LANES // tile.threads,
    )
    return max(1, min(*fits, 16))
