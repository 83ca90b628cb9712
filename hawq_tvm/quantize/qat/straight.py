"""Rounding that training sees through: the value is the deployed integer's, the gradient that of the real formula it
stands for (straight-through).

Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013; the gradient of a scale is that
of Esser et al., "Learned Step Size Quantization", 2020.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, soft: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None


def straight(soft: Tensor, exact: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `soft`, which has its shape and type."""
    return _Straight.apply(soft, exact)


def nearest(value: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The nearest integers at a scale, ties to even, within bounds; without a gradient."""
    return (value.detach() / scale.detach()).round().clamp(*bounds)


class _OnGrid(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor, scale: Tensor, codes: Tensor, low: int, high: int) -> Tensor:
        context.save_for_backward(value, scale, codes)
        context.bounds = low, high
        return codes.to(value.dtype) * scale

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (gradient,), (value, scale, codes), (low, high) = gradients, context.saved_tensors, context.bounds
        steps = value / scale
        inside = (steps >= low) & (steps <= high)
        moved = torch.where(inside, codes - steps, steps.clamp(low, high)) * gradient
        return gradient * inside, moved.sum_to_size(scale.shape), None, None, None


def on_grid(value: Tensor, scale: Tensor, codes: Tensor, bounds: tuple[int, int]) -> Tensor:
    """The numbers that integers stand for at a scale that broadcasts against them.

    codes: the integers of `value`, zero point taken away, within bounds.  The gradient goes to what lies within them;
    a scale gets what is rounded of that, and of what lies outside the end of the range.
    """
    return _OnGrid.apply(value, scale, codes, *bounds)
