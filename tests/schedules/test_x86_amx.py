"""AMX kernels: whole layers in software emulation on any machine, natively where there is AMX, and what is compiled."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops, stages
from hawq_tvm.targets import target as targets
from hawq_tvm.verify.disassemble import inspect_library
from hawq_tvm.verify.reference import evaluate
from schedules.cpu import amx_forms, amx_tiles, x86_amx
from schedules.cpu.amx_tiles import AmxTile, tiles_of, vectors_of
from schedules.cpu.contraction import shape_of
from schedules.cpu.x86_amx import Amx
from schedules.layer import Layer
from schedules.spelling.tile_intrinsics import BYTES, LANES, Tiles

from .one_layer import in_two_steps, lower, packed, run
from .test_borders import CASES as BORDERED
from .test_cpu_contract import CONVS, Conv, accumulate, convolve, full

R = relax.op
rng = np.random.default_rng(12)
AMX = targets.parse("x86-amx")
AWKWARD = [
    Conv(1, 7, 7, 64, 64, (1, 1)),
    Conv(1, 6, 14, 128, 48, (1, 1)),
    Conv(1, 15, 15, 64, 32, (1, 1), (2, 2)),
    Conv(2, 7, 28, 64, 64, (3, 3)),
    Conv(3, 7, 31, 17, 65, (3, 3), pad=(1, 1, 1, 1)),
    Conv(1, 9, 1, 65, 17, (3, 1), (2, 1)),
    Conv(1, 7, 56, 65, 16, (1, 3), pad=(0, 1, 0, 1)),
    Conv(1, 9, 35, 128, 96, (3, 3), (1, 1), (2, 2), groups=2, pad=(2, 2, 2, 2)),
    Conv(1, 5, 40, 64, 33, (3, 3), (2, 2), (1, 2)),
]


TILED = [*(c for c in CONVS if (c.h, c.w) != c.k), *AWKWARD]  # those of more than one pixel


@pytest.mark.parametrize("steps", [1, 2**20])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("c", [Conv(2, 6, 14, 128, 64, (1, 1)), Conv(1, 7, 28, 64, 96, (3, 3))], ids=str)
def test_a_table_behind_a_requantize(c, wide, steps, amx, monkeypatch):
    """Of 8 bits, or of 32 with a scale for every channel behind it; under products and not."""
    monkeypatch.setattr(amx_tiles, "FEWEST_STEPS", steps)
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    eight, zero = arith.QType.of("uint8"), {"zero_point": 100, "rounding": "half_up"}
    table, scales = rng.integers(0, 256, 256).astype(np.uint8), rng.integers(2**30, 2**31, c.co)
    fine = rng.integers(-(2**21), 2**22, 256).astype(np.int32)

    def body(emit, p):
        sums = emit(accumulate(emit, c, p, relax.const(w), 3, "int32"))
        codes = emit(ops.requantize([sums], [1417339207], 0, 42, qtype=eight, **zero))
        if not wide:
            return ops.lookup(codes, table)
        return ops.requantize([emit(ops.lookup(codes, fine))], [scales], 0, 46, qtype=eight, **zero)

    (got,) = run(body, x, target=amx, rule="x86.amx")
    codes = arith.requantize([convolve(c, x, w, 3)], [1417339207], 0, 42, qmin=0, qmax=255, **zero)
    expected = table[codes]
    if wide:
        expected = arith.requantize([fine[codes].astype(np.int64)], [scales], 0, 46, qmin=0, qmax=255, **zero)
    np.testing.assert_array_equal(got, expected.astype(np.uint8), strict=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("c", TILED, ids=str)
def test_conv2d_with_residual_and_requantize(c, dtype, amx):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    acc = convolve(c, x, w, 3)
    residual, bias = full("uint8", *acc.shape), rng.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32)
    m, shift = rng.integers(2**30, 2**31, (1, 1, 1, c.co)), rng.integers(36, 46, (1, 1, 1, c.co))
    first = {"rounding": "half_up", "zero_point": 100, "qmin": 0, "qmax": 255}
    second = {"rounding": "half_even", "zero_point": 7, "qmin": 3, "qmax": 250}

    def body(emit, p, other):
        a = emit(R.add(accumulate(emit, c, p, relax.const(w), 3, "int32"), relax.const(bias)))
        y = emit(ops.requantize([a], [m], 0, shift, qtype=arith.QType.of("uint8"), zero_point=100, rounding="half_up"))
        return ops.requantize(
            [other, y],
            [2**30, 2**29 + 3],
            5,
            31,
            qtype=arith.QType(3, 250, "uint8"),
            zero_point=7,
            rounding="half_even",
        )

    y = arith.requantize([acc + bias], [m], 0, shift, **first)
    expected = arith.requantize([residual, y], [2**30, 2**29 + 3], 5, 31, **second).astype(np.uint8)
    (out,) = run(body, x, residual, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, expected, strict=True)


def test_conv2d_that_rounds_in_two_steps(amx):
    c = TILED[0]
    x, w = full("uint8", c.n, c.h, c.w, c.ci) >> 5, full("int8", *c.k, c.ci // c.groups, c.co)

    def body(emit, p):
        return in_two_steps(emit, accumulate(emit, c, p, relax.const(w), 3, "int32"))

    module = packed(body, [(x.shape, "uint8")])
    (out,) = run(body, x, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, evaluate(module, {"x0": x})["output0"], strict=True)


@pytest.mark.parametrize("weight", ["int8", "uint8"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("c", [CONVS[5], AWKWARD[0], AWKWARD[4], AWKWARD[8]], ids=str)
def test_conv2d_with_run_time_weights(c, dtype, weight, amx):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full(weight, *c.k, c.ci, c.co)
    (out,) = run(lambda e, p, k: accumulate(e, c, p, k, 1, "int32"), x, w, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, convolve(c, x, w, 1).astype(np.int32), strict=True)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("c", [CONVS[0], CONVS[2], CONVS[10], AWKWARD[0], AWKWARD[4], AWKWARD[6]], ids=str)
def test_conv2d_with_four_bit_weights_keeps_them_packed(c, dtype, signed, amx):
    x = full(dtype, c.n, c.h, c.w, c.ci)
    low, high = (-8, 8) if signed else (0, 16)
    w = rng.integers(low, high, (*c.k, c.ci // c.groups, c.co)).astype("int8" if signed else "uint8")

    def body(emit, p):
        return accumulate(emit, c, p, emit(ops.unpack_int4(arith.pack_int4(w), w.shape, signed)), 0, "int32")

    (out,) = run(body, x, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)
    kernel = lower(packed(body, [(x.shape, dtype)]), amx)["fused"].script()
    assert re.search(r'weights: T.Buffer\(\([^)]*\), "uint8"\)', kernel)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 64), (64, 16)),
        ((7, 17), (17, 65)),
        ((50, 768), (768, 64)),
        ((3, 31, 65), (65, 33)),
        ((2, 3, 12, 64), (2, 1, 64, 20)),
        ((3, 17, 100), (3, 100, 17)),
    ],
    ids=str,
)
@pytest.mark.parametrize("constant", [True, False])
def test_matmul(a, b, constant, amx):
    x, w = full("int8", *a), full("int8", *b)
    expected = (x.astype(np.int64) @ w.astype(np.int64)).astype(np.int32)
    if constant:
        (out,) = run(lambda e, p: R.matmul(p, relax.const(w), out_dtype="int32"), x, target=amx, rule="x86.amx")
    else:
        (out,) = run(lambda e, p, q: R.matmul(p, q, out_dtype="int32"), x, w, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, expected, strict=True)


def layer(c: Conv, dtype: str = "uint8") -> tvm.IRModule:
    """A convolution of a parameter as it is, rounded to 8 bits."""
    w = full("int8", *c.k, c.ci // c.groups, c.co)
    return packed(
        lambda e, p: ops.requantize(
            [accumulate(e, c, p, relax.const(w), 0, "int32")],
            [2**30],
            0,
            40,
            qtype=arith.QType.of("int8"),
            zero_point=0,
            rounding="half_up",
        ),
        [((c.n, c.h, c.w, c.ci), dtype)],
    )


def test_whole_pixels_are_loaded_where_they_lie():
    kernel = lower(layer(AWKWARD[0]), AMX)["fused"].script()
    assert "rows = T." not in kernel and "tileloadd64" in kernel


@pytest.mark.parametrize("c", TILED, ids=str)
def test_no_tile_reaches_beyond_its_row(c):
    """The address of every first and last byte, by the formula of the stage that loads data."""
    (binding,) = (b for b in Layer.of(*private(layer(c))).bindings if ops.op_name(b.value) == "relax.nn.conv2d")
    vectors = vectors_of(binding.value)
    s = shape_of(binding.value, LANES * vectors)
    for tile in tiles_of(s, vectors, pairs_rows=True):
        pixels, length = x86_amx._rounded_up(s, tile)
        assert pixels >= s.pixels and pixels % (tile.columns * tile.pixels) == 0 and tile.columns * tile.lines <= 2
        starts = [int(s.start(b, tile.channels)) for b in range(-(-s.channels // tile.channels))]
        ends = [
            (pixels - 1) * s.step + (s.taps[1] - 1) * s.hop + start + -(-s.run // BYTES) * BYTES for start in starts
        ]
        assert max(ends) <= length and min(starts) >= 0


@pytest.mark.parametrize(
    ("c", "fill"),
    [
        (Conv(1, 12, 33, 16, 48, pad=(1, 1, 1, 1)), 1),
        (Conv(2, 7, 7, 64, 40, (1, 1)), 1),
        (Conv(1, 12, 33, 16, 48, pad=(1, 1, 1, 1)), 0),
        *((BORDERED[k], 0) for k in (0, 2, 4, 8, 9)),
    ],
    ids=str,
)
def test_every_tile_of_the_space_computes_the_same(c, fill, amx, monkeypatch):
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    own = amx_forms.tiles_of
    for k in range(len(Amx().tiles(Layer.of(*private(layer(c))), amx))):
        monkeypatch.setattr(amx_forms, "tiles_of", lambda given, k=k: own(given)[k:])
        (out,) = run(lambda e, p: accumulate(e, c, p, relax.const(w), fill, "int32"), x, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, convolve(c, x, w, fill).astype(np.int32), strict=True)


def private(module: tvm.IRModule) -> tuple[tvm.ir.GlobalVar, relax.Function]:
    """The only layer of a module."""
    ((name, func),) = stages.private_functions(module).items()
    return module.get_global_var(name), func


@pytest.mark.parametrize(
    ("c", "why"),
    [
        (Conv(1, 32, 32, 4, 64, (5, 5), (2, 2), pad=(2, 2, 2, 2)), "runs of 20 elements, which tiles would pad to 64."),
        (Conv(1, 9, 9, 64, 12, (1, 1)), "12 output channels, of the 16 of a tile."),
        (Conv(1, 1, 1, 512, 1000, (1, 1)), "a single pixel, of the 16 of a tile."),
        (Conv(1, 9, 9, 64, 128, (3, 3), groups=4), "runs of 16 elements, which tiles would pad to 64."),
    ],
    ids=str,
)
def test_where_tiles_do_not_pay_vectors_take_over(c, why):
    (entry,) = schedules.report(lower(layer(c), AMX))
    assert entry["rule"] == "x86.vnni" and f"x86.amx: {why}" in entry["refused"]


def test_without_amx_vectors_take_over():
    (entry,) = schedules.report(lower(layer(AWKWARD[3]), targets.parse("x86-64-v4")))
    assert entry["rule"] == "cpu.contract" and "x86.amx: the target has no AMX." in entry["refused"]


@pytest.mark.parametrize(("dtype", "instruction"), [("uint8", "tdpbusd"), ("int8", "tdpbssd")])
@pytest.mark.parametrize("c", [AWKWARD[0], AWKWARD[3], CONVS[5]], ids=str)
def test_the_library_multiplies_tiles_and_nothing_else(c, dtype, instruction, tmp_path):
    module = lower(layer(c, dtype), AMX)
    assert [r["rule"] for r in schedules.report(module)] == ["x86.amx"]
    executable = build.build(module, AMX)
    library = tmp_path / "layer.so"
    executable.export_library(str(library))
    report = inspect_library(library, ["fused"])
    assert report.instructions > 0 and report.offenders == ()
    listing = " ".join(disassembled(library))
    # What a thread does first and last, and every tile of the block in one step.
    assert all(name in listing for name in ("ldtilecfg", "tilezero", "tileloadd", "tilestored", "tilerelease"))
    assert listing.count(instruction) >= 4 and "vpdpbusd" not in listing


def disassembled(library: Path) -> list[str]:
    """The mnemonics of a library's code."""
    import iced_x86 as iced
    from elftools.elf.elffile import ELFFile

    names = {v: k.lower() for k, v in vars(iced.Mnemonic).items() if isinstance(v, int)}
    with library.open("rb") as f:
        code = ELFFile(f).get_section_by_name(".text").data()
    return [names[i.mnemonic] for i in iced.Decoder(64, code)]


@pytest.mark.parametrize(
    "bad", [(2, 2, 14, 1, 2), (1, 2, 17, 2, 1), (2, 1, 7, 2, 3), (1, 3, 16, 2, 1), (1, 1, 1, 2, 1)]
)
def test_tiles_check_themselves(bad):
    with pytest.raises(ValueError, match="not a"):
        AmxTile(*bad)


def test_the_emulator_finds_what_the_cpu_would_fault_on(emulator):
    made = ctypes.c_int64()

    def failure() -> str:
        why = emulator.hawq_emulated_failure(ctypes.byref(made))
        return "" if why is None else why.decode()

    config = bytearray(Tiles(2, 14, 2).configuration())
    emulator.hawq_emulated_tilezero(0)
    assert "before ldtilecfg" in failure()
    assert emulator.hawq_emulated_ldtilecfg(bytes(config)) == 0 and emulator.hawq_emulated_tdpbusd(0, 4, 6) == 0
    assert emulator.hawq_emulated_tilerelease() == 0 and failure() == "" and made.value == 1
    for place, value, why in [(0, 2, "palette"), (48, 17, "larger"), (16, 65, "larger"), (5, 1, "reserved")]:
        wrong = bytearray(config)
        wrong[place] = value
        emulator.hawq_emulated_ldtilecfg(bytes(wrong))
        assert why in failure()
    config[54] = 15
    emulator.hawq_emulated_ldtilecfg(bytes(config))
    emulator.hawq_emulated_tdpbusd(0, 4, 6)
    assert "sizes" in failure()
    emulator.hawq_emulated_ldtilecfg(bytes(config))
    emulator.hawq_emulated_tdpbusd(0, 4, 0)
    assert "twice" in failure()
    emulator.hawq_emulated_ldtilecfg(bytes(config))
    emulator.hawq_emulated_tilezero(8)
    assert "no such tile" in failure()
    emulator.hawq_emulated_ldtilecfg(bytes(config))
    assert "ended without tilerelease" in failure()
    emulator.hawq_emulated_tilerelease()
    failure()


def test_configuration_of_the_registers():
    config = Tiles(2, 14, 2).configuration()
    assert len(config) == 64 and config[0] == 1 and not any(config[1:16])
    assert list(config[16:32:2]) == [64] * 8 and list(config[48:56]) == [14] * 6 + [16] * 2 and not any(config[56:])
