"""The targets for Arm: what they need of a processor, and tiles and refusals of their rules. Nothing here is run."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.targets import target
from schedules.cpu.arm_neon import DOTS, MATRICES, PAIRS, Neon
from schedules.cpu.contract_tiles import LoadedTile
from schedules.cpu.vector_unit import VectorUnit
from schedules.layer import Layer
from schedules.record import tile_of

from ..schedules import one_layer
from ..schedules.one_layer import packed
from ..schedules.test_cpu_contract import Conv, accumulate, full
from .on_arm import DOTPROD, I8MM, NEON, TARGETS


def layer_of(c: Conv, w: np.ndarray, data: str = "uint8") -> Layer:
    module = packed(lambda e, p: accumulate(e, c, p, relax.const(w), 0, "int32"), [((c.n, c.h, c.w, c.ci), data)])
    return one_layer.layer_of(module)


def test_targets_need_what_their_processors_have():
    cortex_a76 = {"neon", "lse", "fullfp16", "rdm", "rcpc", "dotprod"}
    needed = {name: set(target.required_features(t)) for name, t in TARGETS.items()}
    assert needed == {"arm-neon": {"neon"}, "arm-dotprod": cortex_a76, "arm-i8mm": cortex_a76 | {"i8mm"}}
    for t in TARGETS.values():
        assert target.architecture(t) == "aarch64" and target.describe(
            target.parse(str(target.describe(t)).replace("'", '"'))
        ) == target.describe(t)
    assert [sorted(VectorUnit.of(t).neon) for t in TARGETS.values()] == [
        ["neon"],
        ["dotprod", "neon"],
        ["dotprod", "i8mm", "neon"],
    ]


@pytest.mark.parametrize(
    ("rule", "t"),
    [(Neon("neon"), NEON), (Neon("dotprod"), DOTPROD), (Neon("i8mm"), I8MM)],
    ids=lambda x: getattr(x, "name", ""),
)
@pytest.mark.parametrize(
    "c", [Conv(1, 14, 14, 64, 64), Conv(1, 9, 7, 17, 33), Conv(1, 8, 8, 64, 128, groups=4)], ids=str
)
def test_tiles_fit_the_registers_and_survive_a_record(c, rule, t):
    layer = layer_of(c, full("int8", *c.k, c.ci // c.groups, c.co))
    for tile in rule.tiles(layer, t):
        assert (
            isinstance(tile, LoadedTile) and tile.pixels % tile.together == 0 and (tile.vectors == 1 or c.groups == 1)
        )
        assert tile.pixels * tile.vectors + tile.pixels + 4 <= 32
        assert tile_of(rule, layer, t, asdict(tile)) == tile


@pytest.mark.parametrize("family", [PAIRS, DOTS, MATRICES])
@pytest.mark.parametrize("run", [1, 9, 24, 27, 147, 576])
def test_registers_of_data_are_full_unless_that_adds_products(family, run):
    padded = {i: -(-run // (family.depth * i)) * family.depth * i for i in family.inners}
    assert padded[family.inner(run)] <= 1.05 * min(padded.values())


def test_sums_of_shifted_data_that_may_leave_32_bits_are_refused():
    w = np.full((260, 260, 2, 1), -128, np.int8)
    layer = layer_of(Conv(1, 260, 260, 2, 1, (260, 260)), w)
    assert Neon("dotprod").applies(layer, DOTPROD) == "sums of shifted data that may leave 32 bits."
    assert Neon("dotprod").applies(layer, I8MM) is None  # usdot takes them as they are


@pytest.mark.parametrize("bad", [(3, 2, 4, 8, 1, 2, 2), (2, 2, 4, 8, 1, 0, 2)])
def test_tiles_check_themselves(bad):
    with pytest.raises(ValueError, match="not a tile"):
        LoadedTile(*bad)
