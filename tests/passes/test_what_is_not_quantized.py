"""Tensors that a model leaves in float between its quantized ones: weights, factors of products, inputs that are added
to the network's results, parts of a concatenation that a float tail reads, addends that are lost beside others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import ops, ranges, stages
from hawq_tvm.core.arith import QType
from hawq_tvm.core.errors import ModelError
from hawq_tvm.verify.distances import distances
from hawq_tvm.verify.reference import evaluate
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.remove_dead_code import remove_dead_code

from .modules import RNG, S4, Build, dq, full_range, module, op_names, q, same_values, weight

TAIL = {"hawq.allow_float_tail": 1}


def lowered(mod: tvm.IRModule) -> tvm.IRModule:
    after, _ = remove_dead_code(lower_to_integer(mod)[0])
    stages.verify(after, stages.Stage.INTEGER)
    ranges.margins(after)
    return after


def apart(build: Build, inputs: dict[str, Any], values: dict[str, Any], **attrs: Any) -> int:
    """By how many steps the lowered module is off from the float64 evaluation, in its first output."""
    before = module(build, inputs, **attrs)
    got, wanted = evaluate(lowered(before), values)["out0"], evaluate(before, values)["out0"]
    assert got.shape == wanted.shape
    return int(np.max(np.abs(got.astype(int) - wanted.astype(int))))


@pytest.mark.parametrize("kind", ["uint8", "int16"])
@pytest.mark.parametrize("op", ["conv", "transposed", "matmul"])
def test_a_float_weight_beside_a_quantized_tensor_is_as_exact_as_scales(op: str, kind: str) -> None:
    """Four digits of a weight, each an operand of one requantize: floats within 2^6 of the largest lose nothing."""
    shape = (5, 4) if op == "matmul" else (4, 3, 2, 2) if op == "transposed" else (3, 4, 2, 2)
    values = (RNG.uniform(0.02, 1, shape) * RNG.choice([-1, 1], shape)).astype(np.float32)

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.0317, 9, QType.of(kind))
        made = {
            "conv": lambda: relax.op.nn.conv2d(x, relax.const(values), padding=1),
            "transposed": lambda: relax.op.nn.conv2d_transpose(x, relax.const(values), strides=2),
            "matmul": lambda: relax.op.matmul(x, relax.const(values)),
        }
        return q(bb, bb.emit(made[op]()), 0.2137 if kind == "uint8" else 53.1, 128)

    before = module(build, {"x": ((3, 5) if op == "matmul" else (1, 4, 5, 5), kind)})
    after = lowered(before)
    same_values(before, after)
    calls = [b.value for b in stages.bindings(after["main"]) if isinstance(b.value, relax.Call)]
    constants = [a for c in calls for a in c.args if ops.is_const(a)]
    assert sum(ops.dtype_of(c) == "int8" and ops.const_value(c).size == values.size for c in constants) in (3, 4)


def test_a_float_weight_that_no_quantize_follows_is_as_exact() -> None:
    """An output of one sum of digits (A10a), (A1b); a float tail where that is asked for."""
    values = (RNG.uniform(0.02, 1, (5, 4)) * RNG.choice([-1, 1], (5, 4))).astype(np.float32)

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return bb.emit(relax.op.matmul(dq(bb, p[0], 0.1, 3), relax.const(values)), "the_product")

    inputs: dict[str, Any] = {"x": ((2, 5), "uint8")}
    x = full_range((2, 5), "uint8")
    exact = float(np.float32(0.1)) * ((x.astype(np.float64) - 3) @ values.astype(np.float64))
    got = evaluate(lowered(module(build, inputs)), {"x": x})["out0"]
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    assert stages.float_tail(lowered(module(build, inputs, **TAIL))["main"]) == {"the_product"}


@pytest.mark.parametrize("other", ["same", "eight", "sixteen"])
def test_a_product_of_tensors_that_nothing_quantizes(other: str) -> None:
    """Scores of queries and keys that a quantizer has left in float: their scales differ by channel, along the sum."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = dq(bb, p[0], 0.01, 3)
        scales = np.linspace(0.001, 0.02, 6).astype(np.float32).reshape(1, 6)
        y = bb.emit(relax.op.add(bb.emit(relax.op.matmul(x, bb.emit(weight((5, 6), scales)))), relax.const(0.25)))
        y = bb.emit(
            relax.op.matmul(y, bb.emit(relax.op.permute_dims(y, [1, 0])))
            if other == "same"
            else relax.op.matmul(y, dq(bb, p[1], 0.02, 7, QType.of("uint8" if other == "eight" else "uint16")))
        )
        return q(bb, y, 0.7 if other != "sixteen" else 200.0, 128)

    kind = "uint16" if other == "sixteen" else "uint8"
    shapes: dict[str, Any] = {"x": ((4, 5), "uint8"), "y": ((6, 4), kind)}
    values = {n: full_range(s, k) for n, (s, k) in shapes.items()}
    assert apart(build, shapes, values) <= 1
    assert max(distances(lowered(module(build, shapes))).values()) < 0.02


def test_an_addend_of_a_lost_tensor_keeps_the_shape_of_the_sum() -> None:
    """A mask of float's minimum quantized with the scores: nothing of the scores is left beside it, but their shape."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        mask = bb.emit(relax.op.multiply(bb.emit(relax.op.astype(p[1], "float32")), relax.const(np.float32(-3.0e38))))
        return q(bb, bb.emit(relax.op.add(dq(bb, p[0], 0.1, 3), mask)), 1.3e36, 255)

    after = lowered(
        module(
            build,
            {"x": ((2, 4, 3), "uint8"), "mask": ((1, 1, 3), "int8")},
            **{"hawq.input_ranges": [0, 255, 0, 1], "hawq.input_types": ["uint8", "int8"]},
        )
    )
    got = evaluate(after, {"x": full_range((2, 4, 3), "uint8"), "mask": np.array([[[0, 1, 0]]], np.int8)})["out0"]
    np.testing.assert_array_equal(got, np.broadcast_to(np.array([255, 24, 255], np.uint8), (2, 4, 3)))


@pytest.mark.parametrize("moved", [False, True])
def test_a_float_tail_joins_what_only_a_quantize_would(moved: bool) -> None:
    """A detector's boxes and scores in one concatenation: half of it is quantized, the other half ends in float."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x, y = dq(bb, p[0], 0.1, 3), dq(bb, p[0], 0.013, 5)
        parts = [
            bb.emit(relax.op.matmul(x, bb.emit(weight((5, 6), 0.1)))),
            bb.emit(relax.op.matmul(y, bb.emit(weight((5, 6), 0.2)))),
        ]
        both = bb.emit(relax.op.concat(parts, 0), "the_concat")
        both = bb.emit(relax.op.permute_dims(both, [1, 0]), "the_turn") if moved else both
        half = bb.emit(relax.op.strided_slice(both, [0], [0], [2]), "the_half")
        rest = bb.emit(relax.op.strided_slice(both, [0], [2], [4]), "the_rest")
        return [q(bb, half, 1.1, 128), bb.emit(relax.op.sigmoid(rest), "the_sigmoid")]

    inputs: dict[str, Any] = {"x": ((2, 5), "uint8")}
    before = module(build, inputs, **TAIL)
    after = lowered(before)
    outside = ["the_concat", *(["the_turn"] if moved else []), "the_rest", "the_sigmoid"]
    assert [str(n) for n in after["main"].attrs["hawq.float_tail"]] == outside
    x = full_range((2, 5), "uint8")
    got, wanted = evaluate(after, {"x": x}), evaluate(before, {"x": x})
    np.testing.assert_array_equal(got["out0"], wanted["out0"])
    np.testing.assert_allclose(got["out1"], wanted["out1"], rtol=0, atol=1e-6)


# -- float inputs ------------------------------------------------------------------------------------


def _residual(smoothed: bool) -> Build:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        factors = np.array([0.5, 2.0, 1.0, 0.25, 3.0], np.float32)
        x = bb.emit(relax.op.multiply(p[0], relax.const(factors)), "the_factors") if smoothed else p[0]
        y = dq(bb, q(bb, x, 0.05, 128), 0.05, 128)
        z = bb.emit(relax.op.matmul(y, bb.emit(weight((5, 5), 0.1, 0, S4))))
        return q(bb, bb.emit(relax.op.add(p[0], z), "the_sum"), 0.1, 128)

    return build


@pytest.mark.parametrize("attrs", [{}, TAIL], ids=["integers", "tail"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_an_input_that_is_added_to_what_its_layers_make(smoothed: bool, attrs: dict[str, Any]) -> None:
    inputs: dict[str, Any] = {"x": ((64, 5), "float32")}
    values = {"x": (RNG.standard_normal((64, 5)) * 3).astype(np.float32)}
    assert apart(_residual(smoothed), inputs, values, **attrs) <= 1
    after = lowered(module(_residual(smoothed), inputs, **attrs))
    (grid,) = (
        b.value
        for b in stages.bindings(after["main"])
        if ops.op_name(b.value) == "hawq.quantize" and str(b.value.attrs["out_dtype"]) == "int32"
    )
    # 128 steps of 0.05, sixteen times that, with the factor a quarter of it at least.
    assert float(ops.const_value(grid.args[1])) == 2.0 ** ((9 if smoothed else 7) - 27)
    assert 0 < distances(after)["q1"] < 0.005


def test_an_input_far_beyond_what_quantizes_it_saturates() -> None:
    inputs: dict[str, Any] = {"x": ((2, 5), "float32")}
    x = np.array([[1e9, -1e9, 100, -100, 0]] * 2, np.float32)
    got = evaluate(lowered(module(_residual(False), inputs)), {"x": x})["out0"]
    assert got.min() == 0 and got.max() == 255


def test_a_function_of_an_input_is_polynomials() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(relax.op.multiply(p[0], bb.emit(relax.op.sigmoid(p[0]))))
        return [q(bb, x, 0.05, 20), q(bb, p[0], 0.05, 128)]

    inputs: dict[str, Any] = {"x": ((32, 5), "float32")}
    values = {"x": (RNG.standard_normal((32, 5)) * 4).astype(np.float32)}
    assert apart(build, inputs, values) <= 1
    assert op_names(lowered(module(build, inputs))).count("interpolate") == 1


def test_an_input_that_nothing_quantizes_is_refused() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.matmul(dq(bb, p[1], 0.1, 3), bb.emit(weight((5, 5), 0.1))))
        return q(bb, bb.emit(relax.op.add(p[0], y), "the_sum"), 0.1, 128)

    with pytest.raises(ModelError, match=r"the_sum: .*nothing tells its range.*; remedy: declare"):
        lower_to_integer(module(build, {"x": ((2, 5), "float32"), "y": ((2, 5), "uint8")}))
