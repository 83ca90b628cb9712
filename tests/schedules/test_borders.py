"""What contractions leave out: products with a border of zeros, at awkward shapes, and nothing is read beside the
data.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops
from schedules import rules
from schedules.cpu.borders import Axis, Borders, Ranges
from schedules.cpu.contract_tiles import Step, choose_tile, form_of
from schedules.cpu.cpu_contract import Contract, VectorUnit
from schedules.cpu.generic import Generic
from schedules.layer import Layer

from .one_layer import layer_of, lower, packed, run
from .test_cpu_contract import DOT, HOST, PORTABLE, Conv, accumulate, convolve, full, with_epilogue

vnni = pytest.mark.skipif(DOT != "x86.vnni", reason="this CPU has no VNNI, so data is always copied to 16 bits")

CASES = [
    Conv(1, 7, 7, 64, 64, pad=(1, 1, 1, 1)),
    Conv(3, 14, 14, 128, 33, pad=(1, 1, 1, 1)),
    Conv(2, 9, 13, 64, 48, (5, 5), pad=(2, 2, 2, 2)),
    Conv(1, 8, 8, 128, 65, (3, 3), (2, 2), pad=(1, 1, 1, 1)),
    Conv(1, 8, 8, 64, 32, (3, 3), (2, 2), pad=(0, 0, 1, 1)),
    Conv(1, 17, 17, 64, 32, (1, 7), pad=(0, 3, 0, 3)),
    Conv(2, 17, 17, 64, 32, (7, 1), pad=(3, 0, 3, 0)),
    Conv(1, 8, 8, 80, 48, (1, 3), pad=(0, 1, 0, 1)),
    Conv(1, 11, 9, 64, 32, (3, 3), (1, 1), (2, 3), pad=(2, 3, 2, 3)),
    Conv(1, 4, 5, 64, 32, pad=(4, 4, 4, 4)),
    Conv(1, 5, 5, 64, 32, (1, 1), pad=(1, 2, 0, 1)),
    Conv(1, 1, 1, 256, 32, pad=(1, 1, 1, 1)),
    Conv(1, 6, 31, 3, 32, (7, 7), (2, 2), pad=(3, 3, 3, 3)),
    Conv(1, 7, 7, 17, 17, pad=(1, 1, 1, 1)),
    Conv(1, 7, 9, 128, 64, groups=2, pad=(1, 1, 1, 1)),
    Conv(1, 5, 17, 256, 96, (1, 1)),
    Conv(1, 4, 4, 256, 64, pad=(1, 1, 1, 1)),
    Conv(2, 5, 7, 512, 48, (1, 3), pad=(0, 1, 0, 1)),
    Conv(1, 17, 5, 256, 24, (5, 1), pad=(2, 0, 2, 0)),
    Conv(1, 3, 6, 128, 33, (3, 1), pad=(1, 3, 1, 6)),
    Conv(1, 9, 13, 30, 33),
    Conv(1, 1, 1, 256, 32, (1, 1), (2, 2), pad=(1, 1, 1, 1)),
]


@pytest.mark.parametrize("target", [HOST, PORTABLE], ids=["host", "portable"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("c", CASES, ids=str)
def test_convolutions_of_data_with_a_border_of_zeros(c, dtype, target):
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    body, residual, expected = with_epilogue(c, x, w, 0)
    (out,) = run(body, x, residual, target=target)
    np.testing.assert_array_equal(out, expected, strict=True)


@st.composite
def convolutions(draw) -> Conv:
    """Convolutions of at least one pixel, with borders on all sides."""
    size = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    k, stride, dilation = ((size(1, high), size(1, high)) for high in (5, 3, 2))
    pad = tuple(size(0, 4) for _ in range(4))
    h, w = (max(size(1, 14), (k[a] - 1) * dilation[a] + 1 - pad[a] - pad[a + 2]) for a in (0, 1))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    return Conv(
        size(1, 2),
        h,
        w,
        draw(st.sampled_from([3, 30, 64, 66, 128, 256])) // groups * groups,
        size(1, 40) * groups,
        k,
        stride,
        dilation,
        groups,
        pad,
    )


def any_convolution(c: Conv, dtype: str, target: tvm.target.Target) -> None:
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    (out,) = run(lambda emit, p: accumulate(emit, c, p, relax.const(w), 0, "int32"), x, target=target)
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@settings(max_examples=15, deadline=None)
@given(convolutions(), st.sampled_from(["uint8", "int8"]), st.sampled_from([HOST, PORTABLE]))
def test_any_convolution(c, dtype, target):
    any_convolution(c, dtype, target)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(convolutions(), st.sampled_from(["uint8", "int8"]), st.sampled_from([HOST, HOST, PORTABLE]))
def test_many_convolutions(c, dtype, target):
    any_convolution(c, dtype, target)


@pytest.mark.parametrize(
    "width",
    [[0, 0, 1, 1, 1, 1, 16, 16], [0, 0, 1, 1, 1, 1, 0, 64], [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 3, 3, 0, 0, 0, 64]],
    ids=str,
)
def test_a_border_around_channels_or_images_is_kept(width):
    x = full("uint8", 1, 7, 7, 64)
    padded = np.pad(x, np.reshape(width, (4, 2)))
    c = Conv(padded.shape[0], *padded.shape[1:], 32, (7, 1) if not any(width[4:6]) else (3, 3))
    w = full("int8", *c.k, c.ci, c.co)

    def body(emit, p):
        return accumulate(emit, c, emit(relax.op.nn.pad(p, width, "constant", 0)), relax.const(w), 0, "int32")

    (out,) = run(body, x)
    np.testing.assert_array_equal(out, convolve(c, padded, w, 0).astype(np.int32), strict=True)


@pytest.mark.parametrize("unit", [VectorUnit(4, 32, False), VectorUnit(8, 16, True)], ids=str)
@pytest.mark.parametrize("c", CASES[::2], ids=str)
def test_every_vector_unit_leaves_out_the_same(c, unit, monkeypatch):
    monkeypatch.setattr(rules, "CPU_RULES", (Contract(unit), Generic()))
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    body, residual, expected = with_epilogue(c, x, w, 0)
    (out,) = run(body, x, residual)
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("c", [CASES[0], CASES[2], CASES[6], CASES[8]], ids=str)
def test_four_bit_weights_under_a_border_of_zeros(c):
    x, w = (
        full("uint8", c.n, c.h, c.w, c.ci),
        np.random.default_rng(2).integers(-8, 8, (*c.k, c.ci, c.co), dtype=np.int8),
    )
    m, q = np.full((1, 1, 1, c.co), 2**30), arith.QType.of("uint8")

    def body(emit, p):
        opened = emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True))
        return emit(
            ops.requantize(
                [accumulate(emit, c, p, opened, 0, "int32")], [m], 0, 40, qtype=q, zero_point=7, rounding="half_up"
            )
        )

    (out,) = run(body, x)
    acc = convolve(c, x, w, 0)
    expected = arith.requantize([acc], [m], 0, 40, rounding="half_up", zero_point=7, qmin=0, qmax=255).astype(np.uint8)
    np.testing.assert_array_equal(out, expected, strict=True)


@given(st.data())
def test_ranges_are_the_pixels_that_read_data(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    axis = Axis(size=draw(1, 20), before=draw(0, 7), stride=draw(1, 3), dilation=draw(1, 3))
    scale, outputs, block, taps = draw(1, 5), draw(1, 24), draw(1, 14), draw(1, 7)
    ranges = Ranges(axis, scale, outputs * scale, block, taps)
    every = iter(ranges.all)
    for base in range(0, outputs * scale, block):
        for tap in range(taps):
            pixels = [
                p
                for p in range(min(block, outputs * scale - base))
                if 0 <= axis.data((base + p) // scale, tap) < axis.size
            ]
            first, last = next(every)
            assert list(range(first, last)) == pixels


def kernel_of(c: Conv, fill: int = 0, dtype: str = "uint8") -> tuple[tvm.IRModule, Layer, relax.Call]:
    """The PACKED module of a convolution of padded data, its layer and its call."""
    w = full("int8", *c.k, c.ci // c.groups, c.co)
    module = packed(
        lambda emit, p: accumulate(emit, c, p, relax.const(w), fill, "int32"), [((c.n, c.h, c.w, c.ci), dtype)]
    )
    layer = layer_of(module)
    return module, layer, layer.anchor_call


def borders_of(c: Conv, fill: int = 0, offset: int = 0) -> Borders:
    """What the kernel of a convolution leaves out, with vectors of 16 and steps of 4."""
    _, layer, call = kernel_of(c, fill)
    unit, step = VectorUnit(16, 32, False, quads=True), Step(4)
    shape = form_of(call, unit, step)
    return Borders.of(layer, call, shape, choose_tile(shape, unit, step), offset, in_place=True)


def test_a_window_of_three_leaves_out_the_first_and_the_last_pixel():
    found = borders_of(CASES[0])
    assert found.lines == Axis(7, 1, 1, 1) and found.origin == (1, 1) and found.unpadded is not None
    assert found.ranges is not None and found.ranges.needed == [(0, 6), (0, 7), (1, 7)]
    assert 1 - (1 - found.ranges.saved) * 19 / 21 == pytest.approx(1 - (19 / 21) ** 2)  # float: a ratio of two counts


@pytest.mark.parametrize(("fill", "offset"), [(3, 0), (0, 128)], ids=["filled with 3", "shifted by 128"])
def test_a_border_of_other_values_is_kept(fill, offset):
    assert borders_of(CASES[0], fill, offset) == Borders()


@pytest.mark.parametrize("c", [CASES[12], CASES[13]], ids=str)
def test_steps_that_span_taps_leave_out_lines_alone(c):
    found = borders_of(c)
    assert found.lines is not None and found.ranges is None and found.unpadded is None


def test_pixels_beyond_a_row_are_left_out():
    found = borders_of(CASES[15])
    assert found.lines is None and found.unpadded is None
    assert found.ranges is not None and found.ranges.axis is None and found.ranges.saved > 0


@vnni
@pytest.mark.parametrize(
    ("c", "copied"),
    [(CASES[0], False), (CASES[6], False), (CASES[9], False), (CASES[10], False), (CASES[12], True)],
    ids=str,
)
def test_data_are_copied_only_where_zeros_are_read(c, copied):
    kernels = [str(f) for f in lower(kernel_of(c)[0], HOST).functions.values() if not isinstance(f, relax.Function)]
    assert ["rows = " in k for k in kernels] == [copied]


def between_guards(data: np.ndarray) -> np.ndarray:
    """A copy of whole pages that lies between two pages nobody may read."""
    page = mmap.PAGESIZE
    assert data.nbytes % page == 0
    memory = mmap.mmap(-1, data.nbytes + 2 * page)
    copy = np.frombuffer(memory, np.uint8, data.nbytes, page).view(data.dtype).reshape(data.shape)
    copy[...] = data
    libc = ctypes.CDLL(None, use_errno=True)
    for at in (copy.ctypes.data - page, copy.ctypes.data + data.nbytes):
        assert libc.mprotect(ctypes.c_void_p(at), page, mmap.PROT_READ & 0) == 0
    return copy


@vnni
@pytest.mark.parametrize(
    "c",
    [
        Conv(1, 8, 8, 64, 32, pad=(1, 1, 1, 1)),
        Conv(1, 8, 8, 64, 32, (5, 5), pad=(2, 2, 2, 2)),
        Conv(1, 8, 8, 64, 16, (3, 3), (2, 2), pad=(1, 1, 1, 1)),
        Conv(1, 16, 4, 64, 48, (7, 1), pad=(3, 0, 3, 0)),
        Conv(1, 16, 4, 64, 48, (1, 7), pad=(0, 3, 0, 3)),
        Conv(1, 4, 16, 64, 16, pad=(4, 4, 4, 4)),
        Conv(1, 32, 1, 128, 16, (3, 3), pad=(1, 1, 1, 1)),
        Conv(1, 1, 64, 64, 16, (1, 1)),
    ],
    ids=str,
)
def test_nothing_beside_the_data_is_read(c):
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    module = packed(lambda emit, p: accumulate(emit, c, p, relax.const(w), 0, "int32"), [(x.shape, "uint8")])
    lowered = lower(module, HOST)
    assert [r["rule"] for r in schedules.report(lowered)] == ["x86.vnni"]
    main = relax.VirtualMachine(build.build(lowered, HOST), tvm.cpu())["main"]
    out = main(tvm.runtime.from_dlpack(between_guards(x)))[0].numpy()
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


def test_few_steps_and_many_bodies_are_not_worth_it():
    assert borders_of(replace(CASES[0], ci=16)).ranges is None
    assert borders_of(Conv(1, 29, 29, 64, 32, (15, 15), pad=(7, 7, 7, 7))).ranges is None
