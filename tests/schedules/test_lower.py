"""lower_to_tir and build on whole modules: calls, constants, the float tail, targets, rules and tiles by layer."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import tvm
from tvm import relax

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.errors import UsageError
from schedules.cpu.cpu_depthwise import DepthwiseTile, tiles_of
from schedules.cpu.vector_unit import VectorUnit

from .one_layer import TARGET, lower, packed, run

R = relax.op
rng = np.random.default_rng(5)
U8 = arith.QType.of("uint8")


def function(builder: relax.BlockBuilder, name: str, layer: str, body, *shapes) -> None:
    params = [relax.Var(f"p{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(shapes)]
    with builder.function(name, params, attrs={"Primitive": 1, "hawq.layer": layer}, private=True):
        with builder.dataflow():
            result = builder.emit_output(body(lambda e: builder.emit(e), *params))
        builder.emit_func_output(result)


WEIGHT = rng.integers(-128, 128, (16, 5)).astype(np.int8)


def two_layers_and_a_float_tail() -> tvm.IRModule:
    """quantize, one product used twice, dequantize, and a float softmax that the user allowed."""
    builder = relax.BlockBuilder()
    function(builder, "q", "/in/Quantize", lambda e, x: ops.quantize(x, 0.1, 3, qtype=U8), ((2, 16), "float32"))
    function(
        builder,
        "mm",
        "/fc/MatMul",
        lambda e, x: R.matmul(x, relax.const(WEIGHT), out_dtype="int32"),
        ((2, 16), "uint8"),
    )
    function(
        builder,
        "dq",
        "/out/Dequantize",
        lambda e, x, y: ops.dequantize(e(R.add(x, y)), 1e-5, 0, qmin=0, qmax=1),
        ((2, 5), "int32"),
        ((2, 5), "int32"),
    )
    module = builder.get()
    builder = relax.BlockBuilder(module)
    x = relax.Var("input", relax.TensorType((2, 16), "float32"))

    def call(name: str, *args: relax.Expr, layer: str) -> relax.Expr:
        return builder.emit(relax.Call(module.get_global_var(name), list(args)), name_hint=layer)

    attrs = {"hawq.output_names": ["p", "acc"], "hawq.float_tail": ["/out/Softmax"]}
    with builder.function("main", [x], attrs=attrs):
        with builder.dataflow():
            q = call("q", x, layer="/in/Quantize")
            a, b = call("mm", q, layer="/fc/MatMul"), call("mm", q, layer="/fc/MatMul_1")
            d = call("dq", a, b, layer="/out/Dequantize")
            p = builder.emit(R.nn.softmax(d, axis=-1), name_hint="/out/Softmax")
            result = builder.emit_output(relax.Tuple([p, a]))
        builder.emit_func_output(result)
    return builder.get()


def test_a_module_keeps_its_calls_names_and_attributes_and_runs():
    module = two_layers_and_a_float_tail()
    stages.verify(module, stages.Stage.PACKED)
    lowered, count = schedules.lower_to_tir(module, TARGET)
    assert count == 3
    before, after = (list(stages.bindings(m["main"])) for m in (module, lowered))
    assert [b.var.name for b in before] == [b.var.name for b in after]
    assert [str(n) for n in lowered["main"].attrs["hawq.output_names"]] == ["p", "acc"]
    assert [r["layer"] for r in schedules.report(lowered)] == ["/out/Dequantize", "/fc/MatMul", "/in/Quantize"]
    x = rng.normal(0, 5, (2, 16)).astype(np.float32)
    vm = relax.VirtualMachine(build.build(lowered, TARGET), tvm.cpu())
    p, acc = (r.numpy() for r in vm["main"](tvm.runtime.tensor(x)))
    q = arith.quantize(x, np.float32(0.1), np.array(3), qmin=0, qmax=255, storage="uint8")
    expected = q.astype(np.int32) @ WEIGHT.astype(np.int32)
    np.testing.assert_array_equal(acc, expected, strict=True)
    real = 2e-5 * expected
    e = np.exp(real - real.max(axis=1, keepdims=True))
    np.testing.assert_allclose(p, e / e.sum(axis=1, keepdims=True), rtol=1e-5)  # float softmax, outside our region


def test_the_module_given_is_not_changed():
    module = two_layers_and_a_float_tail()
    before = module.script()
    schedules.lower_to_tir(module, TARGET)
    assert module.script() == before


def test_a_target_without_rules_is_refused():
    other = tvm.target.Target({"kind": "opencl"})
    with pytest.raises(UsageError, match=r"no kernels for this kind of target.*found opencl"):
        schedules.lower_to_tir(two_layers_and_a_float_tail(), other)


def test_scalars_are_immediates_and_arrays_are_arguments():
    def body(emit, x):
        return ops.requantize([x], [np.arange(1, 18)], 7, 20, qtype=U8, zero_point=3, rounding="half_even")

    kernel = lower(packed(body, [((3, 17), "int32")]))["fused"]
    assert len(kernel.params) == 3  # the data, the multipliers, the result


def test_a_constant_left_matrix():
    left, x = rng.integers(-128, 128, (3, 7, 17)).astype(np.int8), rng.integers(0, 256, (3, 17, 33)).astype(np.uint8)
    (out,) = run(lambda e, v: R.matmul(relax.const(left), v, out_dtype="int32"), x, rule="cpu.contract")
    np.testing.assert_array_equal(out, left.astype(np.int32) @ x.astype(np.int32), strict=True)


CASES = {
    "cpu.depthwise": (
        lambda e, x: R.nn.conv2d(
            x,
            relax.const(np.ones((3, 3, 1, 16), np.int8)),
            groups=16,
            data_layout="NHWC",
            kernel_layout="HWIO",
            out_dtype="int32",
        ),
        [((1, 5, 5, 16), "uint8")],
    ),
    "cpu.window": (lambda e, x: R.nn.max_pool2d(x, (2, 2), (2, 2), 0, layout="NHWC"), [((1, 4, 4, 16), "int8")]),
    "cpu.elementwise": (lambda e, x, y: R.concat([x, y], axis=1), [((1, 4), "int8"), ((1, 8), "int8")]),
    "cpu.rows": (
        lambda e, x: ops.softmax(
            x,
            arith.softmax_table(Fraction(1, 20), 256),
            axis=1,
            multiplier=2**30,
            shift=22,
            qtype=arith.QType.of("uint8"),
            zero_point=0,
        ),
        [((3, 40), "uint8")],
    ),
    "cpu.generic": (lambda e, x: R.argmax(x, axis=1), [((1, 40), "int8")]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_kind_of_layer_finds_its_rule(name):
    (entry,) = schedules.report(lower(packed(*CASES[name])))
    assert entry["rule"] == name
    earlier = entry["refused"]
    assert earlier == "" or earlier.endswith(".")


@pytest.mark.parametrize(
    ("body", "shape", "why"),
    [
        (
            lambda e, x: R.nn.max_pool2d(x, (2, 2), (2, 2), 0, layout="NCHW"),
            (1, 16, 4, 4),
            "the layout is NCHW, not NHWC.",
        ),
        (
            lambda e, x: R.nn.max_pool2d(x, (2, 2), (2, 2), 0, layout="NHWC"),
            (1, 4, 4, 3),
            "3 channels do not fill vectors.",
        ),
        (lambda e, x: R.sum(e(R.astype(x, "int32")), axis=[1]), (3, 16), "the last axis is reduced."),
        (lambda e, x: R.max(x, axis=[0]), (1, 16), "nothing is reduced."),
    ],
)
def test_windows_refuse_with_a_sentence(body, shape, why):
    (entry,) = schedules.report(lower(packed(body, [(shape, "int8")])))
    assert entry["rule"] == "cpu.generic" and f"cpu.window: {why}" in entry["refused"]


@pytest.mark.parametrize("bad", [(0, 4), (2, 0)])
def test_depthwise_tiles_check_themselves(bad):
    with pytest.raises(ValueError, match="not a tile"):
        DepthwiseTile(*bad, "int16")


def test_depthwise_products_are_16_bits_only_where_they_fit():
    narrow, wide = (
        schedules.report(
            lower(
                packed(
                    lambda e, x: R.nn.conv2d(
                        x,
                        relax.const(np.ones((3, 3, 1, 16), np.int8)),
                        groups=16,
                        data_layout="NHWC",
                        kernel_layout="HWIO",
                        out_dtype="int32",
                    ),
                    [((1, 5, 5, 16), dtype)],
                )
            )
        )[0]["tile"]
        for dtype in ("uint8", "int16")
    )
    assert "int16 products" in narrow and "int32 products" in wide
    assert tiles_of(7, 16, VectorUnit(16, 32, True), "int16")[0].pixels == 7
