"""Every CUDA rule's kernel, with its threads as loops on the CPU, gives the reference's integers at odd shapes and
on the full range.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ibert, ibert_ops, ops, softmax_wide
from hawq_tvm.core.division import divide
from hawq_tvm.core.errors import ScheduleError
from hawq_tvm.core.interpolation import Steps
from hawq_tvm.core.layer_norm import Norm
from schedules.gpu.cuda_depthwise import CudaDepthwiseTile

from ..schedules.one_layer import in_two_steps, lower, packed
from ..schedules.products import KINDS, SHAPES, factors, product
from .on_cpu import TARGET, check

R = relax.op
rng = np.random.default_rng(11)
TYPES = {k: arith.QType.of(k) for k in ("uint8", "int8")}


def full_range(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    values.flat[0], values.flat[-1] = info.min, info.max
    return values


def requantized(
    e: Any, acc: relax.Expr, channels: int, rounding: str = "half_even", shift: int = 40, kind: str = "uint8"
) -> relax.Expr:
    biased = e(R.add(acc, relax.const(rng.integers(-999, 999, channels).astype(np.int32), "int32")))
    m = rng.integers(1 << 20, 1 << 30, channels)
    return ops.requantize([biased], [m], 12345, shift, qtype=TYPES[kind], zero_point=3, rounding=rounding)


@pytest.mark.parametrize(
    ("x", "k", "stride", "dilation", "pad", "dtype"),
    [
        ((1, 9, 8, 16), 3, 1, 1, 1, "uint8"),
        ((2, 7, 7, 12), 3, 2, 1, 1, "int8"),
        ((1, 11, 10, 6), 5, 1, 2, 0, "uint8"),
        ((1, 5, 6, 7), 2, 1, 1, 0, "int8"),
        ((1, 12, 13, 4), 7, 3, 1, 3, "uint8"),
    ],
)
def test_depthwise(x, k, stride, dilation, pad, dtype):
    w = full_range((k, k, 1, x[3]), "int8")

    def body(e: Any, data: relax.Expr) -> relax.Expr:
        padded = e(R.nn.pad(data, [0, 0, pad, pad, pad, pad, 0, 0], pad_value=7)) if pad else data
        acc = e(
            R.nn.conv2d(
                padded,
                relax.const(w),
                strides=stride,
                dilation=dilation,
                groups=x[3],
                data_layout="NHWC",
                kernel_layout="HWIO",
                out_dtype="int32",
            )
        )
        return requantized(e, acc, x[3])

    check(body, full_range(x, dtype), rule="cuda.depthwise")


def test_depthwise_of_several_outputs_per_channel_and_no_epilogue():
    w = full_range((3, 3, 1, 10), "int8")

    def body(e: Any, data: relax.Expr) -> relax.Expr:
        return R.nn.conv2d(data, relax.const(w), groups=5, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32")

    check(body, full_range((1, 6, 5, 5), "uint8"), rule="cuda.depthwise")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 9, 9, 16), "uint8"), ((2, 8, 7, 12), "int8"), ((1, 7, 5, 3), "int8")]
)
def test_max_pool(shape, dtype):
    low = np.iinfo(dtype).min

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        return R.nn.max_pool2d(e(R.nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0], pad_value=low)), (3, 3), (2, 2), layout="NHWC")

    check(body, full_range(shape, dtype), rule="cuda.window")


@pytest.mark.parametrize(
    ("shape", "window"), [((1, 9, 9, 16), 3), ((2, 7, 7, 40), 7), ((1, 8, 8, 5), 8), ((1, 5, 6, 32), 2)]
)
def test_sum_pool(shape, window):
    """Windows of one thread, and such as eight threads share."""

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        acc = e(ops.sum_pool2d(x, (window, window), (1, 1), layout="NHWC"))
        return ops.requantize([acc], [1 << 30], 99, 35, qtype=TYPES["uint8"], zero_point=1, rounding="half_up")

    check(body, full_range(shape, "uint8"), rule="cuda.window")


@pytest.mark.parametrize(
    ("name", "axes", "rule"),
    [
        ("sum", [1], "cuda.window"),
        ("max", [0, 1], "cuda.window"),
        ("min", [2], "cuda.generic"),
        ("sum", [1, 2], "cuda.generic"),
        ("max", [0, 1, 2], "cuda.generic"),
    ],
)
def test_reductions(name, axes, rule):
    check(lambda e, x: getattr(R, name)(e(R.astype(x, "int32")), axis=axes), full_range((3, 37, 65), "int8"), rule=rule)


def test_arg_extrema():
    check(lambda e, x: R.argmax(x, axis=1), rng.integers(0, 4, (5, 67)).astype(np.uint8), rule="cuda.generic")


@pytest.mark.parametrize(
    ("shape", "rounding"),
    [((2, 5, 7, 16), "half_up"), ((1, 3, 3, 6), "half_even"), ((1, 2, 2, 3), "half_away"), ((33,), "half_up")],
)
def test_residual_additions(shape, rounding):
    def body(e: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        return ops.requantize([a, b], [1234567, 7654321], 5, 24, qtype=TYPES["int8"], zero_point=-3, rounding=rounding)

    check(body, full_range(shape, "uint8"), full_range(shape, "int8"), rule="cuda.elementwise")


def test_tables():
    table = full_range((256,), "int8")
    check(lambda e, x: ops.lookup(x, table), full_range((1, 5, 5, 24), "int8"), rule="cuda.elementwise")


def test_polynomials_in_cells():
    table = np.array([[1 << 20, -(1 << 20), 5], [900, -7, 12], [-3, 100, 0]], np.int32)
    u = np.arange(3 << 5, dtype=np.int32).reshape(1, 4, 4, 6)
    check(lambda e, x: ops.interpolate(x, table, Steps(5, 2, 3, 4), bound=0.1, slope=0.1), u, rule="cuda.elementwise")


def test_quotients():
    numbers = {"qtype": TYPES["int8"], "zero_point": 7, "rounding": "half_even", "undefined": -128}

    def body(e: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        return divide(a, b, -(2**29) - 7, 2**30 - 5, **numbers)

    check(body, full_range((3, 5, 41), "int8"), full_range((5, 1), "int8"), rule="cuda.elementwise")


def test_outputs_with_a_fraction_beside_them():
    """(A1a): the sums on a finer grid in int64, and their float32, on sums of the whole of int32."""
    finer = np.array([1 << 20, 1 << 20, 1 << 20], np.int64)

    def fraction(e: Any, x: relax.Expr) -> relax.Expr:
        wide = e(R.multiply(e(R.astype(x, "int64")), ops.const(finer, "int64")))
        return R.maximum(e(R.subtract(wide, ops.const([419430, -419430, 2**51], "int64"))), ops.const(0, "int64"))

    check(fraction, full_range((4, 5, 3), "int32"), rule="cuda.elementwise")
    sums = rng.integers(-(2**53), 2**53, (4, 5, 3))
    check(
        lambda e, x: ops.dequantize(x, np.array([1.3e-14, 2.7e-15, 1e-9]), 0, qmin=-(2**53), qmax=2**53),
        sums,
        rule="cuda.elementwise",
    )


@pytest.mark.parametrize("channels", [(16, 32, 8), (3, 5, 6), (4, 12, 4)])
def test_concats(channels):
    arrays = [full_range((1, 3, 5, c), "uint8") for c in channels]
    check(lambda e, *x: R.concat(list(x), axis=3), *arrays, rule="cuda.elementwise")


def test_moves():
    x = full_range((2, 6, 5, 12), "uint8")
    check(lambda e, v: R.permute_dims(v, [0, 3, 1, 2]), x, rule="cuda.elementwise")
    check(lambda e, v: R.reshape(v, (12, 60)), x, rule="cuda.elementwise")
    check(lambda e, v: R.nn.pad(v, [0, 0, 1, 2, 0, 1, 0, 4], pad_value=5), x, rule="cuda.elementwise")


@pytest.mark.parametrize(
    ("rounding", "shape"), [("half_even", (1, 3, 7, 8)), ("half_up", (5,)), ("half_away", (1, 3, 7, 8))]
)
def test_the_border(rounding, shape):
    x = (rng.normal(0, 20, shape)).astype(np.float32)
    x.flat[:3] = 0.5, -1.5, 1e9
    check(lambda e, v: ops.quantize(v, 1.0, 3, qtype=TYPES["int8"], rounding=rounding), x, rule="cuda.elementwise")
    check(
        lambda e, v: ops.dequantize(v, np.float32(0.0371), 3, qmin=-128, qmax=127),
        full_range(shape, "int8"),
        rule="cuda.elementwise",
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_that_no_other_rule_takes(groups):
    w = full_range((3, 2, 6 // groups, 10), "int8")

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        acc = e(
            R.nn.conv2d(
                x, relax.const(w), strides=2, groups=groups, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"
            )
        )
        return requantized(e, acc, 10)

    check(body, full_range((1, 9, 8, 6), "int16"), rule="cuda.generic")


@pytest.mark.parametrize("rule", ["cuda.window", "cuda.generic"])
def test_rounding_in_two_steps(rule):
    """(A23a) after the sums of a pool, and of a convolution of wide data."""
    w = (full_range((3, 2, 6, 10), "int8") >> 3).astype(np.int8)

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        if rule == "cuda.window":
            return in_two_steps(e, e(ops.sum_pool2d(x, (2, 3), (1, 1), layout="NHWC")))
        return in_two_steps(
            e, e(R.nn.conv2d(x, relax.const(w), data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"))
        )

    x = full_range((1, 9, 8, 6), "int16" if rule == "cuda.generic" else "int8")
    check(body, x >> 4 if rule == "cuda.generic" else x, rule=rule)


def test_softmax():
    table = np.round(2**30 * np.exp(-0.03 * np.arange(256))).astype(np.int32)

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        return ops.softmax(x, table, axis=1, multiplier=255 << 23, shift=23, qtype=TYPES["uint8"], zero_point=0)

    check(body, full_range((3, 41), "uint8"), rule="cuda.generic")


def test_layer_norm():
    norm = Norm.of(41, (0, 255), Fraction(1, 20), Fraction(1, 10**5), None)

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        return requantized(e, e(ops.layer_norm(x, [1], norm)), 41, shift=55)

    check(body, full_range((3, 41), "uint8"), rule="cuda.generic")


@pytest.mark.parametrize("operator", ["gelu", "softmax", "layer_norm"])
def test_ibert(operator):
    """(A28) in 64 bits, (A29), (A30)."""
    numbers, exponents = ibert.Polynomial.gelu([Fraction(1, 2**12)], [2**15]), ibert.Softmax.of(Fraction(1, 20))
    m, k = ibert.softmax_dyadic(Fraction(255), 41)

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        if operator == "gelu":
            made = e(ibert_ops.i_gelu(x, numbers, (), (-(2**15), 2**15 - 1)))
            return ops.requantize([made], [1 << 19], 0, 53, qtype=TYPES["int8"], zero_point=0, rounding="half_up")
        if operator == "layer_norm":
            return requantized(e, e(ibert_ops.i_layer_norm(x, [1], 3)), 41, shift=50)
        asked = {"multiplier": m, "shift": k, "qtype": TYPES["uint8"], "zero_point": 0}
        return ibert_ops.i_softmax(x, exponents, axis=1, scale=0.0, **asked)

    rule = "cuda.elementwise" if operator == "gelu" else "cuda.generic"
    check(body, full_range((3, 41), "int16" if operator == "gelu" else "uint8"), rule=rule)


def test_weights_of_4_bits():
    values = rng.integers(-8, 8, (3, 3, 5, 6)).astype(np.int8)
    packed_values = arith.pack_int4(values)

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        w = e(ops.unpack_int4(packed_values, values.shape, signed=True))
        return requantized(e, e(R.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32")), 6)

    check(body, full_range((1, 5, 6, 5), "int16"), rule="cuda.generic")


def test_positions_beyond_32_bits_are_refused():
    module = packed(lambda e, x: R.maximum(x, relax.const(0, "int8")), [((1 << 16, 1 << 15), "int8")])
    with pytest.raises(
        ScheduleError, match="layer: a tensor is too large for a GPU kernel; expected less than 2147483648 elements"
    ):
        lower(module, TARGET)


@pytest.mark.parametrize("bad", [(0, 4), (2, 3)])
def test_depthwise_tiles_check_themselves(bad):
    with pytest.raises(ValueError, match="not a tile"):
        CudaDepthwiseTile(*bad)


def test_a_scale_computed_at_run_time():
    x = rng.normal(0, 3, (3, 50)).astype(np.float32)
    check(lambda e, v: ops.dynamic_quantize(v), x, rule="cuda.generic")


@pytest.mark.parametrize("level", [0, 255])
def test_softmax_of_wide_scores(level):
    """(A24), masked columns and a row that is masked everywhere."""
    m, s = arith.softmax_dyadic(Fraction(255), 41)
    qtype = arith.QType.of("uint8")

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        tables = softmax_wide.tables(18)
        return ops.softmax_wide(
            x, tables, fraction=18, axis=1, multiplier=m, shift=s, qtype=qtype, zero_point=level, rounding="half_even"
        )

    scores = rng.integers(-(1 << 22), 1 << 22, (4, 41)).astype(np.int32)
    scores[1, ::3], scores[2] = -(1 << 30), -(1 << 30)
    scores[3, 5] = (1 << 30) - 1
    check(body, scores, rule="cuda.generic")


@pytest.mark.parametrize(
    ("shapes", "kind", "requantized"),
    [*((s, KINDS[4], i % 2 == 0) for i, s in enumerate(SHAPES)), *((SHAPES[2], k, True) for k in KINDS)],
    ids=str,
)
def test_products_of_two_activations(shapes, kind, requantized):
    """Bytes of any sign and zero point, one matrix and many."""
    types, zeros = kind
    check(product(zeros, requantized), *factors(shapes, types), rule="cuda.products")
