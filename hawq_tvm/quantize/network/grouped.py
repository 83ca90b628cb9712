"""Convolutions with groups that can be differentiated twice in reasonable time: PyTorch's second derivative calls
one convolution per group.

For a depthwise convolution of 672 channels that is 672 calls a side, and nine tenths of the time that the Hessian of
a mobile network takes. A convolution is linear in both operands, so its two derivatives and it are each other's
derivatives: three functions that are closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


@dataclass(frozen=True)
class Window:
    """What a convolution has beside its operands; per spatial axis, but groups."""

    strides: tuple[int, ...]
    padding: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int


def convolution(
    x: Tensor, w: Tensor, b: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """What torch.nn.functional.conv1d, conv2d and conv3d compute, by the weight's rank."""
    rank = w.ndim - 2
    if groups == 1 or not torch.is_grad_enabled():
        return (F.conv1d, F.conv2d, F.conv3d)[rank - 1](x, w, b, stride, padding, dilation, groups)
    y = _Product.apply(x, w, Window(_each(stride, rank), _each(padding, rank), _each(dilation, rank), groups))
    return y if b is None else y + b.reshape(-1, *[1] * rank)


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


class _Product(torch.autograd.Function):
    """The output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, window: Window) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.window = window
        return torch.ops.aten.convolution(
            x, w, None, window.strides, window.padding, window.dilations, False, [0] * (w.ndim - 2), window.groups
        )

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return (
            _ByInput.apply(u, w, x.shape, ctx.window) if ctx.needs_input_grad[0] else None,
            _ByWeight.apply(u, x, w.shape, ctx.window) if ctx.needs_input_grad[1] else None,
            None,
        )


class _ByInput(torch.autograd.Function):
    """The gradient by the input, of the output's gradient u and the weight."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, w: Tensor, shape: torch.Size, window: Window) -> Tensor:
        ctx.save_for_backward(u, w)
        ctx.window = window
        return _backward(u, w.new_empty(shape), w, window, 0)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        u, w = ctx.saved_tensors
        return (
            _Product.apply(v, w, ctx.window) if ctx.needs_input_grad[0] else None,
            _ByWeight.apply(u, v, w.shape, ctx.window) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _ByWeight(torch.autograd.Function):
    """The gradient by the weight, of the output's gradient u and the input."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, shape: torch.Size, window: Window) -> Tensor:
        ctx.save_for_backward(u, x)
        ctx.window = window
        return _backward(u, x, x.new_empty(shape), window, 1)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        u, x = ctx.saved_tensors
        return (
            _Product.apply(x, v, ctx.window) if ctx.needs_input_grad[0] else None,
            _ByInput.apply(u, v, x.shape, ctx.window) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def _backward(u: Tensor, x: Tensor, w: Tensor, window: Window, side: int) -> Tensor:
    """One of the two gradients; of the operand that it is taken by only the shape matters."""
    mask = [side == 0, side == 1, False]
    given = (window.strides, window.padding, window.dilations, False, [0] * (w.ndim - 2), window.groups, mask)
    return torch.ops.aten.convolution_backward(u, x, w, None, *given)[side]
