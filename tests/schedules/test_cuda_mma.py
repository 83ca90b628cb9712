"""Tensor-core kernels whose threads run one after the other on the CPU, every intrinsic as its meaning, against the arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import test_cpu_contract as contract
from one_layer import run
from test_cpu_contract import Conv, accumulate, convolve, full
from tvm import relax

from hawq_tvm import arith, ops
from schedules import lower
from schedules.cuda_mma import Mma
from schedules.generic import Generic
from schedules.mma_tiles import MmaTile

R = relax.op
TILES = [MmaTile((2, 1), 1, 2), MmaTile((1, 2), 2, 1, slices=2, depth=4), MmaTile((1, 1), 1, 4, slices=4)]
rng = np.random.default_rng(8)


@pytest.fixture
def on_cpu(monkeypatch):
    """Lower with the tensor-core rule, its threads as loops."""

    def use(tile: MmaTile) -> None:
        rule = Mma(threads=False)
        monkeypatch.setattr(rule, "tiles", lambda layer, target: [tile])
        monkeypatch.setattr(lower, "rules_for", lambda target: (rule, Generic()))

    return use


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("c", [c for c in contract.CONVS if c.groups != c.co], ids=str)
def test_conv2d_with_bias_residual_requantize_and_lookup(c: Conv, tile: MmaTile, on_cpu) -> None:
    on_cpu(tile)
    dtype = "uint8" if c.co % 2 else "int8"
    x, w, fill = full(dtype, c.n, c.h, c.w, c.ci), full("int8", *c.k, c.ci // c.groups, c.co), 3 * (c.ci % 3)
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
    (out,) = run(body, x, residual, rule="cuda.mma")
    np.testing.assert_array_equal(out, expected, strict=True)
