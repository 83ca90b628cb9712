"""What keeps a compilation short: kernels whose code does not grow with their layers."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.measure import race
from hawq_tvm.targets import target
from schedules import rules
from schedules.rule import choose

from .one_layer import layer_of, packed

R = relax.op


def code(preset: str, channels: int, depthwise: bool) -> tuple[str, int]:
    """The rule of a 3x3 convolution with its requantize, and the lines of its assembly."""
    groups = channels if depthwise else 1
    weights = relax.const(np.ones((3, 3, channels // groups, channels), np.int8))

    def body(emit, p):
        attributes = {"padding": (0, 0, 0, 0), "data_layout": "NHWC", "kernel_layout": "HWIO", "out_dtype": "int32"}
        sums = emit(R.nn.conv2d(p, weights, groups=groups, **attributes))
        to = arith.QType.of("uint8")
        return ops.requantize([sums], [2**30 + 1], 0, 40, qtype=to, zero_point=3, rounding="half_up")

    on, layer = target.parse(preset), layer_of(packed(body, [((1, 16, 16, channels), "uint8")]))
    choice = choose(rules.rules_for(on), layer, on)
    module, _ = race.library([choice.rule.build(layer, on)], on)
    return choice.rule.name, len(module.inspect_source("asm").splitlines())


@pytest.mark.parametrize("depthwise", [True, False], ids=["depthwise", "dense"])
@pytest.mark.parametrize("preset", ["x86-vnni", "x86-avx2", "arm-dotprod"])
def test_code_does_not_grow_with_the_channels(preset, depthwise):
    (few, small), (many, large) = (code(preset, channels, depthwise) for channels in (128, 512))
    assert few == many and large < 1.2 * small
