"""Upsampling, nearest and linear, with PyTorch's float32 positions (aten/src/ATen/native/UpSample.h)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..common.resize import Plans, interpolated
from ..common.values import Array, Result
from .node import Node, handles

F = np.float32


def _scales(node: Node, count: int) -> list[float | None]:
    """The scale factor of every axis, None where only the size is given."""
    if node.overload == "vec":
        given: Any = node.arguments.get("scale_factors")
        return [None] * count if given is None else [float(s) for s in given]
    names = ["scales"] if count == 1 else ["scales_h", "scales_w"]
    return [float(node.number(n)) if node.has(n) else None for n in names]


def _sizes(node: Node, spatial: tuple[int, ...], scales: list[float | None]) -> list[int]:
    if node.has("output_size"):
        sizes = list(node.sizes("output_size", len(spatial)))
    else:
        node.need(len(scales) == len(spatial) and None not in scales, "needs a size or scales", expected=f"{len(spatial)} scale factors", found=scales)
        sizes = [math.floor(d * s) for d, s in zip(spatial, scales, strict=True) if s is not None]
    node.need(min(sizes) > 0, "gives an impossible size", expected="sizes of at least 1", found=sizes)
    return sizes


def _step(size: int, output: int, scale: float | None) -> np.float32:
    """How far apart two output positions lie in the input."""
    return F(1.0 / scale) if scale is not None and scale > 0 else F(size) / F(output)


def _nearest(size: int, output: int, scale: float | None, exact: bool) -> tuple[Array, Array]:
    positions = np.arange(output, dtype=F) + F(0.5 if exact else 0)
    places = np.floor(positions * _step(size, output, scale)).astype(np.int64)
    return np.minimum(places, size - 1), np.zeros(output)


def _linear(size: int, output: int, scale: float | None, align_corners: bool) -> tuple[Array, Array]:
    positions = np.arange(output, dtype=F)
    if align_corners:
        step = F(size - 1) / F(output - 1) if output > 1 else F(0)
        source = positions * step
    else:
        source = np.maximum(_step(size, output, scale) * (positions + F(0.5)) - F(0.5), F(0))
    places = np.minimum(np.floor(source).astype(np.int64), size - 1)
    return places, np.clip(source - places.astype(F), F(0), F(1)).astype(np.float64)


@handles(
    "aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten._upsample_nearest_exact1d", "aten._upsample_nearest_exact2d",
    "aten.upsample_linear1d", "aten.upsample_bilinear2d",
)
def upsample(node: Node) -> Result:
    """Resize to a size or by scale factors."""
    linear = "linear" in node.op
    if linear:
        node.x()
    count = 1 if node.op.endswith("1d") or "linear1d" in node.op else 2
    spatial = node.shape()[2:]
    node.need(len(spatial) == count, "works on data of another rank", expected=f"rank {count + 2}", found=list(node.shape()))
    scales = _scales(node, count)
    sizes = _sizes(node, spatial, scales)
    plans: Plans = {}
    for i, (size, output, scale) in enumerate(zip(spatial, sizes, scales, strict=True)):
        if linear:
            places, part = _linear(size, output, scale, node.flag("align_corners"))
        else:
            places, part = _nearest(size, output, scale, "exact" in node.op)
        if size != output or part.any() or not np.array_equal(places, np.arange(size)):
            plans[2 + i] = places, part, 1
    return interpolated(node, plans)
