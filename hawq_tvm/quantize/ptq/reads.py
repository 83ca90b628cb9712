"""What a layer reads, as rows that its weights multiply: a sample of the positions of every image."""

from __future__ import annotations

import torch

from hawq_tvm.quantize.network.float_graph import Layer
from hawq_tvm.quantize.network.float_operators import padded

Tensor = torch.Tensor
# So many rows are enough, so many numbers in all, and so many multiplications for their covariance.
ROWS, NUMBERS, PRODUCTS = 2**17, 2**26, 2**38
# The covariance of more would take gigabytes.
WIDEST = 4608


def matrices(weight: Tensor, layer: Layer) -> Tensor | None:
    """The weight as (groups, outputs of a group, what each multiplies), float64; None for a transposed convolution, of
    which no result reads all weights of its channel, and where an output multiplies more than WIDEST.
    """
    rows = weight.movedim(layer.channel_axis, 0).flatten(1)
    if layer.kind == "deconv" or rows.shape[1] > WIDEST:
        return None
    return rows.double().reshape(layer.group, -1, rows.shape[1])


def unfolded(matrix: Tensor, like: Tensor, layer: Layer) -> Tensor:
    """The inverse of `matrices`: in the shape of a weight."""
    moved = like.movedim(layer.channel_axis, 0)
    return matrix.reshape(moved.shape).movedim(0, layer.channel_axis)


def rows(value: Tensor, weight: Tensor, layer: Layer, images: int) -> Tensor:
    """What the rows of `matrices` multiply at evenly spread positions, float32 in (groups, images, positions, weights).

    value: of a batch, the images in its first dimension.  images: of all batches.
    """
    width = weight.numel() // weight.shape[layer.channel_axis]
    most = max(min(ROWS, NUMBERS // (layer.group * width), PRODUCTS // width**2) // images, 1)
    if layer.kind == "matmul":
        flat = value.reshape(len(value) if value.ndim > 1 else 1, -1, value.shape[-1])
        return flat[:, _spread(flat.shape[1], most)][None]
    windows, axes = padded(value, layer.before, layer.after), range(2, value.ndim)
    taps = weight.shape[2:]
    for axis, tap, step, gap in zip(axes, taps, layer.strides, layer.dilations, strict=True):
        windows = windows.unfold(axis, (tap - 1) * gap + 1, step)
    for axis, gap in enumerate(layer.dilations, value.ndim):
        windows = windows.index_select(axis, torch.arange(0, windows.shape[axis], gap)) if gap > 1 else windows
    sizes = windows.shape[2 : value.ndim]
    at = torch.unravel_index(_spread(sizes.numel(), most), sizes)
    every = (slice(None), slice(None))
    found = windows[every + tuple(at)]  # images, channels, positions, taps
    grouped = found.reshape(len(value), layer.group, -1, *found.shape[2:])
    return grouped.movedim(2, 3).flatten(3).movedim(1, 0)


def _spread(count: int, most: int) -> Tensor:
    """At most so many of the numbers below a count, evenly."""
    kept = min(count, most)
    return (torch.arange(kept) * count) // kept
