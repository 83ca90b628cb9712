"""Attention in one kernel on Arm: what QEMU computes is what the reference says, exactly."""

from __future__ import annotations

import numpy as np
import pytest

from hawq_tvm.core import arith

from ..schedules.test_cpu_attention import U8, body, inputs, rng
from .on_arm import TARGETS, check, needs_emulator

pytestmark = needs_emulator
EVERY = [pytest.param(t, id=name) for name, t in TARGETS.items()]


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize(
    ("kinds", "zeros", "to", "level"),
    [
        (("uint8",) * 3, (117, 130, 146), U8, 0),
        (("int8", "uint8", "int8"), (None, 255, -128), arith.QType.of("int8"), -128),
        (("uint8", "int8", "uint8"), (0, -128, 0), arith.QType(0, 32767, "int16"), 0),
    ],
    ids=str,
)
def test_types_and_zero_points(kinds, zeros, to, level, target):
    check(body(2, zeros, False, to, level), target, *inputs(2, 11, 20, 9, 6, kinds), rule="cpu.attention")


@pytest.mark.parametrize("target", EVERY)
def test_scores_of_32_bits_under_a_mask(target):
    mask = rng.random((1, 1, 1, 33)) < 0.7
    arrays = inputs(1, 5, 33, 16, 8, ["uint8"] * 3)
    check(body(1, (3, 5, 250), True), target, *arrays, np.asarray(mask), rule="cpu.attention")
