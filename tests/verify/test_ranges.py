"""Intervals and margins: by hand, reached exactly by the worst input, and never left by any value (hypothesis)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from hawq_tvm.core import arith, ops, ranges
from hawq_tvm.core.arith import QType
from hawq_tvm.core.errors import ModelError, OverflowBoundError
from hawq_tvm.core.interpolation import Steps
from hawq_tvm.core.intervals import Interval, requantize_worst
from hawq_tvm.core.operators import interval_of, partial_sums
from hawq_tvm.verify.reference import evaluate
from relay_passes.choose_layout import choose_layout
from relay_passes.fuse_epilogues import fuse_epilogues

from .graphs_for_verify import full_range, graph, inputs

I8, U8, I32 = QType.of("int8"), QType.of("uint8"), QType.of("int32")


def bounds(build: Any, *arrays: Any, **attrs: Any) -> Interval:
    """The interval of the last binding before the outputs."""
    named = ranges.module_ranges(graph(lambda emit, *x: emit(build(emit, *x), "out"), *arrays, **attrs))
    return named["out"]


def conv(x: Any, w: np.ndarray, dtype: str = "int32", **options: Any) -> relax.Expr:
    return relax.op.nn.conv2d(x, ops.const(w, str(w.dtype)), out_dtype=dtype, **options)


# -- by hand -----------------------------------------------------------------------------------------------


def test_convolution_per_output_channel_by_hand() -> None:
    w = np.array([[1, -2], [3, 4], [-5, -6]], np.int8).reshape(3, 2, 1, 1)
    found = bounds(lambda emit, x: conv(x, w), ((1, 2, 4, 4), "uint8"))
    np.testing.assert_array_equal(found.low, np.array([-510, 0, -2805]).reshape(1, 3, 1, 1), strict=True)
    np.testing.assert_array_equal(found.high, np.array([255, 1785, 0]).reshape(1, 3, 1, 1), strict=True)


def test_every_group_reads_its_own_channels_with_their_own_bounds() -> None:
    # Channels reach 0, 1, 2, 3 at most; a group has two of them.
    def build(emit: Any, x: relax.Expr) -> relax.Expr:
        limited = emit(relax.op.minimum(x, ops.const(np.arange(4).reshape(1, 4, 1, 1), "uint8")))
        return conv(limited, np.array([[1, 1], [2, -1], [1, 1], [2, -1]], np.int8).reshape(4, 2, 1, 1), groups=2)

    found = bounds(build, ((1, 4, 3, 3), "uint8"))
    np.testing.assert_array_equal(found.high.ravel(), [1, 0, 5, 4])
    np.testing.assert_array_equal(found.low.ravel(), [0, -1, 0, -3])


@pytest.mark.parametrize(("groups", "dtype"), [(1, "int8"), (2, "uint8"), (6, "int8")])
def test_the_worst_input_reaches_the_bounds_exactly(groups: int, dtype: str) -> None:
    rng, info = np.random.default_rng(groups), np.iinfo(dtype)
    w = full_range(rng, (6, 6 // groups, 3, 3), "int8")
    module = graph(lambda emit, x: emit(conv(x, w, groups=groups), "out"), ((1, 6, 3, 3), dtype))
    found = ranges.module_ranges(module)["out"]
    for channel in range(6):
        first = channel // (6 // groups) * (6 // groups)
        for sign, bound in ((1, found.high), (-1, found.low)):
            x = np.zeros((1, 6, 3, 3), dtype)
            x[0, first : first + 6 // groups] = np.where(sign * w[channel].astype(int) > 0, info.max, info.min)
            assert evaluate(module, inputs(x))["y0"].ravel()[channel] == bound.ravel()[channel]


def test_four_bit_weights_are_read_through_their_packing() -> None:
    w = np.array([-8, 7, 3], np.int8).reshape(1, 3, 1, 1)
    found = bounds(
        lambda emit, x: relax.op.nn.conv2d(
            x, emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True)), out_dtype="int32"
        ),
        ((1, 3, 2, 2), "uint8"),
    )
    assert found.scalar == (-8 * 255, 10 * 255)


def test_matrix_product_per_column_and_with_a_runtime_operand() -> None:
    w = np.array([[1, -2], [3, 4]], np.int8)
    found = bounds(lambda emit, x: relax.op.matmul(x, ops.const(w, "int8"), out_dtype="int32"), ((5, 2), "int8"))
    np.testing.assert_array_equal(found.low, [[-512, -256 - 512 + 2]])
    np.testing.assert_array_equal(found.high, [[508, 256 + 508]])
    found = bounds(lambda emit, x, y: relax.op.matmul(x, y, out_dtype="int32"), ((5, 3), "int8"), ((3, 2), "uint8"))
    assert found.scalar == (-128 * 255 * 3, 127 * 255 * 3)


def test_padding_and_dilation_add_their_value() -> None:
    assert bounds(
        lambda emit, x: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 0, 0], pad_value=-100), ((1, 2, 3, 3), "uint8")
    ).scalar == (-100, 255)
    assert bounds(lambda emit, x: ops.dilate2d(x, (2, 2), -7), ((1, 2, 3, 3), "uint8")).scalar == (-7, 255)


def test_arguments_are_bounded_by_the_axis_or_the_whole_tensor() -> None:
    assert bounds(lambda emit, x: relax.op.argmax(x, 1), ((9, 4, 2), "int8")).scalar == (0, 3)
    assert bounds(lambda emit, x: relax.op.argmin(x), ((9, 4, 2), "int8")).scalar == (0, 71)


def test_a_lookup_is_bounded_by_the_entries_that_can_be_read() -> None:
    table = np.arange(256, dtype=np.int16)
    assert bounds(
        lambda emit, x: ops.lookup(emit(relax.op.maximum(x, ops.const(0, "int8"))), table), ((4,), "int8")
    ).scalar == (128, 255)


def test_an_interpolation_is_bounded_by_the_cells_that_can_be_read() -> None:
    table, steps = np.array([[64, 640, -6400], [1, 1, 1], [0, 0, 0]], np.int32), Steps(2, 0, 0, 3)

    def made(emit: Any, x: relax.Expr) -> relax.Expr:
        u = emit(relax.op.clip(emit(relax.op.astype(x, "int32")), 2, 7))
        return ops.interpolate(u, table, steps, bound=0.1, slope=0.1)

    low, high = bounds(made, ((4,), "uint8")).scalar
    assert 7 <= low <= 8 and 80 <= high <= 81


def test_an_interpolation_that_leaves_32_bits_is_an_error() -> None:
    table, steps = np.array([[0] * 8, [1 << 27] * 8, [0] * 8], np.int32), Steps(5, 0, 0, 0)
    mod = graph(
        lambda emit, x: ops.interpolate(emit(relax.op.astype(x, "int32")), table, steps, bound=0.1, slope=0.1),
        ((4,), "uint8"),
    )
    with pytest.raises(OverflowBoundError, match=r"interpolate can leave int32.*found 2147483648"):
        ranges.margins(mod)


def test_requantize_follows_the_sign_of_each_multiplier() -> None:
    m = np.array([3, -3, 0]).reshape(1, 3, 1, 1)
    found = bounds(
        lambda emit, x: ops.requantize([x], [m], 8, 2, qtype=I32, zero_point=1, rounding="half_up"),
        ((1, 3, 2, 2), "uint8"),
    )
    np.testing.assert_array_equal(found.low.ravel(), [3, (-765 + 8 + 2) // 4 + 1, 3])
    np.testing.assert_array_equal(found.high.ravel(), [(765 + 8 + 2) // 4 + 1, 3, 3])


@pytest.mark.parametrize(("kind", "expected"), [("int4", (-8, 7)), ("uint4", (0, 15)), ("int8", (-128, 127))])
def test_inputs_of_less_than_eight_bits(kind: str, expected: tuple[int, int]) -> None:
    storage = QType.of(kind).storage
    assert (
        bounds(lambda emit, x: relax.op.flip(x, 0), ((4,), storage), **{"hawq.input_types": [kind]}).scalar == expected
    )


def test_an_input_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(ModelError, match="input x0"):
        ranges.margins(graph(lambda emit, x: relax.op.flip(x, 0), ((4,), "uint64")))


def test_positions_are_forgotten_where_a_layer_moves_them() -> None:
    """Multipliers that vary by position (a pool's divisor) leave bounds by position, which a later pool cannot keep."""
    m = np.arange(1, 13).reshape(1, 1, 3, 4)

    def build(emit: Any, x: relax.Expr) -> list[relax.Expr]:
        y = emit(ops.requantize([x], [m], 0, 2, qtype=I32, zero_point=0, rounding="half_even"), "rescaled")
        return [
            emit(relax.op.nn.max_pool2d(y, (2, 2)), "max"),
            emit(ops.sum_pool2d(y, (2, 2), (1, 1)), "sum"),
            emit(relax.op.nn.pad(y, [0, 0, 0, 0, 1, 1, 1, 1], pad_value=0), "pad"),
            emit(ops.dilate2d(y, (2, 2), 0), "dilate"),
            emit(relax.op.permute_dims(y, [0, 2, 3, 1]), "moved"),
        ]

    module = graph(build, ((2, 5, 3, 4), "uint8"))
    for name, interval in ranges.module_ranges(module).items():
        shape = next(ops.shape_of(b.var) for b in module["main"].body.blocks[0].bindings if b.var.name == name)
        np.broadcast_to(interval.low, shape), np.broadcast_to(interval.high, shape)
    assert ranges.module_ranges(module)["max"].scalar == (0, 765)


# -- margins ------------------------------------------------------------------------------------------------


def test_margins_of_a_layer_by_hand() -> None:
    def build(emit: Any, x: relax.Expr) -> relax.Expr:
        y = emit(conv(x, np.array([100, -100], np.int8).reshape(1, 2, 1, 1)), "c.acc")
        y = emit(relax.op.add(y, ops.const(np.full((1, 1, 1, 1), 1000), "int32")), "c.bias")
        return emit(ops.requantize([y], [1 << 30], -(1 << 33), 31, qtype=I8, zero_point=0, rounding="half_even"), "c")

    packed, _ = fuse_epilogues(graph(build, ((1, 2, 3, 3), "uint8")))
    found = ranges.margins(packed)
    assert [(m.layer, m.kind, m.dtype, m.worst, m.limit) for m in found] == [
        ("c", "conv2d", "int32", 25500, 2**31),
        ("c", "add", "int32", 26500, 2**31),
        ("c", "requantize", "int64", 26500 * 2**30 + 2**33 + 2**30, 2**63),
    ]
    assert found[0].to_dict()["spare_bits"] == pytest.approx(16.36, abs=0.005)  # log2(2^31 / 25500) to two places


def test_the_least_int32_is_no_overflow_and_one_less_is() -> None:
    w = np.full((1, 2**8, 1, 1), -128, np.int8)

    def build(x_dtype: str, extra: int) -> Any:
        def body(emit: Any, x: relax.Expr) -> relax.Expr:
            return emit(
                relax.op.add(emit(conv(x, w), "acc"), ops.const(np.full((1, 1, 1, 1), extra), "int32")), "layer"
            )

        return graph(body, ((1, 2**8, 1, 1), x_dtype))

    least = -128 * 255 * 2**8
    assert ranges.margins(build("uint8", -(2**31) - least))[-1].worst == 2**31 - 1
    with pytest.raises(OverflowBoundError, match=r"layer: .*add.*int32.*found 2147483648"):
        ranges.margins(build("uint8", -(2**31) - least - 1))


OVERFLOWS = {
    "conv": lambda emit, x: conv(emit(relax.op.astype(x, "int16")), np.full((1, 4, 1, 1), 2**15 - 1, np.int16)),
    "add int64": lambda emit, x: relax.op.add(
        emit(relax.op.astype(x, "int64")), ops.const(np.full((4, 1, 1), 2**63 - 100), "int64")
    ),
    "multiply int64": lambda emit, x: relax.op.multiply(emit(relax.op.astype(x, "int64")), ops.const(2**56, "int64")),
    "unsigned": lambda emit, x: relax.op.subtract(x, ops.const(1, "uint8")),
    "astype": lambda emit, x: relax.op.astype(x, "int8"),
    "sum": lambda emit, x: relax.op.sum(x, [1]),
    "sum_pool2d": lambda emit, x: ops.sum_pool2d(x, (20, 20), (1, 1), out_dtype="int16"),
    "requantize": lambda emit, x: ops.requantize(
        [x], [2**31 - 1], 2**63 - 1000, 3, qtype=I8, zero_point=0, rounding="half_up"
    ),
    "requantize half": lambda emit, x: ops.requantize(
        [x], [0], 2**62 + 2**61, 62, qtype=I8, zero_point=0, rounding="half_up"
    ),
    "double": lambda emit, x: ops.requantize([x], [2**30], 0, 7, qtype=I8, zero_point=0, rounding="double"),
    "softmax": lambda emit, x: ops.softmax(
        x, arith.softmax_table(Fraction(1, 100), 256), axis=1, multiplier=2**30, shift=31, qtype=I8, zero_point=0
    ),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_a_possible_overflow_is_an_error_that_names_the_layer(name: str) -> None:
    # One channel of 400 times 255, or four times 32767 * 32767, and so on.
    dtype = "uint16" if name in ("conv",) else "uint8"

    def build(emit: Any, x: relax.Expr) -> relax.Expr:
        return emit(OVERFLOWS[name](lambda e: emit(e, "the_layer.part"), x), "the_layer")

    with pytest.raises(OverflowBoundError, match="the_layer") as caught:
        ranges.margins(graph(build, ((1, 4, 20, 20), dtype)))
    assert caught.value.expected and caught.value.found and caught.value.remedy


def test_the_same_layers_one_step_smaller_pass() -> None:
    small = {
        "requantize half": lambda x: ops.requantize(
            [x], [0], 2**62 + 2**61 - 2**61 - 1, 62, qtype=I8, zero_point=0, rounding="half_up"
        ),
        "double": lambda x: ops.requantize([x], [2**30], 0, 8, qtype=I8, zero_point=0, rounding="double"),
        "softmax": lambda x: ops.softmax(
            x, arith.softmax_table(Fraction(1, 100), 256), axis=1, multiplier=2**30, shift=30, qtype=I8, zero_point=0
        ),
    }
    for build in small.values():
        assert ranges.margins(graph(lambda emit, x, b=build: emit(b(x)), ((1, 4, 20, 20), "uint8")))


def test_partial_sums_start_at_zero() -> None:
    """Inputs of 5 and 6 only: the sum is 5 to 7 with weights 2 and -1, but 12 and -6 occur on the way."""

    def call_of(x: relax.Var) -> relax.Call:
        builder = relax.BlockBuilder()
        return builder.normalize(conv(x, np.array([2, -1], np.int8).reshape(1, 2, 1, 1)))

    call = call_of(relax.Var("x", relax.TensorType((1, 2, 1, 1), "uint8")))
    args = [
        Interval.of_range(5, 6),
        Interval(ops.const_value(call.args[1]).astype(np.int64), ops.const_value(call.args[1]).astype(np.int64)),
    ]
    assert interval_of(call, args).scalar == (4, 7)
    assert partial_sums(call, args, interval_of(call, args)).scalar == (-6, 12)


def test_the_bound_of_a_requantize_is_exact_beyond_int64() -> None:
    x = relax.Var("x", relax.TensorType((2,), "int64"))
    call = ops.requantize(
        [x], [np.array([2**31 - 1, 1])], np.array([5, -(2**62)]), 40, qtype=I8, zero_point=0, rounding="half_up"
    )
    worst = requantize_worst(call, [Interval.of_range(-(2**63), 7)])
    assert worst == 2**63 * (2**31 - 1) + 5 + 2**39


# -- every value lies inside ------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> tuple[Any, np.ndarray]:
    """A random chain of layers on an NCHW tensor of 8 bits, and an input for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(["int8", "uint8"]))
    channels = draw(st.sampled_from([1, 2, 4]))
    kinds = draw(
        st.lists(
            st.sampled_from(["conv", "depthwise", "pool", "mean", "lookup", "residual", "pad", "flip", "concat"]),
            max_size=5,
        )
    )

    def quantized(emit: Any, operands: list[relax.Expr], shift: int) -> relax.Expr:
        size = next(ops.shape_of(o) for o in operands)[1]
        multipliers = [rng.integers(-(2**15), 2**15, (1, size, 1, 1)) for _ in operands]
        qtype = U8 if rng.integers(2) else I8
        rounding = ["half_up", "half_even", "half_away"][int(rng.integers(3))]
        offset = rng.integers(-(2**20), 2**20, (1, size, 1, 1))
        return emit(
            ops.requantize(
                operands,
                multipliers,
                offset,
                shift,
                qtype=qtype,
                zero_point=int(rng.integers(-9, 9)),
                rounding=rounding,
            )
        )

    def build(emit: Any, x: relax.Expr) -> relax.Expr:
        for kind in kinds:
            _, c, h, w = ops.shape_of(x)
            if kind in ("conv", "depthwise"):
                groups = c if kind == "depthwise" else int(rng.choice([g for g in (1, 2) if c % g == 0]))
                k = int(rng.integers(1, min(h, w, 3) + 1))
                weights = full_range(rng, (c * int(rng.integers(1, 3)), c // groups, k, k), "int8")
                y = emit(conv(x, weights, groups=groups))
                y = emit(relax.op.add(y, ops.const(rng.integers(-999, 999, (1, weights.shape[0], 1, 1)), "int32")))
                x = quantized(emit, [y], 24)
            elif kind == "pool" and min(h, w) >= 2:
                x = emit(relax.op.nn.max_pool2d(x, (2, 2), (1, 1)))
            elif kind == "mean" and min(h, w) >= 2:
                x = quantized(emit, [emit(ops.sum_pool2d(x, (2, 2), (1, 1)))], 17)
            elif kind == "lookup":
                x = emit(ops.lookup(x, full_range(rng, (256,), "int8")))
            elif kind == "residual":
                x = quantized(emit, [x, emit(relax.op.flip(x, 2))], 15)
            elif kind == "pad":
                x = emit(relax.op.nn.pad(x, [0, 0, 0, 0, 1, 0, 0, 1], pad_value=int(rng.integers(0, 100))))
            elif kind == "flip":
                x = emit(relax.op.permute_dims(x, [0, 1, 3, 2]))
            elif kind == "concat":
                x = emit(relax.op.concat([x, emit(relax.op.minimum(x, ops.const(7, ops.dtype_of(x))))], 1))
        y = emit(relax.op.sum(emit(relax.op.astype(x, "int32")), [2, 3]))
        narrow = emit(relax.op.astype(emit(relax.op.clip(y, -128, 127)), "int8"))
        return emit(
            relax.op.matmul(
                narrow, ops.const(full_range(rng, (ops.shape_of(y)[1], 3), "int8"), "int8"), out_dtype="int32"
            )
        )

    x = full_range(rng, (2, channels, 5, 4), dtype)
    return graph(build, x), x


def check_inside(module: tvm.IRModule, x: np.ndarray) -> None:
    """Every binding of main, evaluated, lies inside its interval."""
    named, seen = ranges.module_ranges(module), {}
    for batch in (x, np.full_like(x, np.iinfo(x.dtype).max), np.full_like(x, np.iinfo(x.dtype).min)):
        evaluate(module, inputs(batch), seen.__setitem__)
        for name, interval in named.items():
            value = seen[name].astype(np.int64)
            assert np.all(value >= np.broadcast_to(interval.low, value.shape)), name
            assert np.all(value <= np.broadcast_to(interval.high, value.shape)), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks())
def test_no_value_ever_leaves_its_interval(case: tuple[Any, np.ndarray]) -> None:
    module, x = case
    check_inside(module, x)
    check_inside(fuse_epilogues(choose_layout(module)[0])[0], x)
    named = ranges.module_ranges(module)
    for name, interval in ranges.module_ranges(fuse_epilogues(module)[0]).items():
        assert interval.scalar == named[name].scalar
