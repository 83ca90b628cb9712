"""What every group of channels costs: half its share of the Hessian's trace times the squared norm of its weights (Yu
et al., "Hessian-Aware Pruning and Optimal Neural Implant", 2021, equation 8).

Taking weights w away raises the loss by about w^T H w / 2; with the average curvature Tr(H_g) / n_g of the group's n_g
weights for H, that is Tr(H_g) / (2 n_g) ||w||^2. The trace of every channel's block is Hutchinson's: the elements of v
(H v) have the diagonal of H for mean, over random signs v, each layer's weights being probed on their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hawq_tvm.quantize.allocate.loss import Loss
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .channels import Channels

Array = NDArray[np.float64]


def diagonals(loss: Loss, probes: int, batch: int, seed: int, progress: Progress) -> dict[str, torch.Tensor]:
    """An estimate of the Hessian's diagonal by every layer's weights, the mean of `probes` sets of random signs: one
    for each batch of `batch` images, in order and again from the first.
    """
    graph, random = loss.graph, torch.Generator().manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    done = 0
    while done < probes:
        for one in loss.data.batches(batch, True):
            weights = {w: graph.parameters[w].detach().clone().requires_grad_() for w in _weights(graph)}
            gradients = torch.autograd.grad(
                loss.of(one, parameters=weights).mean(), [*weights.values()], create_graph=True, materialize_grads=True
            )
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                sign = torch.randint(0, 2, weight.shape, generator=random, dtype=weight.dtype).mul_(2).sub_(1)
                (product,) = torch.autograd.grad(gradient, weight, sign, retain_graph=True, materialize_grads=True)
                sums[name] = sums.get(name, torch.zeros_like(weight)) + sign * product
            done += 1
            progress(Step("Hessian", done, probes))
            if done == probes:
                break
    return {name: total / done for name, total in sums.items()}


def _weights(graph: FloatGraph) -> list[str]:
    return list(dict.fromkeys(layer.weight for layer in graph.layers))


def group_costs(graph: FloatGraph, channels: Channels, diagonal: Mapping[str, torch.Tensor] | None) -> Array:
    """The cost of every group: of the rows of all layers that make its channels, added; never negative.

    diagonal: None for squared norms alone, as if the Hessian were 2.
    """
    costs: Array = np.zeros(channels.count)
    for rows in channels.rows.values():
        weight = graph.parameters[rows.parameter]
        curvature = torch.full_like(weight, 2) if diagonal is None else diagonal[rows.parameter]
        costs += np.bincount(rows.groups, _row_costs(weight, curvature, rows.axis), channels.count)
    return costs


def _row_costs(weight: Any, diagonal: torch.Tensor, axis: int) -> Array:
    """Tr(H_g) / (2 n_g) ||w_g||^2 of every slice along an axis."""
    others = [d for d in range(weight.ndim) if d != axis]
    trace = diagonal.double().mean(others).clamp_min(0)
    return (trace * weight.double().square().sum(others) / 2).numpy()
