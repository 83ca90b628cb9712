"""Bytes that are the same on every machine and with every version of NumPy: inputs and constants that need not be
carried.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1


def noise(seed: int, count: int) -> Array:
    """`count` bytes, uint8, of the generator splitmix64 (Steele, Lea, Flood 2014), begun `seed` steps after state 0."""
    z = np.arange(1, (count + 7) // 8 + 1, dtype=np.uint64) * np.uint64(_STEP)
    z += np.uint64(seed * _STEP & _WORD)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return (z ^ (z >> np.uint64(31))).astype("<u8").view(np.uint8)[:count]


def image(seed: int, shape: tuple[int, ...]) -> Array:
    """A float32 array of deviation about 1, in 256 levels between -1.7 and 1.7."""
    size = int(np.prod(shape))
    return ((noise(seed, size).astype(np.float32) - np.float32(127.5)) / np.float32(73.5)).reshape(shape)


def weights(kind: str, seed: int, count: int) -> Array:
    """Bytes of dense weights, uint8: int8 between -16 and 15, or nibbles between -1 and 1.

    So dense weights have sums about as large as those of weights of which one in 16 to 64 is not zero and may have
    any value.
    kind: "int8" or "nibbles".
    """
    random = noise(seed, count)
    if kind == "int8":
        return ((random & 31).astype(np.int8) - np.int8(16)).view(np.uint8)
    values = np.array([0, 0, 1, 15], np.uint8)
    return values[random & 3] | values[random >> 2 & 3] << 4
