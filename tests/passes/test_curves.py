"""Functions of one tensor: tables of its own integers are the real formula rounded once; tables of a grid for wider
values (A27) and fixed-point values (A26) stay within the bound that they state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.arith import QType
from hawq_tvm.core.errors import ModelError
from hawq_tvm.verify.distances import both, distances
from hawq_tvm.verify.reference import evaluate
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.remove_dead_code import remove_dead_code

from .modules import S8, U8, dq, full_range, module, op_names, q, same_values

S16 = QType.of("int16")
Long = np.longdouble
POLYNOMIALS = ("hawq.interpolate", "int32")
FUNCTIONS: dict[str, Any] = {
    "sigmoid": lambda bb, x: relax.op.sigmoid(x),
    "tanh": lambda bb, x: relax.op.tanh(x),
    "gelu": lambda bb, x: relax.op.nn.gelu(x),
    "silu_in_pieces": lambda bb, x: relax.op.multiply(x, bb.emit(relax.op.sigmoid(x))),
    "hard_swish_in_pieces": lambda bb, x: relax.op.multiply(
        x,
        bb.emit(
            relax.op.clip(
                bb.emit(
                    relax.op.add(
                        bb.emit(relax.op.multiply(x, relax.const(np.float32(1 / 6)))), relax.const(np.float32(0.5))
                    )
                ),
                0,
                1,
            )
        ),
    ),
    "erf_of_half": lambda bb, x: relax.op.erf(bb.emit(relax.op.multiply(x, relax.const(np.float32(0.5))))),
    "exp_negative_square": lambda bb, x: relax.op.exp(bb.emit(relax.op.negative(bb.emit(relax.op.square(x))))),
}


def lowered(before: tvm.IRModule) -> tvm.IRModule:
    after, _ = remove_dead_code(lower_to_integer(before)[0])
    stages.verify(after, stages.Stage.INTEGER)
    return after


def tables(after: tvm.IRModule) -> list[relax.Call]:
    return [b.value for b in stages.bindings(after["main"]) if ops.op_name(b.value) in ("hawq.lookup", POLYNOMIALS[0])]


# -- tables of a tensor's own integers ---------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind, zero", [(U8, 131), (S8, -7)])
def test_functions(function: str, kind: QType, zero: int) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(FUNCTIONS[function](bb, dq(bb, p[0], 0.0317, zero, kind))), 0.0127, 17, kind)

    before = module(build, {"x": ((4, 96), kind.storage)})
    after = lowered(before)
    assert op_names(after) == ["lookup", ""] and len(before["main"].params) == 1
    same_values(before, after, runs=4)


def test_sixteen_bits_have_a_table_of_65536() -> None:
    before = module(
        lambda bb, p: q(bb, bb.emit(relax.op.tanh(dq(bb, p[0], 2.0**-12, 5, S16))), 0.00005, 0, S16),
        {"x": ((64, 64), "int16")},
    )
    after = lowered(before)
    assert op_names(after) == ["lookup", ""]
    same_values(before, after)


@pytest.mark.parametrize(
    "make",
    [
        lambda bb, p: relax.op.nn.relu(dq(bb, p[0], 0.1, 3)),
        lambda bb, p: relax.op.multiply(dq(bb, p[0], 0.1, 3), relax.const(np.float32(0.7))),
        lambda bb, p: relax.op.multiply(dq(bb, p[0], 0.1, 3), dq(bb, p[1], 0.1, 3)),
    ],
)
def test_what_is_linear_or_a_product_has_no_table(make: Any) -> None:
    before = module(lambda bb, p: q(bb, bb.emit(make(bb, p)), 0.2, 3), {"x": ((2, 3), "uint8"), "y": ((2, 3), "uint8")})
    assert not tables(lowered(before))


def test_a_function_that_is_no_number_is_refused() -> None:
    before = module(
        lambda bb, p: q(bb, bb.emit(relax.op.log(dq(bb, p[0], 0.1, 3))), 0.2, 3, name="the_log"),
        {"x": ((2, 3), "uint8")},
    )
    with pytest.raises(ModelError, match=r"the_log: .*not a number.*NaN at x = "):
        lower_to_integer(before)


def test_two_dequantizes_of_one_tensor_are_one_leaf() -> None:
    before = module(
        lambda bb, p: q(
            bb,
            bb.emit(relax.op.multiply(dq(bb, p[0], 0.1, 3), bb.emit(relax.op.sigmoid(dq(bb, p[0], 0.1, 3))))),
            0.05,
            3,
        ),
        {"x": ((2, 3), "uint8")},
    )
    assert op_names(lowered(before)) == ["lookup", ""]


# -- movement, joins and extrema around a table ------------------------------------------------------


def _moves(bb: relax.BlockBuilder, x: relax.Expr) -> dict[str, Callable[[], Any]]:
    return {
        "reshape": lambda: relax.op.reshape(x, (4, 36)),
        "transpose": lambda: relax.op.permute_dims(x, [0, 2, 3, 1]),
        "slice": lambda: relax.op.strided_slice(x, [1], [1], [3]),
        "pad": lambda: relax.op.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], "constant", 0.25),
        "maximum": lambda: relax.op.maximum(x, bb.emit(relax.op.flip(x, 1))),
        "max_pool": lambda: relax.op.nn.max_pool2d(x, (2, 2), (2, 2), (1, 1, 1, 1)),
        "largest": lambda: relax.op.max(x, [2, 3], keepdims=True),
        "clip": lambda: relax.op.clip(bb.emit(relax.op.permute_dims(x, [0, 2, 3, 1])), 0.1, 0.8),
    }


@pytest.mark.parametrize("move", _moves(relax.BlockBuilder(), None))
@pytest.mark.parametrize("function", ["sigmoid", "hard_swish_in_pieces"])
def test_movement_behind_a_table_commutes(move: str, function: str) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(FUNCTIONS[function](bb, dq(bb, p[0], 0.0317, 131)))
        return q(bb, bb.emit(_moves(bb, x)[move]()), 0.0127, 17)

    before = module(build, {"x": ((1, 4, 6, 6), "uint8")})
    after = lowered(before)
    assert len(tables(after)) == 1
    same_values(before, after)


@pytest.mark.parametrize("move", ["reshape", "transpose", "slice"])
def test_movement_before_a_table(move: str) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(_moves(bb, dq(bb, p[0], 0.0317, 131))[move]())
        return q(bb, bb.emit(relax.op.multiply(x, bb.emit(relax.op.sigmoid(x)))), 0.0127, 17)

    before = module(build, {"x": ((1, 4, 6, 6), "uint8")})
    after = lowered(before)
    assert len(tables(after)) == 1
    same_values(before, after)


def test_a_function_of_joined_tensors_is_joined_tables() -> None:
    """Each part keeps its own exact table, in front of the concatenation and behind it."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        parts = relax.Tuple([dq(bb, p[0], 0.03, 131), bb.emit(relax.op.tanh(dq(bb, p[1], 0.05, 7)))])
        return q(bb, bb.emit(relax.op.sigmoid(bb.emit(relax.op.concat(parts, 1)))), 0.004, 17)

    before = module(build, {"x": ((2, 3, 4), "uint8"), "y": ((2, 5, 4), "uint8")})
    after = lowered(before)
    assert op_names(after) == ["lookup", "lookup", "concat", ""]
    same_values(before, after)


# -- functions of sums ---------------------------------------------------------------------------------

SMOOTH: dict[str, tuple[Any, Any]] = {
    "sigmoid": (lambda bb, x: relax.op.sigmoid(x), lambda x: 1 / (1 + np.exp(-x))),
    "tanh": (lambda bb, x: relax.op.tanh(x), np.tanh),
    "silu": (lambda bb, x: relax.op.nn.silu(x), lambda x: x / (1 + np.exp(-x))),
    "silu_in_pieces": (FUNCTIONS["silu_in_pieces"], lambda x: x / (1 + np.exp(-x))),
    "gelu": (lambda bb, x: relax.op.nn.gelu(x), lambda x: x * _normal(x)),
    "hard_swish": (FUNCTIONS["hard_swish_in_pieces"], lambda x: x * np.clip(x * Long(np.float32(1 / 6)) + 0.5, 0, 1)),
    "softplus": (lambda bb, x: relax.op.nn.softplus(x, 1.0, 20.0), lambda x: np.logaddexp(Long(0), x)),
    "leaky_sigmoid": (
        lambda bb, x: relax.op.sigmoid(bb.emit(relax.op.nn.leakyrelu(x, 0.125))),
        lambda x: 1 / (1 + np.exp(-np.where(x < 0, x / 8, x))),
    ),
}


def _normal(x: np.ndarray) -> np.ndarray:
    """The normal distribution function; beyond float64's last bits no boundary is near."""
    return np.vectorize(lambda v: 0.5 * math.erfc(-float(v) / math.sqrt(2)), otypes=[Long])(x)


def _sums(bb: relax.BlockBuilder, x: relax.Expr, bias: np.ndarray) -> relax.Expr:
    """A convolution with a scale and a float bias by channel."""
    values = np.random.default_rng(5).integers(-128, 128, (8, 4, 3, 3))
    scales = np.linspace(0.001, 0.02, 8).astype(np.float32).reshape(8, 1, 1, 1)
    w = bb.emit(ops.dequantize(ops.const(values, "int8"), scales, 0, qmin=-128, qmax=127))
    y = bb.emit(relax.op.nn.conv2d(dq(bb, x, 0.0213, 117), w))
    return bb.emit(relax.op.add(y, relax.const(bias.reshape(1, 8, 1, 1))))


def _real_sums(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """The same in long double: every number of the file is exact there."""
    values = np.random.default_rng(5).integers(-128, 128, (8, 4, 3, 3))
    scales = np.linspace(0.001, 0.02, 8).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64) - 117, (3, 3), (2, 3))
    sums = np.einsum("nchwij,ocij->nohw", windows, values)
    scale = Long(np.float32(0.0213)) * scales.astype(Long).reshape(1, 8, 1, 1)
    return sums * scale + bias.astype(Long).reshape(1, 8, 1, 1)


BIAS = np.linspace(-3, 2, 8).astype(np.float32)


@pytest.mark.parametrize("function", SMOOTH)
@pytest.mark.parametrize("scale, zero, kind", [(0.0127, 23, U8), (0.004, -128, S8)])
def test_a_function_of_sums_stays_within_its_bound(function: str, scale: float, zero: int, kind: QType) -> None:
    made, real = SMOOTH[function]

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(made(bb, _sums(bb, p[0], BIAS))), scale, zero, kind)

    after = lowered(module(build, {"x": ((2, 4, 40, 40), "uint8")}))
    (table,) = tables(after)
    x = full_range((2, 4, 40, 40), "uint8")
    x[1] = 117 + (x[1].astype(np.int64) - 117) // 20
    got = evaluate(after, {"x": x})["out0"].astype(Long)
    steps = real(_real_sums(x, BIAS)) / Long(np.float32(scale)) + zero
    wrong = np.abs(got - np.clip(steps, kind.qmin - 0.5, kind.qmax + 0.5))
    (bound,) = distances(after).values()
    assert ops.op_name(table) == POLYNOMIALS[0] and 0 < bound < 0.0001
    assert wrong.max() <= 0.5 + bound * (1 + 1e-9) + 1e-9
    assert np.mean(got != np.clip(np.rint(steps), kind.qmin, kind.qmax)) < 0.0001
    assert table.attrs["thresholds"] > 0 and table.attrs["differing"] < 0.02 * table.attrs["thresholds"]
    assert (got != got.min()).mean() > 0.05, "most of what is compared is not clamped"


# -- fixed-point values --------------------------------------------------------------------------------


def _behind(bb: relax.BlockBuilder, x: relax.Expr, other: relax.Expr) -> dict[str, Callable[[], Any]]:
    channel = relax.const(np.linspace(0.5, 1.5, 8).astype(np.float32).reshape(1, 8, 1, 1))
    return {
        "mean": lambda: relax.op.mean(x, [2, 3], keepdims=True),
        "average_pool": lambda: relax.op.nn.avg_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=False),
        "product": lambda: relax.op.multiply(x, other),
        "gate": lambda: relax.op.multiply(x, bb.emit(relax.op.sigmoid(other))),
        "sum": lambda: relax.op.add(x, bb.emit(relax.op.tanh(other))),
        "by_channel": lambda: relax.op.multiply(x, channel),
        "sum_over_channels": lambda: relax.op.sum(x, [1], keepdims=True),
    }


REAL_BEHIND: dict[str, Any] = {
    "mean": lambda x, y: x.mean((2, 3), keepdims=True),
    "average_pool": lambda x, y: _pooled(x),
    "product": lambda x, y: x * y,
    "gate": lambda x, y: x / (1 + np.exp(-y)),
    "sum": lambda x, y: x + np.tanh(y),
    "by_channel": lambda x, y: x * np.linspace(0.5, 1.5, 8).astype(np.float32).astype(Long).reshape(1, 8, 1, 1),
    "sum_over_channels": lambda x, y: x.sum(1, keepdims=True),
}


def _pooled(x: np.ndarray) -> np.ndarray:
    rows = [[max(0, 2 * i - 1), min(x.shape[2], 2 * i + 2)] for i in range((x.shape[2] - 1) // 2 + 1)]
    return np.stack([np.stack([x[:, :, a:b, c:d].mean((2, 3)) for c, d in rows], -1) for a, b in rows], -2)


@pytest.mark.parametrize("operator", REAL_BEHIND)
@pytest.mark.parametrize("wide", [False, True])
def test_what_an_operator_reads_is_a_fixed_point_value(operator: str, wide: bool) -> None:
    """SiLU of an 8-bit tensor, or of sums, before an operator that a quantize follows."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        leaf = _sums(bb, p[0], BIAS) if wide else dq(bb, p[0], 0.0317, 131)
        x = bb.emit(relax.op.nn.silu(leaf))
        return q(bb, bb.emit(_behind(bb, x, dq(bb, p[1], 0.0127, 101))[operator](), "last"), 0.0117, 117)

    shape, size = ((1, 4, 17, 17), 15) if wide else ((1, 8, 15, 15), 15)
    inputs = {"x": (shape, "uint8"), "y": ((1, 8, size, size), "uint8")}
    after = lowered(module(build, inputs))
    feed = {name: full_range(*what) for name, what in inputs.items()}
    if wide:
        feed["x"] = (117 + (feed["x"].astype(np.int64) - 117) // 8).astype(np.uint8)
    leaf = _real_sums(feed["x"], BIAS) if wide else (feed["x"].astype(Long) - 131) * Long(np.float32(0.0317))
    other = (feed["y"].astype(Long) - 101) * Long(np.float32(0.0127))
    real = REAL_BEHIND[operator](leaf / (1 + np.exp(-leaf)), other)
    steps = np.clip(real / Long(np.float32(0.0117)) + 117, -0.5, 255.5)
    got = evaluate(after, feed)["out0"]
    bound = max(distances(after).values(), default=0.0)
    assert bound < 0.01 if wide else bound < 0.001
    assert np.abs(got.astype(Long) - steps).max() <= 0.5 + bound * (1 + 1e-9) + 1e-9
    assert {(ops.op_name(c), ops.dtype_of(c)) for c in tables(after)} <= {("hawq.lookup", "int32"), POLYNOMIALS}
    assert [ops.op_name(c) for c in tables(after)].count(POLYNOMIALS[0]) == wide


def test_a_float_weight_beside_a_fixed_point_value() -> None:
    """Two digits: an int8 and, rounded, an int16."""
    weight = np.random.default_rng(8).standard_normal((6, 8, 2, 2)).astype(np.float32)

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(relax.op.nn.silu(_sums(bb, p[0], BIAS)))
        return q(bb, bb.emit(relax.op.nn.conv2d(x, relax.const(weight))), 0.317, 117)

    after = lowered(module(build, {"x": ((1, 4, 17, 17), "uint8")}))
    kinds = [
        ops.dtype_of(b.value.args[1])
        for b in stages.bindings(after["main"])
        if ops.op_name(b.value) == "relax.nn.conv2d"
    ]
    assert kinds == ["int8", "int8", "int16"]
    x = (117 + (full_range((1, 4, 17, 17), "uint8").astype(np.int64) - 117) // 8).astype(np.uint8)
    leaf = _real_sums(x, BIAS)
    windows = np.lib.stride_tricks.sliding_window_view(leaf / (1 + np.exp(-leaf)), (2, 2), (2, 3))
    real = np.einsum("nchwij,ocij->nohw", windows, weight.astype(Long))
    steps = np.clip(real / Long(np.float32(0.317)) + 117, -0.5, 255.5)
    (bound,) = distances(after).values()
    assert bound < 0.02
    assert np.abs(evaluate(after, {"x": x})["out0"].astype(Long) - steps).max() <= 0.5 + bound


def test_a_residual_sum_of_many_operands_states_its_distance() -> None:
    """A sum of 32 bits and a tensor of 16: too many pairs to compare thresholds."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        total = bb.emit(relax.op.add(_sums(bb, p[0], BIAS), dq(bb, p[1], 0.00137, 11, S16)))
        return q(bb, total, 0.00931, 5, S16, name="last")

    after = lowered(module(build, {"x": ((1, 4, 9, 9), "uint8"), "y": ((1, 8, 7, 7), "int16")}))
    last = next(b.value for b in stages.bindings(after["main"]) if ops.op_name(b.value) == "hawq.requantize")
    feed = {"x": full_range((1, 4, 9, 9), "uint8"), "y": full_range((1, 8, 7, 7), "int16")}
    real = _real_sums(feed["x"], BIAS) + (feed["y"].astype(Long) - 11) * Long(np.float32(0.00137))
    (bound,) = distances(after).values()
    assert int(last.attrs["thresholds"]) == -1 and 0 < bound < 0.001
    off = np.abs(evaluate(after, feed)["out0"].astype(Long) - real / Long(np.float32(0.00931)) - 5)
    assert off.max() <= 0.5 + bound


def test_two_readers_of_a_function_share_its_table() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(relax.op.nn.silu(_sums(bb, p[0], BIAS)))
        halves = [bb.emit(relax.op.strided_slice(x, [1], [i], [i + 4])) for i in (0, 4)]
        return [q(bb, h, 0.02, 3, name=f"half{i}") for i, h in enumerate(halves)]

    assert len(tables(lowered(module(build, {"x": ((1, 4, 8, 8), "uint8")})))) == 1


def test_a_function_without_bounds_is_no_fixed_point_value() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.divide(relax.const(np.float32(1)), _sums(bb, p[0], BIAS)), "inverse")
        return q(bb, bb.emit(relax.op.mean(y, [2, 3]), "the_mean"), 0.02, 3)

    with pytest.raises(ModelError, match=r"the_mean: .*not bounded.*clip"):
        lower_to_integer(module(build, {"x": ((1, 4, 8, 8), "uint8")}))


def test_a_function_that_nothing_quantizes_is_an_output_in_fixed_point() -> None:
    inputs: dict[str, Any] = {"x": ((1, 4, 8, 8), "uint8")}
    mod = module(lambda bb, p: bb.emit(relax.op.tanh(_sums(bb, p[0], BIAS)), "the_tanh"), inputs)
    after, _ = remove_dead_code(lower_to_integer(mod)[0])
    stages.verify(after, stages.Stage.INTEGER)
    x = full_range((1, 4, 8, 8), "uint8")
    got, wanted = evaluate(after, {"x": x})["out0"], np.tanh(_real_sums(x, BIAS))
    steps, ends = both(after)
    (bound,) = ends.values()
    assert not steps and 0 < bound < 1e-6
    assert np.max(np.abs(got - wanted)) <= bound + 2.0**-25  # and half a float32 step
