"""Depthwise convolutions by dp4a: the intrinsic's meaning with threads as loops, and its CUDA source executed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.verify.reference import evaluate
from schedules.gpu.cuda_depthwise import CudaDepthwise, CudaDepthwiseTile
from schedules.layer import Layer

from ..schedules.one_layer import layer_of, packed
from . import on_cpu
from .emulate import ARCHITECTURES, Array, needs_gxx, run
from .on_cpu import TARGET
from .test_rules_on_cpu import full_range, requantized

R = relax.op
CASES = [  # data, kernel, strides, border, pixels of a thread
    ((1, 7, 8, 16), (3, 3), (1, 1), 1, 4),
    ((2, 6, 7, 8), (3, 3), (1, 1), 1, 7),
    ((1, 9, 16, 12), (3, 3), (2, 2), 1, 8),
    ((1, 8, 8, 4), (5, 5), (1, 1), 2, 2),
    ((1, 8, 14, 4), (5, 5), (2, 2), 2, 7),
    ((1, 4, 10, 8), (1, 7), (1, 3), 0, 2),
    ((1, 5, 8, 4), (2, 3), (1, 1), 0, 2),
    ((1, 5, 9, 8), (2, 2), (1, 1), 0, 8),
    ((1, 3, 12, 4), (1, 9), (1, 1), 0, 4),
    ((1, 4, 11, 4), (4, 4), (1, 1), 0, 4),
]


def _layer(case: tuple[Any, ...], dtype: str) -> tuple[Layer, Array, Array]:
    """A layer, its data and what it gives."""
    shape, kernel, strides, border, _ = case
    w = full_range((*kernel, 1, shape[3]), "int8")

    def body(e: Any, data: relax.Expr) -> relax.Expr:
        padded = e(R.nn.pad(data, [0, 0, border, border, border, border, 0, 0], pad_value=7)) if border else data
        acc = e(
            R.nn.conv2d(
                padded,
                relax.const(w),
                strides=strides,
                groups=shape[3],
                data_layout="NHWC",
                kernel_layout="HWIO",
                out_dtype="int32",
            )
        )
        return requantized(e, acc, shape[3])

    x = full_range(shape, dtype)
    module = packed(body, [(shape, dtype)])
    (expected,) = evaluate(module, {"x0": x}).values()
    return layer_of(module), x, expected


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows_with_threads_as_loops(case, dtype):
    layer, x, expected = _layer(case, dtype)
    kernel = CudaDepthwise(spelled=False).build(layer, TARGET, CudaDepthwiseTile(case[-1], 4))
    out = np.zeros_like(expected)
    on_cpu.execute(kernel.func, [x, *kernel.arguments], [out])
    np.testing.assert_array_equal(out, expected, strict=True)


@needs_gxx
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_windows_in_cuda_source(case, dtype):
    layer, x, expected = _layer(case, dtype)
    kernel = CudaDepthwise().build(layer, TARGET, CudaDepthwiseTile(case[-1], 4))
    assert "hawq::windows" in kernel.func.script()
    for arch in (ARCHITECTURES[0], ARCHITECTURES[-1]):
        out = np.zeros_like(expected)
        run(kernel.func, [x, *kernel.arguments], [out], arch, TARGET)
        np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize(
    ("pixels", "lanes", "taps", "dilation", "data", "weights"),
    [
        (1, 4, 3, 1, "uint8", "int8"),
        (4, 4, 3, 1, "uint8", "int8"),
        (2, 2, 3, 1, "uint8", "int8"),
        (2, 4, 1, 1, "uint8", "int8"),
        (2, 4, 3, 2, "uint8", "int8"),
        (2, 4, 3, 1, "int16", "int8"),
        (2, 4, 3, 1, "uint8", "int16"),
    ],
)
def test_what_dp4a_does_not_fit_is_left_to_loops(pixels, lanes, taps, dilation, data, weights):
    w = np.ones((3, taps, 1, 4), weights)

    def body(e: Any, x: relax.Expr) -> relax.Expr:
        return R.nn.conv2d(
            x, relax.const(w), dilation=dilation, groups=4, data_layout="NHWC", kernel_layout="HWIO", out_dtype="int32"
        )

    module = packed(body, [((1, 8, 8, 4), data)])
    kernel = CudaDepthwise().build(layer_of(module), TARGET, CudaDepthwiseTile(pixels, lanes))
    assert "hawq::windows" not in kernel.func.script()
