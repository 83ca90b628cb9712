"""Softmax and normalizations of integers in torch: operators that read a whole row before they write of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor
Shift = Callable[[Tensor, Tensor, str], Tensor]


def exponents_of_table(attrs: Any, x: Tensor, table: Tensor) -> Tensor:
    """(A17): e of every element."""
    x = x.long()
    return table.long()[x.amax(int(attrs["axis"]), keepdim=True) - x]


def wide_exponents(attrs: Any, x: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """(A24): e of scores on a grid of powers of two."""
    x, fraction = x.long(), int(attrs["fraction"])
    below = x.amax(int(attrs["axis"]), keepdim=True) - x
    rest, half = below & ((1 << fraction) - 1), fraction // 2
    product = coarse.long()[rest >> half] * fine.long()[rest & ((1 << half) - 1)]
    return ((product + (1 << 29)) >> 30) >> (below >> fraction).clamp(max=31)


def softmax(attrs: Any, e: Tensor, shifted: Shift) -> Tensor:
    """(A17) from the sum on; shifted: a shift that rounds."""
    total = e.sum(int(attrs["axis"]), keepdim=True)
    bits = _bits(total)
    reciprocal = (int(attrs["multiplier"]) << 31) // (total >> (bits - 31))
    found = shifted(e * reciprocal, bits + int(attrs["shift"]), str(attrs["rounding"]))
    return (found + int(attrs["zero_point"])).clamp(int(attrs["qmin"]), int(attrs["qmax"]))


def layer_norm(attrs: Any, x: Tensor) -> Tensor:
    """(A25)"""
    axes, f, fraction = [int(a) for a in attrs["axes"]], int(attrs["shift"]), int(attrs["fraction"])
    n, q = math.prod(x.shape[a] for a in axes), x.long() - int(attrs["zero_point"])
    total = q.sum(axes, keepdim=True) * int(attrs["centered"])
    spread = n * (q * q).sum(axes, keepdim=True) - total * total
    wide = ((spread << f if f >= 0 else spread >> -f) + int(attrs["epsilon"])).clamp(min=1)
    bits = _bits(wide)
    even = 62 - bits - bits % 2
    root = _root(torch.where(even < 0, wide >> 2, wide << even.clamp(min=0)))
    by = (61 - fraction - ((even + f) >> 1)).clamp(1, 62)
    return ((n * q - total) * ((1 << 61) // root) + (torch.ones_like(by) << (by - 1))) >> by


def _bits(v: Tensor) -> Tensor:
    """The lengths of positive integers below 2^63."""
    bits = torch.frexp(v.double())[1].long()
    return bits - ((torch.ones_like(v) << (bits - 1).clamp(max=62)) > v).long()  # float64 may have rounded up


def _root(v: Tensor) -> Tensor:
    """The floor of the root of integers below 2^62; that of float64 is off by one at most."""
    root = v.double().sqrt().long()
    root = root - (root * root > v).long()
    return root + ((root + 1) * (root + 1) <= v).long()
