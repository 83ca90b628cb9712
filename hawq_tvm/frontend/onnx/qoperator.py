"""The standard QOperator format: each node becomes dequantize, a float operator, quantize, under the node's name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.frontend.common.matmul import check_product
from hawq_tvm.frontend.common.quant import Affine, dequantized, quantized

from .conv import convolve
from .node import Node, expression, handles
from .quant import affine, in_range, read_scale, read_zero, spread, stored_zero
from .values import QUANTIZED, Array, Result, Tensor, Value


def check_kind(node: Node, index: int, allowed: Sequence[str] = ("int8", "uint8")) -> str:
    """The element type of a quantized input, refused unless allowed."""
    kind = node.value(index).kind
    node.need(
        kind in allowed,
        f"does not take this element type as its input {index}",
        expected=", ".join(allowed),
        found=kind,
    )
    return kind


def real_input(
    node: Node, index: int, suffix: str, *, axis: int = 1, allowed: Sequence[str] = ("int8", "uint8")
) -> relax.Var:
    """Input `index` as real numbers, its scale and zero point being the two inputs after it."""
    kind = check_kind(node, index, allowed)
    how = affine(node, index + 1, index + 2, kind, node.shape(index), axis)
    return node.emit(dequantized(node.value(index), how), suffix)


def output_affine(node: Node, scale: int, zero: int, fallback: str, shape: Sequence[int] = ()) -> Affine:
    """The scale and zero point of the result; its element type is the zero point's, else `fallback`."""
    value = node.optional(zero)
    kind = value.kind if value is not None else fallback
    node.need(kind in QUANTIZED, "gives a type that is not supported", expected=", ".join(QUANTIZED), found=kind)
    return affine(node, scale, zero, kind, shape)


def int32_bias(node: Node, index: int, scale: Array) -> Value | None:
    """An int32 bias as real numbers; scale: that of the accumulator, in float64 so that the product is exact."""
    value = node.optional(index)
    if value is None:
        return None
    node.need(value.kind == "int32", "has a bias of the wrong type", expected="int32", found=value.kind)
    low, high = arith.RANGES["int32"]
    per_channel = scale.reshape(-1) if scale.size > 1 else scale.reshape(())
    if per_channel.size not in (1, *value.shape):
        raise node.fail(
            "has a bias that does not fit", expected=f"shape [{per_channel.size}]", found=str(list(value.shape))
        )
    real = ops.dequantize(expression(value), per_channel.astype(np.float64), 0, qmin=low, qmax=high)
    return Tensor(node.emit(real, "bias.real"), "float32")


def exact_product(a: Array, b: Array) -> Array:
    """The product of two float32 scales, which float64 holds exactly."""
    return a.astype(np.float64) * b.astype(np.float64)


@handles("QLinearConv", checks_types=True)
def qlinear_conv(node: Node) -> Result:
    """Convolution of quantized tensors with an int32 bias; padding holds the zero point, which is the real 0."""
    return qlinear_conv_nchw(node, node.value(0))


def qlinear_conv_nchw(node: Node, x: Value) -> Tensor:
    """QLinearConv of an NCHW tensor, which may differ from input 0 by a transposition."""
    check_kind(node, 0)
    data = affine(node, 1, 2, x.kind, ())
    weight_kind = check_kind(node, 3)
    weight = affine(node, 4, 5, weight_kind, node.shape(3), axis=0)
    bias = int32_bias(node, 8, exact_product(data.scale, weight.scale))
    real = node.emit(dequantized(x, data), "x")
    kernel = node.emit(dequantized(node.value(3), weight), "w")
    y = node.emit(convolve(node, real, kernel, bias), "real")
    return quantized(y, output_affine(node, 6, 7, x.kind))


def _along_rows(node: Node, array: Array, shape: Sequence[int], columns: bool, what: str) -> Array:
    """A scale or zero point per tensor, row (left factor) or column (right factor), or already of the data's rank."""
    if array.size == 1:
        return array.reshape(())
    axis = len(shape) - 1 if columns else len(shape) - 2
    if array.ndim == 1 and axis >= 0:
        return spread(node, array, shape, axis, 0, what)
    wanted = tuple(1 if i == (len(shape) - 2 if columns else len(shape) - 1) else d for i, d in enumerate(shape))
    node.need(
        array.shape == wanted,
        f"has a {what} that does not fit",
        expected=f"one value, or shape {list(wanted)}",
        found=list(array.shape),
    )
    return array


def _factor(node: Node, index: int, columns: bool, suffix: str) -> relax.Var:
    kind, shape = check_kind(node, index), node.shape(index)
    scale = read_scale(node, index + 1)
    zero = read_zero(node, index + 2, kind, scale)
    how = Affine(
        _along_rows(node, scale, shape, columns, "scale"), _along_rows(node, zero, shape, columns, "zero point"), kind
    )
    return node.emit(dequantized(node.value(index), how), suffix)


@handles("QLinearMatMul", checks_types=True)
def qlinear_matmul(node: Node) -> Result:
    """Product of quantized tensors; scales per tensor, per row of a, per column of b."""
    check_product(node, node.shape(0), node.shape(3))
    a, b = _factor(node, 0, False, "a"), _factor(node, 3, True, "b")
    y = node.emit(relax.op.matmul(a, b), "real")
    scale = read_scale(node, 6)
    kind = node.value(7).kind
    zero = read_zero(node, 7, kind, scale)
    shape = ops.shape_of(y)
    node.need(kind in ("int8", "uint8"), "gives a type that is not supported", expected="int8 or uint8", found=kind)
    return quantized(
        y,
        Affine(
            _along_rows(node, scale, shape, False, "scale"), _along_rows(node, zero, shape, False, "zero point"), kind
        ),
    )


UNIT = np.ones((), np.float32)


def integer_zero(node: Node, index: int, kind: str) -> Array:
    """The zero point of an integer operator, which has no scale; 0 when left out."""
    if not node.given(index):
        return np.zeros((), np.int64)
    array, name = stored_zero(node, index, kind), node.source(index)
    node.need(array.size > 0, f"has an empty zero point {name!r}", expected="at least one number")
    return in_range(node, array.astype(np.int64), kind, name)


def accumulator(expr: relax.Expr) -> Tensor:
    """A sum of products of integers, real numbers on the grid of scale 1, as int32."""
    return quantized(expr, Affine(UNIT, np.zeros((), np.int32), "int32"))


@handles("ConvInteger", checks_types=True)
def conv_integer(node: Node) -> Result:
    """Convolution of integers into int32, after both zero points are taken away."""
    x_kind, w_kind = check_kind(node, 0), check_kind(node, 1)
    x_zero, w_zero = integer_zero(node, 2, x_kind), integer_zero(node, 3, w_kind)
    node.need(
        x_zero.size == 1, "has a zero point of x that is not one number", expected="one value", found=list(x_zero.shape)
    )
    w_zero = spread(node, w_zero, node.shape(1), 0, 0, "zero point")
    x = node.emit(dequantized(node.value(0), Affine(UNIT, x_zero.reshape(()), x_kind)), "x")
    w = node.emit(dequantized(node.value(1), Affine(UNIT, w_zero, w_kind)), "w")
    return accumulator(node.emit(convolve(node, x, w, None), "real"))


@handles("MatMulInteger", checks_types=True)
def matmul_integer(node: Node) -> Result:
    """Product of integers into int32; zero points per tensor, per row of A, per column of B."""
    check_product(node, node.shape(0), node.shape(1))
    return accumulator(
        node.emit(relax.op.matmul(_centred(node, 0, 2, False, "a"), _centred(node, 1, 3, True, "b")), "real")
    )


def _centred(node: Node, index: int, zero: int, columns: bool, suffix: str) -> relax.Var:
    kind, shape = check_kind(node, index), node.shape(index)
    how = Affine(UNIT, _along_rows(node, integer_zero(node, zero, kind), shape, columns, "zero point"), kind)
    return node.emit(dequantized(node.value(index), how), suffix)
