"""The sums of every shape of fragments that the model may choose stay in registers, on every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.compiler.cuda import nvcc
from hawq_tvm.core import arith, ops
from hawq_tvm.targets.gpu import ARCHITECTURES
from schedules.gpu.cuda_mma import Mma
from schedules.gpu.mma_model import FRAGMENTS
from schedules.gpu.mma_tiles import MmaTile
from schedules.layer import Layer
from schedules.spelling.cuda_prelude import PRELUDE

from ..schedules.one_layer import packed
from .on_cpu import TARGET


def convolution(weight_bits: int) -> Layer:
    """3x3, 256 to 256 channels, 14 x 14 pixels, bias and requantize."""
    weights = np.full((3, 3, 256, 256), 3, np.int8)

    def body(emit, x):
        w = (
            emit(ops.unpack_int4(arith.pack_int4(weights), weights.shape, True))
            if weight_bits == 4
            else relax.const(weights)
        )
        padded = emit(relax.op.nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0], pad_value=0))
        acc = emit(relax.op.nn.conv2d(padded, w, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"))
        acc = emit(relax.op.add(acc, relax.const(np.arange(256, dtype=np.int32))))
        return ops.requantize(
            [acc], [1 << 30], 0, 40, qtype=arith.QType.of("uint8"), zero_point=0, rounding="half_even"
        )

    module = packed(body, [((8, 14, 14, 256), "uint8")])
    gv = module.get_global_var("fused")
    return Layer.of(gv, module[gv])


@pytest.mark.slow
@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize(("rows", "columns"), FRAGMENTS)
def test_sums_stay_in_registers(rows: int, columns: int, weight_bits: int, compiler: Path) -> None:
    with nvcc.compiling(ARCHITECTURES, PRELUDE) as job, TARGET:
        kernel = Mma().build(convolution(weight_bits), TARGET, MmaTile((2, 1), rows, columns))
        tvm.tirx.build(
            tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")}), target=TARGET, pipeline="s_tir"
        )
    assert {u.arch for u in job.usage} == set(ARCHITECTURES)
    # Four sums of 4 bytes for every 16 x 8 fragment. A spilled address or two is nvcc's choice; sums on the stack are
    # ours.
    assert not [u for u in job.usage if u.stack >= 16 * rows * columns]
