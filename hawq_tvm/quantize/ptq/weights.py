"""Weights as integers: one symmetric scale per output channel, the nearest integers, and how far they are from the
real weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hawq_tvm.quantize.network.float_graph import Layer

from .observers import LEAST

Tensor = torch.Tensor
# Largest magnitudes that are tried as the end of the range, as shares of the channel's own, and more below 4 bits.
SHARES = tuple(i / 100 for i in range(100, 39, -2))
LOW_SHARES = tuple(i / 100 for i in range(38, 19, -2))


@dataclass
class Rounded:
    """The weights of a layer in integers.

    scale: one per output channel, float32.  codes: int8 in the weight's shape, from -2^(bits-1) to 2^(bits-1) - 1.
    bias: float32 by output channel (of every group, see `Layer.repeats`), None where the layer has none.
    """

    layer: Layer
    bits: int
    scale: Tensor
    codes: Tensor
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """What the integers stand for, float32."""
        return self.codes.to(torch.float32) * along(self.scale, self.layer, self.codes.ndim)

    def error(self, weight: Tensor) -> float:
        """The squared distance from the real weights over their squared length."""
        difference, given = (self.weight - weight).double(), weight.double()
        return float((difference**2).sum() / (given**2).sum().clamp_min(1e-30))


def along(values: Tensor, layer: Layer, rank: int) -> Tensor:
    """One value per output channel, shaped to multiply the weight."""
    return values.reshape([-1 if d == layer.channel_axis else 1 for d in range(rank)])


def scales(weight: Tensor, layer: Layer, bits: int, search: bool, least: Tensor) -> Tensor:
    """The scale of every output channel, float32: its largest magnitude at the largest integer, or with search the
    share of that whose error is least.

    least: scales are no smaller, by channel.
    """
    top = 2 ** (bits - 1) - 1
    rows = weight.movedim(layer.channel_axis, 0).flatten(1).double()
    largest = torch.maximum(rows.abs().amax(1), least.double() * top)
    if not search:
        return (largest / top).float()
    best, smallest = largest / top, torch.full_like(largest, float("inf"))
    for share in (*SHARES, *(LOW_SHARES if bits < 4 else ())):
        tried = torch.maximum(largest * share / top, least.double()).float().double()
        error = ((rows / tried[:, None]).round().clamp(-top - 1, top) * tried[:, None] - rows).square().sum(1)
        better = error < smallest
        best, smallest = torch.where(better, tried, best), torch.where(better, error, smallest)
    return best.float()


def nearest(
    weight: Tensor, bias: Tensor | None, layer: Layer, bits: int, search: bool, step: float, added: float = 0.0
) -> Rounded:
    """Every weight at its nearest integer, ties to even; search: as for `scales`; step: the scale of the layer's input.

    added: the greatest magnitude of a constant that is added to the result.  A channel whose weights are tiny beside it
    or its bias gets a scale at which they fit into 31 bits, so that there is room for the sum.
    """
    scale = scales(weight, layer, bits, search, _least(weight, bias, layer, step, added))
    return Rounded(layer, bits, scale, _nearest(weight, scale, layer, bits), bias)


def with_room(ours: Rounded, weight: Tensor, step: float, added: float = 0.0) -> Rounded:
    """The same where every channel's scale still leaves its bias room in 31 bits, after the bias or the step changed;
    other channels are rounded anew, and are tiny beside their bias.
    """
    scale = torch.maximum(ours.scale, _least(weight, ours.bias, ours.layer, step, added))
    tight = along(scale > ours.scale, ours.layer, weight.ndim)
    codes = torch.where(tight, _nearest(weight, scale, ours.layer, ours.bits), ours.codes)
    return replace(ours, scale=scale, codes=codes)


def _least(weight: Tensor, bias: Tensor | None, layer: Layer, step: float, added: float) -> Tensor:
    greatest = torch.full([weight.shape[layer.channel_axis]], added, dtype=torch.float64)
    if bias is not None:
        greatest = torch.maximum(greatest, bias.double().abs().reshape(layer.repeats, -1).amax(0))
    return (greatest / (step * 2**30)).clamp_min(LEAST).float()


def _nearest(weight: Tensor, scale: Tensor, layer: Layer, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    return (weight / along(scale, layer, weight.ndim)).round().clamp(-top - 1, top).to(torch.int8)
