"""Traces and their standard errors from samples, of which every layer may have another number.

Samples stand in an array [number, layer], NaN where a layer was not probed; PAIR in a row are of one batch of images.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Random signs of one batch: from two, what signs alone contribute to the spread is known, and images that differ in
# curvature do not hide it.
PAIR = 2


def _pairs(samples: Array, counts: Array) -> tuple[Array, Array]:
    """The samples as [pair, sign, layer], 0 where a layer does not use them, and which it uses [pair, layer]."""
    pairs = samples[: counts.max() // PAIR * PAIR].reshape(-1, PAIR, samples.shape[1])
    used = np.arange(len(pairs))[:, None] < counts // PAIR
    return np.where(used[:, None], pairs, 0.0), used


def estimated(samples: Array, counts: Array) -> tuple[Array, Array]:
    """The trace of every layer from its first `counts` samples, and the standard error that random signs leave: each
    pair's mean is off by half its difference.
    """
    pairs, used = _pairs(samples, counts)
    number = used.sum(0)
    return pairs.mean(1).sum(0) / number, np.sqrt(np.square(np.diff(pairs, axis=1)[:, 0] / 2).sum(0)) / number


def spread(samples: Array, counts: Array, batches: int) -> Array:
    """The standard errors of the traces over other images of the kind, from how much batches differ: so many of them
    take turns, a pair at a time. Infinite after a single batch.
    """
    pairs, used = _pairs(samples, counts)
    turns = np.arange(len(pairs)) % batches
    sums, times = np.zeros((batches, len(counts))), np.zeros((batches, len(counts)), np.int64)
    np.add.at(sums, turns, pairs.mean(1))
    np.add.at(times, turns, used)
    means, seen = sums / np.maximum(times, 1), times > 0
    number = seen.sum(0)
    off = np.where(seen, means - means.sum(0) / number, 0.0)
    return np.where(number > 1, np.sqrt(np.square(off).sum(0) / np.maximum(number - 1, 1) / number), np.inf)


def added(samples: Array, rows: int) -> Array:
    """The samples with at least so many rows; new ones hold NaN."""
    lacking = max(0, rows - len(samples))
    return np.concatenate([samples, np.full((lacking, samples.shape[1]), np.nan)]) if lacking else samples
