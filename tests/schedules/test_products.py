"""Products of two activations in 8 bits: every sign and zero point, at odd shapes, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import schedules
from hawq_tvm.core import ops
from hawq_tvm.targets import target
from hawq_tvm.verify.reference import evaluate
from schedules.factors import Factors

from .one_layer import layer_of, packed, run
from .products import KINDS, SHAPES, factors, product

HERE = [
    (name, rule)
    for name, rule in (("x86-vnni", "x86.vnni"), ("x86-avx2", "cpu.contract"), ("x86-64-v2", "cpu.contract"))
    if target.runs_here(target.required_features(target.parse(name)))
]


def check(shapes, types, zeros, requantized, on, rule):
    body, arrays = product(zeros, requantized), factors(shapes, types)
    module = packed(body, [(a.shape, str(a.dtype)) for a in arrays])
    expected = evaluate(module, {f"x{i}": a for i, a in enumerate(arrays)})["output0"]
    (out,) = run(body, *arrays, target=on, rule=rule)
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize(("name", "rule"), HERE)
@pytest.mark.parametrize("requantized", [True, False])
@pytest.mark.parametrize(("types", "zeros"), KINDS)
def test_signs_and_zero_points(name, rule, types, zeros, requantized):
    check(SHAPES[1], types, zeros, requantized, target.parse(name), rule)


@pytest.mark.parametrize(("name", "rule"), HERE)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes(name, rule, shapes):
    check(shapes, ("int8", "uint8"), (-7, 100), True, target.parse(name), rule)


@pytest.mark.parametrize(("shapes", "kind"), [*((s, KINDS[4]) for s in SHAPES), *((SHAPES[2], k) for k in KINDS)])
def test_tiles(shapes, kind, amx):
    check(shapes, *kind, True, amx, "x86.amx")
    check(shapes, *kind, False, amx, "x86.amx")


def test_a_tensor_times_its_own_transpose_is_one_of_bytes():
    """Both factors are one tensor, of two zero points."""
    (a, _), body = factors(((9, 9), (9, 9)), ("int8", "int8")), product((3, -4), False)
    (out,) = run(lambda e, x: body(e, x, x), a, target=target.parse("x86-64-v2"), rule="cpu.contract")
    wide = a.astype(np.int64)
    np.testing.assert_array_equal(out, (wide - 3) @ (wide + 4))


@pytest.mark.parametrize("name", ["x86-vnni", "x86-avx2", "x86-amx", "arm-dotprod", "cuda-sm80"])
@pytest.mark.parametrize("first", [True, False])
def test_a_factor_that_is_known_is_no_factor_of_bytes_that_are_computed(name, first):
    known = ops.const(np.arange(64, dtype=np.uint8).reshape(8, 8), "uint8")
    body = product((3, 5), True)
    module = packed(lambda e, x: body(e, known, x) if first else body(e, x, known), [((8, 8), "uint8")])
    layer = layer_of(module)
    assert Factors.of(layer, layer.anchor_call) is None
    schedules.lower_to_tir(module, target.parse(name))


def test_sums_that_may_leave_32_bits_keep_16_bit_factors():
    def why(length, zeros):
        layer = layer_of(packed(product(zeros, False), [((1, 2, length), "uint8"), ((1, length, 2), "uint8")]))
        found = Factors.of(layer, layer.anchor_call)
        assert found is not None and found.types == ("uint8", "uint8")
        return found.turned("uint8", "int8").too_long()

    assert why(65793, (0, 128)) is None and why(65794, (0, 128)) == "sums of bytes that may leave 32 bits."
    assert why(10000, (0, 128)) is None and why(30000, (255, 255)) is not None
