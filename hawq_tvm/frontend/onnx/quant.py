"""QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear; reading scales and zero points for every operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.frontend.common.quant import Affine, calibrated_again, dequantized, quantized

from .fold import type_name
from .node import MICROSOFT, Node, expression, handles
from .values import ELEMENT_TYPES, FLOAT_KINDS, QUANTIZED, Array, Result, Tensor, storage_of

SCALES = ("float32", "float16", "bfloat16", "float64")
MAX_EXPANDED = 1 << 28


def read_scale(node: Node, index: int) -> Array:
    """The scale at input `index` as float32, in the model's shape: constant, finite, above zero."""
    array = node.constant(index, "scale")
    name = node.source(index)
    if array.dtype.name not in SCALES:
        raise node.fail(
            f"has a scale {name!r} of a type that is not supported", expected=", ".join(SCALES), found=array.dtype.name
        )
    node.need(array.size > 0, f"has an empty scale {name!r}", expected="at least one number")
    with np.errstate(all="ignore"):
        scale = array.astype(np.float32)
    exact = array.astype(np.float64)
    bad = ~(np.isfinite(exact) & (exact > 0) & np.isfinite(scale) & (scale > 0))
    if bad.any():
        position = int(np.flatnonzero(bad.ravel())[0])
        place = f" at position {position}" if array.size > 1 else ""
        raise node.fail(
            f"has a scale {name!r} that is not a positive finite number{place}",
            expected="a finite number above zero",
            found=f"{float(exact.ravel()[position]):g}",
            remedy=calibrated_again(float(exact.ravel()[position])),
        )
    if array.dtype == np.float64 and np.any(scale.astype(np.float64) != exact):
        raise node.fail(
            f"has a float64 scale {name!r} that float32 cannot hold",
            expected="float32 scales",
            remedy="store it as float32",
        )
    return scale


def stored_zero(node: Node, index: int, kind: str) -> Array:
    """The zero point at input `index` as it is stored.

    Raises ModelError when it is of another type than the data.
    """
    array = node.constant(index, "zero point")
    node.need(
        array.dtype.name == kind,
        f"has a zero point {node.source(index)!r} of another type than its data",
        expected=kind,
        found=array.dtype.name,
    )
    return array


def read_zero(node: Node, index: int, kind: str, scale: Array) -> Array:
    """The zero point at input `index` as int32, of the scale's shape; 0 when left out.

    Raises ModelError when it is of another type than the data, of another shape than the scale, or out of range.
    """
    if not node.given(index):
        return np.zeros(scale.shape, np.int32)
    array, name = stored_zero(node, index, kind), node.source(index)
    # QLinearConv and its like take one zero point for scales per channel; QuantizeLinear wants equal shapes.
    shared = array.size == 1 and (scale.size == 1 or node.op.startswith("QLinear") or node.op == "QGemm")
    if array.shape != scale.shape and not shared:
        raise node.fail(
            f"has a zero point {name!r} that does not fit its scale",
            expected=f"shape {list(scale.shape)}",
            found=str(list(array.shape)),
        )
    zero = in_range(node, array.astype(np.int64), kind, name).astype(np.int32)
    return np.broadcast_to(zero.reshape(-1), scale.shape) if shared and scale.ndim else zero.reshape(scale.shape)


def in_range(node: Node, zero: Array, kind: str, name: str) -> Array:
    """A zero point, checked against the range of its type (and 0 for int32 data, as ONNX wants)."""
    low, high = (0, 0) if kind == "int32" else arith.RANGES[kind]
    if np.any((zero < low) | (zero > high)):
        worst = int(zero.ravel()[np.flatnonzero(((zero < low) | (zero > high)).ravel())[0]])
        raise node.fail(
            f"has a zero point {name!r} out of range", expected=f"{low} to {high} for {kind}", found=str(worst)
        )
    return zero


def spread(node: Node, array: Array, shape: Sequence[int], axis: int, block: int, what: str) -> Array:
    """A scale or zero point reshaped (per tensor, per axis) or repeated (blocked) to broadcast against `shape`.

    An empty shape stands for data that has one value for the whole tensor.
    """
    rank = len(shape)
    if block:
        return _spread_blocks(node, array, shape, node.axis(axis, rank), block, what)
    if array.size == 1 and array.ndim <= 1:
        return array.reshape(())
    if rank == 0:
        raise node.fail(
            f"has a {what} of several values", expected="one value for the tensor", found=f"{array.size} values"
        )
    if array.ndim != 1:
        raise node.fail(
            f"has a {what} of rank {array.ndim}",
            expected="a scalar, one value per channel, or blocks with block_size",
            found=f"shape {list(array.shape)} for data {list(shape)}",
        )
    axis = 0 if rank == 1 and node.op == "QuantizeLinear" else node.axis(axis, rank)
    if array.shape[0] != shape[axis]:
        raise node.fail(
            f"has a {what} of the wrong length",
            expected=f"1 or {shape[axis]} values (axis {axis} of {list(shape)})",
            found=f"{array.shape[0]} values",
        )
    return array.reshape([-1 if i == axis else 1 for i in range(rank)])


def _spread_blocks(node: Node, array: Array, shape: Sequence[int], axis: int, block: int, what: str) -> Array:
    node.need(block > 0, "has a negative block_size", expected="0 or more", found=block)
    wanted = [math.ceil(d / block) if i == axis else d for i, d in enumerate(shape)]
    if list(array.shape) != wanted:
        raise node.fail(
            f"has a blocked {what} that does not fit",
            expected=f"shape {wanted} (block_size {block} along axis {axis} of {list(shape)})",
            found=str(list(array.shape)),
        )
    if array.shape[axis] == 1:
        return array
    node.need(
        math.prod(shape) <= MAX_EXPANDED,
        f"has a blocked {what} on very large data",
        expected=f"at most {MAX_EXPANDED} elements",
    )
    repeated = np.repeat(array, block, axis=axis)
    return np.take(repeated, np.arange(shape[axis]), axis=axis)


def affine(node: Node, scale: int, zero: int, kind: str, shape: Sequence[int], axis: int = 1, block: int = 0) -> Affine:
    """The scale and zero point at two input positions, for data of a type and shape."""
    raw = read_scale(node, scale)
    raw_zero = read_zero(node, zero, kind, raw)
    return Affine(
        spread(node, raw, shape, axis, block, "scale"), spread(node, raw_zero, shape, axis, block, "zero point"), kind
    )


def output_kind(node: Node) -> str:
    """The element type a QuantizeLinear gives: the zero point's, else output_dtype, else uint8."""
    number = node.attr("output_dtype", 0)
    declared = ELEMENT_TYPES.get(number, "")
    zero = node.optional(2)
    kind = zero.kind if zero is not None else declared or "uint8"
    if kind not in QUANTIZED or (number and not declared):
        raise node.fail(
            "gives a type that is not supported",
            expected=", ".join(QUANTIZED),
            found=type_name(number) if number else kind,
            remedy="quantize to integers",
        )
    if number and zero is not None and declared != kind:
        raise node.fail("has a zero point and an output_dtype that disagree", expected=declared, found=kind)
    return kind


@handles("QuantizeLinear", checks_types=True)
@handles("QuantizeLinear", domain=MICROSOFT, inputs=(2, 3), checks_types=True)
def quantize_linear(node: Node) -> Result:
    """Float (or int32) to integers: y = saturate(rne(x / scale) + zero_point)."""
    x, kind = node.value(0), output_kind(node)
    if x.kind not in FLOAT_KINDS and x.kind != "int32":
        raise node.fail("does not take this element type", expected="float32, float16, bfloat16 or int32", found=x.kind)
    data = node.expr(0) if x.kind != "int32" else node.emit(relax.op.astype(node.expr(0), "float32"), "real")
    if isinstance(node.value(1), Tensor) and node.source(1) not in node.graph_inputs:
        return _quantize_by_computed_scale(node, data, kind)
    how = affine(node, 1, 2, kind, x.shape, node.attr("axis", 1), node.attr("block_size", 0))
    return quantized(data, replace(how, form=_division(node)))


def _division(node: Node) -> str:
    """The form of (A2): since opset 23 the quotient has the type of the scale, or the one that the node names."""
    number = node.attr("precision", 0)
    kind = ELEMENT_TYPES.get(number, type_name(number)) if number else node.value(1).kind
    node.need(
        not number or kind in FLOAT_KINDS,
        "divides in a type that is not supported",
        expected="a float type",
        found=kind,
    )
    return kind if kind in arith.HALVES and node.opset >= 23 and not node.domain else "divide"


def _quantize_by_computed_scale(node: Node, data: relax.Expr, kind: str) -> Tensor:
    """A scale computed in the graph: the formula in float operators, which only a float head or tail may keep."""
    scale, zero = node.value(1), node.optional(2)
    for value in [scale] + ([zero] if zero is not None else []):
        node.need(
            math.prod(value.shape) == 1,
            "has a computed scale or zero point of more than one value",
            found=list(value.shape),
        )
    ratio = node.emit(relax.op.divide(data, node.emit(relax.op.reshape(expression(scale), ()), "scale")), "ratio")
    steps = node.emit(relax.op.round(ratio), "round")
    if zero is not None:
        offset = node.emit(
            relax.op.astype(node.emit(relax.op.reshape(expression(zero), ()), "zero"), "float32"), "zero_point"
        )
        steps = node.emit(relax.op.add(steps, offset), "shift")
    low, high = arith.RANGES[kind]
    return Tensor(relax.op.astype(node.emit(relax.op.clip(steps, low, high), "clip"), storage_of(kind)), kind)


@handles("DequantizeLinear", checks_types=True)
@handles("DequantizeLinear", domain=MICROSOFT, inputs=(2, 3), checks_types=True)
def dequantize_linear(node: Node) -> Result:
    """Integers to float: (x - zero_point) * scale."""
    x = node.value(0)
    if x.kind not in (*QUANTIZED, "int32"):
        raise node.fail("does not take this element type", expected=", ".join((*QUANTIZED, "int32")), found=x.kind)
    number = node.attr("output_dtype", 0)
    kind = ELEMENT_TYPES.get(number, type_name(number)) if number else node.value(1).kind
    node.need(not number or kind in SCALES, "gives a type that is not supported", expected="float32", found=kind)
    how = affine(node, 1, 2, x.kind, x.shape, node.attr("axis", 1), node.attr("block_size", 0))
    return Tensor(dequantized(x, how), "float32" if kind == "float64" else kind)


@handles("DynamicQuantizeLinear")
def dynamic_quantize_linear(node: Node) -> list[Result]:
    """(A2b) the tensor, its scale and its zero point."""
    whole = node.emit(ops.dynamic_quantize(node.expr(0)), "dynamic")
    kinds = ("uint8", "float32", "uint8")
    return [Tensor(relax.TupleGetItem(whole, i), kind) for i, kind in enumerate(kinds)]
