"""The reference's integer operators against cases worked out by hand from ARITHMETIC.md, and against arith.py."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.arith import QType
from hawq_tvm.core.interpolation import Steps
from hawq_tvm.verify import reference, reference_float, reference_rounding, reference_rows
from hawq_tvm.verify.reference import ReferenceOverflow, evaluate
from relay_passes.fuse_epilogues import fuse_epilogues

from .graphs_for_verify import full_range, graph, inputs, result

I8, U8, I16, I32 = (QType.of(n) for n in ("int8", "uint8", "int16", "int32"))
HALVES = [-5, -3, -2, -1, 0, 1, 2, 3, 5]


def requantized(values, multiplier, offset, shift, rounding, zero_point=0, qtype=I32):
    """The reference's (A9) of one int32 operand."""
    x = np.asarray(values, np.int32)
    return result(
        lambda emit, a: ops.requantize(
            [a], [multiplier], offset, shift, qtype=qtype, zero_point=zero_point, rounding=rounding
        ),
        x,
    )


# -- the border: (A1), (A2), (A2b) -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("half_even", [10, 12, 10, 8, 12]),
        ("half_up", [11, 12, 10, 9, 13]),
        ("half_away", [11, 12, 9, 8, 13]),
        ("half_toward_zero", [10, 11, 10, 9, 12]),
        ("floor", [10, 11, 9, 8, 12]),
        ("ceil", [11, 12, 10, 9, 13]),
        ("toward_zero", [10, 11, 10, 9, 12]),
        ("away", [11, 12, 9, 8, 13]),
    ],
)
def test_quantize_rounds_ties_as_named(rounding: str, expected: list[int]) -> None:
    # Divided by 0.5: 0.5, 1.5, -0.5, -1.5, 2.5; the zero point is 10.
    x = np.array([0.25, 0.75, -0.25, -0.75, 1.25], np.float32)
    y = result(lambda emit, a: ops.quantize(a, 0.5, 10, qtype=U8, rounding=rounding), x)
    np.testing.assert_array_equal(y, np.array(expected, np.uint8), strict=True)


def test_quantize_saturates_narrow_ranges_and_infinities() -> None:
    x = np.array([-np.inf, -100, 3, 100, np.inf, 3e38], np.float32)
    y = result(lambda emit, a: ops.quantize(a, 1.0, 1, qtype=QType(-8, 7, "int8")), x)
    np.testing.assert_array_equal(y, np.array([-8, -8, 4, 7, 7, 7], np.int8), strict=True)


def test_quantize_to_int32_clamps_at_the_bounds_that_float32_cannot_hold() -> None:
    x = np.array([2.0**31, -(2.0**31), 2.0**31 - 128, 1e30], np.float32)
    y = result(lambda emit, a: ops.quantize(a, 1.0, 0, qtype=I32), x)
    np.testing.assert_array_equal(y, np.array([2**31 - 1, -(2**31), 2**31 - 128, 2**31 - 1], np.int32), strict=True)


def test_divide_and_reciprocal_are_two_functions() -> None:
    x = (np.arange(-4000, 4000) * np.float32(0.015)).astype(np.float32)
    found = {}
    for form in ("divide", "reciprocal", "affine"):
        found[form] = result(lambda emit, a, form=form: ops.quantize(a, np.float32(0.03), 3, qtype=I16, form=form), x)
        expected = arith.quantize(x, np.float32(0.03), np.int32(3), qmin=-32768, qmax=32767, storage="int16", form=form)
        np.testing.assert_array_equal(found[form], expected, strict=True)
    assert np.any(found["divide"] != found["reciprocal"])


def test_dequantize_is_a_float32_product() -> None:
    q = np.array([0, 1, 130, 255], np.uint8)
    y = result(lambda emit, a: ops.dequantize(a, np.float32(0.1), 130, qmin=0, qmax=255), q)
    np.testing.assert_array_equal(y, np.array([-130, -129, 0, 125], np.float32) * np.float32(0.1), strict=True)


def test_dynamic_quantize_is_onnx_own_example() -> None:
    def build(emit, x):
        triple = emit(ops.dynamic_quantize(x))
        return [emit(relax.TupleGetItem(triple, i)) for i in range(3)]

    x = np.array([0, 2, -3, -2.5, 1.34, 0.5], np.float32)
    y = evaluate(graph(build, x), inputs(x))
    np.testing.assert_array_equal(y["y0"], np.array([153, 255, 0, 26, 221, 179], np.uint8), strict=True)
    np.testing.assert_array_equal(y["y1"], np.float32(5) / np.float32(255))
    assert int(y["y2"]) == 153
    zeros = np.zeros(3, np.float32)
    y = evaluate(graph(build, zeros), inputs(zeros))
    assert (y["y0"].tolist(), float(y["y1"]), int(y["y2"])) == ([0, 0, 0], 1.0, 0)


# -- rounding and requantize: (A5) to (A9) -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("half_up", [-2, -1, -1, 0, 0, 1, 1, 2, 3]),
        ("half_even", [-2, -2, -1, 0, 0, 0, 1, 2, 2]),
        ("half_away", [-3, -2, -1, -1, 0, 1, 1, 2, 3]),
        ("half_toward_zero", [-2, -1, -1, 0, 0, 0, 1, 1, 2]),
        ("floor", [-3, -2, -1, -1, 0, 0, 1, 1, 2]),
        ("ceil", [-2, -1, -1, 0, 0, 1, 1, 2, 3]),
        ("toward_zero", [-2, -1, -1, 0, 0, 0, 1, 1, 2]),
        ("away", [-3, -2, -1, -1, 0, 1, 1, 2, 3]),
    ],
)
def test_halves_by_every_rounding(rounding: str, expected: list[int]) -> None:
    np.testing.assert_array_equal(requantized(HALVES, 1, 0, 1, rounding), np.array(expected, np.int32), strict=True)


def test_double_rounds_twice() -> None:
    # A half: the high multiply alone, whose negative ties go up.  A quarter: its result is halved again, away from
    # zero.
    np.testing.assert_array_equal(requantized(HALVES, 1 << 30, 0, 31, "double"), [-2, -1, -1, 0, 0, 1, 1, 2, 3])
    np.testing.assert_array_equal(requantized([2, -2, 6, -6, 1], 1 << 30, 0, 32, "double"), [1, -1, 2, -2, 1])
    np.testing.assert_array_equal(requantized([5, -5, 0], 1 << 30, 0, 30, "double"), [5, -5, 0])


@pytest.mark.parametrize(("rounding", "expected"), [("half_up", [1, 0]), ("half_even", [0, 0]), ("half_away", [1, -1])])
def test_the_largest_shift_and_a_tie_from_the_offset(rounding: str, expected: list[int]) -> None:
    offset = np.array([2**61, -(2**61)])
    np.testing.assert_array_equal(requantized([0, 0], 1, offset, 62, rounding), expected)


def test_no_shift_changes_nothing() -> None:
    for rounding in set(arith.ROUNDINGS) - {"double"}:
        np.testing.assert_array_equal(requantized([-7, 0, 7], 3, 1, 0, rounding), [-20, 1, 22])


def test_the_zero_point_is_added_after_rounding_and_before_the_clamp() -> None:
    np.testing.assert_array_equal(
        requantized([1, 3, 600, -600], 1, 0, 1, "half_even", 1, U8), np.array([1, 3, 255, 0], np.uint8), strict=True
    )


def test_several_operands_are_rounded_once() -> None:
    x, y = np.array([10, -10, 7], np.int32), np.array([2, 4, 100], np.int8)
    z = result(
        lambda emit, a, b: ops.requantize([a, b], [3, -1], 2, 2, qtype=I8, zero_point=-1, rounding="half_up"), x, y
    )
    # (30 - 2 + 2) / 4 = 7.5, (-30 - 4 + 2) / 4 = -8, (21 - 100 + 2) / 4 = -19.25
    np.testing.assert_array_equal(z, np.array([7, -9, -20], np.int8), strict=True)


@pytest.mark.parametrize("rounding", arith.ROUNDINGS)
def test_requantize_equals_arith_on_full_range_operands(rounding: str) -> None:
    rng = np.random.default_rng(1)
    double = rounding == "double"
    for _ in range(20):
        x = full_range(rng, (2, 5, 3), "int16" if double else "int32")
        multiplier = rng.integers(-(2**31) + 1, 2**31, (5, 1))
        shift = rng.integers(16 if double else 0, 63, (5, 1))
        offset = 0 if double else rng.integers(-(2**58), 2**58, (5, 1))
        zero, qtype = int(rng.integers(-128, 128)), (I8, U8, I16, I32)[int(rng.integers(4))]
        found = result(
            lambda emit, a, m=multiplier, o=offset, s=shift, z=zero, t=qtype: ops.requantize(
                [a], [m], o, s, qtype=t, zero_point=z, rounding=rounding
            ),
            x,
        )
        expected = arith.requantize(
            [x.astype(np.int64)],
            [multiplier],
            offset,
            shift,
            rounding=rounding,
            zero_point=zero,
            qmin=qtype.qmin,
            qmax=qtype.qmax,
        )
        np.testing.assert_array_equal(found, expected.astype(qtype.storage), strict=True)


# -- the layers: (A10) to (A17) ------------------------------------------------------------------------


def test_convolution_by_hand() -> None:
    x = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    w = np.array([[1, 2], [-1, 3]], np.int8).reshape(1, 1, 2, 2)
    y = result(lambda emit, a: relax.op.nn.conv2d(a, ops.const(w, "int8"), out_dtype="int32"), x)
    # 1 + 2 * 2 - 4 + 3 * 5 = 16 and so on
    np.testing.assert_array_equal(y, np.array([[16, 21], [31, 36]], np.int32).reshape(1, 1, 2, 2), strict=True)


@pytest.mark.parametrize(
    ("groups", "strides", "dilation"), [(1, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (6, (2, 3), (2, 1))]
)
def test_convolution_equals_torch_in_both_layouts(
    groups: int, strides: tuple[int, int], dilation: tuple[int, int]
) -> None:
    rng = np.random.default_rng(2)
    x, w = full_range(rng, (2, 6, 9, 8), "int8"), full_range(rng, (12, 6 // groups, 3, 2), "int8")
    double = torch.float64  # exact: every sum is far below 2^53
    expected = (
        torch.nn.functional.conv2d(
            torch.tensor(x, dtype=double),
            torch.tensor(w, dtype=double),
            stride=strides,
            dilation=dilation,
            groups=groups,
        )
        .numpy()
        .astype(np.int32)
    )
    options = {"strides": strides, "dilation": dilation, "groups": groups, "out_dtype": "int32"}
    y = result(lambda emit, a: relax.op.nn.conv2d(a, ops.const(w, "int8"), **options), x)
    np.testing.assert_array_equal(y, expected, strict=True)
    hwio = ops.const(w.transpose(2, 3, 1, 0), "int8")
    y = result(
        lambda emit, a: relax.op.nn.conv2d(a, hwio, data_layout="NHWC", kernel_layout="HWIO", **options),
        x.transpose(0, 2, 3, 1).copy(),
    )
    np.testing.assert_array_equal(y.transpose(0, 3, 1, 2), expected)


def test_products_too_large_for_float64_stay_exact() -> None:
    a, b = np.full((1, 3), -(2**31), np.int32), np.array([[2**30 - 1], [2**30 - 3], [5]], np.int32)
    y = result(lambda emit, p, q: relax.op.matmul(p, q, out_dtype="int64"), a, b)
    np.testing.assert_array_equal(y, np.array([[-(2**31) * (2**31 + 1)]], np.int64), strict=True)


def test_pools_by_hand() -> None:
    x = np.array([[-5, 2, 7], [0, -1, 3], [4, 4, -128]], np.int8).reshape(1, 1, 3, 3)
    y = result(lambda emit, a: ops.sum_pool2d(a, (2, 2), (1, 1)), x)
    np.testing.assert_array_equal(y.reshape(2, 2), np.array([[-4, 11], [7, -122]], np.int32), strict=True)
    y = result(lambda emit, a: relax.op.nn.max_pool2d(a, (2, 2), (1, 1)), x)
    np.testing.assert_array_equal(y.reshape(2, 2), np.array([[2, 7], [4, 4]], np.int8), strict=True)
    y = result(lambda emit, a: ops.sum_pool2d(a, (2, 2), (1, 1), (2, 2)), x)
    np.testing.assert_array_equal(y.ravel(), np.array([-5 + 7 + 4 - 128], np.int32), strict=True)


def test_padding_and_dilation_are_filled_with_the_zero_point() -> None:
    x = np.array([[1, 2], [3, 4]], np.uint8).reshape(1, 1, 2, 2)
    y = result(lambda emit, a: relax.op.nn.pad(a, [0, 0, 0, 0, 1, 0, 0, 1], pad_value=9), x)
    np.testing.assert_array_equal(y.reshape(3, 3), np.array([[9, 9, 9], [1, 2, 9], [3, 4, 9]], np.uint8), strict=True)
    y = result(lambda emit, a: ops.dilate2d(a, (2, 1), 7), x)
    np.testing.assert_array_equal(y.reshape(3, 2), np.array([[1, 2], [7, 7], [3, 4]], np.uint8), strict=True)


def test_lookup_starts_at_the_least_value_of_the_type() -> None:
    table = np.arange(256, dtype=np.uint8)[::-1].copy()
    y = result(lambda emit, a: ops.lookup(a, table), np.array([-128, 0, 127], np.int8))
    np.testing.assert_array_equal(y, np.array([255, 127, 0], np.uint8), strict=True)
    y = result(lambda emit, a: ops.lookup(a, table), np.array([0, 1, 255], np.uint8))
    np.testing.assert_array_equal(y, np.array([255, 254, 0], np.uint8), strict=True)


def test_interpolation_by_hand() -> None:
    """Cells of four places, -2 .. 1: (value + ((slope + (curvature place >> 1)) place >> 2)) >> 3."""
    table = np.array([[100, -8], [9, 16], [-3, 0]], np.int32)

    def made(emit: object, u: relax.Expr) -> relax.Expr:
        return ops.interpolate(u, table, Steps(2, 1, 2, 3), bound=0.1, slope=0.1)

    # (100 + floor(-24 / 4)) >> 3, (100 + floor(-10 / 4)) >> 3, 100 >> 3, (100 + floor(7 / 4)) >> 3; then
    # (-8 + 4 place) >> 3.
    y = result(made, np.arange(8, dtype=np.int32))
    np.testing.assert_array_equal(y, np.array([11, 12, 12, 12, -2, -2, -1, -1], np.int32), strict=True)
    table[1, 0] = 1 << 30
    with pytest.raises(ReferenceOverflow, match="interpolation"):
        result(made, np.arange(8, dtype=np.int32))


@pytest.mark.parametrize(
    ("table", "x", "multiplier", "shift", "expected"),
    [
        ([4, 2, 1], [2, 1, 0], 14, 0, [8, 4, 2]),
        ([4, 2, 1], [0, 2, 1], 14, 1, [1, 4, 2]),
        ([1, 1], [0, 0], 5, 0, [2, 2]),  # 2.5
        ([1, 1], [0, 0], 7, 0, [4, 4]),  # 3.5
        ([1, 0], [-127, -128], 300, 0, [127, 0]),
    ],
)
def test_softmax_by_hand(table: list[int], x: list[int], multiplier: int, shift: int, expected: list[int]) -> None:
    y = result(
        lambda emit, a: ops.softmax(
            a, np.array(table) * (2**30 // table[0]), axis=1, multiplier=multiplier, shift=shift, qtype=I8, zero_point=0
        ),
        np.array([x], np.int8),
    )
    np.testing.assert_array_equal(y, np.array([expected], np.int8), strict=True)


@pytest.mark.parametrize(("signed", "expected"), [(True, [1, -1, -8]), (False, [1, 15, 8])])
def test_four_bits_low_nibble_first(signed: bool, expected: list[int]) -> None:
    y = result(
        lambda emit, a: emit(ops.unpack_int4(np.array([0xF1, 0x08], np.uint8), (3,), signed)), np.zeros(1, np.int8)
    )
    np.testing.assert_array_equal(y, np.array(expected, np.int8 if signed else np.uint8), strict=True)
    values = (
        np.random.default_rng(3)
        .integers(-8 if signed else 0, 8 if signed else 16, (3, 5))
        .astype(np.int8 if signed else np.uint8)
    )
    y = result(
        lambda emit, a: emit(ops.unpack_int4(arith.pack_int4(values), values.shape, signed)), np.zeros(1, np.int8)
    )
    np.testing.assert_array_equal(y, values, strict=True)


def test_arguments_and_comparisons_do_not_truncate_floats() -> None:
    x = np.array([[0.25, 0.75, 0.5]], np.float32)
    np.testing.assert_array_equal(result(lambda emit, a: relax.op.argmax(a, 1), x), np.array([1]), strict=True)
    np.testing.assert_array_equal(
        result(lambda emit, a: relax.op.argmin(a, 1, keepdims=True), x), np.array([[0]]), strict=True
    )
    half = relax.const(np.float32(0.5))
    np.testing.assert_array_equal(
        result(lambda emit, a: relax.op.greater_equal(a, half), x), np.array([[False, True, True]]), strict=True
    )


# -- the evaluator itself ----------------------------------------------------------------------------------


def _int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


OVERFLOWS = {
    "add": (lambda emit, a: relax.op.add(a, ops.const(1, "int32")), _int32(2**31 - 1)),
    "subtract": (lambda emit, a: relax.op.subtract(a, ops.const(1, "int32")), _int32(-(2**31))),
    "multiply": (lambda emit, a: relax.op.multiply(a, a), _int32(2**16)),
    "add int64": (lambda emit, a: relax.op.add(a, a), np.array([2**62], np.int64)),
    "multiply int64": (lambda emit, a: relax.op.multiply(a, a), np.array([2**32], np.int64)),
    "matmul": (lambda emit, a: relax.op.matmul(a, a, out_dtype="int32"), np.full((2, 2), 2**15, np.int32)),
    "matmul int64": (lambda emit, a: relax.op.matmul(a, a, out_dtype="int64"), np.full((2, 2), 2**31, np.int64)),
    "sum": (lambda emit, a: relax.op.sum(a, [0]), np.full(3, 2**30, np.int32)),
    "sum int64": (lambda emit, a: relax.op.sum(a, [0]), np.full(3, 2**62, np.int64)),
    "astype": (lambda emit, a: relax.op.astype(a, "int8"), _int32(128)),
    "requantize": (
        lambda emit, a: ops.requantize([a], [2**31 - 1], 2**62, 40, qtype=I8, zero_point=0, rounding="half_up"),
        np.array([2**31 + 8], np.int64),
    ),
    "double": (
        lambda emit, a: ops.requantize([a], [2**30], 0, 20, qtype=I8, zero_point=0, rounding="double"),
        _int32(2**20),
    ),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_is_an_error_never_a_wrap(name: str) -> None:
    build, x = OVERFLOWS[name]
    with pytest.raises(ReferenceOverflow):
        result(build, x)


def test_the_very_ends_of_int64_are_no_overflow() -> None:
    x = np.array([-(2**63), 2**63 - 1], np.int64)
    np.testing.assert_array_equal(
        result(lambda emit, a: relax.op.multiply(a, ops.const(1, "int64")), x), x, strict=True
    )
    np.testing.assert_array_equal(
        result(lambda emit, a: relax.op.add(a, ops.const([0, 0], "int64")), x), x, strict=True
    )


def test_inputs_of_another_type_or_shape_are_refused() -> None:
    module = graph(lambda emit, a: relax.op.add(a, a), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="x0 is int64"):
        evaluate(module, {"x0": np.zeros(3, np.int64)})
    with pytest.raises(ValueError, match="declared int32"):
        evaluate(module, {"x0": np.zeros(2, np.int32)})


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"relax\.cumsum"):
        result(lambda emit, a: relax.op.cumsum(a, 0), np.zeros(3, np.float32))


def test_layers_are_seen_in_order_functions_are_entered_and_values_can_be_given() -> None:
    def build(emit, a):
        y = emit(relax.op.nn.conv2d(a, ops.const(np.ones((2, 1, 1, 1)), "int8"), out_dtype="int32"), "conv_acc")
        y = emit(ops.requantize([y], [1], 0, 1, qtype=I8, zero_point=0, rounding="half_even"), "conv")
        return emit(relax.op.nn.max_pool2d(y, (2, 2)), "pool")

    x = np.arange(4, dtype=np.int8).reshape(1, 1, 2, 2)
    module = graph(build, x)
    packed, _ = fuse_epilogues(module)
    for m, names in ((module, ["conv_acc", "conv", "pool"]), (packed, ["conv", "pool"])):
        seen: dict[str, np.ndarray] = {}
        y = evaluate(m, inputs(x), seen.__setitem__)["y0"]
        assert list(seen)[: len(names)] == names
        np.testing.assert_array_equal(seen["conv"][0, 0], np.array([[0, 0], [1, 2]], np.int8), strict=True)
        np.testing.assert_array_equal(y, np.full((1, 2, 1, 1), 2, np.int8), strict=True)
        given = {"conv": np.full((1, 2, 2, 2), -3, np.int8)}
        np.testing.assert_array_equal(
            evaluate(m, inputs(x), given=given)["y0"], np.full((1, 2, 1, 1), -3, np.int8), strict=True
        )


def test_the_reference_shares_no_code_with_what_it_checks() -> None:
    for module in (reference, reference_float, reference_rounding, reference_rows):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {"." * n.level + (n.module or "") for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert imported <= {
            "__future__",
            "collections.abc",
            "typing",
            "math",
            "ml_dtypes",
            "numpy",
            "numpy.lib.stride_tricks",
            "numpy.typing",
            "tvm",
            ".",
        }
