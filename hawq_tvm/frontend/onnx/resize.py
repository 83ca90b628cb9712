"""Resize, nearest and linear, as gathers of constant positions with constant weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
import onnx
from tvm import relax

from hawq_tvm.frontend.common.resize import Plans, interpolated

from .graph import node_name
from .node import Node, handles
from .values import Array, Constant, Result, Tensor, Value

COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
MAX_SIZE = 1 << 20
# Weights with a larger denominator, which only scales that are no simple fractions give, are rounded to float32.
MAX_DENOMINATOR = 1 << 12


@dataclass(frozen=True)
class Axis:
    """One resized axis: sizes, the scale as the model gives it, and the real length it leads to; all exact."""

    size: int
    output: int
    scale: Fraction
    length: Fraction
    crop: tuple[Fraction, Fraction] = (Fraction(0), Fraction(1))

    def source(self, mode: str) -> tuple[Array, int]:
        """Where each output position lies in the input (ONNX, Resize, coordinate_transformation_mode): numerators
        and their one denominator.
        """
        start, step = self._line(mode)
        whole = lcm(start.denominator, step.denominator)
        return np.arange(self.output).astype(object) * int(step * whole) + int(start * whole), whole

    def _line(self, mode: str) -> tuple[Fraction, Fraction]:
        """The source of position 0, and how far those of two neighbours are apart."""
        last, half, still = self.size - 1, Fraction(1, 2), Fraction(0)
        if mode == "align_corners":
            return still, last / (self.length - 1) if self.length != 1 else still
        if mode == "asymmetric":
            return still, 1 / self.scale
        if mode == "tf_half_pixel_for_nn":
            return half / self.scale, 1 / self.scale
        if mode == "tf_crop_and_resize":
            start, stop = self.crop
            if self.length == 1:
                return half * (start + stop) * last, still
            return start * last, (stop - start) * last / (self.length - 1)
        if mode == "pytorch_half_pixel" and self.length == 1:
            return -half, still
        offset = self.size * half * (1 - self.output / self.length) if mode == "half_pixel_symmetric" else still
        return offset + half / self.scale - half, 1 / self.scale


def nearest(numerators: Array, whole: int, rounding: str) -> Array:
    """Positions rounded to whole ones."""
    if rounding == "floor":
        return numerators // whole
    if rounding == "ceil":
        return -(-numerators // whole)
    return (
        -((whole - 2 * numerators) // (2 * whole))
        if rounding == "round_prefer_floor"
        else (2 * numerators + whole) // (2 * whole)
    )


@handles("Resize", "Upsample")
def resize(node: Node) -> Result:
    """Resize by scales or to sizes."""
    return interpolated(node, planned(node))


def plans_of(proto: onnx.NodeProto, opset: int, shape: Sequence[int], given: Sequence[Any]) -> Plans:
    """What a node reads of an input of that shape; given: the arrays of its other inputs, None for one left out.

    Raises ModelError as the importer does.
    """
    data = Tensor(relax.Var("data", relax.TensorType(tuple(shape), "float32")), "float32")
    others: list[Value | None] = [None if v is None else Constant(np.asarray(v)) for v in given]
    attributes = {a.name: a for a in proto.attribute}
    sources, outputs = list(proto.input), list(proto.output)
    node = Node(
        node_name(proto), proto.op_type, [data, *others], sources, frozenset(), _unbound, "", opset, outputs, attributes
    )
    return planned(node)


def _unbound(expr: relax.Expr, name: str) -> relax.Var:
    raise AssertionError(f"{name}: a plan computes nothing")


def planned(node: Node) -> Plans:
    """What a Resize or an Upsample reads, axis by axis."""
    return _upsampled(node) if node.op == "Upsample" else _resized(node)


def _upsampled(node: Node) -> Plans:
    """What Resize was called before opset 10, with the scales as an attribute before opset 9: asymmetric, rounding
    down.
    """
    node.need(
        node.opset < 10,
        "does not exist in this opset any more",
        found=f"opset {node.opset}",
        remedy="export the model again",
    )
    return _as_first(node, node.attr("scales", [1.0]) if node.opset < 9 else _numbers(node.constant(1, "scale")))


def _as_first(node: Node, scales: list[float]) -> Plans:
    return _plans(node, _axes_by_scale(node, scales, list(range(len(node.shape())))), "asymmetric", "floor")


def _resized(node: Node) -> Plans:
    if node.opset < 11:
        return _as_first(node, _numbers(node.constant(1, "scale")))
    coordinates = node.attr("coordinate_transformation_mode", "half_pixel")
    rounding = node.attr("nearest_mode", "round_prefer_floor")
    node.need(
        coordinates in COORDINATES,
        "has an unknown coordinate_transformation_mode",
        expected=", ".join(COORDINATES),
        found=coordinates,
    )
    node.need(rounding in ROUNDINGS, "has an unknown nearest_mode", expected=", ".join(ROUNDINGS), found=rounding)
    rank = len(node.shape())
    axes = node.axes(node.attr("axes", list(range(rank))), rank)
    scales = _numbers(node.constant(2, "scale")) if node.given(2) else []
    sizes = node.ints(3, "size") if node.given(3) else []
    node.need(
        bool(scales) != bool(sizes),
        "needs either scales or sizes",
        expected="one of the two",
        found="both or none",
    )
    resized = _axes_by_scale(node, scales, axes) if scales else _axes_by_size(node, sizes, axes)
    if coordinates == "tf_crop_and_resize":
        resized = _cropped(node, resized, axes)
    if node.flag("antialias", 0) and any(a.scale < 1 for a in resized.values()):
        raise node.fail("shrinks with antialias", expected="antialias 0", remedy="export without antialiasing")
    return _plans(node, resized, coordinates, rounding)


def _numbers(array: Array) -> list[float]:
    return array.astype(np.float64).ravel().tolist()


def _axes_by_scale(node: Node, scales: list[float], axes: list[int]) -> dict[int, Axis]:
    dims = node.shape()
    if len(scales) != len(axes) or any(not (math.isfinite(s) and s > 0) for s in scales):
        raise node.fail("has scales that do not fit", expected=f"{len(axes)} positive numbers", found=str(scales))
    chosen = [
        (a, s)
        for a, s in zip(axes, scales, strict=True)
        if s != 1.0 or node.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize"
    ]
    exact = [(a, Fraction(s)) for a, s in chosen]
    return {a: _checked(node, Axis(dims[a], math.floor(dims[a] * s), s, dims[a] * s)) for a, s in exact}


def _axes_by_size(node: Node, sizes: list[int], axes: list[int]) -> dict[int, Axis]:
    dims = node.shape()
    if len(sizes) != len(axes) or any(s < 1 for s in sizes):
        raise node.fail("has sizes that do not fit", expected=f"{len(axes)} positive integers", found=str(sizes))
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch":
        node.need(policy in ("not_larger", "not_smaller"), "has an unknown keep_aspect_ratio_policy", found=policy)
        ratios = [Fraction(s, dims[a]) for a, s in zip(axes, sizes, strict=True)]
        ratio = min(ratios) if policy == "not_larger" else max(ratios)
        exact = [ratio * dims[a] for a in axes]
        return {
            a: _checked(node, Axis(dims[a], math.floor(e + Fraction(1, 2)), ratio, e))
            for a, e in zip(axes, exact, strict=True)
        }
    return {
        a: _checked(node, Axis(dims[a], s, Fraction(s, dims[a]), Fraction(s))) for a, s in zip(axes, sizes, strict=True)
    }


def _checked(node: Node, axis: Axis) -> Axis:
    node.need(1 <= axis.output <= MAX_SIZE, "gives an impossible size", expected=f"1 to {MAX_SIZE}", found=axis.output)
    return axis


def _cropped(node: Node, axes: dict[int, Axis], order: list[int]) -> dict[int, Axis]:
    """Axes with the region of interest that tf_crop_and_resize reads."""
    roi = _numbers(node.constant(1, "region of interest"))
    if len(roi) != 2 * len(order):
        raise node.fail(
            "has a region of interest that does not fit", expected=f"{2 * len(order)} numbers", found=str(len(roi))
        )
    if any(not (0 <= v <= 1) for v in roi):
        raise node.fail("reads outside its input", expected="a region of interest within 0 and 1", found=str(roi))
    crops = {a: (Fraction(roi[i]), Fraction(roi[len(order) + i])) for i, a in enumerate(order)}
    return {a: Axis(x.size, x.output, x.scale, x.length, crops[a]) for a, x in axes.items()}


def _weights(part: Array, whole: int) -> tuple[Array, int]:
    """part / whole with the least denominator, which is 1 where the numerators are float32 numbers."""
    common = gcd(whole, *part.tolist())
    part, whole = part // common, whole // common
    return (
        (part.astype(np.float64), whole)
        if whole <= MAX_DENOMINATOR
        else ((part / whole).astype(np.float32).astype(np.float64), 1)
    )


def _plans(node: Node, axes: dict[int, Axis], coordinates: str, rounding: str) -> Plans:
    mode = node.attr("mode", "nearest")
    node.need(
        mode in ("nearest", "linear"), f"in mode {mode} is not supported", expected="nearest or linear", found=mode
    )
    plans: Plans = {}
    for axis, geometry in axes.items():
        rounded: Array
        part: Array
        numerators, whole = geometry.source(coordinates)
        if mode == "nearest":
            rounded, part = nearest(numerators, whole, rounding), np.zeros(geometry.output, object)
        else:
            inside = np.clip(numerators, 0, (geometry.size - 1) * whole)
            rounded, part = inside // whole, inside % whole
        places = np.clip(rounded, 0, geometry.size - 1).astype(np.int64)
        if not (np.array_equal(places, np.arange(geometry.size)) and not part.any()):
            plans[axis] = places, *_weights(part, whole)
    return plans
