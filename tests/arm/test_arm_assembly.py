"""What the kernels' innermost loops consist of, read from LLVM's assembly: no Arm machine has timed them."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops

from ..schedules.one_layer import packed
from ..schedules.test_cpu_contract import Conv, accumulate, full
from .on_arm import TARGETS, assembly, inner_loop

LAYERS = {
    "3x3, 64 to 64, W8A8": (Conv(1, 56, 56, 64, 64, pad=(1, 1, 1, 1)), False),
    "1x1, 128 to 256, W8A8": (Conv(1, 28, 28, 128, 256, (1, 1)), False),
    "3x3, 128 to 128, W4A8": (Conv(1, 28, 28, 128, 128, pad=(1, 1, 1, 1)), True),
}
# The least products among vector instructions in percent, the most loads per hundred products, and the most spills.
BOUNDS = {
    ("arm-neon", False): (70, 20, 0),
    ("arm-dotprod", False): (85, 30, 0),
    ("arm-i8mm", False): (70, 65, 0),
    ("arm-neon", True): (70, 20, 0),
    ("arm-dotprod", True): (85, 25, 0),
    ("arm-i8mm", True): (55, 40, 0),
}


def module(c: Conv, four_bits: bool, data: str):
    nibbles = np.random.default_rng(3).integers(-8, 8, (*c.k, c.ci, c.co)).astype(np.int8)
    w = nibbles if four_bits else full("int8", *c.k, c.ci, c.co)

    def body(e, p):
        weights = e(ops.unpack_int4(arith.pack_int4(w), w.shape, True)) if four_bits else relax.const(w)
        sums = accumulate(e, c, p, weights, 3, "int32")
        return ops.requantize(
            [sums],
            [np.arange(c.co).reshape(1, 1, 1, -1) + 2**30],
            5,
            40,
            qtype=arith.QType.of("uint8"),
            zero_point=3,
            rounding="half_up",
        )

    return packed(body, [((c.n, c.h, c.w, c.ci), data)])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", LAYERS)
def test_inner_loops_are_mostly_products(layer: str, target: str) -> None:
    c, four_bits = LAYERS[layer]
    text = assembly(module(c, four_bits, "uint8"), TARGETS[target])
    loop = inner_loop(text)
    print(f"\n{layer}, {target}: {loop}")
    share, loads, spills = BOUNDS[target, four_bits]
    assert 100 * loop.products >= share * loop.vector
    assert 100 * loop.loads <= loads * loop.products
    assert loop.spills <= spills


@pytest.mark.parametrize("target", TARGETS)
def test_requantize_multiplies_in_vectors(target: str) -> None:
    text = assembly(module(*LAYERS["1x1, 128 to 256, W8A8"], "uint8"), TARGETS[target])
    found = [
        line.split()[0] for line in text.splitlines() if line.startswith("\t") and ".2d, v" in line and ".2s, v" in line
    ]
    assert "smlal" in found or "smull" in found  # 32 by 32 to 64 bits
    assert "smulh\t" not in text
