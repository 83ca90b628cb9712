"""Pools and reductions that keep the last axis, on a GPU.

    for (position, vector of channels) in parallel:
        acc = identity                                          registers
        for window: load a vector of x; for lane: acc = reduce(acc, x)
        out = epilogue(acc), stored as a vector

A large window over few positions (global pooling) is shared by the threads of a block, a channel each:

    for (position, 32 channels) in parallel: for 8 parts of the window in parallel:
        acc = identity; for part: acc = reduce(acc, x)
        acc = reduce over the 8 parts; out = epilogue(acc)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import tvm
from tvm import s_tir

from hawq_tvm.core import ops
from schedules.cpu.cpu_window import BLOCKS, keeps_last_axis
from schedules.cpu.loops import extent
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .cuda_loops import (
    MANY_THREADS,
    WARP,
    bind_grid,
    blocks,
    fuse_outer,
    lanes_for,
    share_reduction,
    spatial_and_reduction,
    start,
    vectorize_copy,
)

_PARTS = 8
_SHARE_FROM = 32  # steps of a window


@dataclass(frozen=True)
class CudaWindowTile:
    """`lanes` channels of a thread; the window shared by `parts` threads."""

    lanes: int
    parts: int

    def __str__(self) -> str:
        return f"{self.lanes} channels" + (f", window in {self.parts} parts" if self.parts > 1 else "")


class CudaWindow:
    """max_pool2d, sum_pool2d, sum, max, min over other axes than the last."""

    name = "cuda.window"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """A window in NHWC, or a reduction that keeps the last axis."""
        why = keeps_last_axis(layer)
        return why or layer.epilogue_moves_data()

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """See the loops at the top of this file."""
        call = layer.anchor_call
        assert call is not None
        shape = ops.shape_of(call)
        emission = Emission(layer)
        sch = start(layer, emission, keep=("pad",))
        acc = sch.get_sblock(BLOCKS[ops.op_name(call)])
        _, reduction = spatial_and_reduction(sch, acc)
        steps = prod(extent(sch, lp) for lp in reduction)
        # With whole warps across, parts are added with barriers between; within a warp TVM would leave them out.
        shared = steps >= _SHARE_FROM and prod(shape) < MANY_THREADS and prod(shape) % WARP == 0
        tile = CudaWindowTile(1, _PARTS) if shared else CudaWindowTile(lanes_for(shape[-1], prod(shape)), 1)
        (_shared if shared else _vectors)(sch, acc, tile)
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), tile)


def _vectors(sch: s_tir.Schedule, acc: s_tir.schedule.SBlockRV, tile: CudaWindowTile) -> None:
    spatial, window = spatial_and_reduction(sch, acc)
    vectors, lane = sch.split(spatial[-1], [None, tile.lanes])
    sch.reorder(*spatial[:-1], vectors, *window, lane)
    element = fuse_outer(sch, [*spatial[:-1], vectors], acc)
    (out,) = sch.get_output_blocks(sch.get_sblock("root"))
    data = next((b for b in blocks(sch) if sch.get(b).name_hint == "pad"), None) or sch.cache_read(acc, 0, "local")
    sch.compute_at(data, window[-1], preserve_unit_loops=True)
    sch.set_scope(data, 0, "local")
    if sch.get(out).name_hint == sch.get(acc).name_hint:
        out = sch.cache_write(acc, 0, "local")
        sch.reverse_compute_at(out, element, preserve_unit_loops=True)
    else:
        sch.reverse_compute_at(out, element, preserve_unit_loops=True)
        sch.set_scope(acc, 0, "local")
        computed = out
        out = sch.cache_write(computed, 0, "local")
        sch.reverse_compute_at(out, element, preserve_unit_loops=True)
        sch.unroll(sch.get_loops(computed)[-1])
    vectorize_copy(sch, out)
    vectorize_copy(sch, data)
    sch.unroll(lane)
    bind_grid(sch, element)
    sch.decompose_reduction(acc, window[0])


def _shared(sch: s_tir.Schedule, acc: s_tir.schedule.SBlockRV, tile: CudaWindowTile) -> None:
    for block in blocks(sch):
        if sch.get(block).name_hint == "pad":
            sch.compute_inline(block)
    spatial, window = spatial_and_reduction(sch, acc)
    sch.reorder(*spatial, *window)
    (out,) = sch.get_output_blocks(sch.get_sblock("root"))
    element = fuse_outer(sch, spatial, acc)
    share_reduction(sch, window, tile.parts, "threadIdx.y")
    if sch.get(out).name_hint == sch.get(acc).name_hint:
        out = sch.cache_write(acc, 0, "local")
    sch.reverse_compute_at(out, element, preserve_unit_loops=True)
    sch.set_scope(acc, 0, "local")
    # No guard, which the threads of a block would have to pass together to reduce together.
    bind_grid(sch, element, WARP, exact=True)
