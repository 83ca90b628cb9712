"""Depthwise convolutions on a GPU: a thread computes a few pixels of a line, of four channels, whatever kernel,
stride and dilation.

    for (n, line, block of pixels, four channels) in parallel:
        acc[pixels][4] = 0                                      registers
        for kh (unrolled):
            row = the data that the pixels need, words of four channels; taps = a row of the weights
            for kw, pixel, channel (unrolled): acc += row * taps    `windows`: four products of bytes at once (dp4a)
        out = epilogue(acc), stored in words of four channels

Where dp4a does not fit (a dilated line, a single tap or pixel, pixels that do not divide a line, more than 8 bits,
unsigned weights, other numbers of channels), a number is opened to 32 bits once and serves every tap of its line.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, te

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d
from schedules.cpu.cpu_depthwise import Depthwise
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.dp4a_intrinsics import CHANNELS, windows

from .cuda_loops import MANY_THREADS, bind_grid, fuse_outer, start, vectorize_copy

_UNROLLED = 32  # taps of a kernel, up to which every loop over them is unrolled


@dataclass(frozen=True)
class CudaDepthwiseTile:
    """What a thread computes: `pixels` of a line, of `lanes` channels."""

    pixels: int
    lanes: int

    def __post_init__(self) -> None:
        if self.pixels < 1 or self.lanes not in (1, 2, 4):
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{self.pixels} pixels of {self.lanes} channels"


class CudaDepthwise(Depthwise):
    """conv2d with one input channel per group.

    spelled: False writes `windows` as its meaning, to run on a CPU.
    """

    name = "cuda.depthwise"

    def __init__(self, spelled: bool = True) -> None:
        self.spelled = spelled

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[CudaDepthwiseTile]:  # type: ignore[override]
        """Blocks of pixels that divide a line: more of them read less data twice, fewer leave more threads."""
        call = layer.anchor_call
        assert call is not None
        shape = ops.shape_of(call)
        lanes = gcd(shape[3], 4) if ops.shape_of(call.args[0])[3] == shape[3] else 1
        sizes = [p for p in (4, 7, 8, 2, 1) if shape[2] % p == 0 and p * _taps(layer) <= 256]
        threads = prod(shape) // lanes
        sizes.sort(key=lambda p: (threads // p < MANY_THREADS and p > 1, -min(p, 4), p))
        return [CudaDepthwiseTile(p, lanes) for p in sizes or [1]]

    def build(self, layer: Layer, target: tvm.target.Target, tile: CudaDepthwiseTile | None = None) -> Kernel:  # type: ignore[override]
        """See the loops at the top of this file."""
        tile = tile or self.tiles(layer, target)[0]
        emission = Emission(layer, {"relax.nn.conv2d": _emit})
        sch = start(layer, emission, keep=("rows",))
        _schedule(sch, tile, _taps(layer) <= _UNROLLED, _windows(layer, tile, self.spelled))
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), tile)


def _taps(layer: Layer) -> int:
    call = layer.anchor_call
    assert call is not None
    kh, kw = ops.shape_of(call.args[1])[:2]
    return kh * kw


def _windows(layer: Layer, tile: CudaDepthwiseTile, spelled: bool) -> str:
    """The intrinsic of a line's products, if there is one."""
    call = layer.anchor_call
    assert call is not None
    (data, weights), taps = (ops.dtype_of(a) for a in call.args), ops.shape_of(call.args[1])[1]
    if (
        tile.lanes != CHANNELS
        or min(tile.pixels, taps) == 1
        or ops.shape_of(call)[2] % tile.pixels
        or Conv2d.of(call).dilation[1] > 1
    ):
        return ""
    if data not in ("uint8", "int8") or weights != "int8":
        return ""
    return windows(tile.pixels, taps, Conv2d.of(call).strides[1], data, spelled)


def _emit(e: Emission, call: relax.Call) -> te.Tensor:
    x, kernel = e.operand(call.args[0]), e.layer.constant(call.args[1])
    n, h, w, c_in = x.shape
    shape = ops.shape_of(call)
    a, times = Conv2d.of(call), shape[3] // c_in
    (sh, sw), (dh, dw) = a.strides, a.dilation
    # Weights stored in 4 bits are opened now: a depthwise kernel's are too few to be worth it at run time.
    weights = e.argument(np.ascontiguousarray(kernel.reshape(*kernel.shape[:2], shape[3])), "weights")
    rows = te.compute((n, h, w, c_in), lambda *i: x.at(i), name="rows")
    kh, kw = te.reduce_axis((0, kernel.shape[0]), "kh"), te.reduce_axis((0, kernel.shape[1]), "kw")

    def accumulate(b: Any, y: Any, p: Any, c: Any) -> Any:
        data = rows(b, y * sh + kh * dh, p * sw + kw * dw, c // times if times > 1 else c)
        return te.sum(data.astype("int32") * weights(kh, kw, c).astype("int32"), axis=[kh, kw])

    return te.compute(shape, accumulate, name="acc")


def _schedule(sch: s_tir.Schedule, tile: CudaDepthwiseTile, unrolled: bool, intrinsic: str) -> None:
    acc, rows = sch.get_sblock("acc"), sch.get_sblock("rows")
    (out,) = sch.get_output_blocks(sch.get_sblock("root"))
    alone = sch.get(out).name_hint == "acc"
    n, y, w, c, kh, kw = sch.get_loops(acc)
    w_outer, pixel = sch.split(w, [None, tile.pixels])
    c_outer, lane = sch.split(c, [None, tile.lanes])
    sch.reorder(n, y, w_outer, c_outer, kh, kw, pixel, lane)
    element = fuse_outer(sch, [n, y, w_outer, c_outer], acc)
    sch.compute_at(rows, kh, preserve_unit_loops=True)
    sch.set_scope(rows, 0, "local")
    taps = sch.cache_read(acc, _reads(sch, acc, "weights"), "local")
    sch.compute_at(taps, kh, preserve_unit_loops=True)
    if alone:
        out = sch.cache_write(acc, 0, "local")
        sch.reverse_compute_at(out, element, preserve_unit_loops=True)
    else:
        sch.reverse_compute_at(out, element, preserve_unit_loops=True)
        sch.set_scope(acc, 0, "local")
        computed, out = out, sch.cache_write(out, 0, "local")
        sch.reverse_compute_at(out, element, preserve_unit_loops=True)
        for loop in sch.get_loops(computed)[-2:]:
            sch.unroll(loop)
    for copy in (rows, taps, out):
        sch.unroll(sch.get_loops(copy)[-2])
        vectorize_copy(sch, copy)
    if unrolled:
        sch.unroll(kh)
    if not intrinsic:
        for loop in (*((kw,) if unrolled else ()), pixel, lane):
            sch.unroll(loop)
        bind_grid(sch, element)
        sch.decompose_reduction(acc, kh)
        return
    # Spelled before it is dealt out, because `tensorize` takes no block with a condition, in a block that still clears
    # its sums.
    products = sch.blockize(kw)
    sch.tensorize(sch.get_loops(acc)[-3], intrinsic)
    bind_grid(sch, element)
    cleared = sch.decompose_reduction(products, kh)
    for loop in sch.get_loops(sch.get_child_blocks(cleared)[0])[-2:]:
        sch.unroll(loop)


def _reads(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, name: str) -> int:
    """Which of the buffers that a stage reads has a name."""
    return next(k for k, region in enumerate(sch.get(block).reads) if str(region.source.name) == name)
