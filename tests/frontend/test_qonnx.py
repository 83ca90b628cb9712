"""QONNX operators against integers computed here from the format's definition, in exact rationals."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.compiler.inspection import inspect
from hawq_tvm.core import ops
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx import import_onnx, known_operators
from hawq_tvm.verify.reference import evaluate

from ..models import Graph, float_output
from .onnx_models import call

GENERAL = "qonnx.custom_op.general"
DOMAINS = ("onnx.brevitas", GENERAL, "finn.custom_op.general", "hawq2qonnx")
MODES = ("ROUND", "HALF_EVEN", "CEIL", "FLOOR", "UP", "DOWN", "ROUND_TO_ZERO", "HALF_UP", "HALF_DOWN")
F = np.float32


class QonnxGraph(Graph):
    """A Graph with QONNX's operators."""

    domain = GENERAL

    def real(self, values: Any) -> str:
        return self.constant(np.asarray(values, F), TensorProto.FLOAT)

    def quant(self, x: str, scale: Any, zero: Any = 0.0, bits: Any = 8, op: str = "Quant", **attrs: Any) -> str:
        return self.node(op, [x, self.real(scale), self.real(zero), self.real(bits)], self.domain, **attrs)

    def trunc(self, x: str, scale: Any, zero: Any, in_bits: int, out: Sequence[Any], **attrs: Any) -> str:
        return self.node(
            "Trunc",
            [x, self.real(scale), self.real(zero), self.real(in_bits), *(self.real(o) for o in out)],
            self.domain,
            **attrs,
        )


def rounded(value: Fraction, mode: str) -> int:
    """A rational rounded as QONNX names it: UP and HALF_UP are symmetric."""
    sign, size = (1, value) if value >= 0 else (-1, -value)
    down, part = size.__floor__(), size - size.__floor__()
    half = Fraction(1, 2)
    return {
        "ROUND": round(value),
        "HALF_EVEN": round(value),
        "CEIL": value.__ceil__(),
        "FLOOR": value.__floor__(),
        "UP": sign * (down + (part > 0)),
        "DOWN": sign * down,
        "ROUND_TO_ZERO": sign * down,
        "HALF_UP": sign * (down + (part >= half)),
        "HALF_DOWN": sign * (down + (part > half)),
    }[mode]


def limits(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    top = 2 ** (bits - signed) - 1
    return (-top - (not narrow), top) if signed else (0, top - narrow)


def quantized(x: Any, scale: Any, zero: int, bits: int, signed: int, narrow: int, mode: str) -> np.ndarray:
    """The integers of a Quant."""
    low, high = limits(bits, bool(signed), bool(narrow))
    x, scale = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(scale, np.float64))
    steps = [Fraction(float(v)) / Fraction(float(s)) + zero for v, s in zip(x.ravel(), scale.ravel(), strict=True)]
    return np.array([rounded(min(max(v, Fraction(low)), Fraction(high)), mode) for v in steps], np.int64).reshape(
        x.shape
    )


def outputs(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the compiled library gives; the imported and the lowered module must give the same by the reference."""
    module = import_onnx(model)
    package = ht.compile(model)
    assert package.prove().ok
    package.verify(feed).raise_if_mismatch()
    got = package.run(feed)
    for other in (evaluate(module, feed), evaluate(pipeline.to_packed(module), feed)):
        for name, value in other.items():
            np.testing.assert_array_equal(value, got[name])
    return got


SETTINGS = [
    (8, 1, 0, 0),
    (8, 1, 1, 0),
    (8, 0, 0, 0),
    (8, 0, 1, 128),
    (4, 1, 1, 0),
    (4, 0, 0, 7),
    (3, 1, 0, -1),
    (7, 0, 0, 0),
    (5, 1, 0, 3),
    (1, 0, 0, 0),
    (9, 0, 1, 200),
    (11, 1, 0, -700),
    (16, 1, 1, 0),
    (16, 0, 0, 0),
]


def many_quants(
    modes: Sequence[str], settings: Sequence[tuple[int, int, int, int]]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Quants of an input and of integers, what to feed them and what they give: every integer, ties of both signs."""
    x = (np.arange(-128, 128) * 0.25).astype(F)
    g = QonnxGraph()
    inner = g.quant(g.input("x", [256]), 0.25)
    expected = {}
    for k, (mode, (bits, signed, narrow, zero)) in enumerate(product(modes, settings)):
        scale = 0.5 if k % 2 else 0.75  # no dyadic number meets the ties of a ratio like 1/6
        attrs = {"signed": signed, "narrow": narrow, "rounding_mode": mode.lower() if k % 3 == 0 else mode}
        for source in ("x", inner):
            y = g.quant(source, scale, zero, bits, op="IntQuant" if k % 2 else "Quant", **attrs)
            expected[y] = ((quantized(x, scale, zero, bits, signed, narrow, mode) - zero) * scale).astype(F)
    return g.model([float_output(y) for y in expected]), {"x": x}, expected


@pytest.mark.parametrize("mode", MODES)
def test_quant_of_an_input_and_of_integers(mode: str) -> None:
    model, feed, expected = many_quants([mode], SETTINGS)
    module = import_onnx(model)
    for got in (evaluate(module, feed), evaluate(pipeline.to_packed(module), feed)):
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value)


@pytest.mark.slow
def test_every_rounding_in_the_library() -> None:
    model, feed, expected = many_quants(MODES, SETTINGS[5:7])
    got = outputs(model, feed)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_a_quant_lives_in_the_next_storage_type_with_its_true_range() -> None:
    g = QonnxGraph()
    g.quant(g.input("x", [4]), 0.5, 0, 5, signed=1, narrow=1)
    quantize = call(import_onnx(g.model([float_output("quant_0")])), "quantize")
    assert (int(quantize.attrs["qmin"]), int(quantize.attrs["qmax"]), str(quantize.attrs["out_dtype"])) == (
        -15,
        15,
        "int8",
    )
    assert str(quantize.attrs["form"]) == "divide"


def convolution(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A 3x3 convolution of integers, padded with 0."""
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]).astype(np.int64)
    height, width = x.shape[2:]
    return sum(
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + height, j : j + width], w[:, :, i, j])
        for i in range(3)
        for j in range(3)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "bits, signed, narrow",
    [(8, 1, 1), (4, 1, 0), (3, 1, 1), (6, 0, 0), (2, 1, 0), (18, 1, 0), (23, 1, 1), (32, 1, 0), (32, 0, 0)],
)
def test_constants_are_quantized_exactly(mode: str, bits: int, signed: int, narrow: int) -> None:
    g = QonnxGraph(3)
    values = np.concatenate([g.rng.integers(-600, 600, (5, 40)), [[-(2**30), 2**30] * 20]] * 2, axis=0) * F(0.125)
    scales = (2.0 ** g.rng.integers(-3, 3, (12, 1))).astype(F)
    zero = 3 if bits == 6 else 0  # float32 holds the sum of a larger quotient and a zero point no longer
    g.quant(g.real(values), scales, zero, bits, signed=signed, narrow=narrow, rounding_mode=mode)
    back = call(import_onnx(g.model([float_output("quant_0")])), "dequantize")
    np.testing.assert_array_equal(
        ops.const_value(back.args[0]), quantized(values, scales, zero, bits, signed, narrow, mode)
    )
    np.testing.assert_array_equal(ops.const_value(back.args[1]), scales)


@pytest.mark.slow
@pytest.mark.parametrize("bits, bias_bits", [(4, 18), (24, 32)])
def test_a_convolution_of_odd_widths(bits: int, bias_bits: int) -> None:
    """Weights of up to 32 bits are constants too: a convolution of them is exact, if slow."""
    g = QonnxGraph(3)
    w = (g.rng.integers(-600, 600, (5, 3, 3, 3)) * 0.125).astype(F)
    scales = (2.0 ** g.rng.integers(-3, 3, (5, 1, 1, 1))).astype(F)
    bias, bias_scale = (g.rng.integers(-(2**20), 2**20, 5) * 2.0**-7).astype(F), (scales.reshape(-1) * 0.5).astype(F)
    x = (g.rng.integers(-12, 12, (1, 3, 6, 5)) * 0.25).astype(F)
    data = g.quant(g.input("x", x.shape), 0.5, 0, 4)
    y = g.conv(data, g.quant(g.real(w), scales, 0, bits), g.quant(g.real(bias), bias_scale, 0, bias_bits), pads=[1] * 4)
    got = outputs(g.model([float_output(y)]), {"x": x})[y]
    qx, qw = quantized(x, 0.5, 0, 4, 1, 0, "ROUND"), quantized(w, scales, 0, bits, 1, 0, "ROUND")
    qb = quantized(bias, bias_scale, 0, bias_bits, 1, 0, "ROUND")
    wanted = (convolution(qx, qw) + qb.reshape(1, -1, 1, 1)) * (0.5 * scales.reshape(1, -1, 1, 1).astype(np.float64))
    np.testing.assert_array_equal(got, wanted.astype(F))


@pytest.mark.parametrize("data_bits, bits, signed", [(9, 9, 1), (12, 3, 0), (16, 16, 1), (16, 8, 0)])
def test_data_of_more_than_8_bits(data_bits: int, bits: int, signed: int) -> None:
    """Quantized again to the same width after a ReLU; sums of two 16-bit tensors leave 32 bits."""
    g = QonnxGraph(7)
    w = g.rng.normal(size=(4, 5, 3, 3)).astype(F)
    x = (g.rng.normal(size=(1, 5, 6, 5)) * 4).astype(F)
    step, fine = 2.0 ** (4 - data_bits), 2.0 ** (3 - bits)
    data = g.quant(g.input("x", x.shape), step, 0, data_bits, signed=signed)
    real = g.node("Relu", [g.conv(data, g.quant(g.real(w), fine, 0, bits, narrow=1), pads=[1] * 4)])
    y = g.quant(real, 16 * step, 0, data_bits, signed=0)
    got = outputs(g.model([float_output(y)]), {"x": x})[y]
    qx = quantized(x, step, 0, data_bits, signed, 0, "ROUND")
    sums = np.maximum(convolution(qx, quantized(w, fine, 0, bits, 1, 1, "ROUND")), 0) * (step * fine)
    wanted = quantized(sums, 16 * step, 0, data_bits, 0, 0, "ROUND") * (16 * step)
    np.testing.assert_array_equal(got, wanted.astype(F))


@pytest.mark.slow
def test_bipolar_weights_and_one_signed_bit() -> None:
    g = QonnxGraph(5)
    w = g.rng.integers(-2, 3, (4, 3, 3, 3)).astype(F)
    w.flat[:2] = 0.0, -0.0
    x = (g.rng.integers(-12, 12, (2, 3, 5, 6)) * 0.25).astype(F)
    data = g.quant(g.input("x", x.shape), 0.5, 0, 8)
    made = [g.node("BipolarQuant", [g.real(w), g.real(0.75)], GENERAL), g.quant(g.real(w), 0.75, 0, 1)]
    names = [g.conv(data, m, pads=[1] * 4) for m in made]
    got = outputs(g.model([float_output(n) for n in names]), {"x": x})
    wanted = convolution(quantized(x, 0.5, 0, 8, 1, 0, "ROUND"), np.where(w >= 0, 1, -1)) * 0.375
    for name in names:
        np.testing.assert_array_equal(got[name], wanted.astype(F))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.0625, 3.0])
def test_bipolar_activations(scale: float) -> None:
    """Of an input, down to the least float, and of a convolution with a float bias that is no multiple of its scale."""
    g = QonnxGraph(6)
    x = g.rng.integers(-8, 8, (1, 2, 9, 7)).astype(F)
    x.flat[:6] = 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38
    sign = g.node("BipolarQuant", [g.input("x", x.shape), g.real(scale)], GENERAL)
    w = (g.rng.integers(-7, 8, (3, 2, 3, 3)) * 0.25).astype(F)
    bias = np.array([0.3, -0.3, 0.0], F)
    conv = g.conv(g.quant("x", 1.0, 0, 4), g.quant(g.real(w), 0.25, 0, 4), g.real(bias), pads=[1] * 4)
    inner = g.node("BipolarQuant", [conv, g.real(scale)], GENERAL)
    got = outputs(g.model([float_output(sign), float_output(inner)]), {"x": x})
    np.testing.assert_array_equal(got[sign], np.where(x >= 0, F(scale), -F(scale)))
    total = convolution(
        quantized(x, 1.0, 0, 4, 1, 0, "ROUND"), quantized(w, 0.25, 0, 4, 1, 0, "ROUND")
    ) * 0.25 + bias.reshape(1, -1, 1, 1).astype(np.float64)
    np.testing.assert_array_equal(got[inner], np.where(total >= 0, F(scale), -F(scale)))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("zero", [0, 16])
def test_trunc_of_a_pool(version: int, zero: int) -> None:
    """Brevitas's pool: the sum of 16 integers of 4 bits is an integer of 8, of which Trunc keeps some."""
    g = QonnxGraph(7)
    x = (g.rng.integers(-8, 24, (2, 3, 8, 4)) * 0.5).astype(F)
    pooled = g.node(
        "AveragePool", [g.quant(g.input("x", x.shape), 0.5, 0, 4, signed=0)], kernel_shape=[4, 4], strides=[4, 4]
    )
    scale, out, attrs = 0.5 / 16, [5] if version == 1 else [0.5 / 2, 5], {} if version == 1 else {"signed": 0}
    made = {
        mode: g.trunc(pooled, scale, zero, 8, out, **({"rounding_mode": mode} if mode else {}), **attrs)
        for mode in ["", *MODES]
    }
    got = outputs(g.model([float_output(y) for y in made.values()]), {"x": x})
    sums = quantized(x, 0.5, 0, 4, 0, 0, "ROUND").reshape(2, 3, 2, 4, 1, 4).sum(axis=(3, 5)) + zero
    for mode, y in made.items():
        kept = np.array([rounded(Fraction(int(v), 8), mode or "FLOOR") for v in sums.ravel()]).reshape(sums.shape)
        wanted = (kept - zero) * scale if version == 1 else (np.clip(kept, 0, 31) - zero // 8) * 0.25
        np.testing.assert_array_equal(got[y], wanted.astype(F))


@pytest.mark.slow
def test_trunc_of_negative_sums_feeds_a_convolution() -> None:
    """Version 1 does not say whether its result has a sign; what follows computes with either."""
    g = QonnxGraph(8)
    x = (g.rng.integers(-10, 10, (1, 2, 6, 6)) * 0.5).astype(F)
    w = g.rng.integers(-7, 8, (3, 2, 3, 3)).astype(F)
    t = g.trunc(g.quant(g.input("x", x.shape), 0.5, 0, 6), 0.5, 0, 6, [4])
    y = g.conv(t, g.quant(g.real(w), 1.0, 0, 4), pads=[1] * 4)
    got = outputs(g.model([float_output(y)]), {"x": x})[y]
    kept = quantized(x, 0.5, 0, 6, 1, 0, "ROUND") >> 2
    np.testing.assert_array_equal(got, (convolution(kept, w.astype(np.int64)) * 0.5).astype(F))


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("listed", [True, False])
def test_every_domain_listed_or_not(domain: str, listed: bool) -> None:
    g = QonnxGraph()
    g.domain = domain
    y = g.trunc(g.node("BipolarQuant", [g.quant(g.input("x", [4]), 0.5), g.real(0.5)], domain), 0.5, 0, 2, [1])
    model = g.model([float_output(y)])
    if not listed:
        del model.opset_import[1:]
    got = evaluate(import_onnx(model), {"x": np.array([-3, -0.1, 0.2, 9], F)})[y]
    np.testing.assert_array_equal(got, np.array([-0.5, 0, 0, 0], F))
    assert {"Quant", "IntQuant", "BipolarQuant", "Trunc"} == set(known_operators()[domain])


def test_inspect_says_what_is_quantized() -> None:
    g = QonnxGraph(9)
    x = g.quant(g.input("x", [1, 3, 5, 5]), 0.5, 0, 7, signed=0)
    bias = g.quant(g.real(np.ones(4)), 0.125, 0, 18)
    y = g.quant(
        g.conv(x, g.quant(g.real(g.rng.normal(size=(4, 3, 3, 3))), np.full((4, 1, 1, 1), 0.25), 0, 4), bias), 0.5, 3
    )
    report = inspect(g.model([float_output(g.node("BipolarQuant", [y, g.real(1.0)], GENERAL))]))
    assert report.compilable
    kept = [(q["role"], q["type"], q["bits"], q["granularity"], q["symmetric"]) for q in report.model["quantized"]]
    assert kept == [
        ("output", "uint7", 7, "per tensor", True),
        ("bias", "int18", 18, "per tensor", True),
        ("weight", "int4", 4, "per channel (4)", True),
        ("output", "int8", 8, "per tensor", False),
        ("output", "bipolar", 1, "per tensor", True),
    ]


X = ("x", [1, 2, 4, 4])
REFUSED: dict[str, tuple[Any, str]] = {
    "17 bits": (lambda g: g.quant(g.input(*X), 0.5, 0, 17), r"bit width that is not supported.*1 to 16.*17.*biases"),
    "33 bits": (lambda g: g.quant(g.real([1.0]), 0.5, 0, 33), r"1 to 32"),
    "0 bits": (lambda g: g.quant(g.input(*X), 0.5, 0, 0), r"1 to 16.*found 0"),
    "bits with a fraction": (lambda g: g.quant(g.input(*X), 0.5, 0, 4.5), r"whole number.*4.5"),
    "bits that are not a number": (lambda g: g.quant(g.input(*X), 0.5, 0, np.nan), r"whole number.*nan"),
    "bits per channel": (lambda g: g.quant(g.input(*X), 0.5, 0, [[[4]], [[8]]]), r"not one number"),
    "a rounding nobody knows": (
        lambda g: g.quant(g.input(*X), 0.5, rounding_mode="STOCHASTIC"),
        r"unknown rounding_mode.*HALF_DOWN.*STOCHASTIC",
    ),
    "a zero point with a fraction": (lambda g: g.quant(g.input(*X), 0.5, 2.5), r"not an integer.*2\.5"),
    "a zero point out of range": (lambda g: g.quant(g.input(*X), 0.5, 16, 4, signed=0), r"out of range.*0 to 15.*16"),
    "a zero point outside a narrow range": (
        lambda g: g.quant(g.input(*X), 0.5, -8, 4, narrow=1),
        r"out of range.*-7 to 7",
    ),
    "a scale that does not fit": (
        lambda g: g.quant(g.input(*X), [0.5, 0.5, 0.5]),
        r"scale 'c0' that does not fit.*\[1, 2, 4, 4\].*\[3\]",
    ),
    "a scale that enlarges": (lambda g: g.quant(g.input(*X), np.full((3, 1, 1, 1), 0.5)), r"does not fit"),
    "a negative scale": (lambda g: g.quant(g.input(*X), -0.5), r"not a positive finite number"),
    "a scale of zero": (
        lambda g: g.node("BipolarQuant", [g.input(*X), g.real(0.0)], GENERAL),
        r"not a positive finite number",
    ),
    "a scale at run time": (
        lambda g: g.node("Quant", [g.input(*X), g.input("s", []), g.real(0), g.real(8)], GENERAL),
        r"scale 's' that is a graph input",
    ),
    "a computed scale": (
        lambda g: g.node("Quant", [g.input(*X), g.node("ReduceMax", ["x"], keepdims=0), g.real(0), g.real(8)], GENERAL),
        r"computed at run time",
    ),
    "a flag that is neither": (lambda g: g.quant(g.input(*X), 0.5, signed=2), r"neither 0 nor 1"),
    "one signed bit with a zero point": (lambda g: g.quant(g.input(*X), 0.5, 1, 1), r"one signed bit and a zero point"),
    "too few inputs": (
        lambda g: g.node("Quant", [g.input(*X), g.real(0.5), g.real(0)], GENERAL),
        r"wrong number of inputs.*4",
    ),
    "integers": (
        lambda g: g.node("BipolarQuant", [g.input("x", [4], TensorProto.INT8), g.real(0.5)], GENERAL),
        r"does not take this element type.*int8",
    ),
    "a Trunc that adds bits": (
        lambda g: g.trunc(g.quant(g.input(*X), 0.5), 0.5, 0, 4, [8]),
        r"more bits than it takes",
    ),
    "a Trunc to 17 bits": (
        lambda g: g.trunc(g.quant(g.input(*X), 0.5), 0.5, 0, 20, [17]),
        r"output bit width.*1 to 16",
    ),
    "a Trunc whose zero point is cut": (
        lambda g: g.trunc(g.quant(g.input(*X), 0.5, 3), 0.5, 3, 8, [4]),
        r"does not keep whole.*multiple of 16.*3",
    ),
    "FloatQuant": (
        lambda g: g.node("FloatQuant", [g.input(*X)], GENERAL),
        r"FloatQuant is not supported.*integer quantizers",
    ),
    "MultiThreshold": (lambda g: g.node("MultiThreshold", [g.input(*X)], GENERAL), r"MultiThreshold is not supported"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_layer_and_say_why(case: str) -> None:
    build, words = REFUSED[case]
    g = QonnxGraph()
    y = build(g)
    with pytest.raises(ModelError, match=words) as error:
        import_onnx(g.model([float_output(y)]))
    assert error.value.where == y


def test_zero_points_per_channel_of_an_activation_are_refused() -> None:
    g = QonnxGraph()
    inner = g.quant(g.input("x", [1, 2, 4, 4]), 0.5)
    y = g.quant(inner, 0.25, np.reshape([0, 3], (1, 2, 1, 1)))
    with pytest.raises(ModelError, match="zero points differ between channels"):
        ht.compile(g.model([float_output(y)]))


def test_the_dequantize_declares_the_range() -> None:
    g = QonnxGraph()
    g.quant(g.input("x", [4]), 0.5, 2, 6, signed=0, narrow=1)
    module = import_onnx(g.model([float_output("quant_0")]))
    back = call(module, "dequantize")
    assert (int(back.attrs["qmin"]), int(back.attrs["qmax"]), int(ops.const_value(back.args[2]))) == (0, 62, 2)
    assert str(call(module, "quantize").attrs["form"]) == "affine"
