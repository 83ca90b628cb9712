"""Weights of 2, 3, 4 and 6 bits: kernels open what they store, on every unit, at awkward shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.targets import target as targets
from schedules import narrow, rules
from schedules.cpu import amx_forms
from schedules.cpu.cpu_contract import Contract, VectorUnit
from schedules.cpu.generic import Generic
from schedules.cpu.x86_vnni import Vnni

from ..arm.on_arm import TARGETS, check, kernel_of, needs_emulator
from .one_layer import layer_of, packed, run
from .test_cpu_contract import CONVS, DOT, HOST, JOINED, Conv, accumulate, convolve, full

rng = np.random.default_rng(33)
WIDTHS = tuple(narrow.PLANES)
OTHERS = (2, 3, 6)  # 4 bits have tests of their own with every rule
SHAPES = [CONVS[i] for i in (0, 1, 2, 5, 8, 9, 10, 16)] + [*JOINED[:3], Conv(1, 6, 7, 24, 40, (1, 1))]
EVEN = Conv(1, 7, 9, 64, 48, (3, 3), pad=(1, 1, 1, 1))


def weights(c: Conv, width: int, signed: bool = True) -> np.ndarray:
    """Values of a width; half of them are its ends."""
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    shape = (*c.k, c.ci // c.groups, c.co)
    some = rng.integers(low, high, shape, endpoint=True)
    ends = np.where(rng.random(shape) < 0.5, rng.choice([low, high], shape), some)
    return ends.astype("int8" if signed else "uint8")


def body_of(c: Conv, w: np.ndarray, fill: int = 0):
    def body(emit, p):
        four = narrow.width_of(w) <= 4
        held = emit(ops.unpack_int4(arith.pack_int4(w), w.shape, w.dtype == np.int8)) if four else relax.const(w)
        return accumulate(emit, c, p, held, fill, "int32")

    return body


def stored(c: Conv, w: np.ndarray, data: str, target: tvm.target.Target) -> float:
    """Bits a weight in what a kernel is given."""
    kernel, _ = kernel_of(packed(body_of(c, w), [((c.n, c.h, c.w, c.ci), data)]), target)
    bits = 8 * kernel.arguments[0].nbytes / w.size
    assert kernel.arguments[0].dtype == (np.int8 if bits == 8 else np.uint8)
    return bits


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_the_values_decide_the_width(width: int, signed: bool) -> None:
    w = weights(EVEN, width, signed)
    assert narrow.width_of(w) == width
    assert narrow.width_of(w.ravel()[: narrow.SMALLEST - 1]) == 8  # too few to be worth it
    assert narrow.width_of(w.astype(np.int16)) == 8
    wider = next((n for n in WIDTHS if n > width), 8)
    w.flat[0] = 2 ** (width - signed)
    assert narrow.width_of(w) == wider


@pytest.mark.parametrize("width", WIDTHS)
def test_planes_hold_every_bit_once(width: int) -> None:
    low = -(2 ** (width - 1))
    values = rng.integers(low, -low, (3, 16, 5)).astype(np.int8)
    held, start, codes = narrow.split(values, 1, width), 0, np.zeros(values.shape, np.int64)
    assert held.shape == (3, 2 * width, 5) and held.dtype == np.uint8
    for bits in narrow.PLANES[width]:
        size = 16 * bits // 8
        fields = [held[:, start : start + size] >> bits * f & 2**bits - 1 for f in range(8 // bits)]
        codes, start = codes << bits | np.concatenate(fields, 1), start + size
    np.testing.assert_array_equal((codes ^ -low) + low, values)


@pytest.mark.parametrize("width", OTHERS)
@pytest.mark.parametrize("c", SHAPES, ids=str)
def test_on_this_cpu(c: Conv, width: int) -> None:
    dtype = ("uint8", "int8")[(SHAPES.index(c) + width) % 2]
    x, w = full(dtype, c.n, c.h, c.w, c.ci), weights(c, width)
    (out,) = run(body_of(c, w, 3), x, target=HOST, rule=DOT)
    np.testing.assert_array_equal(out, convolve(c, x, w, 3).astype(np.int32), strict=True)


@pytest.mark.parametrize("name", ["x86-vnni", "x86-avx2"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("signed", [True, False])
def test_what_x86_stores(width: int, signed: bool, name: str) -> None:
    assert stored(EVEN, weights(EVEN, width, signed), "uint8", targets.parse(name)) == width


@pytest.mark.parametrize(("width", "signed"), [(2, True), (2, False), (3, True), (6, False), (6, True)])
@pytest.mark.parametrize("unit", [VectorUnit(4, 16, True), VectorUnit(8, 16, True), VectorUnit(16, 32, True)], ids=str)
def test_every_vector_unit_computes_the_same(unit: VectorUnit, width: int, signed: bool, monkeypatch) -> None:
    monkeypatch.setattr(rules, "CPU_RULES", (Contract(unit), Generic()))
    for c in (CONVS[0], JOINED[1]):
        x, w = full("int8", c.n, c.h, c.w, c.ci), weights(c, width, signed)
        (out,) = run(body_of(c, w), x, rule="cpu.contract")
        np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


def test_steps_that_would_be_mostly_zeros_open_wider_weights() -> None:
    """With VNNI four instructions share bytes of 2 bits: runs of 24 would be padded to 32."""
    short = Conv(1, 6, 7, 24, 48, (1, 1))
    assert stored(short, weights(short, 2), "uint8", targets.parse("x86-vnni")) == 4
    assert stored(short, weights(short, 2), "uint8", targets.parse("x86-avx2")) == 2


FEW = Conv(1, 1, narrow.FEWEST_PIXELS - 1, 64, 48, (1, 1))


@pytest.mark.parametrize(("width", "bits"), [(2, 2), (3, 4), (4, 4), (6, 8)])
@pytest.mark.parametrize("signed", [True, False])
def test_weights_for_few_pixels_are_not_opened_from_several_planes(width: int, bits: int, signed: bool) -> None:
    w = weights(FEW, width, signed)
    assert stored(FEW, w, "uint8", targets.parse("x86-avx2")) == bits
    assert stored(replace(FEW, w=FEW.w + 1), w, "uint8", targets.parse("x86-avx2")) == width
    assert stored(FEW, w, "uint8", targets.parse("x86-vnni")) == (width if signed else bits)  # or in registers


@pytest.mark.parametrize(("width", "signed"), [(3, True), (3, False), (6, False), (6, True)])
def test_few_pixels(width: int, signed: bool, monkeypatch) -> None:
    monkeypatch.setattr(rules, "CPU_RULES", (Contract(VectorUnit(8, 16, True)), Generic()))
    for c in (FEW, replace(FEW, h=3, w=5, k=(3, 3))):
        x, w = full("int8", c.n, c.h, c.w, c.ci), weights(c, width, signed)
        (out,) = run(body_of(c, w), x, rule="cpu.contract")
        np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


def test_packed_constants_are_opened_once(monkeypatch) -> None:
    opened, unpack = [], arith.unpack_int4
    monkeypatch.setattr(arith, "unpack_int4", lambda *a: opened.append(a) or unpack(*a))
    for target in ("x86-vnni", "x86-avx2"):
        opened.clear()
        kernel_of(packed(body_of(EVEN, weights(EVEN, 4)), [((1, 7, 9, 64), "uint8")]), targets.parse(target))
        assert len(opened) == 1


@pytest.mark.skipif(DOT != "x86.vnni", reason="this CPU has no VNNI")
@pytest.mark.parametrize("width", OTHERS)
def test_vectors_of_256_bits(width: int, monkeypatch) -> None:
    unit = replace(VectorUnit.of(HOST), lanes=8, registers=16)
    monkeypatch.setattr(rules, "CPU_RULES", (Vnni(unit), Generic()))
    for c in (CONVS[5], CONVS[1]):
        x, w = full("uint8", c.n, c.h, c.w, c.ci), weights(c, width)
        (out,) = run(body_of(c, w), x, target=HOST, rule="x86.vnni")
        np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@pytest.mark.parametrize("width", OTHERS)
def test_tiles(width: int, amx) -> None:
    for c, dtype in ((CONVS[5], "uint8"), (Conv(3, 7, 31, 17, 65, (3, 3), pad=(1, 1, 1, 1)), "int8")):
        x, w = full(dtype, c.n, c.h, c.w, c.ci), weights(c, width)
        (out,) = run(body_of(c, w), x, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@pytest.mark.parametrize("width", [3, 6])
@pytest.mark.parametrize("signed", [True, False])
def test_tiles_of_few_pixels_and_of_parts(width: int, signed: bool, amx) -> None:
    """Tiles are those for weights that are opened where they are."""
    for c, form, opens in ((replace(FEW, w=4), "lines", width < 6), (Conv(2, 7, 7, 64, 64, (1, 1)), "parts", True)):
        x, w = full("uint8", c.n, c.h, c.w, c.ci), weights(c, width, signed)
        body = body_of(c, w)
        tiles = amx_forms.tiles_of(layer_of(packed(body, [(x.shape, "uint8")])))
        assert tiles[0].form == form and all(t.inside == "pixels" for t in tiles) is opens
        (out,) = run(body, x, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@pytest.mark.parametrize("width", OTHERS)
@pytest.mark.parametrize("signed", [True, False])
def test_sums_that_leave_32_bits_when_shifted(width: int, signed: bool) -> None:
    c = Conv(1, 1, 2, 280_000 >> width, 4, (1, 1))
    x, w = full("uint8", 1, 1, 2, c.ci), weights(c, width, signed)
    (out,) = run(body_of(c, w), x, target=HOST, rule=DOT)
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@needs_emulator
@pytest.mark.parametrize("width", OTHERS)
@pytest.mark.parametrize("target", [pytest.param(t, id=n) for n, t in TARGETS.items()])
def test_on_arm(target: tvm.target.Target, width: int) -> None:
    for c, dtype in ((CONVS[2], "uint8"), (Conv(1, 3, 9, 20, 24, (1, 1)), "int8")):
        x, w = full(dtype, c.n, c.h, c.w, c.ci), weights(c, width)
        check(body_of(c, w, 3), target, x)
    assert stored(EVEN, weights(EVEN, 2), "uint8", target) == (4 if "i8mm" in str(target) else 2)
