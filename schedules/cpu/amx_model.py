"""The cost model of AMX kernels: cycles of one core, by figures that were measured on one with AMX (48 KB first, 2 MB
second cache, 3.75 GHz), each beside its number. Tile records say otherwise where somebody has measured a layer.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from schedules.spelling.tile_intrinsics import BYTES, LANES

from .contraction import Shape

if TYPE_CHECKING:
    from .amx_tiles import AmxTile

# Bytes between two uses of a tile up to which it is still in the first cache, beside the sums; half of the second one.
# The latter also bounds the data of a task's rows, with as much again for its results: what a task begins with, tiles
# to configure and memory to take for its sums, is worth several steps of products. And all weights, where the loop
# over channels is inside the one over pixels: they are then read again for every block of pixels, while the block's
# data and results stay in the first cache.
NEAR_BYTES, CACHED_BYTES, SECOND_BYTES = 32 << 10, 1 << 20, 2 << 20
# Of a tile: to load it from the first cache, the second, and beyond (28 GB/s); to store it.
NEAR, CACHED, FAR, STORED = 8.5, 21.0, 140.0, 16.5
REQUANTIZED = 4.0  # the epilogue of 16 results, without a residual
TILE = LANES * BYTES


def product(pixels: int) -> float:
    """A product of a tile of so many rows of data: nearly a cycle for each, and not less than for 8."""
    return max(9.9, 2.6 + 0.93 * pixels)


def load(between: int) -> float:
    """Of a tile that was used last before so many other bytes."""
    return NEAR if between <= NEAR_BYTES else CACHED if between <= CACHED_BYTES else FAR


def cycles(s: Shape, t: AmxTile) -> float:
    """Of a whole layer. Weights come from beyond the caches when they are first read, data from where the layer before
    has left them, which is the same for all tiles.
    """
    groups, lines = t.lines * t.columns, s.lead[-1] if s.lead else 1
    along = -(-s.pixels // (t.columns * t.pixels))
    pixel_blocks = prod(s.lead[:-1]) * -(-lines // t.lines) * along
    channel_blocks = -(-s.channels // (t.halves * t.channels))
    steps = t.halves * prod(s.taps) * -(-s.run // BYTES)
    # Bytes that a block of channels or of pixels reads, and the tiles of data that it reads for the first time.
    panel, rows = steps * t.vectors * TILE, groups * t.pixels * prod(s.taps) * s.step
    new, every = min(-(-rows // TILE), groups * steps // t.halves), groups * steps
    if t.inside == "channels" or channel_blocks == 1:
        weights, data = load(panel * channel_blocks + rows), load(rows + panel)
    else:
        weights, data = load(panel + rows), load(prod(s.rows) * s.row_length)
    products = steps * groups * t.vectors * product(t.pixels)
    # Every half reads them again, and every tap what others have read.
    loads = new * (data + (t.halves - 1) * load(rows + panel // t.halves)) + (every - t.halves * new) * load(rows)
    first, later = (max(products, loads + steps * t.vectors * w) for w in (FAR, weights))
    if t.fetches:  # weights are in the second cache when they are read
        first = max(products, steps * t.vectors * FAR, loads + steps * t.vectors * CACHED)
    multiplying = channel_blocks * (first + (pixel_blocks - 1) * later)
    stores = pixel_blocks * channel_blocks * t.halves * groups * t.vectors * STORED
    epilogue = prod(s.lead) * s.pixels * s.channels / LANES * REQUANTIZED
    return stores + (max(multiplying, epilogue) if t.overlaps(s) else multiplying + epilogue)
