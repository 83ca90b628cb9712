"""lower_to_integer: every operator's integers equal the real formula, evaluated in float64, on full-range operands.

The scales are ugly on purpose: 0.03 / 0.04 is exactly 3/4 in float32, and at the ties it makes float64 is no oracle.
"""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import ops, ranges, stages
from hawq_tvm.core.arith import QType
from hawq_tvm.core.errors import ModelError
from hawq_tvm.verify.distances import both
from hawq_tvm.verify.reference import evaluate
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.remove_dead_code import remove_dead_code

from .modules import RNG, S8, Build, dq, full_range, module, op_names, q, same_values, weight


def check(build: Build, inputs: dict[str, tuple[tuple[int, ...], str]], **attrs: Any) -> tvm.IRModule:
    """Lower, and compare integers with the float64 evaluation of the annotated module exactly."""
    before = module(build, inputs, **attrs)
    after, count = lower_to_integer(before)
    after, _ = remove_dead_code(after)
    stages.verify(after, stages.Stage.INTEGER)
    assert count > 0
    same_values(before, after)
    return after


@pytest.mark.parametrize(
    "groups, stride, dilation, pads, kernel",
    [
        (1, (1, 1), (1, 1), (1, 1, 1, 1), (3, 3)),
        (1, (2, 1), (1, 2), (0, 2, 1, 1), (3, 2)),
        (4, (1, 1), (1, 1), (1, 1, 1, 1), (3, 3)),
        (2, (1, 2), (1, 1), (0, 0, 0, 0), (1, 1)),
    ],
)
@pytest.mark.parametrize("weight_zero", [0, 3])
def test_conv_bias_relu(groups: int, stride: Any, dilation: Any, pads: Any, kernel: Any, weight_zero: int) -> None:
    scales = RNG.uniform(0.001, 0.02137, (8, 1, 1, 1)).astype(np.float32)
    bias = RNG.integers(-20000, 20000, (1, 8, 1, 1))

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.05317, 117)
        w = bb.emit(weight((8, 4 // groups, *kernel), scales, weight_zero))
        y = bb.emit(relax.op.nn.conv2d(x, w, strides=stride, dilation=dilation, padding=list(pads), groups=groups))
        b = bb.emit(
            ops.dequantize(
                ops.const(bias, "int32"),
                np.float32(0.05317) * scales.reshape(1, 8, 1, 1).astype(np.float64),
                0,
                qmin=-(2**31),
                qmax=2**31 - 1,
            )
        )
        y = bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(y, b))))
        return q(bb, y, 0.4079, 7)

    after = check(build, {"x": ((2, 4, 9, 8), "uint8")})
    assert op_names(after).count("requantize") == 1 and op_names(after).count("conv2d") == 1


def test_conv_without_quantize_ends_in_dequantize() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.5, 3), bb.emit(weight((5, 3, 1, 1), 0.25))))

    assert op_names(check(build, {"x": ((1, 3, 4, 4), "uint8")}))[-2:] == ["dequantize", ""]


@pytest.mark.parametrize("pool", ["", "max", "maximum", "mean", "sum", "product"])
def test_a_float_bias_keeps_its_fraction_up_to_the_next_requantize(pool: str) -> None:
    """0.2 of a step of the sum is half a step after a ratio of 5/2; a product reads the sum itself, whose grid has
    no 0.2 (A11).
    """
    ones = ops.dequantize(ops.const(np.ones((1, 1, 1, 1)), "int8"), np.float32(1), 0, qmin=-128, qmax=127)

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 1.0, 0), bb.emit(ones)))
        y = bb.emit(relax.op.add(y, relax.const(np.full((1, 1, 1, 1), 0.21, np.float32))))
        made = {
            "max": lambda: relax.op.nn.max_pool2d(y, (1, 1)),
            "maximum": lambda: relax.op.max(y, [1], True),
            "mean": lambda: relax.op.mean(y, [1], True),
            "sum": lambda: relax.op.sum(y, [1], True),
            "product": lambda: relax.op.multiply(y, dq(bb, p[1], 1.0, 0)),
        }
        return q(bb, bb.emit(made[pool]()) if pool else y, 0.4, 0)

    x = np.arange(0, 100, dtype=np.uint8).reshape(1, 1, 10, 10)
    one = np.ones((1, 1, 1, 1), np.uint8)
    after, _ = lower_to_integer(module(build, {"x": (x.shape, "uint8"), "one": (one.shape, "uint8")}))
    exact = x * np.longdouble(1) + (0 if pool == "product" else np.longdouble(np.float32(0.21)))
    np.testing.assert_array_equal(
        evaluate(after, {"x": x, "one": one})["out0"], np.rint(exact / np.longdouble(np.float32(0.4))).clip(0, 255)
    )


def test_a_pool_of_another_pool_s_means_reads_fixed_point_values() -> None:
    """Where padding does not count, a mean's divisor differs between positions: their integers cannot be compared,
    nor summed, before they share a scale (A26), be the result quantized or an output in fixed point.
    """
    for second in (relax.op.nn.max_pool2d, relax.op.nn.avg_pool2d):

        def build(bb: relax.BlockBuilder, p: list[relax.Expr], second: Any = second, quantized: bool = True) -> Any:
            y = bb.emit(
                relax.op.nn.avg_pool2d(dq(bb, p[0], 0.5, 3), (3, 3), (1, 1), (1, 1, 1, 1), count_include_pad=False)
            )
            again = bb.emit(second(y, (3, 3), (1, 1), (1, 1, 1, 1)), "again")
            return q(bb, again, 0.4137, 0) if quantized else again

        inputs = {"x": ((1, 2, 5, 5), "uint8")}
        check(build, inputs)
        before, x = module(partial(build, quantized=False), inputs), full_range((1, 2, 5, 5), "uint8")
        got, wanted = (evaluate(m, {"x": x})["out0"] for m in (lower_to_integer(before)[0], before))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2.0**-14)  # a few roundings to 24 bits of 126


def test_float_bias_on_the_grid() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.5, 3), bb.emit(weight((5, 3, 1, 1), 0.25))))
        bias = relax.const(np.arange(-2, 3, dtype=np.float32).reshape(1, 5, 1, 1) * 0.125 * 3)
        return q(bb, bb.emit(relax.op.add(y, bias)), 0.3119, 128)

    check(build, {"x": ((1, 3, 4, 4), "uint8")})


@pytest.mark.parametrize("branches", ["common", "each"])
@pytest.mark.parametrize("scales", [(0.03171, 0.02137, 0.0719), (0.5, 0.25, 1.0)])
def test_residual_add(branches: str, scales: tuple[float, float, float]) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        a, c = dq(bb, p[0], scales[0], 100), dq(bb, p[1], scales[1], -5, S8)
        return q(bb, bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(a, c)))), scales[2], 3, branches=branches)

    shapes: dict[str, Any] = {"a": ((1, 3, 16, 16), "uint8"), "c": ((1, 3, 16, 16), "int8")}
    if branches == "common":
        check(build, shapes)
        return
    after, _ = lower_to_integer(module(build, shapes))
    feed = {n: full_range(s, d) for n, (s, d) in shapes.items()}
    s = [float(np.float32(v)) for v in scales]
    parts = np.rint((feed["a"].astype(int) - 100) * (s[0] / s[2])) + np.rint(
        (feed["c"].astype(int) + 5) * (s[1] / s[2])
    )
    np.testing.assert_array_equal(evaluate(after, feed)["out0"], np.clip(parts, 0, 252) + 3)


def test_conv_plus_residual_without_a_quantize_between() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.05317, 10)
        y = bb.emit(
            relax.op.nn.conv2d(x, bb.emit(weight((4, 4, 3, 3), RNG.uniform(0.001, 0.01, (4, 1, 1, 1)))), padding=1)
        )
        return q(bb, bb.emit(relax.op.nn.relu(bb.emit(relax.op.add(y, x)))), 0.1129, 0)

    after = check(build, {"x": ((1, 4, 6, 6), "uint8")})
    assert op_names(after).count("requantize") == 1


def test_subtract_multiply_divide_and_constants() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        a, c = dq(bb, p[0], 0.03171, 100), dq(bb, p[1], 0.02137, -5, S8)
        d = bb.emit(relax.op.subtract(a, c))
        e = bb.emit(relax.op.multiply(d, relax.const(np.array([0.5, -2.0, 1.25], np.float32).reshape(1, 3, 1, 1))))
        f = bb.emit(
            relax.op.divide(bb.emit(relax.op.add(e, relax.const(np.float32(0.75)))), relax.const(np.float32(3)))
        )
        return q(bb, f, 0.05317, 90)

    check(build, {"a": ((1, 3, 7, 5), "uint8"), "c": ((1, 3, 7, 5), "int8")})


def test_product_of_two_tensors_with_broadcasting() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.multiply(dq(bb, p[0], 0.03171, 100), dq(bb, p[1], 0.02137, -5, S8))), 0.2071, 120)

    check(build, {"a": ((2, 3, 7, 5), "uint8"), "c": ((2, 3, 1, 1), "int8")})


@pytest.mark.parametrize("kind", ["leaky", "prelu", "abs", "clip"])
def test_piecewise_linear(kind: str) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.03171, 100)
        made = {
            "leaky": lambda: relax.op.nn.leakyrelu(x, 0.1),
            "abs": lambda: relax.op.abs(x),
            "clip": lambda: relax.op.clip(x, -1.0, 2.5),
            "prelu": lambda: relax.op.nn.prelu(x, relax.const(np.array([0.1, 0.25, -0.5], np.float32)), 1),
        }[kind]()
        return q(bb, bb.emit(made), 0.04191, 60)

    check(build, {"x": ((1, 3, 16, 16), "uint8")})


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("ceil", [True, False])
def test_average_pool(include: bool, ceil: bool) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.03171, 100)
        y = bb.emit(relax.op.nn.avg_pool2d(x, (3, 2), (2, 2), (1, 0, 1, 1), ceil_mode=ceil, count_include_pad=include))
        return q(bb, y, 0.03713, 90)

    check(build, {"x": ((2, 3, 9, 8), "uint8")})


def test_max_pool_global_mean_and_reductions() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.03171, 100)
        m = bb.emit(relax.op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), ceil_mode=True))
        return [
            q(bb, m, 0.03171, 100),
            q(bb, bb.emit(relax.op.mean(x, [2, 3], True)), 0.01127, 90),
            q(bb, bb.emit(relax.op.sum(x, [1], False)), 0.2071, 9),
            q(bb, bb.emit(relax.op.max(x, [1], True)), 0.04191, 0),
            bb.emit(relax.op.argmax(x, 1)),
        ]

    check(build, {"x": ((2, 3, 9, 8), "uint8")})


def test_concat_of_different_scales_and_of_equal_ones() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        a, c, d = dq(bb, p[0], 0.03171, 100), dq(bb, p[1], 0.02137, -5, S8), dq(bb, p[0], 0.03171, 100)
        mixed = bb.emit(relax.op.nn.relu(bb.emit(relax.op.concat([a, c], 1))))
        equal = bb.emit(relax.op.concat([a, d], 1))
        y = bb.emit(relax.op.nn.conv2d(equal, bb.emit(weight((2, 6, 1, 1), 0.01))))
        return [q(bb, mixed, 0.05317, 10), q(bb, y, 0.1, 128)]

    check(build, {"a": ((1, 3, 4, 4), "uint8"), "c": ((1, 2, 4, 4), "int8")})


def test_matmul_per_column_blocked_and_dynamic() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        a, c = dq(bb, p[0], 0.03171, 100), dq(bb, p[1], 0.02137, -5, S8)
        column = bb.emit(weight((6, 5), RNG.uniform(0.01, 0.02137, (1, 5)), 2))
        blocks = np.repeat(RNG.uniform(0.01, 0.02137, (3, 5)), 2, axis=0)
        return [
            q(bb, bb.emit(relax.op.matmul(a, column)), 0.3119, 128),
            q(bb, bb.emit(relax.op.matmul(a, bb.emit(weight((6, 5), blocks)))), 0.3119, 128),
            q(bb, bb.emit(relax.op.matmul(a, c)), 0.4079, 128),
        ]

    check(build, {"a": ((3, 6), "uint8"), "c": ((6, 4), "int8")})


@pytest.mark.parametrize(
    "groups, strides, padding, extra", [(1, (2, 2), (1, 1, 1, 1), (1, 1)), (2, (1, 3), (0, 2, 1, 0), (0, 0))]
)
def test_transposed_convolution(groups: int, strides: Any, padding: Any, extra: Any) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.03171, 100)
        w = bb.emit(weight((4, 6 // groups, 3, 3), 0.01))
        y = bb.emit(
            relax.op.nn.conv2d_transpose(
                x, w, strides=strides, padding=list(padding), output_padding=extra, groups=groups
            )
        )
        return q(bb, y, 0.3119, 128)

    check(build, {"x": ((1, 4, 5, 4), "uint8")})


def test_movement_carries_scales_per_channel() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(
            relax.op.nn.conv2d(
                dq(bb, p[0], 0.05317, 9), bb.emit(weight((6, 3, 1, 1), RNG.uniform(0.001, 0.01, (6, 1, 1, 1))))
            )
        )
        y = bb.emit(relax.op.permute_dims(y, [0, 2, 3, 1]))
        y = bb.emit(relax.op.reshape(y, (2, 8, 6)))
        y = bb.emit(relax.op.strided_slice(y, [1, 2], [1, 1], [7, 5]))
        return q(bb, y, 0.1, 120)

    check(build, {"x": ((2, 3, 2, 4), "uint8")})


def test_resize_by_gather_and_weights_is_one_requantize() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.05317, 9)
        for axis, size in ((2, 4), (3, 3)):
            place = np.clip((np.arange(2 * size) + 0.5) / 2 - 0.5, 0, size - 1)
            i0 = np.floor(place).astype("int64")
            i1, frac = (
                np.minimum(i0 + 1, size - 1),
                (place - i0).astype("float32").reshape([-1 if i == axis else 1 for i in range(4)]),
            )
            parts = [
                bb.emit(relax.op.multiply(bb.emit(relax.op.take(x, relax.const(i), axis)), relax.const(f)))
                for i, f in ((i0, 1 - frac), (i1, frac))
            ]
            x = bb.emit(relax.op.add(*parts))
        return q(bb, x, 0.05419, 9)

    assert op_names(check(build, {"x": ((1, 2, 4, 3), "uint8")})).count("requantize") == 1


def test_batch_norm_like_negative_and_zero_scales() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        scale = np.array([0.01, -0.02137, 0.0, 0.015]).reshape(4, 1, 1, 1)
        values = ops.const(RNG.integers(-128, 128, (4, 3, 3, 3)), "int8")
        w = bb.emit(ops.dequantize(values, scale, 0, qmin=-128, qmax=127))
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.05317, 9), w))
        y = bb.emit(
            relax.op.add(y, relax.const(np.array([1, 2, 900, -4], np.float32).reshape(1, 4, 1, 1) * np.float32(0.0005)))
        )
        y = bb.emit(relax.op.nn.max_pool2d(bb.emit(relax.op.nn.relu(y)), (2, 2)))
        return q(bb, y, 0.3119, 0)

    check(build, {"x": ((1, 3, 6, 6), "uint8")})


def test_input_quantize_commutes_with_movement() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.permute_dims(p[0], [0, 3, 1, 2])), 0.1, 3)

    after, _ = lower_to_integer(module(build, {"x": ((1, 4, 4, 3), "float32")}))
    after, _ = remove_dead_code(after)
    assert op_names(after)[:2] == ["quantize", "permute_dims"]
    stages.verify(after, stages.Stage.INTEGER)


def test_identical_quantization_is_no_operation() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.reshape(dq(bb, p[0], 0.1, 3), (2, 8))), 0.1, 3)

    assert "requantize" not in op_names(check(build, {"x": ((4, 4), "uint8")}))


def test_float_operators_are_named_all_at_once() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.log_softmax(dq(bb, p[0], 0.05317, 9)), "the_log")
        z = bb.emit(relax.op.divide(dq(bb, p[0], 0.05317, 9), relax.const(np.float32(0))), "the_divide")
        return [q(bb, y, 0.1, 0), q(bb, z, 0.1, 0)]

    mod = module(build, {"x": ((1, 3, 2, 2), "uint8")})
    with pytest.raises(ModelError, match=r"the_log: .*no integer arithmetic.*and 1 more") as error:
        lower_to_integer(mod)
    found = {f["layer"]: f for f in error.value.problems()}
    assert set(found) == {"the_log", "the_divide"} and all(f["remedy"] for f in found.values())


def test_float_tail_is_kept_only_when_asked() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return bb.emit(relax.op.nn.softmax(dq(bb, p[0], 0.1, 3), -1), "the_softmax")

    inputs: dict[str, Any] = {"x": ((2, 5), "uint8")}
    integers, _ = lower_to_integer(module(build, inputs))
    stages.verify(integers, stages.Stage.INTEGER)
    x = full_range((2, 5), "uint8")
    got, wanted = (evaluate(m, {"x": x})["out0"] for m in (integers, module(build, inputs)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2.0**-22)  # 24 bits of 1
    after, _ = lower_to_integer(module(build, inputs, **{"hawq.allow_float_tail": 1}))
    assert [str(n) for n in after["main"].attrs["hawq.float_tail"]] == ["the_softmax"]
    stages.verify(after, stages.Stage.INTEGER)


def _tail(*operators: str) -> Any:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = dq(
            bb, q(bb, bb.emit(relax.op.matmul(dq(bb, p[0], 0.1, 3), bb.emit(weight((5, 4), 0.1)))), 0.2, 128), 0.2, 128
        )
        made: dict[str, Any] = {
            "add": lambda: relax.op.add(y, relax.const(1.0)),
            "subtract": lambda: relax.op.subtract(y, relax.const(1.0)),
            "abs": lambda: relax.op.abs(y),
            "sigmoid": lambda: relax.op.sigmoid(y),
            "clip": lambda: relax.op.clip(y, 0, 0.33),
            "relu": lambda: relax.op.nn.relu(y),
        }
        for name in operators:
            y = bb.emit(made[name](), f"the_{name}")
        return y

    return build


@pytest.mark.parametrize(
    "operators, outside",
    [
        (("abs",), []),
        (("add", "sigmoid"), ["the_sigmoid"]),
        (("subtract", "abs"), ["the_abs"]),
        (("clip",), []),
        (("abs", "add"), []),
        (("clip", "sigmoid"), ["the_sigmoid"]),
        (("sigmoid", "abs"), ["the_sigmoid", "the_abs"]),
    ],
)
def test_what_nothing_quantizes_is_integers_or_a_float_tail(operators: tuple[str, ...], outside: list[str]) -> None:
    """Sums and clips are exact on one grid (A1b) with the flag or without; functions in fixed point (A26) without."""
    inputs: dict[str, Any] = {"x": ((2, 5), "uint8")}
    mod = module(_tail(*operators), inputs)
    asked = tvm.IRModule({"main": mod["main"].with_attr("hawq.allow_float_tail", 1)})
    x = full_range((2, 5), "uint8")
    wanted = evaluate(mod, {"x": x})["out0"]
    for before, left in ((mod, []), (asked, outside)):
        after, _ = remove_dead_code(lower_to_integer(before)[0])
        assert sorted(stages.float_tail(after["main"])) == sorted(left)
        stages.verify(after, stages.Stage.INTEGER)
        # What float32 loses of numbers up to 30, and 24 bits of 1.
        np.testing.assert_allclose(evaluate(after, {"x": x})["out0"], wanted, rtol=0, atol=32 * 2.0**-23)


@pytest.mark.parametrize("clipped", [True, False])
def test_a_sum_that_is_quantized_and_an_output(clipped: bool) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.1, 3)
        y = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, bb.emit(weight((5, 5), 0.1)))), x))
        y = bb.emit(relax.op.clip(bb.emit(relax.op.add(y, relax.const(0.77))), 0, 20.03)) if clipped else y
        return [q(bb, y, 0.2137, 128), bb.emit(relax.op.nn.softmax(y, -1), "the_softmax"), y]

    inputs: dict[str, Any] = {"x": ((2, 5), "uint8")}
    mod = module(build, inputs)
    x = full_range((2, 5), "uint8")
    wanted = evaluate(mod, {"x": x})
    for before in (mod, tvm.IRModule({"main": mod["main"].with_attr("hawq.allow_float_tail", 1)})):
        after, _ = remove_dead_code(lower_to_integer(before)[0])
        stages.verify(after, stages.Stage.INTEGER)
        ranges.margins(after)
        assert sorted(stages.float_tail(after["main"])) == (["the_softmax"] if before is not mod else [])
        got = evaluate(after, {"x": x})
        np.testing.assert_array_equal(got["out0"], wanted["out0"])
        for name in ("out1", "out2"):
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-4)


def test_an_output_that_is_a_sum_of_tensors_is_exact() -> None:
    """(A1b): as the Fractions of what the file holds, rounded to float64 and float32 once each."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        a, b = dq(bb, p[0], 0.0371, 3), dq(bb, p[1], 0.2113, 128)
        y = bb.emit(relax.op.subtract(bb.emit(relax.op.add(a, relax.const(np.float32(0.77)))), b))
        return bb.emit(relax.op.clip(y, -20.03, 11.7))

    mod = module(build, {"a": ((256, 1), "uint8"), "b": ((1, 256), "uint8")})
    every = np.arange(256, dtype=np.uint8)
    got = evaluate(lower_to_integer(mod)[0], {"a": every[:, None], "b": every[None]})["out0"]
    one, two, more = (Fraction(float(np.float32(v))) for v in (0.0371, 0.2113, 0.77))
    low, high = (Fraction(v) for v in (-20.03, 11.7))
    exact = [[min(max(one * (i - 3) + more - two * (j - 128), low), high) for j in range(256)] for i in range(256)]
    np.testing.assert_array_equal(got, np.array([[np.float32(float(v)) for v in row] for row in exact]))


@pytest.mark.parametrize("scale", [0.0017, 0.00123456])
def test_what_one_grid_loses_of_long_sums_is_in_the_certificate(scale: float) -> None:
    """Sums of 64 bits leave their factor on the grid (A1b) few."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = dq(bb, p[0], 0.0625, 0, S8)
        for size, step in ((4096, 2.0**-9), (2, scale)):
            codes = relax.const(np.full((int(y.ty.shape[1]), size), 127, np.int8))
            y = bb.emit(relax.op.matmul(y, dq(bb, codes, step, 0, S8)))
        return bb.emit(relax.op.clip(y, -(2.0**20), 2.0**20))

    after, _ = lower_to_integer(module(build, {"x": ((1, 4), "int8")}))
    got = evaluate(after, {"x": np.full((1, 4), 127, np.int8)})["out0"]
    real = Fraction(127**3 * 4 * 4096, 16 * 512) * Fraction(float(np.float32(scale)))
    off = abs(Fraction(float(got.flat[0])) - real)
    (bound,) = both(after)[1].values()
    last = float(np.spacing(np.float32(real)))
    assert 4 * last < off <= bound + last / 2 and bound < 32 * last


def test_a_function_of_sums_that_grows_beyond_its_bits_is_refused() -> None:
    """exp of the bounds of a sum of products is e^20 times and more what it is of sums that occur."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.matmul(dq(bb, p[0], 0.02, 128), bb.emit(weight((64, 5), 0.02))))
        return bb.emit(relax.op.exp(y), "the_exp")

    inputs: dict[str, Any] = {"x": ((2, 64), "uint8")}
    with pytest.raises(ModelError, match=r"grows too fast for fixed point .*--allow-float-tail"):
        lower_to_integer(module(build, inputs))
    after, _ = lower_to_integer(module(build, inputs, **{"hawq.allow_float_tail": 1}))
    assert sorted(stages.float_tail(after["main"])) == ["the_exp"]


def test_integers_from_a_float_head_can_be_any() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.astype(bb.emit(relax.op.floor(p[0])), "int32"))
        return bb.emit(relax.op.multiply(y, y), "the_product")

    after, _ = lower_to_integer(module(build, {"x": ((2, 5), "float32")}, **{"hawq.allow_float_tail": 1}))
    with pytest.raises(
        ModelError, match=r"the_product: .*can leave int32.*remedy: quantize its operands to fewer bits"
    ):
        ranges.margins(after)


def test_the_flag_is_no_remedy_inside_the_network() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.nn.log_softmax(dq(bb, p[0], 0.1, 3)), "the_log"), 0.01, 128)

    mod = module(build, {"x": ((2, 5), "uint8")}, **{"hawq.allow_float_tail": 1})
    with pytest.raises(ModelError) as error:
        lower_to_integer(mod)
    (failure,) = error.value.problems()
    assert failure["layer"] == "the_log" and "no integer arithmetic" in failure["reason"]
    assert failure["remedy"].startswith("replace it") and "--allow" not in failure["remedy"]


def test_a_product_of_a_wide_product_keeps_its_bounds() -> None:
    """The casts to int64 of the first product have an interval too: without it the second product looked small."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        wide = QType.of("uint16")
        x = dq(bb, p[0], 0.01, 3, wide)
        for scale in (1.0173, 0.5219):
            x = dq(bb, q(bb, bb.emit(relax.op.multiply(x, dq(bb, p[1], 0.01, 3, wide))), scale, 7, wide), 0.01, 7, wide)
        return q(bb, x, 0.0219, 128)

    after = check(build, {"x": ((2, 5), "uint16"), "y": ((2, 5), "uint16")})
    ranges.margins(after)
    assert [
        ops.dtype_of(b.var) for b in stages.bindings(after["main"]) if ops.op_name(b.value) == "relax.multiply"
    ] == ["int64"] * 2


def test_dynamic_quantization_inside_is_refused() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return bb.emit(relax.TupleGetItem(bb.emit(ops.dynamic_quantize(dq(bb, p[0], 0.1, 3)), "dyn"), 0))

    for attrs in ({}, {"hawq.allow_float_tail": 1}):  # a float tail holds nothing that quantizes
        with pytest.raises(ModelError, match=r"dyn: .*computed at run time.*statically"):
            lower_to_integer(module(build, {"x": ((2, 5), "uint8")}, **attrs))
