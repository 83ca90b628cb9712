"""QONNX, what Brevitas and HAWQ's exporter write: Quant (IntQuant), BipolarQuant and Trunc as quantize followed by
dequantize.

The operators give float tensors and name a bit width; what the integers are is fixed here. QONNX adds the zero point
before it rounds, which is the form "affine" (A2a). Source: the operators' Python definitions in the package qonnx
1.0.0 (qonnx.custom_op.general).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops

from .node import Handler, Node, handles
from .quant import read_scale
from .values import FLOAT_KINDS, Array, Constant, Result, Tensor

DOMAINS = ("onnx.brevitas", "qonnx.custom_op.general", "finn.custom_op.general", "hawq2qonnx")
MOST_BITS = 16
MOST_CONSTANT_BITS = 32

# QONNX's names, written in either case: HALF_UP and UP are symmetric, away from zero; ROUND_TO_ZERO is Brevitas's name
# of DOWN.
ROUNDINGS = {
    "ROUND": "half_even",
    "HALF_EVEN": "half_even",
    "CEIL": "ceil",
    "FLOOR": "floor",
    "UP": "away",
    "DOWN": "toward_zero",
    "ROUND_TO_ZERO": "toward_zero",
    "HALF_UP": "half_away",
    "HALF_DOWN": "half_toward_zero",
}


def in_every_domain(*names: str, inputs: tuple[int, int]) -> Callable[[Handler], Handler]:
    """Register a handler of QONNX operators in each domain that files have used for them."""

    def register(handler: Handler) -> Handler:
        for domain in DOMAINS:
            handles(*names, domain=domain, inputs=inputs, checks_types=True)(handler)
        return handler

    return register


def integer_range(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    """The least and greatest integer of a bit width; narrow leaves out the one most negative, or greatest if
    unsigned.
    """
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


@in_every_domain("Quant", "IntQuant", inputs=(4, 4))
def quant(node: Node) -> Result:
    """(q - zero_point) scale with q = round(clip(x / scale + zero_point)) of a bit width; inputs x, scale,
    zero_point, bit_width.

    One signed bit is bipolar, -1 or 1, as in QONNX.
    """
    _check_data(node)
    bits = _bits(node, 3, "bit width", MOST_CONSTANT_BITS if isinstance(node.value(0), Constant) else MOST_BITS)
    signed, narrow, rounding = node.flag("signed", 1), node.flag("narrow", 0), _rounding(node, "ROUND")
    scale, zero = _scale(node, 1), _zero(node, 2)
    if signed and bits == 1:
        node.need(
            not zero.any(), "has one signed bit and a zero point", expected="zero point 0", found=int(zero.flat[0])
        )
        return _bipolar(node, scale)
    low, high = integer_range(bits, signed, narrow)
    _zero_in_range(node, zero, low, high)
    value = node.value(0)
    if isinstance(value, Constant):
        steps = value.array.astype(np.float32) / scale + zero.astype(np.float32)
        q = arith.round_real(np.clip(steps.astype(np.float64), low, high), rounding).astype(np.int64)
        return _constant(q, scale, zero, low, high)
    qtype = arith.QType(low, high, _storage(low, high))
    return _dequantized(node, _quantized(node, node.expr(0), scale, zero, qtype, rounding, "q"), scale, zero, qtype)


@in_every_domain("BipolarQuant", inputs=(2, 2))
def bipolar_quant(node: Node) -> Result:
    """scale where x >= 0, else -scale; inputs x, scale."""
    _check_data(node)
    return _bipolar(node, _scale(node, 1))


@in_every_domain("Trunc", inputs=(5, 6))
def trunc(node: Node) -> Result:
    """The low bits of integers dropped: round(q / 2^n) for x = (q - zero_point) scale.

    Version 1 (x, scale, zero_point, in_bits, out_bits) has n = in_bits - out_bits and keeps the scale; version 2 (x,
    scale, zero_point, in_bits, out_scale, out_bits) has 2^n nearest to out_scale / scale, a range of out_bits, and
    the scale out_scale. Both have been written under either version number, so the number of inputs tells them
    apart.
    """
    _check_data(node)
    second = len(node.inputs) == 6
    scale, zero, rounding = _scale(node, 1), _zero(node, 2), _rounding(node, "FLOOR")
    in_bits, out_bits = (
        _bits(node, 3, "input bit width", MOST_CONSTANT_BITS),
        _bits(node, 5 if second else 4, "output bit width", MOST_BITS),
    )
    if second:
        out_scale = _scale(node, 4)
        steps = np.rint(np.log2(out_scale.astype(np.float64) / scale)).astype(np.int64)
        low, high = integer_range(out_bits, node.flag("signed", 1), node.flag("narrow", 0))
    else:
        out_scale, steps = scale, np.asarray(in_bits - out_bits)
        # Version 1 does not say whether its integers have a sign: room for both.
        low, high = integer_range(out_bits, True, False)[0], integer_range(out_bits, False, False)[1]
    node.need(
        bool(np.all(steps >= 0)),
        "gives more bits than it takes",
        expected="a shift to the right",
        found=f"2^{int(np.min(steps))}",
    )
    if np.any(zero % (1 << steps)):
        raise node.fail(
            "has a zero point that its shift does not keep whole",
            expected=f"a multiple of {1 << int(np.max(steps))}",
            found=int(zero.flat[0]),
            remedy="use a symmetric quantizer before the pool",
        )
    out_zero = zero >> steps if second else zero
    _zero_in_range(node, out_zero, low, high)
    widest = arith.QType(
        integer_range(in_bits, True, False)[0], min(integer_range(in_bits, False, False)[1], 2**31 - 1), "int32"
    )
    whole = _quantized(node, node.expr(0), scale, zero, widest, "half_even", "whole")
    real = node.emit(ops.dequantize(whole, scale, zero, qmin=widest.qmin, qmax=widest.qmax), "real")
    qtype = arith.QType(low, high, _storage(low, high))
    q = _quantized(node, real, np.ldexp(scale, steps).astype(np.float32), zero >> steps, qtype, rounding, "q")
    return _dequantized(node, q, out_scale, out_zero, qtype)


def _storage(low: int, high: int) -> str:
    """The type that holds a range, unsigned where nothing is below 0."""
    return arith.smallest_storage(low, high) if low else "uint8" if high <= 255 else "uint16"


def _bipolar(node: Node, scale: Array) -> Result:
    """-1 or 1 times a scale. At run time floor(x / t) + 1 clipped to 0..1 is [x >= 0], for any t > 0; then 2 [x >=
    0] - 1.
    """
    value, none = node.value(0), np.zeros((), np.int32)
    if isinstance(value, Constant):
        return _constant(np.where(value.array >= 0, 1, -1), scale, none, -1, 1)
    # With t <= 1 no quotient underflows to zero.
    step = ops.quantize(
        node.expr(0), np.minimum(scale.min(), np.float32(1)), 1, qtype=arith.QType(0, 1, "uint8"), rounding="floor"
    )
    twice = node.emit(ops.dequantize(node.emit(step, "step"), 2 * scale, none, qmin=0, qmax=1), "twice")
    sign = node.emit(relax.op.subtract(twice, ops.const(scale, "float32")), "sign")
    qtype = arith.QType(-1, 1, "int8")
    return _dequantized(node, _quantized(node, sign, scale, none, qtype, "half_even", "q"), scale, none, qtype)


def _quantized(
    node: Node, x: relax.Expr, scale: Array, zero: Array, qtype: arith.QType, rounding: str, suffix: str
) -> relax.Var:
    form = "affine" if zero.any() else "divide"
    return node.emit(ops.quantize(x, scale, zero, qtype=qtype, rounding=rounding, form=form), suffix)


def _dequantized(node: Node, q: relax.Expr, scale: Array, zero: Array, qtype: arith.QType) -> Tensor:
    return Tensor(ops.dequantize(q, scale, zero, qmin=qtype.qmin, qmax=qtype.qmax), node.value(0).kind)


def _constant(q: Array, scale: Array, zero: Array, low: int, high: int) -> relax.Call:
    return ops.dequantize(ops.const(q, arith.smallest_storage(low, high)), scale, zero, qmin=low, qmax=high)


def _check_data(node: Node) -> None:
    kind = node.value(0).kind
    node.need(kind in FLOAT_KINDS, "does not take this element type", expected="float32", found=kind)


def _rounding(node: Node, default: str) -> str:
    name = node.attr("rounding_mode", default)
    if name.upper() not in ROUNDINGS:
        raise node.fail("has an unknown rounding_mode", expected=", ".join(ROUNDINGS), found=name or "an empty text")
    return ROUNDINGS[name.upper()]


def _bits(node: Node, index: int, what: str, most: int) -> int:
    """A bit width: one whole number from 1 to `most`."""
    array = node.constant(index, what)
    if array.size == 0 or array.dtype.kind not in "iuf" or (array.size > 1 and np.any(array != array.flat[0])):
        raise node.fail(
            f"has a {what} that is not one number",
            expected="one value for the tensor",
            found=f"{array.dtype}{list(array.shape)}",
        )
    bits = float(array.flat[0])
    if not (1 <= bits <= most and bits == round(bits)):
        remedy = f"train with at most {most} bits; only constants, such as biases, may have up to {MOST_CONSTANT_BITS}"
        raise node.fail(
            f"has a {what} that is not supported",
            expected=f"a whole number from 1 to {most}",
            found=f"{bits:g}",
            remedy=remedy if most < bits else "",
        )
    return int(bits)


def _scale(node: Node, index: int) -> Array:
    return _fitted(node, index, read_scale(node, index), "scale")


def _zero(node: Node, index: int) -> Array:
    """The zero point as int32; QONNX would take a fraction, but then no integer stands for 0."""
    array = node.constant(index, "zero point")
    with np.errstate(all="ignore"):
        whole = np.rint(array.astype(np.float64))
    if array.size == 0 or np.any(whole != array) or np.any(np.abs(whole) >= 2**31):
        found = (
            f"{float(array.ravel()[np.flatnonzero((whole != array).ravel())[0]]):g}"
            if np.any(whole != array)
            else str(list(array.shape))
        )
        raise node.fail(
            f"has a zero point {node.source(index)!r} that is not an integer",
            expected="whole numbers",
            found=found,
            remedy="train with an integer zero point: padding needs an integer that stands for 0",
        )
    return _fitted(node, index, whole.astype(np.int32), "zero point")


def _zero_in_range(node: Node, zero: Array, low: int, high: int) -> None:
    if np.any((zero < low) | (zero > high)):
        worst = int(zero.ravel()[np.argmax(np.abs(zero.ravel().astype(np.int64)))])
        raise node.fail("has a zero point out of range", expected=f"{low} to {high} for its bit width", found=worst)


def _fitted(node: Node, index: int, array: Array, what: str) -> Array:
    """An array that broadcasts into the tensor without enlarging it; a scalar where there is one value."""
    shape = node.shape()
    pairs = zip(array.shape[::-1], shape[::-1], strict=False)
    if array.size > 1 and (array.ndim > len(shape) or any(have not in (1, wanted) for have, wanted in pairs)):
        raise node.fail(
            f"has a {what} {node.source(index)!r} that does not fit",
            expected=f"a shape that broadcasts to {list(shape)}",
            found=str(list(array.shape)),
        )
    return array.reshape(()) if array.size == 1 else array
