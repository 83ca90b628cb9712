"""Blocks of AMX kernels: halves of 64 channels, their order, joined pixels, and epilogues under products."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.compiler import build
from hawq_tvm.core import ops
from hawq_tvm.targets import target as targets
from schedules.cpu import amx_forms, amx_tiles
from schedules.cpu.amx_tiles import INSIDE, STORES
from schedules.cpu.x86_amx import Amx
from schedules.layer import Layer

from .one_layer import layer_of, lower, packed, run
from .test_borders import CASES as BORDERED
from .test_cpu_contract import CONVS, Conv, full, with_epilogue, with_packed_epilogue
from .test_x86_amx import AWKWARD, disassembled, layer, private

AMX = targets.parse("x86-amx")
WHOLE = [
    Conv(1, 8, 32, 64, 64, (1, 1)),
    Conv(2, 7, 7, 64, 128, (1, 1)),
    Conv(3, 8, 7, 64, 192, (1, 1)),
    Conv(1, 8, 28, 64, 64, (3, 3), pad=(1, 1, 1, 1)),
    Conv(1, 9, 9, 64, 64, (3, 3), pad=(1, 1, 1, 1)),
    Conv(1, 12, 13, 64, 128, (3, 3), (2, 2), pad=(1, 1, 1, 1)),
    Conv(1, 16, 17, 3, 64, (7, 7), (2, 2), pad=(3, 3, 3, 3)),
]


@pytest.mark.parametrize(("kinds", "steps"), [(("uint8", "uint8"), 1), (("int8", "uint8"), 2**20)])
@pytest.mark.parametrize("c", WHOLE, ids=str)
def test_halves_of_64_channels_share_an_epilogue(c, kinds, steps, amx, monkeypatch):
    """In both orders, where blocks are whole and where they are not, under the next block's products and after their
    own.
    """
    monkeypatch.setattr(amx_tiles, "FEWEST_STEPS", steps)
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_packed_epilogue(c, x, w, kinds)
    module = packed(body, [(x.shape, "uint8"), (residual.shape, kinds[0])])
    found = Amx().tiles(Layer.of(*private(module)), amx)
    assert all(t.halves == 2 for t in found)
    for inside in INSIDE:
        chosen = next(t for t in found if t.inside == inside)
        monkeypatch.setattr(amx_forms, "tiles_of", lambda layer, chosen=chosen: [chosen])
        (out,) = run(body, x, residual, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("c", [*AWKWARD, *CONVS[2:6], BORDERED[0], BORDERED[1], BORDERED[8]], ids=str)
def test_epilogues_under_the_next_blocks_products(c, amx, monkeypatch):
    """Every kernel that has two blocks a task, with parts of several steps where there are many."""
    monkeypatch.setattr(amx_tiles, "FEWEST_STEPS", 1)
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co)
    body, residual, expected = with_epilogue(c, x, w, 0)
    (out,) = run(body, x, residual, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize(
    ("c", "parts"),
    [
        (Conv(1, 14, 14, 256, 256, pad=(1, 1, 1, 1)), 3),
        (Conv(1, 14, 14, 1024, 256, (1, 1)), 2),
        (Conv(8, 7, 7, 512, 2048, (1, 1)), 1),
        (Conv(1, 56, 56, 64, 256, (1, 1)), 0),  # two steps
        (Conv(1, 2, 14, 512, 64, (1, 1)), 0),  # one block
    ],
    ids=str,
)
def test_an_epilogue_is_cut_into_parts_between_steps(c, parts):
    module = layer(c)
    given = Layer.of(*private(module))
    tile = amx_forms.tiles_of(given)[0]
    (form,) = (f for f in amx_forms.forms_of(given) if f.name == tile.form)
    assert tile.steps_of_a_part(form.shape) == parts
    assert ("for part in" in lower(module, AMX)["fused"].script()) is (parts > 0)


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize(
    "c",
    [
        Conv(1, 8, 14, 128, 128, (1, 1)),
        Conv(3, 7, 8, 64, 64, (3, 3), pad=(0, 1, 0, 1)),
        Conv(1, 9, 31, 100, 48, (1, 1)),
        Conv(2, 12, 13, 64, 80, (2, 2), (2, 2)),
        Conv(1, 6, 16, 192, 16, (1, 1)),
    ],
    ids=str,
)
def test_sums_are_stored_after_a_block_or_before_the_next(c, stores, amx, monkeypatch):
    """Of one tile or several, in every form, order and number of rows."""
    monkeypatch.setattr(amx_tiles, "FEWEST_STEPS", 1)
    monkeypatch.setattr(amx_forms, "TASKS", 0)
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_packed_epilogue(c, x, w, ("uint8", "uint8"))
    module = packed(body, [(x.shape, "uint8"), (residual.shape, "uint8")])
    found = [t for t in Amx().tiles(layer_of(module), amx) if t.stores == "before"]
    for tile in found[:: 4 if stores == "before" else 12]:
        chosen = replace(tile, stores=stores)
        monkeypatch.setattr(amx_forms, "tiles_of", lambda given, chosen=chosen: [chosen])
        (out,) = run(body, x, residual, target=amx, rule="x86.amx")
        np.testing.assert_array_equal(out, expected, strict=True)
    assert found


def test_a_tile_is_stored_right_before_its_next_sums(tmp_path):
    """Which a record may change; not where a block's first lines may lie above the data."""
    module = layer(Conv(1, 14, 14, 1024, 256, (1, 1)))
    best, second = Amx().tiles(layer_of(module), AMX)[:2]
    assert best.stores == "before" and second == replace(best, stores="after")
    build.build(lower(module, AMX), AMX).export_library(str(tmp_path / "layer.so"))
    order = [n for n in disassembled(tmp_path / "layer.so") if n in ("tilestored", "tilezero", "tdpbusd")]
    assert " ".join(["tilestored tilezero tdpbusd"] * 3) in " ".join(order)
    bordered = Amx().tiles(layer_of(layer(Conv(1, 14, 14, 256, 256, pad=(1, 1, 1, 1)))), AMX)
    assert {t.stores for t in bordered if t.form == "lines"} == {"after"}


def test_a_residual_is_fetched_ahead_unless_products_hide_the_epilogue():
    """32 pixels further, as is the result's line; what the first requantize made is in the cache already."""

    def fetched(c: Conv) -> list[str]:
        x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
        body, residual, _ = with_packed_epilogue(c, x, w, ("uint8", "uint8"))
        text = lower(packed(body, [(x.shape, "uint8"), (residual.shape, "uint8")]), AMX)["fused"].script()
        return re.findall(r"llvm.prefetch\", T.address_of\(\w+\[(\d+)\]\), (\d)", text)

    assert fetched(Conv(1, 8, 32, 64, 256, (1, 1))) == [("8192", "0"), ("8192", "1")]
    assert fetched(Conv(1, 56, 56, 256, 64, (1, 1))) == []


def test_channels_are_inside_while_weights_are_small_and_pixels_make_tasks():
    def inside(c: Conv) -> str:
        return Amx().tiles(Layer.of(*private(layer(c))), AMX)[0].inside

    assert inside(Conv(1, 56, 56, 64, 256, (1, 1))) == "channels"
    assert inside(Conv(8, 7, 7, 512, 512, pad=(1, 1, 1, 1))) == "pixels"  # 2.3 MB of weights
    assert inside(Conv(1, 7, 7, 512, 128, (1, 1))) == "pixels"  # four tasks


@pytest.mark.parametrize(
    ("c", "width"),
    [
        (Conv(8, 7, 7, 64, 128, (1, 1)), 28),
        (Conv(1, 56, 56, 64, 64, (1, 1)), 32),
        (Conv(1, 7, 7, 64, 64, (1, 1)), 0),
        (Conv(8, 7, 7, 64, 64, (1, 1), pad=(1, 1, 1, 1)), 0),
        (Conv(8, 14, 14, 64, 64, (1, 1), (2, 2)), 0),
        (Conv(8, 7, 7, 64, 64, pad=(1, 1, 1, 1)), 0),
    ],
    ids=str,
)
def test_pixels_of_all_images_are_one_sequence_where_that_fills_tiles(c, width):
    forms = amx_forms.forms_of(Layer.of(*private(layer(c))))
    assert [ops.shape_of(f.layer.anchor_call)[2] for f in forms if f.name == "parts"] == ([width] if width else [])
    assert not width or amx_forms.tiles_of(forms[0].layer)[0].form == "parts" or c.n == 1


def test_a_product_with_one_matrix_has_lines_of_whole_blocks():
    w = full("int8", 64, 64)
    module = packed(lambda e, p: relax.op.matmul(p, relax.const(w), out_dtype="int32"), [((1, 128, 64), "int8")])
    forms = amx_forms.forms_of(Layer.of(*private(module)))
    assert [ops.shape_of(f.layer.anchor_call) for f in forms] == [(1, 128, 64), (4, 32, 64)]


@pytest.mark.parametrize("co", [64, 128])
def test_an_epilogue_has_as_few_instructions_as_its_arithmetic(co, tmp_path):
    """For 64 results: a product of pairs in each of two steps, no permutation but three, and one store."""
    c = Conv(1, 8, 32, 64, co, (1, 1))
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, _ = with_packed_epilogue(c, x, w, ("uint8", "uint8"))
    executable = build.build(lower(packed(body, [(x.shape, "uint8"), (residual.shape, "uint8")]), AMX), AMX)
    executable.export_library(str(tmp_path / "layer.so"))
    listing = disassembled(tmp_path / "layer.so")
    times = listing.count("vpackuswb") // 2
    counts = {"vpmuldq": 8, "vpaddq": 8, "vpsrlq": 1, "vpermt2d": 4, "vpermd": 1, "vpackuswb": 2, "vpsravw": 2}
    counts |= {"vpdpwssd": 8, "vpsrad": 8, "vpaddsw": 2, "vpunpcklbw": 3, "vpunpckhbw": 3, "vpmaddwd": 0, "tdpbusd": 8}
    found = {name: listing.count(name) / times for name in counts}
    assert times and found == counts


@pytest.mark.parametrize(
    ("c", "stride"),
    [
        (Conv(1, 5, 17, 288, 64, (1, 1)), 320),
        (Conv(2, 4, 13, 80, 64, (1, 1), pad=(1, 1, 1, 1)), 128),
        (Conv(1, 17, 17, 160, 64, (7, 1), pad=(3, 0, 3, 0)), 192),
        (Conv(1, 9, 9, 48, 64, (3, 3), (1, 1), (2, 2), pad=(2, 2, 2, 2)), 64),
        (Conv(1, 9, 9, 48, 64, (3, 3), pad=(1, 1, 1, 1)), 48),  # a run goes through three pixels
        (Conv(1, 9, 9, 32, 64, (1, 1)), 32),  # the copy would be twice as large
    ],
    ids=str,
)
def test_copied_pixels_begin_at_cache_lines(c, stride, amx):
    x, w = full("uint8", c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci, c.co)
    body, residual, expected = with_packed_epilogue(c, x, w, ("uint8", "uint8"))
    (out,) = run(body, x, residual, target=amx, rule="x86.amx")
    np.testing.assert_array_equal(out, expected, strict=True)
    text = lower(layer(c), AMX)["fused"].script()
    assert re.search(rf"tileloadd64.*[24] \+ x1.elem_offset.*T.int64\({stride}\)", text)
