"""AMX kernels of images whose lines are one sequence: exact beside what they leave out, and where they are chosen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.compiler import build
from hawq_tvm.core import arith, ops
from hawq_tvm.core.errors import ScheduleError
from hawq_tvm.targets import target as targets
from schedules import record
from schedules.cpu import amx_forms, amx_tiles
from schedules.cpu.images import Images
from schedules.cpu.x86_amx import Amx
from schedules.layer import Layer

from .one_layer import layer_of, lower, packed, run
from .test_cpu_contract import Conv, accumulate, convolve, full, rng, with_epilogue, with_packed_epilogue
from .test_x86_amx import disassembled, layer, private

AMX = targets.parse("x86-amx")
SMALL = [
    Conv(1, 7, 7, 64, 64, pad=(1, 1, 1, 1)),
    Conv(3, 7, 7, 64, 128, (1, 1)),
    Conv(2, 8, 8, 48, 64, (1, 3), pad=(0, 1, 0, 1)),
    Conv(1, 9, 5, 64, 64, (5, 5), pad=(2, 2, 2, 2)),
    Conv(2, 6, 7, 64, 64, (3, 1), dilation=(2, 1), pad=(2, 0, 2, 0)),
    Conv(1, 7, 9, 30, 64, (3, 3), pad=(0, 2, 1, 1)),
    Conv(1, 5, 6, 64, 65, (2, 4), pad=(1, 0, 0, 2)),
    Conv(2, 7, 7, 64, 48, (3, 3)),
    Conv(1, 3, 3, 64, 33, (2, 2), pad=(3, 3, 3, 3)),
]


def test_a_form_that_a_layer_no_longer_has(monkeypatch, capsys):
    """A record of it is ignored with a warning; a graph that carries its tile, and the rule, refuse in a sentence."""
    monkeypatch.setattr(amx_forms, "TASKS", 0)
    module = layer(SMALL[0])
    (name, func), made, rule = private(module), layer_of(module), Amx(emulated=True)
    tiles = amx_forms.tiles_of(made)
    tile = next(t for t in tiles if t.form == "images")
    found = record.Record(rule.name, record.fields_of(tile), 1.0, 1.0, made.name, 1, 1, "a CPU", 0.0, {}, "")
    assert record.find({"key": found}, ["key"], rule, made, AMX, set()) is found
    carried = Layer.of(name, func.with_attr(record.ATTRIBUTE, json.dumps({"rule": rule.name, "tile": found.tile})))
    assert record.recorded_tile(rule, carried, AMX) == tile
    monkeypatch.setattr(amx_forms.Images, "of", lambda layer: None)
    assert record.find({"key": found}, ["key"], rule, made, AMX, set()) is None
    assert "the record 'key' is ignored" in capsys.readouterr().err
    with pytest.raises(ScheduleError, match="recorded tile does not fit"):
        record.recorded_tile(rule, carried, AMX)
    with pytest.raises(ScheduleError, match=r"tile does not fit.*a tile of lines"):
        rule.build(made, AMX, tile)


@pytest.fixture(params=[1, 2**20], ids=["beneath", "after"])
def steps(request, monkeypatch):
    """Epilogues under the next block's products, and after their own."""
    monkeypatch.setattr(amx_tiles, "FEWEST_STEPS", request.param)
    monkeypatch.setattr(amx_forms, "TASKS", 0)


def of_images(monkeypatch, made: Layer) -> list:
    """The tiles of a layer's images, one of which is to be used from here on: a list that it is taken from."""
    (form,) = (f for f in amx_forms.forms_of(made) if f.name == "images")
    vectors = 2 if form.shape.channels > 16 else 1
    tiles = amx_tiles.tiles_of(form.shape, vectors, False, form="images")
    monkeypatch.setattr(amx_forms, "tiles_of", lambda given: tiles)
    return tiles


@pytest.mark.parametrize("c", SMALL, ids=str)
def test_a_residual_and_bytes_at_once(c, steps, amx, monkeypatch):
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_packed_epilogue(c, x, w, ("uint8", "uint8"))
    tiles = of_images(monkeypatch, layer_of(packed(body, [(x.shape, "uint8"), (residual.shape, "uint8")])))
    while tiles:
        (out,) = run(body, x, residual, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, expected, strict=True)
        del tiles[:4]


@pytest.mark.parametrize("c", SMALL, ids=str)
def test_any_other_epilogue(c, steps, amx, monkeypatch):
    x, w = full("int8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_epilogue(c, x, w, 0)
    of_images(monkeypatch, layer_of(packed(body, [(x.shape, "int8"), (residual.shape, "int8")])))
    (out,) = run(body, x, residual, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("c", SMALL[:2], ids=str)
def test_a_table_behind_bytes(c, steps, amx, monkeypatch):
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    table, rounded = full("uint8", 256), {"zero_point": 100, "rounding": "half_up"}

    def body(emit, p):
        sums = emit(accumulate(emit, c, p, relax.const(w), 0, "int32"))
        return ops.lookup(
            emit(ops.requantize([sums], [1417339207], 0, 39, qtype=arith.QType.of("uint8"), **rounded)), table
        )

    of_images(monkeypatch, layer_of(packed(body, [(x.shape, "uint8")])))
    (out,) = run(body, x, target=amx, rule="x86.amx")
    codes = arith.requantize([convolve(c, x, w, 0)], [1417339207], 0, 39, qmin=0, qmax=255, **rounded)
    np.testing.assert_array_equal(out, table[codes], strict=True)


ONE_BLOCK = [
    SMALL[0],
    Conv(1, 7, 7, 128, 128, (1, 1)),
    Conv(1, 5, 9, 30, 64, (3, 3), pad=(1, 1, 1, 1)),
    Conv(1, 1, 49, 64, 192, (1, 3), pad=(0, 1, 0, 1)),
]


@pytest.mark.parametrize("c", ONE_BLOCK, ids=str)
def test_weights_that_no_cache_holds_are_read_once(c, steps, amx, monkeypatch):
    """Data take turns in three tiles, in both orders of the loops and in every form."""
    monkeypatch.setattr(amx_tiles, "SECOND_BYTES", 0)
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_packed_epilogue(c, x, w, ("uint8", "uint8"))
    module = packed(body, [(x.shape, "uint8"), (residual.shape, "uint8")])
    tiles = [t for t in amx_forms.tiles_of(layer_of(module)) if t.fetches]
    assert tiles and all((t.columns, t.vectors, t.halves) == (4, 1, 4) for t in tiles)
    for tile in tiles:
        monkeypatch.setattr(amx_forms, "tiles_of", lambda given, tile=tile: [tile])
        (out,) = run(body, x, residual, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, expected, strict=True)


def test_a_product_with_a_matrix_that_no_cache_holds(amx, monkeypatch):
    monkeypatch.setattr(amx_tiles, "SECOND_BYTES", 0)
    x, w = full("int8", 50, 200), full("int8", 200, 64)
    (out,) = run(lambda e, p: relax.op.matmul(p, relax.const(w), out_dtype="int32"), x, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, x.astype(np.int32) @ w, strict=True)


def test_weights_of_2_mb_are_read_once_by_few_pixels(tmp_path):
    """Five loads for four products, and as many prefetches as a tile has lines."""
    module = layer(Conv(1, 7, 7, 512, 512, pad=(1, 1, 1, 1)))
    assert Amx().tiles(layer_of(module), AMX)[0].fetches
    build.build(lower(module, AMX), AMX).export_library(str(tmp_path / "layer.so"))
    listing = disassembled(tmp_path / "layer.so")
    products = listing.count("tdpbusd")
    assert products % 4 == 0 and listing.count("tileloadd") == products // 4 * 5
    assert listing.count("prefetcht1") == products // 4 * 16
    for c in (Conv(2, 7, 7, 512, 512, pad=(1, 1, 1, 1)), Conv(1, 7, 7, 384, 512, pad=(1, 1, 1, 1))):
        assert not any(t.fetches for t in Amx().tiles(Layer.of(*private(layer(c))), AMX))


@pytest.mark.parametrize("fill", [0, 3])
@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize("c", [SMALL[0], SMALL[5], SMALL[8]], ids=str)
def test_sums_of_a_border_of_any_number_and_of_four_bit_weights(c, fill, four, steps, amx, monkeypatch):
    """Zeros alone are shared by two lines."""
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    w = rng.integers(-8, 8, w.shape).astype("int8") if four else w

    def body(emit, p):
        weights = emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True)) if four else relax.const(w)
        return accumulate(emit, c, p, weights, fill, "int32")

    made = layer_of(packed(body, [(x.shape, "uint8")]))
    wide = sum((c.w, c.pad[1], c.pad[3]))
    shared = 0 if fill else min(c.pad[1], c.pad[3], c.k[1] - 1)  # a line has as many pixels as its results
    assert Images.of(made).pitch == wide - shared
    of_images(monkeypatch, made)
    (out,) = run(body, x, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, convolve(c, x, w, fill).astype(np.int32), strict=True)


@pytest.mark.parametrize(
    "c",
    [
        Conv(1, 8, 8, 64, 64, (3, 3), (2, 2), pad=(1, 1, 1, 1)),
        Conv(1, 8, 8, 64, 64, (3, 3), dilation=(1, 2)),
        Conv(1, 8, 8, 128, 128, (3, 3), groups=2, pad=(1, 1, 1, 1)),
    ],
    ids=str,
)
def test_lines_that_are_no_sequence(c):
    assert Images.of(Layer.of(*private(layer(c)))) is None


def test_a_tensor_that_is_convolved_and_added_has_one_shape():
    c, w = Conv(1, 7, 7, 64, 64, pad=(1, 1, 1, 1)), full("int8", 3, 3, 64, 64)

    def body(emit, p):
        sums = emit(accumulate(emit, c, p, relax.const(w), 0, "int32"))
        return relax.op.add(sums, emit(relax.op.astype(p, "int32")))

    assert Images.of(layer_of(packed(body, [((1, 7, 7, 64), "uint8")]))) is None


@pytest.mark.parametrize(
    ("c", "form"),
    [
        (Conv(1, 7, 7, 512, 512, pad=(1, 1, 1, 1)), "images"),
        (Conv(8, 7, 7, 512, 512, pad=(1, 1, 1, 1)), "images"),
        (Conv(1, 7, 7, 2048, 512, (1, 1)), "images"),
        (Conv(8, 7, 7, 2048, 512, (1, 1)), "parts"),  # 392 pixels of all images are 14 times 28
        (Conv(1, 14, 14, 256, 256, pad=(1, 1, 1, 1)), "lines"),
        (Conv(1, 7, 7, 64, 256, (1, 1)), "lines"),  # four blocks of channels, for any number of threads
    ],
    ids=str,
)
def test_images_are_chosen_where_their_lines_leave_tiles_empty(c, form):
    assert Amx().tiles(Layer.of(*private(layer(c))), AMX)[0].form == form


def test_a_record_may_name_another_form():
    module = layer(Conv(1, 7, 7, 512, 512, pad=(1, 1, 1, 1)))
    made = layer_of(module)
    tile = next(t for t in Amx().tiles(made, AMX) if t.form == "lines")
    assert record.tile_of(Amx(), made, AMX, record.fields_of(tile)) == tile
    assert Amx().build(made, AMX, tile).tile == tile
    assert "7 images" not in lower(module, AMX)["fused"].attrs["hawq.tile"]
