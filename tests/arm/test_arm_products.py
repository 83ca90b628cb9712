"""Products of two activations in 8 bits on Arm, under QEMU."""

from __future__ import annotations

import pytest

from ..schedules.products import KINDS, SHAPES, factors, product
from .on_arm import TARGETS, check, needs_emulator

pytestmark = needs_emulator
RULES = {"arm-neon": "arm.neon", "arm-dotprod": "arm.dotprod", "arm-i8mm": "arm.i8mm"}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("types", "zeros"), KINDS)
def test_signs_and_zero_points(name, types, zeros):
    check(product(zeros, True), TARGETS[name], *factors(SHAPES[1], types), rule=RULES[name])


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes(name, shapes):
    check(product((-7, 100), False), TARGETS[name], *factors(shapes, ("int8", "uint8")), rule=RULES[name])
