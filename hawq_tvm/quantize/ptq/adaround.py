"""Up or down for every weight, so that the layer's output moves least (Nagel et al., "Up or Down? Adaptive
Rounding", 2020).

A weight w with scale s becomes s (floor(w / s) + h(v)), h the sigmoid stretched to [-0.1, 1.1] and cut to [0, 1].
Gradient descent on v makes the squared distance to the float layer's output small, on patches of the quantized
network's own activations, while a penalty of 1 - |2 h - 1|^b, b from 20 to 2, pushes every h to 0 or 1. Both terms
are scaled to be free of units: the distance by that of nearest rounding, the penalty by the number of weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hawq_tvm.quantize.network.float_graph import Layer

from .weights import Rounded, along

Tensor = torch.Tensor
PATCHES, STEP_PATCHES = 8192, 512
RATE, PENALTY, WARM = 1e-2, 1.0, 0.2


def learn(
    rounded: Rounded,
    weight: Tensor,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    bounds: tuple[float | None, float | None],
    steps: int,
    seed: int,
) -> tuple[float, float]:
    """Choose the rounding of a layer's weights in place; where nearest rounding is better on the patches, it stays.

    inputs, outputs: what the quantized layer reads and what the float one computes, as many batches of each.
    bounds: of the clamp after the layer.  Returns the mean squared distances of nearest and of chosen rounding.
    """
    torch.manual_seed(seed)
    layer = rounded.layer
    patches, targets = _sampled(layer, weight, inputs, outputs)
    bias = rounded.bias if rounded.bias is not None else torch.zeros(1)
    top = 2 ** (rounded.bits - 1) - 1
    scale = along(rounded.scale, layer, weight.ndim)
    floor = torch.floor(weight / scale)

    def distance(values: Tensor, at: Tensor | slice) -> Tensor:
        return (
            (_clamp(_product(layer, values, patches[at]) + bias, bounds) - _clamp(targets[at], bounds)).square().mean()
        )

    with torch.no_grad():
        before = float(distance(rounded.weight, slice(None)))
    if before == 0:
        return 0.0, 0.0
    part = (weight / scale - floor).clamp(0.01, 0.99)
    logit = torch.log((part + 0.1) / (1.1 - part)).requires_grad_()
    optimizer = torch.optim.Adam([logit], RATE)
    for step in range(steps):
        up = (torch.sigmoid(logit) * 1.2 - 0.1).clamp(0, 1)
        at = torch.randint(len(patches), (min(STEP_PATCHES, len(patches)),))
        loss = distance((floor + up).clamp(-top - 1, top) * scale, at) / before
        gone = (step / steps - WARM) / (1 - WARM)
        if gone > 0:
            loss = loss + PENALTY * (1 - (2 * up - 1).abs().pow(20 - 18 * gone)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        codes = (floor + (logit >= 0)).clamp(-top - 1, top)
        after = float(distance(codes * scale, slice(None)))
    if after < before:
        rounded.codes = codes.to(torch.int8)
    return before, min(before, after)


def _clamp(values: Tensor, bounds: tuple[float | None, float | None]) -> Tensor:
    return values if bounds == (None, None) else values.clamp(*bounds)


def _sampled(
    layer: Layer, weight: Tensor, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Patches (number, groups, products of one sum) and the outputs (number, channels) at random positions, the same
    share of every batch.
    """
    share = max(PATCHES // len(inputs), 1)
    patches, targets = [], []
    for x, y in zip(inputs, outputs, strict=True):
        if layer.kind == "conv":
            rows = _windows(layer, weight, x).movedim(-1, 1).flatten(0, 1)
            wanted = y.flatten(2).movedim(-1, 1).flatten(0, 1)
        else:
            rows, wanted = x.reshape(-1, 1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        chosen = torch.randperm(len(rows))[:share]
        patches.append(rows[chosen])
        targets.append(wanted[chosen])
    return torch.cat(patches), torch.cat(targets)


def _windows(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """What every output position of a convolution over one or two axes reads: (images, groups, products, positions)."""
    flat = [p for pair in zip(reversed(layer.before), reversed(layer.after), strict=True) for p in pair]
    kernel, dilations, strides = tuple(weight.shape[2:]), layer.dilations, layer.strides
    x = F.pad(x, flat)
    if len(kernel) == 1:
        x, kernel, dilations, strides = x.unsqueeze(2), (1, *kernel), (1, *dilations), (1, *strides)
    columns = F.unfold(x, kernel, dilations, 0, strides)
    return columns.reshape(len(columns), layer.group, -1, columns.shape[-1])


def _product(layer: Layer, weight: Tensor, patches: Tensor) -> Tensor:
    if layer.kind == "matmul":
        return patches[:, 0] @ (weight.T if layer.channel_axis == 0 else weight)
    rows = weight.reshape(layer.group, -1, patches.shape[-1])
    return torch.einsum("pgk,gok->pgo", patches, rows).flatten(1)


def can_learn(layer: Layer, weight: Tensor) -> bool:
    """Whether `learn` knows the kind of layer."""
    return weight.ndim in {"matmul": (2,), "conv": (3, 4)}.get(layer.kind, ())
