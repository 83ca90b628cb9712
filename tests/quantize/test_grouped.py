"""Convolutions with groups: the same numbers and the same first derivatives as PyTorch's, and second derivatives by
finite differences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hawq_tvm.quantize.network.grouped import convolution

CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 4, 5, 6), (4, 1, 3, 3), {"stride": (2, 1), "padding": (1, 1), "groups": 4}),
    ((1, 4, 6, 5), (6, 2, 2, 3), {"stride": 2, "padding": 1, "dilation": (2, 1), "groups": 2}),
    ((2, 3, 7), (6, 1, 3), {"padding": 2, "dilation": 2, "groups": 3}),
]


@pytest.mark.parametrize("shape, kernel, window", CASES)
def test_derivatives(shape: tuple[int, ...], kernel: tuple[int, ...], window: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, kernel, kernel[:1]))
    wanted = (F.conv1d, F.conv2d)[len(shape) - 3](x, w, b, **window)
    found = convolution(x, w, b, **window)
    torch.testing.assert_close(found, wanted)  # sums in another order
    u = torch.randn_like(wanted)
    for ours, real in zip(
        torch.autograd.grad(found, (x, w, b), u), torch.autograd.grad(wanted, (x, w, b), u), strict=True
    ):
        torch.testing.assert_close(ours, real)
    assert torch.autograd.gradgradcheck(lambda *v: convolution(*v, **window), (x, w, b))
    with torch.no_grad():
        assert torch.equal(convolution(x, w, b, **window), wanted)
