"""Depthwise convolutions whose quads are woven, at odd sizes, borders and extremes, on vectors of 16 and of 8 lanes."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.targets import target
from schedules.cpu import x86_vnni_depthwise
from schedules.cpu.vector_unit import VectorUnit
from schedules.cpu.x86_vnni_depthwise import QuadsTile, VnniDepthwise

from .one_layer import layer_of, lower, packed, run
from .test_cpu_contract import HOST, Conv, accumulate, convolve, full

R = relax.op
rng = np.random.default_rng(11)
VNNI = target.parse("x86-vnni")
NARROW = VectorUnit(8, 16, True, quads=True)
needs_vnni = pytest.mark.skipif(not VectorUnit.of(HOST).quads, reason="this CPU has no VNNI")

CASES = [
    # channels, size, kernel, stride, dilation, border: lines of results together, and vectors of a group
    (Conv(1, 8, 14, 64, 64, groups=64, pad=(1, 1, 1, 1)), 2, 4),
    (Conv(2, 7, 7, 128, 128, groups=128, pad=(1, 1, 1, 1)), 1, 4),
    (Conv(1, 9, 9, 192, 192, stride=(2, 2), groups=192, pad=(1, 1, 1, 1)), 1, 4),
    (Conv(1, 6, 8, 32, 32, groups=32, pad=(1, 1, 1, 1)), 2, 2),
    (Conv(1, 8, 6, 96, 96, stride=(2, 2), groups=96, pad=(0, 0, 1, 1)), 1, 2),
    (Conv(1, 10, 12, 96, 96, (5, 5), groups=96, pad=(2, 2, 2, 2)), 1, 2),
    (Conv(1, 9, 12, 64, 64, (5, 5), stride=(2, 2), groups=64, pad=(1, 1, 2, 2)), 1, 4),
    (Conv(1, 7, 8, 64, 64, (2, 2), groups=64), 3, 4),
    (Conv(1, 8, 8, 64, 64, (1, 3), groups=64, pad=(0, 1, 0, 1)), 4, 4),
    (Conv(1, 8, 4, 64, 64, dilation=(2, 2), groups=64, pad=(2, 2, 2, 2)), 1, 4),
    (Conv(1, 2, 4, 64, 64, groups=64, pad=(3, 2, 3, 4)), 2, 4),
    (Conv(1, 6, 10, 48, 48, groups=48, pad=(1, 1, 1, 1)), 2, 1),
    (Conv(2, 9, 7, 144, 144, stride=(2, 2), groups=144, pad=(1, 1, 1, 1)), 1, 1),
    (Conv(1, 7, 5, 16, 16, (5, 5), groups=16, pad=(2, 2, 2, 2)), 1, 1),
]


def requantized(c: Conv, dtype: str, kind: str, zero_point: int, top: int, shifts: int = 5):
    """A layer, its data, its result; of so many shifts the largest is `top`."""
    x, w = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    bias = rng.integers(-(2**16), 2**16, (1, 1, 1, c.co)).astype(np.int32)
    m, shift = rng.integers(2**28, 2**31, (1, 1, 1, c.co)), rng.integers(top - shifts + 1, top + 1, (1, 1, 1, c.co))
    q = arith.QType.of(kind)
    fill = 3

    def body(emit, p):
        a = emit(R.add(accumulate(emit, c, p, relax.const(w), fill, "int32"), relax.const(bias)))
        return ops.requantize([a], [m], 0, shift, qtype=q, zero_point=zero_point, rounding="half_up")

    expected = arith.requantize(
        [convolve(c, x, w, fill) + bias],
        [m],
        0,
        shift,
        rounding="half_up",
        zero_point=zero_point,
        qmin=q.qmin,
        qmax=q.qmax,
    )
    return body, x, expected.astype(kind)


@needs_vnni
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("c", "lines", "vectors"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_woven_quads_compute_the_same(c, lines, vectors, dtype):
    body, x, expected = requantized(c, dtype, "uint8", 0, 39)
    layer = layer_of(packed(body, [(x.shape, dtype)]))
    rule = VnniDepthwise()
    tiles = rule.tiles(layer, VNNI)
    assert {t.vectors for t in tiles} == {vectors}
    form = x86_vnni_depthwise._Form.of(layer, tiles[0], VectorUnit.of(VNNI))
    assert form.woven is not None and form.woven.lines == lines
    (out,) = run(body, x, target=VNNI, rule=rule.name)
    np.testing.assert_array_equal(out, expected, strict=True)


@needs_vnni
@pytest.mark.parametrize(("kind", "zero_point", "top"), [("int8", 5, 40), ("uint8", 255, 39), ("uint8", 9, 45)])
@pytest.mark.parametrize("c", [CASES[0][0], CASES[3][0], CASES[11][0]], ids=["64", "32", "48"])
def test_every_requantize_behind_woven_quads(c, kind, zero_point, top):
    body, x, expected = requantized(c, "uint8", kind, zero_point, top)
    (out,) = run(body, x, target=VNNI, rule="x86.vnni_depthwise")
    np.testing.assert_array_equal(out, expected, strict=True)


@needs_vnni
@pytest.mark.parametrize("c", [CASES[0][0], CASES[4][0], CASES[5][0]], ids=str)
def test_narrow_vectors_compute_the_same(c, monkeypatch):
    monkeypatch.setattr(VectorUnit, "of", staticmethod(lambda _: NARROW))
    body, x, expected = requantized(c, "uint8", "uint8", 0, 39)
    assert VnniDepthwise().tiles(layer_of(packed(body, [(x.shape, "uint8")])), VNNI)[0].vectors == 4
    (out,) = run(body, x, target=VNNI, rule="x86.vnni_depthwise")
    np.testing.assert_array_equal(out, expected, strict=True)


@needs_vnni
@pytest.mark.parametrize("c", [CASES[3][0], CASES[11][0]], ids=["32", "48"])
def test_every_tile_computes_the_same(c, monkeypatch):
    body, x, expected = requantized(c, "uint8", "uint8", 0, 39)
    for tile in VnniDepthwise().tiles(layer_of(packed(body, [(x.shape, "uint8")])), VNNI):
        monkeypatch.setattr(VnniDepthwise, "tiles", lambda *_, tile=tile: [tile])
        (out,) = run(body, x, target=VNNI, rule="x86.vnni_depthwise")
        np.testing.assert_array_equal(out, expected, strict=True)


@needs_vnni
def test_sums_that_do_not_become_bytes_keep_their_order():
    """Sums as results: one vector at a time."""
    c = CASES[0][0]
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, 1, c.co)

    def body(emit, p):
        return accumulate(emit, c, p, relax.const(w), 0, "int32")

    layer = layer_of(packed(body, [(x.shape, "uint8")]))
    assert {t.vectors for t in VnniDepthwise().tiles(layer, VNNI)} == {1}
    (out,) = run(body, x, target=VNNI, rule="x86.vnni_depthwise")
    np.testing.assert_array_equal(out, convolve(c, x, w, 0).astype(np.int32), strict=True)


@needs_vnni
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("kind", "zero_point"), [("uint8", 0), ("uint8", 200), ("int8", 0), ("int8", -3)])
@pytest.mark.parametrize(
    "c",
    [
        Conv(1, 4, 12, 24, 144, (1, 1)),
        Conv(2, 3, 6, 8, 16, (3, 3), pad=(1, 1, 1, 1)),
        Conv(1, 5, 14, 32, 48, (1, 1)),
        Conv(1, 10, 10, 16, 16, (1, 1)),
        Conv(1, 5, 7, 16, 48, (1, 1)),
    ],
    ids=str,
)
def test_bytes_of_two_pixels_where_vectors_are_odd(c, kind, zero_point, dtype):
    body, x, expected = requantized(c, dtype, kind, zero_point, 39, shifts=4)
    (out,) = run(body, x, target=VNNI, rule="x86.vnni")
    np.testing.assert_array_equal(out, expected, strict=True)
    text = lower(packed(body, [(x.shape, dtype)]), VNNI).script()
    assert "llvm.sadd.sat" in text or c.w % 2 or zero_point < 0


@pytest.mark.parametrize("bad", [(0, 16, 4), (2, 16, 3), (2, 0, 1)])
def test_tiles_check_themselves(bad):
    with pytest.raises(ValueError, match="not a tile"):
        QuadsTile(*bad)
