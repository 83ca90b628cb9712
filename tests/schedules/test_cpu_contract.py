"""The register-blocked kernels of convolutions and matrix products, at awkward shapes and full-range operands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
import tvm
from tvm import relax

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops
from hawq_tvm.measure import race
from hawq_tvm.targets import target
from schedules import rules
from schedules.cpu import cpu_contract
from schedules.cpu.contract_tiles import ContractTile, Step, choose_tile, form_of
from schedules.cpu.contraction import Shape
from schedules.cpu.cpu_contract import Contract, VectorUnit
from schedules.cpu.generic import Generic
from schedules.cpu.x86_vnni import Vnni
from schedules.cpu.x86_vnni_depthwise import VnniDepthwise
from schedules.layer import Layer

from .one_layer import layer_of, lower, packed, run

R = relax.op
rng = np.random.default_rng(4)
HOST = target.host()
DOT = "x86.vnni" if VectorUnit.of(HOST).quads else "cpu.contract"
PORTABLE = tvm.target.Target({"kind": "llvm"})


def full(dtype: str, *shape: int) -> np.ndarray:
    """Seeded values of a dtype; half of them are its extremes."""
    low, high = arith.RANGES[dtype]
    x = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.5, rng.choice(np.array([low, high], dtype), shape), x)


@dataclass(frozen=True)
class Conv:
    """One convolution: sizes, and what is done before and after."""

    n: int
    h: int
    w: int
    ci: int
    co: int
    k: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)


CONVS = [
    Conv(1, 7, 7, 3, 17, (3, 3), pad=(1, 1, 1, 1)),
    Conv(3, 5, 31, 17, 65, (1, 1)),
    Conv(1, 9, 8, 16, 32, (5, 5), (2, 2), pad=(2, 1, 2, 3)),
    Conv(1, 7, 31, 1, 1, (1, 7), pad=(0, 3, 0, 3)),
    Conv(2, 31, 7, 5, 40, (7, 1), (3, 1)),
    Conv(1, 14, 14, 64, 64, (3, 3), (1, 1), pad=(1, 1, 1, 1)),
    Conv(1, 13, 9, 6, 33, (3, 3), (1, 2), (2, 3), pad=(2, 3, 2, 3)),
    Conv(1, 7, 1, 17, 3, (3, 1), pad=(1, 0, 1, 0)),
    Conv(1, 7, 7, 8, 12, (3, 3), groups=2, pad=(1, 1, 1, 1)),
    Conv(1, 7, 9, 64, 128, (3, 3), (2, 2), groups=4),
    Conv(1, 6, 7, 30, 45, (3, 2), (1, 1), (1, 2), groups=5),
    Conv(1, 5, 5, 96, 96, (3, 3), groups=32),
    Conv(3, 7, 7, 17, 17, (3, 3), groups=17, pad=(1, 1, 1, 1)),
    Conv(1, 9, 31, 32, 32, (5, 5), (2, 1), groups=32, pad=(2, 2, 2, 2)),
    Conv(1, 9, 9, 24, 24, (3, 3), (1, 1), (2, 2), groups=24),
    Conv(1, 7, 7, 5, 15, (3, 3), (2, 2), groups=5),
    Conv(1, 1, 1, 2048, 1000, (1, 1)),
    Conv(2, 12, 20, 32, 1, (3, 7), (2, 2), (1, 3)),
    Conv(2, 9, 3, 17, 34, (3, 3), groups=17),
    Conv(1, 3, 3, 1, 1, (3, 3)),
]


# Widths that blocks of pixels do not divide: the lines of an image are joined.
JOINED = [
    Conv(1, 17, 17, 64, 128, (1, 1)),
    Conv(2, 17, 17, 16, 48, (7, 1), pad=(3, 0, 3, 0)),
    Conv(3, 5, 19, 17, 65, (3, 1), dilation=(2, 1)),
    Conv(2, 9, 17, 20, 33, (1, 1)),
    Conv(1, 73, 73, 4, 16, (1, 1)),
]


def convolve(c: Conv, x: np.ndarray, w: np.ndarray, fill: int) -> np.ndarray:
    """The int64 convolution of NHWC data and HWIO weights."""
    t, left, b, r = c.pad
    x = np.pad(x.astype(np.int64), ((0, 0), (t, b), (left, r), (0, 0)), constant_values=fill)
    reach = [(k - 1) * d + 1 for k, d in zip(c.k, c.dilation, strict=True)]
    v = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(1, 2))
    v = v[:, :: c.stride[0], :: c.stride[1], :, :: c.dilation[0], :: c.dilation[1]]
    parts = []
    for g in range(c.groups):
        i, o = c.ci // c.groups, c.co // c.groups
        data, kernel = v[:, :, :, g * i : (g + 1) * i], w[..., g * o : (g + 1) * o].astype(np.int64)
        parts.append(np.einsum("nyxcij,ijco->nyxo", data, kernel))
    return np.concatenate(parts, axis=-1)


def accumulate(emit, c: Conv, p: relax.Expr, w: relax.Expr, fill: int, dtype: str) -> relax.Expr:
    t, left, b, r = c.pad
    if any(c.pad):
        p = emit(R.nn.pad(p, [0, 0, t, b, left, r, 0, 0], "constant", fill))
    return emit(
        R.nn.conv2d(
            p,
            w,
            strides=c.stride,
            dilation=c.dilation,
            groups=c.groups,
            data_layout="NHWC",
            kernel_layout="HWIO",
            out_dtype=dtype,
        )
    )


def with_epilogue(c: Conv, x: np.ndarray, w: np.ndarray, fill: int):
    """A convolution with bias, residual, requantize and look-up: its body, the residual, and what it computes."""
    acc = convolve(c, x, w, fill)
    residual, bias = full("int8", *acc.shape), rng.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32)
    m, shift = rng.integers(2**30, 2**31, (1, 1, 1, c.co)), rng.integers(36, 46, (1, 1, 1, c.co))
    table, q = full("uint8", 256), arith.QType.of("int8")

    def body(emit, p, other):
        a = accumulate(emit, c, p, relax.const(w), fill, "int32")
        a = emit(R.add(a, relax.const(bias)))
        y = emit(ops.requantize([a, other], [m, 2**29], 5, shift, qtype=q, zero_point=-3, rounding="half_even"))
        return ops.lookup(y, table)

    kw = {"rounding": "half_even", "zero_point": -3, "qmin": -128, "qmax": 127}
    expected = table[arith.requantize([acc + bias, residual], [m, 2**29], 5, shift, **kw) + 128]
    return body, residual, expected


@pytest.mark.parametrize("target", [HOST, PORTABLE], ids=["host", "portable"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("c", [*CONVS, *JOINED], ids=str)
def test_conv2d_with_bias_residual_requantize_and_lookup(c, dtype, target):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    body, residual, expected = with_epilogue(c, x, w, 3)
    (out,) = run(body, x, residual, target=target)
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("target", [HOST, PORTABLE], ids=["host", "portable"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(
    "c",
    [
        *CONVS[::3],
        *JOINED,
        Conv(1, 7, 7, 12, 320, (1, 1)),
        Conv(1, 5, 6, 8, 16, (1, 1)),
        Conv(1, 9, 13, 4, 64),
        Conv(1, 8, 29, 32, 32, groups=32),
        Conv(2, 5, 6, 8, 48, (3, 3), pad=(1, 1, 1, 1)),
    ],
    ids=str,
)
def test_conv2d_rounded_half_up_and_added_to_a_residual(c, dtype, target):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    acc = convolve(c, x, w, 3)
    residual, bias = full("uint8", *acc.shape), rng.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32)
    m, shift = rng.integers(2**30, 2**31, (1, 1, 1, c.co)), rng.integers(36, 46, (1, 1, 1, c.co))
    ms, offset = [int(v) for v in rng.integers(2**29, 2**31 - 2**16, 2)], int(rng.integers(-(2**38), 2**38))
    first = {"rounding": "half_up", "zero_point": 100, "qmin": 0, "qmax": 255}
    second = {"rounding": "half_up", "zero_point": 7, "qmin": 3, "qmax": 250}

    def body(emit, p, other):
        a = emit(R.add(accumulate(emit, c, p, relax.const(w), 3, "int32"), relax.const(bias)))
        y = emit(ops.requantize([a], [m], 0, shift, qtype=arith.QType.of("uint8"), zero_point=100, rounding="half_up"))
        return ops.requantize(
            [other, y], ms, offset, 31, qtype=arith.QType(3, 250, "uint8"), zero_point=7, rounding="half_up"
        )

    y = arith.requantize([acc + bias], [m], 0, shift, **first)
    expected = arith.requantize([residual, y], ms, offset, 31, **second).astype(np.uint8)
    (out,) = run(body, x, residual, target=target)
    np.testing.assert_array_equal(out, expected, strict=True)


def with_packed_epilogue(c: Conv, x: np.ndarray, w: np.ndarray, kinds: tuple[str, str], two: bool = True):
    """A convolution with (A9c) and a residual by (A9d), and unless `two` a table between them, which nothing spells."""
    acc, q = convolve(c, x, w, 0), [arith.QType.of(k) for k in kinds]
    residual, table = (
        full(kinds[0], *acc.shape),
        rng.integers(*arith.RANGES[kinds[0]], 256, dtype=kinds[0], endpoint=True),
    )
    least = arith.PACKED_SHIFTS[kinds[0]]
    m, shift = rng.integers(2**27, 2**31, (1, 1, 1, c.co)), rng.integers(least - 7, least + 1, (1, 1, 1, c.co))
    ms, offset, steps = [int(v) for v in rng.integers(2**24, 2**31 - 2**16, 2)], int(rng.integers(-(2**38), 2**38)), 30
    zeros = [int(np.mean(arith.RANGES[k])) + 3 for k in kinds]

    def body(emit, p, other):
        a = emit(accumulate(emit, c, p, relax.const(w), 0, "int32"))
        y = emit(ops.requantize([a], [m], 0, shift, qtype=q[0], zero_point=zeros[0], rounding="half_up"))
        y = y if two else emit(ops.lookup(y, table))
        return ops.requantize([y, other], ms, offset, steps, qtype=q[1], zero_point=zeros[1], rounding="half_up")

    y = arith.requantize([acc], [m], 0, shift, rounding="half_up", zero_point=zeros[0], qmin=q[0].qmin, qmax=q[0].qmax)
    y = y if two else table[y - q[0].qmin].astype(np.int64)
    expected = arith.requantize(
        [y, residual], ms, offset, steps, rounding="half_up", zero_point=zeros[1], qmin=q[1].qmin, qmax=q[1].qmax
    )
    return body, residual, expected.astype(kinds[1])


@pytest.mark.parametrize("target", [target.parse(t) for t in ("x86-avx2", "x86-vnni")], ids=str)
@pytest.mark.parametrize("kinds", [("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int8"), ("int8", "int8")])
@pytest.mark.parametrize("co", [64, 128])
@pytest.mark.parametrize("two", [True, False])
def test_sums_that_become_bytes_at_once(target, kinds, co, two):
    c = Conv(1, 3, 7, 16, co)
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_packed_epilogue(c, x, w, kinds, two)
    module = packed(body, [(x.shape, "uint8"), (residual.shape, kinds[0])])
    (out,) = run(body, x, residual, target=target)
    np.testing.assert_array_equal(out, expected, strict=True)
    if VectorUnit.of(target).packs:
        text = lower(module, target).script()
        # A pair's zero point is added, and so is half of what (A9e) shifts.
        assert "packssdw" in text and ("pmadd" in text or "vpdpwssd" in text) is two


@pytest.mark.parametrize(
    "unit", [VectorUnit(4, 32, False), VectorUnit(8, 16, True), VectorUnit(16, 32, False)], ids=str
)
@pytest.mark.parametrize("c", [*CONVS[:12:2], *JOINED], ids=str)
def test_every_vector_unit_computes_the_same(c, unit, monkeypatch):
    monkeypatch.setattr(rules, "CPU_RULES", (Contract(unit), Generic()))
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    (out,) = run(lambda e, p: accumulate(e, c, p, relax.const(w), 0, "int32"), x, rule="cpu.contract")
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@pytest.mark.parametrize(
    ("data", "weight", "acc"),
    [
        ("int16", "int8", "int32"),
        ("int16", "int16", "int64"),
        ("uint16", "int8", "int64"),
        ("uint8", "int16", "int32"),
        ("int8", "int8", "int64"),
        ("uint16", "int8", "int32"),
    ],
)
def test_conv2d_of_wider_types(data, weight, acc):
    c = Conv(1, 7, 9, 17, 33, pad=(1, 1, 1, 1))
    x, w = full(data, c.n, c.h, c.w, c.ci), full(weight, *c.k, c.ci, c.co)
    (out,) = run(lambda e, p: accumulate(e, c, p, relax.const(w), 1, acc), x, target=HOST, rule="cpu.contract")
    np.testing.assert_array_equal(out, convolve(c, x, w, 1).astype(acc), strict=True)


@pytest.mark.parametrize("c", [CONVS[0], CONVS[6], CONVS[5], JOINED[1], JOINED[2]], ids=str)
def test_conv2d_with_run_time_weights(c):
    x, w = full("int16", c.n, c.h, c.w, c.ci), full("int16", *c.k, c.ci, c.co)
    (out,) = run(lambda e, p, k: accumulate(e, c, p, k, 0, "int32"), x, w, target=HOST, rule="cpu.contract")
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("c", [CONVS[0], CONVS[2], CONVS[10], JOINED[0], JOINED[1]], ids=str)
def test_conv2d_with_four_bit_weights_keeps_them_packed(c, signed):
    x = full("uint8", c.n, c.h, c.w, c.ci)
    low, high = (-8, 8) if signed else (0, 16)
    w = rng.integers(low, high, (*c.k, c.ci // c.groups, c.co)).astype("int8" if signed else "uint8")

    def body(emit, p):
        return accumulate(emit, c, p, emit(ops.unpack_int4(arith.pack_int4(w), w.shape, signed)), 0, "int32")

    (out,) = run(body, x, target=HOST, rule=DOT)
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)
    kernel = lower(packed(body, [(x.shape, "uint8")]), HOST)["fused"].script()
    assert re.search(r'weights: T.Buffer\(\([^)]*\), "uint8"\)', kernel)


def first_conv(module: tvm.IRModule) -> tuple[Layer, relax.Call]:
    """The only layer of a module, and its anchor."""
    layer = layer_of(module)
    return layer, layer.anchor_call


def plain(c: Conv) -> tvm.IRModule:
    """A convolution of u8 data with nothing after it."""
    w = full("int8", *c.k, c.ci // c.groups, c.co)
    return packed(lambda e, p: accumulate(e, c, p, relax.const(w), 0, "int32"), [((c.n, c.h, c.w, c.ci), "uint8")])


UNITS = [
    VectorUnit(16, 32, True, True),
    VectorUnit(8, 16, True, True),
    VectorUnit(8, 16, True),
    VectorUnit(4, 16, True),
]


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_lines_are_joined_where_blocks_of_pixels_do_not_divide_them(unit):
    for c, joined in [
        (JOINED[0], True),
        (JOINED[1], True),
        (Conv(1, 8, 8, 64, 64, (1, 1)), False),
        (Conv(1, 17, 17, 64, 64, (1, 3)), False),
        (Conv(1, 17, 17, 64, 64, (1, 1), (2, 2)), False),
        (Conv(1, 17, 17, 64, 64, (1, 1), groups=2), False),
        (Conv(1, 1, 17, 64, 64, (1, 1)), False),
    ]:
        _, call = first_conv(plain(c))
        form = form_of(call, unit, Step(4 if unit.quads else 2))
        assert (form.width == c.w) == joined and form.pixels == (c.h * c.w if joined else call.ty.shape[2])


@pytest.mark.skipif(DOT != "x86.vnni", reason="this CPU has no VNNI, so data is always copied to 16 bits")
def test_joined_lines_of_single_taps_are_read_where_they_lie():
    assert "rows = T." not in lower(plain(JOINED[0]), HOST)["fused"].script()
    assert "rows = T." in lower(plain(JOINED[1]), HOST)["fused"].script()


@pytest.mark.parametrize("c", [Conv(2, 11, 17, 64, 96, (1, 1)), JOINED[1]], ids=str)
def test_every_tile_of_joined_lines_computes_the_same(c, monkeypatch):
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    m = rng.integers(2**30, 2**31, (1, 1, 1, c.co))
    expected = arith.requantize(
        [convolve(c, x, w, 0)], [m], 0, 44, rounding="half_up", zero_point=100, qmin=0, qmax=255
    ).astype(np.uint8)
    layer, _ = first_conv(plain(c))
    rule = Vnni() if DOT == "x86.vnni" else Contract()
    tiles = rule.tiles(layer, HOST)
    for tile in tiles[::3]:
        monkeypatch.setattr(type(rule), "tiles", lambda self, given, target, tile=tile: [tile])
        monkeypatch.setattr(cpu_contract, "choose_tile", lambda *arguments, tile=tile: tile)

        def body(e, p):
            return ops.requantize(
                [accumulate(e, c, p, relax.const(w), 0, "int32")],
                [m],
                0,
                44,
                qtype=arith.QType.of("uint8"),
                zero_point=100,
                rounding="half_up",
            )

        (out,) = run(body, x, target=HOST, rule=DOT)
        np.testing.assert_array_equal(out, expected, strict=True)


def test_dilated_data_is_read_in_place():
    x, w = full("uint8", 1, 4, 5, 17), full("int8", 3, 3, 17, 8)
    spread = np.full((1, 7, 9, 17), 9, np.uint8)
    spread[:, ::2, ::2] = x
    c = Conv(1, 7, 9, 17, 8, pad=(2, 2, 1, 1))
    (out,) = run(
        lambda e, p: accumulate(e, c, e(ops.dilate2d(p, (2, 2), 9, layout="NHWC")), relax.const(w), 9, "int32"),
        x,
        target=HOST,
        rule=DOT,
    )
    np.testing.assert_array_equal(out, convolve(c, spread, w, 9).astype(np.int32), strict=True)


def test_no_full_tensor_of_sums_is_in_memory():
    x, w = full("uint8", 1, 28, 28, 64), full("int8", 3, 3, 64, 64)
    c = Conv(1, 28, 28, 64, 64, pad=(1, 1, 1, 1))
    lowered = lower(
        packed(
            lambda e, p: ops.requantize(
                [accumulate(e, c, p, relax.const(w), 0, "int32")],
                [2**30],
                0,
                40,
                qtype=arith.QType.of("int8"),
                zero_point=0,
                rounding="half_even",
            ),
            [(x.shape, "uint8")],
        ),
        HOST,
    )
    passes = tvm.s_tir.transform
    small = tvm.ir.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
        ]
    )(tvm.IRModule({"f": lowered["fused"]}))
    shapes = re.findall(r'sblock_alloc_buffer\(\(([^)]*)\), "int32"', small["f"].script())
    sizes = [prod(int(d) for d in shape.split(",") if d.strip()) for shape in shapes]
    assert sizes and max(sizes) <= 14 * 64


@pytest.mark.parametrize("preset", ["x86-vnni", "x86-amx", "x86-avx2", "arm-neon", "arm-dotprod", "arm-i8mm"])
@pytest.mark.parametrize(
    "c", [Conv(1, 14, 14, 64, 256, (1, 1)), Conv(1, 14, 14, 64, 64, (3, 3), groups=64, pad=(1, 1, 1, 1))], ids=str
)
def test_registers_are_not_in_memory(c, preset):
    """From the heap come rows of data, and what AMX stores of its tiles."""
    on = target.parse(preset)
    layer, _ = first_conv(plain(c))
    choice = schedules.rule.choose(rules.rules_for(on), layer, on)
    module, _ = race.library([choice.rule.build(layer, on)], on)
    taken = re.findall(r"%(\S+) = (?:tail )?call ptr %\d+\(i32 1, i32 %dev_id, i64 \d+", module.inspect_source("ll"))
    assert {re.sub(r"[.\d]+$", "", name) for name in taken} <= {
        "rows",
        "quads",
        *(["acc"] if choice.rule.name == "x86.amx" else []),
    }


def clamped(c: Conv, w: np.ndarray, m: np.ndarray, to: arith.QType) -> tvm.IRModule:
    """A convolution of u8 data, requantized."""
    return packed(
        lambda e, p: ops.requantize(
            [accumulate(e, c, p, relax.const(w), 0, "int32")], [m], 0, 42, qtype=to, zero_point=2, rounding="half_up"
        ),
        [((c.n, c.h, c.w, c.ci), "uint8")],
    )


@pytest.mark.parametrize(
    ("preset", "instruction"),
    [("x86-vnni", "avx512.packuswb"), ("x86-amx", "avx512.packuswb"), ("x86-avx2", "avx2.packuswb"), ("x86-64-v2", "")],
)
def test_results_are_packed(preset, instruction):
    on = target.parse(preset)
    for channels, spelled in ((256, instruction), (17, "")):
        c = Conv(1, 14, 14, 64, channels, (1, 1))
        w, m = full("int8", 1, 1, 64, channels), rng.integers(2**30, 2**31, (1, 1, 1, channels))
        script = lower(clamped(c, w, m, arith.QType.of("uint8")), on)["fused"].script()
        assert spelled in script and ("packus" in script) == bool(spelled)


@pytest.mark.parametrize(
    "to",
    [
        *map(arith.QType.of, ("uint8", "int8", "int16", "int32")),
        arith.QType(3, 250, "uint8"),
        arith.QType(-100, 90, "int8"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "c", [Conv(1, 6, 7, 16, 192, (1, 1)), Conv(1, 5, 8, 16, 96, (3, 3), pad=(1, 1, 1, 1))], ids=str
)
def test_every_number_of_vectors_is_packed_right(c, to, monkeypatch):
    x, w, m = (
        full("uint8", c.n, c.h, c.w, c.ci),
        full("int8", *c.k, c.ci, c.co),
        rng.integers(2**30, 2**31, (1, 1, 1, c.co)),
    )
    module = clamped(c, w, m, to)
    expected = arith.requantize(
        [convolve(c, x, w, 0)], [m], 0, 42, rounding="half_up", zero_point=2, qmin=to.qmin, qmax=to.qmax
    ).astype(to.storage)
    layer, _ = first_conv(module)
    rule = Vnni() if DOT == "x86.vnni" else Contract()
    for tile in {t.vectors: t for t in rule.tiles(layer, HOST)}.values():
        monkeypatch.setattr(cpu_contract, "choose_tile", lambda *arguments, tile=tile: tile)
        vm = relax.VirtualMachine(build.build(lower(module, HOST), HOST), tvm.cpu())
        np.testing.assert_array_equal(vm["main"](tvm.runtime.tensor(x))[0].numpy(), expected, strict=True)


@pytest.mark.parametrize(
    ("body", "inputs", "why"),
    [
        (lambda e, x: R.flip(x, axis=0), [((3, 4), "int8")], "not a convolution"),
        (lambda e, x: R.matmul(x, x, out_dtype="int32"), [((4,), "int8")], "a matrix times a vector"),
        (
            lambda e, x: R.nn.conv2d(x, relax.const(np.ones((2, 4, 1, 1), np.int8)), out_dtype="int32"),
            [((1, 4, 5, 5), "int8")],
            "the layout is NCHW",
        ),
        (
            lambda e, x: R.permute_dims(e(R.matmul(x, x, out_dtype="int32"))),
            [((4, 4), "int8")],
            "relax.permute_dims after the relax.matmul",
        ),
    ],
)
def test_refusals_are_sentences_in_the_report(body, inputs, why):
    (entry,) = schedules.report(lower(packed(body, inputs)))
    assert entry["rule"] != "cpu.contract" and f"cpu.contract: {why}" in entry["refused"]


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(("rule", "groups"), [(Vnni(), 1), (VnniDepthwise(), 2)], ids=["vnni", "depthwise"])
def test_shifted_sums_that_may_leave_32_bits_are_refused(rule, groups, dtype):
    w = np.full((260, 260, 2 // groups, 2), -128, np.int8)
    module = packed(
        lambda e, p: R.nn.conv2d(
            p, relax.const(w), groups=groups, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"
        ),
        [((1, 260, 260, 2), dtype)],
    )
    why = rule.applies(layer_of(module), tvm.target.Target(target.PRESETS["x86-vnni"]))
    assert why == ("sums of shifted int8 data that may leave 32 bits." if dtype == "int8" else None)


def test_report_names_layer_rule_and_tile():
    (entry,) = schedules.report(
        lower(
            packed(
                lambda e, x: R.matmul(x, relax.const(np.ones((17, 33), np.int8)), out_dtype="int32"),
                [((7, 17), "int8")],
                layer="/fc/Gemm",
            )
        )
    )
    assert (entry["layer"], entry["rule"]) == ("/fc/Gemm", "cpu.contract") and "vectors of" in entry["tile"]


@pytest.mark.parametrize("bad", [(0, 1, 4, 1, 1), (1, 1, 4, 3, 1), (1, 1, 4, 2, 0)])
def test_tiles_check_themselves(bad):
    with pytest.raises(ValueError, match="not a tile"):
        ContractTile(*bad)


@pytest.mark.parametrize("pixels", [1, 7, 17, 35, 56, 149])
@pytest.mark.parametrize("channels", [1, 17, 64, 1000])
def test_tiles_fit_the_registers(pixels, channels):
    for unit in (VectorUnit(4, 16, True), VectorUnit(16, 32, True)):
        shape = Shape((1, 12), pixels, channels, (3, 1), 48, 16, 16, (1, 14), 16 * pixels)
        tile = choose_tile(shape, unit, Step(2))
        assert tile.pixels * tile.vectors + tile.vectors + 1 < unit.registers and 12 % tile.rows == 0


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(
    "c",
    [
        CONVS[0],
        CONVS[2],
        CONVS[9],
        *JOINED[:3],
        Conv(1, 7, 14, 64, 64, pad=(1, 1, 1, 1)),
        Conv(3, 5, 7, 24, 80, (1, 1)),
    ],
    ids=str,
)
def test_four_bit_weights_under_a_requantize(c, dtype):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), rng.integers(-8, 8, (*c.k, c.ci // c.groups, c.co)).astype(np.int8)
    acc, bias = convolve(c, x, w, 3), rng.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32)
    m, shift = rng.integers(2**30, 2**31, (1, 1, 1, c.co)), rng.integers(36, 46, (1, 1, 1, c.co))

    def body(emit, p):
        weights = emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True))
        a = emit(R.add(accumulate(emit, c, p, weights, 3, "int32"), relax.const(bias)))
        return ops.requantize([a], [m], 2**35, shift, qtype=arith.QType.of("uint8"), zero_point=100, rounding="half_up")

    (out,) = run(body, x, target=HOST, rule=DOT)
    expected = arith.requantize([acc + bias], [m], 2**35, shift, rounding="half_up", zero_point=100, qmin=0, qmax=255)
    np.testing.assert_array_equal(out, expected.astype(np.uint8), strict=True)


def test_short_products_have_small_blocks_of_even_vectors():
    """With VNNI: two pixels of 64 channels where their weights are few, and no vector of bytes is clamped alone."""
    unit, step = VectorUnit(16, 32, True, quads=True), Step(4)

    def chosen(inputs: int, outputs: int) -> tuple[int, int]:
        shape = Shape((1, 28), 28, outputs, (1, 1), inputs, inputs, 0, (1, 28), 28 * inputs, inputs=inputs)
        tile = choose_tile(shape, unit, step)
        return tile.pixels, tile.vectors

    assert chosen(64, 256) == chosen(256, 512) == (2, 4)
    assert chosen(512, 128) != (2, 4) and chosen(64, 64) != (2, 4)
    assert chosen(16, 96)[1] % 2 == 0
