"""The quantized_decomposed operators of PT2E: a real tensor times the reciprocal of its scale, rounded: (A2c)."""

from __future__ import annotations

import numpy as np

from hawq_tvm.core import arith
from hawq_tvm.frontend.common.quant import Affine, calibrated_again, dequantized, quantized
from hawq_tvm.frontend.common.values import QUANTIZED, Array, Constant, Result, Tensor

from .node import Node, handles

PER_TENSOR, PER_CHANNEL = "_per_tensor", "_per_channel"


def _numbers(node: Node, name: str) -> Array:
    """Scales or zero points: a number, or a constant tensor, in the type that the program has them in."""
    value = node.arguments.get(name)
    if isinstance(value, Constant | Tensor):
        if isinstance(value, Tensor):
            raise node.fail(
                f"has {name} that are computed at run time",
                expected="constants",
                remedy="quantize statically, with calibration data",
            )
        return value.array
    return np.asarray(node.number(name), np.float64)


def _scale(node: Node, name: str, reciprocal: bool) -> Array:
    """Scales in float32.

    reciprocal: a quantize will divide by them, which PyTorch does by float32(1 / s) of the s that the program holds;
    scales are refused when (A2c) would be another function.
    """
    exact = _numbers(node, name).astype(np.float64)
    with np.errstate(all="ignore"):
        narrow = exact.astype(np.float32)
        inverse, wanted = np.float32(1) / narrow, (1.0 / exact).astype(np.float32)
    good = np.isfinite(exact) & (narrow > 0) & np.isfinite(narrow) & np.isfinite(inverse)
    if exact.size == 0 or not good.all():
        raise node.fail(
            "has a scale that is not a positive finite number",
            expected="finite numbers above zero",
            found="none" if exact.size == 0 else f"{float(exact[~good].ravel()[0]):g}",
            remedy=calibrated_again(float(exact[~good].ravel()[0]) if exact.size else 0.0),
        )
    if reciprocal and np.any(inverse != wanted):
        raise node.fail(
            "has a scale that float32 cannot hold, and whose reciprocal it rounds differently",
            expected="a float32 scale",
            found=repr(float(exact[inverse != wanted].ravel()[0])),
            remedy="round it: float(numpy.float32(scale))",
        )
    return narrow


def _range(node: Node, kind: str) -> tuple[int, int]:
    low, high = (int(_numbers(node, name).item()) for name in ("quant_min", "quant_max"))
    least, most = arith.RANGES[kind]
    node.need(
        least <= low < high <= most,
        "has a quant_min and quant_max that do not fit its type",
        expected=f"a range within {least} to {most} ({kind})",
        found=f"{low} to {high}",
    )
    return low, high


def _zero(node: Node, name: str, scale: Array, bounds: tuple[int, int], kind: str) -> Array:
    if node.arguments.get(name) is None:
        return np.zeros(scale.shape, np.int32)
    zero = _numbers(node, name)
    if zero.dtype.kind == "f" and np.any(zero != np.rint(zero)):
        raise node.fail(
            "has zero points that are no integers", expected="integers", found=f"{float(zero.ravel()[0]):g}"
        )
    node.need(
        zero.shape == scale.shape,
        f"has {name} that do not fit its scales",
        expected=f"shape {list(scale.shape)}",
        found=list(zero.shape),
    )
    low, high = (0, 0) if kind == "int32" else bounds
    outside = (zero < low) | (zero > high)
    if np.any(outside):
        raise node.fail(
            "has a zero point out of range", expected=f"{low} to {high}", found=str(int(zero[outside].ravel()[0]))
        )
    return zero.astype(np.int32)


def _affine(node: Node, shape: tuple[int, ...], kind: str, reciprocal: bool) -> Affine:
    """The scale and zero point of a call, for data of a shape."""
    channels = node.op.endswith(PER_CHANNEL)
    names = ("scales", "zero_points") if channels else ("scale", "zero_point")
    bounds = _range(node, kind)
    scale = _scale(node, names[0], reciprocal)
    zero = _zero(node, names[1], scale, bounds, kind)
    if channels:
        axis = node.axis(node.integer("axis"), len(shape))
        node.need(
            scale.shape == (shape[axis],),
            "has scales that do not fit its data",
            expected=f"{shape[axis]} (axis {axis} of {list(shape)})",
            found=list(scale.shape),
        )
        spread = [-1 if i == axis else 1 for i in range(len(shape))]
    else:
        node.need(scale.size == 1, "has several scales", expected="one for the tensor", found=scale.size)
        spread = []
    return Affine(scale.reshape(spread), zero.reshape(spread), kind, bounds, "reciprocal")


def _kind(node: Node, allowed: tuple[str, ...]) -> str:
    kind = str(node.arguments.get("dtype"))
    node.need(
        kind in allowed,
        "is of a type that is not supported",
        expected=", ".join(allowed),
        found=kind,
        remedy="quantize to one of these; constants are folded by convert_pt2e(fold_quantize=True)",
    )
    return kind


@handles("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.quantize_per_channel")
def quantize(node: Node) -> Result:
    """clamp(round(x (1 / scale)) + zero_point, quant_min, quant_max)."""
    x = node.value(0)
    kind = _kind(node, QUANTIZED)
    node.need(x.kind == "float32", "does not take this element type", expected="float32", found=x.kind)
    how = _affine(node, x.shape, kind, reciprocal=True)
    if isinstance(x, Constant):
        q = arith.quantize(
            x.array,
            how.scale,
            how.zero,
            qmin=how.qtype.qmin,
            qmax=how.qtype.qmax,
            storage=how.qtype.storage,
            form="reciprocal",
        )
        return Constant(q)
    return quantized(node.expr(0), how)


@handles("quantized_decomposed.dequantize_per_tensor", "quantized_decomposed.dequantize_per_channel")
def dequantize(node: Node) -> Result:
    """(x - zero_point) scale."""
    x = node.value(0)
    kind = _kind(node, (*QUANTIZED, "int32"))
    node.need(x.kind == kind, "does not take this element type", expected=kind, found=x.kind)
    wanted = node.arguments.get("out_dtype")
    node.need(
        wanted in (None, "float32"),
        "gives a float type that is not supported",
        expected="float32",
        found=wanted,
        remedy="convert the model to float32",
    )
    how = _affine(node, x.shape, kind, reciprocal=False)
    low, high = how.qtype.qmin, how.qtype.qmax
    if isinstance(x, Constant) and x.array.size and (x.array.min() < low or x.array.max() > high):
        raise node.fail(
            "has values outside its range", expected=f"{low} to {high}", found=f"{x.array.min()} to {x.array.max()}"
        )
    return Tensor(dequantized(x, how), "float32")
