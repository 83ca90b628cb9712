"""The rules for Arm at awkward shapes and full-range operands: what QEMU computes is what the reference says,
exactly.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops
from schedules.cpu.arm_neon import Neon

from ..schedules.one_layer import in_two_steps, packed
from ..schedules.test_borders import CASES as BORDERED
from ..schedules.test_cpu_contract import CONVS, JOINED, Conv, accumulate, full
from .on_arm import DOTPROD, I8MM, NEON, TARGETS, check, kernel_of, needs_emulator

R = relax.op
rng = np.random.default_rng(21)
pytestmark = needs_emulator
EVERY = [pytest.param(t, id=name) for name, t in TARGETS.items()]


def in_turn(*lists):
    """Every combination with every target; all but one target of a combination are slow tests."""
    params = []
    for i, values in enumerate(product(*lists)):
        for k, (name, target) in enumerate(TARGETS.items()):
            case = "-".join(str(v) for v in values)
            params.append(
                pytest.param(
                    *values, target, id=f"{case}-{name}", marks=[pytest.mark.slow] if i % len(TARGETS) != k else []
                )
            )
    return params


RULES = {
    "arm-neon": ("arm.neon", "arm.neon"),
    "arm-dotprod": ("arm.dotprod", "arm.dotprod"),
    "arm-i8mm": ("arm.i8mm", "arm.dotprod"),
}


def rule_of(target, c: Conv) -> str:
    """The rule that must make a convolution of 8 bits with int8 weights."""
    if c.groups == c.ci and c.groups > 1:
        return "cpu.depthwise"
    name = next(n for n, t in TARGETS.items() if t is target)
    width = (c.w + c.pad[1] + c.pad[3] - (c.k[1] - 1) * c.dilation[1] - 1) // c.stride[1] + 1
    return RULES[name][width == 1]


def finished(emit, c: Conv, sums: relax.Expr, residual: relax.Expr | None, rounding: str = "half_up") -> relax.Expr:
    """Bias, requantize per channel, a residual, a table."""
    local = np.random.default_rng(c.co)
    a = emit(R.add(sums, relax.const(local.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32))))
    m, shift = local.integers(2**30, 2**31, (1, 1, 1, c.co)), local.integers(36, 46, (1, 1, 1, c.co))
    y = emit(ops.requantize([a], [m], 12345, shift, qtype=arith.QType.of("uint8"), zero_point=100, rounding=rounding))
    if residual is None:
        return ops.lookup(y, full("int8", 256))
    return ops.requantize(
        [residual, y],
        [2**29 + 3, 2**30 - 7],
        2**30,
        31,
        qtype=arith.QType(3, 250, "uint8"),
        zero_point=7,
        rounding=rounding,
    )


def out_of(c: Conv) -> tuple[int, ...]:
    """The shape of a convolution's result."""
    sides = zip((c.h, c.w), c.pad[:2], c.pad[2:], c.k, c.dilation, c.stride, strict=True)
    sizes = [(n + a + b - (k - 1) * d - 1) // s + 1 for n, a, b, k, d, s in sides]
    return c.n, *sizes, c.co


@pytest.mark.parametrize(("case", "target"), in_turn(enumerate([*CONVS, *JOINED])))
def test_conv2d_with_what_follows(case, target):
    i, c = case
    dtype, residual = ("uint8", "int8")[i % 2], i % 3 == 0
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)

    def body(e, p, *other):
        return finished(
            e,
            c,
            accumulate(e, c, p, relax.const(w), 3, "int32"),
            other[0] if other else None,
            ("half_up", "half_even")[i % 4 == 0],
        )

    check(body, target, x, *([full("uint8", *out_of(c))] if residual else []), rule=rule_of(target, c))


@pytest.mark.parametrize(("case", "target"), in_turn(enumerate(BORDERED)))
def test_borders_of_zeros(case, target):
    i, c = case
    dtype = ("uint8", "int8")[i % 2]
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    check(lambda e, p: finished(e, c, accumulate(e, c, p, relax.const(w), 0, "int32"), None), target, x)


@pytest.mark.parametrize(
    ("c", "dtype", "target"),
    in_turn(
        [
            Conv(1, 12, 12, 32, 64, pad=(1, 1, 1, 1)),
            Conv(1, 8, 6, 24, 48, (1, 1)),
            Conv(1, 8, 8, 64, 128, (1, 1), (2, 2)),
            Conv(1, 15, 15, 3, 32, (3, 3), (2, 2), pad=(0, 0, 1, 1)),
            Conv(1, 11, 13, 96, 96, groups=96, pad=(1, 1, 1, 1)),
            Conv(1, 1, 1, 64, 40, (1, 1)),
        ],
        ["uint8", "int8"],
    ),
)
def test_layers_of_networks(c, dtype, target):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    check(
        lambda e, p: finished(e, c, accumulate(e, c, p, relax.const(w), 3, "int32"), None),
        target,
        x,
        rule=rule_of(target, c),
    )


@pytest.mark.parametrize(
    ("c", "dtype", "target"),
    in_turn(
        [
            CONVS[0],
            CONVS[2],
            CONVS[8],
            CONVS[13],
            JOINED[0],
            Conv(1, 7, 9, 20, 24, (1, 1)),
            Conv(1, 1, 1, 48, 24, (1, 1)),
        ],
        ["uint8", "int8"],
    ),
)
def test_four_bit_weights_stay_packed(c, dtype, target):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), rng.integers(-8, 8, (*c.k, c.ci // c.groups, c.co)).astype(np.int8)
    w[..., 0] = -8

    def body(e, p):
        return finished(
            e, c, accumulate(e, c, p, e(ops.unpack_int4(arith.pack_int4(w), w.shape, True)), 3, "int32"), None
        )

    check(body, target, x, rule=rule_of(target, c))
    if c.groups == 1:
        kernel, _ = kernel_of(packed(body, [(x.shape, dtype)]), target)
        assert kernel.arguments[0].dtype == np.uint8 and 2 * kernel.arguments[0].nbytes >= w.size


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_four_bit_weights_whose_sums_times_16_leave_32_bits(signed, target):
    c, low = Conv(1, 1, 2, 70000, 4, (1, 1)), -8 if signed else 0
    x, w = full("uint8", 1, 1, 2, c.ci), np.full((1, 1, c.ci, 4), low, "int8" if signed else "uint8")
    w[..., 1:] = rng.integers(low, low + 16, (1, 1, c.ci, 3))
    check(
        lambda e, p: accumulate(e, c, p, e(ops.unpack_int4(arith.pack_int4(w), w.shape, signed)), 0, "int32"), target, x
    )


@pytest.mark.parametrize("target", EVERY)
def test_four_bits_of_data_and_of_weights(target):
    c = Conv(1, 9, 8, 48, 64, pad=(1, 1, 1, 1))
    x, w = rng.integers(0, 16, (1, 9, 8, 48)).astype(np.uint8), rng.integers(-8, 8, (3, 3, 48, 64)).astype(np.int8)

    def body(e, p):
        a = accumulate(e, c, p, e(ops.unpack_int4(arith.pack_int4(w), w.shape, True)), 0, "int32")
        return ops.requantize(
            [a], [2**30 + 5], 5, 38, qtype=arith.QType(0, 15, "uint8"), zero_point=0, rounding="half_up"
        )

    check(body, target, x, rule=rule_of(target, c))


TYPES = [("uint8", "uint8"), ("int8", "int8"), ("uint8", "int8"), ("int8", "uint8"), ("int16", "int8")]


@pytest.mark.parametrize(("shape", "types", "target"), in_turn([(2, 5, 19, 9), (1, 1, 64, 10), (3, 7, 33, 16)], TYPES))
def test_products_with_run_time_weights(shape, types, target):
    data, weight = types
    batch, rows, depth, channels = shape
    a, b = full(data, batch, rows, depth), full(weight, batch, depth, channels)
    check(lambda e, p, q: R.matmul(p, q, out_dtype="int32"), target, a, b)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize(("rows", "depth", "channels"), [(1, 512, 1000), (4, 77, 10), (13, 64, 40)])
def test_dense(rows, depth, channels, target):
    a, w = full("uint8", rows, depth), full("int8", depth, channels)
    matrices = "arm.dotprod" if rows == 1 else "arm.i8mm"
    check(
        lambda e, p: R.matmul(p, relax.const(w), out_dtype="int32"),
        target,
        a,
        rule={NEON: "arm.neon", DOTPROD: "arm.dotprod", I8MM: matrices}[target],
    )


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_pools(dtype, target):
    x = full(dtype, 2, 9, 11, 24)
    check(lambda e, p: R.nn.max_pool2d(p, (3, 3), (2, 2), layout="NHWC"), target, x, rule="cpu.window")

    def average(e, p):
        total = e(
            ops.sum_pool2d(e(R.nn.pad(p, [0, 0, 1, 1, 1, 1, 0, 0], "constant", 5)), (3, 3), (2, 2), layout="NHWC")
        )
        return ops.requantize(
            [total], [2**30 + 11], -77, 34, qtype=arith.QType.of(dtype), zero_point=1, rounding="half_even"
        )

    check(average, target, x)


@pytest.mark.parametrize(
    ("rounding", "target"), in_turn(["half_up", "half_even", "half_away", "toward_zero", "double"])
)
def test_requantize_of_every_rounding(rounding, target):
    x, m, s = full("int32", 3, 5, 20) // 2, rng.integers(2**30, 2**31, 20), rng.integers(32, 40, 20)
    check(
        lambda e, p: ops.requantize([p], [m], 0, s, qtype=arith.QType.of("int8"), zero_point=-3, rounding=rounding),
        target,
        x,
    )
    if rounding != "double":
        a, b = full("uint8", 2, 7, 33), full("int8", 2, 7, 33)
        check(
            lambda e, p, q: ops.requantize(
                [p, q], [2**30 + 3, 2**29 + 1], 99, 31, qtype=arith.QType.of("uint8"), zero_point=9, rounding=rounding
            ),
            target,
            a,
            b,
        )


@pytest.mark.parametrize("target", EVERY)
def test_softmax_and_a_convolution_in_two_steps(target):
    """(A17), whose division is done once a row, and (A23a) after sums of products."""
    table = arith.softmax_table(Fraction(1, 30), 256)
    check(
        lambda e, p: ops.softmax(
            p, table, axis=1, multiplier=255 << 23, shift=23, qtype=arith.QType.of("uint8"), zero_point=0
        ),
        target,
        full("uint8", 5, 37),
    )
    c = Conv(1, 7, 9, 32, 24, pad=(1, 1, 1, 1))
    w = full("int8", *c.k, c.ci, c.co) >> 4
    check(
        lambda e, p: in_two_steps(e, accumulate(e, c, p, relax.const(w), 3, "int32"), 10),
        target,
        full("uint8", c.n, c.h, c.w, c.ci) >> 2,
    )


@pytest.mark.parametrize("target", EVERY)
def test_concat_of_requantized_parts(target):
    a, b = full("uint8", 1, 5, 7, 24), full("int8", 1, 5, 7, 17)

    def body(e, p, q):
        second = e(
            ops.requantize([q], [2**30 + 9], 2**36, 31, qtype=arith.QType.of("uint8"), zero_point=3, rounding="half_up")
        )
        return R.concat([p, second], axis=3)

    check(body, target, a, b)


def test_why_a_rule_refuses():
    c = Conv(1, 4, 4, 8, 8)
    x = ((1, 4, 4, 8), "uint8")
    w = full("int8", 3, 3, 8, 8)
    module = packed(lambda e, p: accumulate(e, c, p, relax.const(w), 0, "int32"), [x])
    with pytest.raises(AssertionError, match=r"arm.i8mm: the target has no i8mm"):
        kernel_of(module, DOTPROD, "arm.i8mm")
    wide = packed(lambda e, p: accumulate(e, c, p, relax.const(w.astype(np.int16)), 0, "int32"), [x])
    with pytest.raises(AssertionError, match=r"arm.neon: no instruction for uint8 times int16 in int32"):
        kernel_of(wide, NEON, "arm.neon")
    assert Neon("dotprod").name == "arm.dotprod"
