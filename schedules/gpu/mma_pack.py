"""Weights in the order in which a tensor-core kernel's lanes read them. Needs NumPy alone: exported tuning runs
carry this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 32


def pack(
    weights: NDArray[Any],
    *,
    groups: int,
    channels: int,
    blocks: int,
    slices: int,
    steps: int,
    depth: int,
    across: int,
    columns: int,
    width: int,
    packed: int,
    opened: int,
) -> NDArray[Any]:
    """[taps, run elements, channels of all groups] weights as [group, block, slice, step, warp, fragment, lane,
    depth * width] bytes.

    channels: of one group.  blocks: of channels.  steps: of a slice, with depth times 32 bytes of K each.  across: a
    block's warps over channels.  columns: a warp's fragments.  width: a lane's bytes of weights per 32 bytes of
    data.  packed: 1 where data and weights hold two elements to a byte.  opened: 1 where the weights alone do. The
    order is the one in which lanes read fragments; the columns of a warp's fragments are dealt out so that every
    thread holds neighbouring channels (see `Digits` in mma_tiles.py).
    """
    per_byte = 2 if packed else 1
    k: NDArray[Any] = weights.reshape(-1, groups, channels)
    extra = slices * steps * 32 * depth * per_byte - k.shape[0], blocks * across * columns * 8 - channels
    k = np.pad(k, [(0, extra[0]), (0, 0), (0, extra[1])])
    if packed:
        k = _pairs(k[0::2], k[1::2])
    digits = k.reshape(slices * steps, depth, 2, 4, 4, groups, blocks, across, 4, columns, 2)
    # step, depth, upper half, t of the row, byte, group, block, warp, t of the column, fragment, column of the pair
    digits = digits.transpose(5, 6, 0, 7, 9, 8, 10, 3, 1, 2, 4)
    if opened:
        digits = _pairs(digits[..., 0, :], digits[..., 1, :])
    return np.ascontiguousarray(digits.reshape(groups, blocks, slices, -1, across, columns, LANES, depth * width))


def _pairs(low: NDArray[Any], high: NDArray[Any]) -> NDArray[Any]:
    return ((low.astype(np.int64) & 15) | (high.astype(np.int64) & 15) << 4).astype(np.uint8)
