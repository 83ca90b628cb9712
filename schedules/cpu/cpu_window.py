"""Pools and reductions that keep the last axis, on any CPU: one vector of channels reduced over its window.

for (outer dimensions) in parallel: for vector of channels:
    acc = identity                                          registers
    for window: acc = reduce(acc, x)
    out = epilogue(acc)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import tvm
from tvm import s_tir

from hawq_tvm.core import ops
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .loops import inline_all
from .vector_unit import VectorUnit

BLOCKS = {
    "relax.nn.max_pool2d": "max_pool2d",
    "hawq.sum_pool2d": "sum_pool2d",
    "relax.sum": "sum",
    "relax.max": "max",
    "relax.min": "min",
}


@dataclass(frozen=True)
class WindowTile:
    """`lanes` channels reduced at once."""

    lanes: int

    def __str__(self) -> str:
        return f"{self.lanes} channels"


def keeps_last_axis(layer: Layer) -> str | None:
    """None when a layer's anchor is a pool in NHWC or a reduction of other axes than the last, else a sentence."""
    call = layer.anchor_call
    if call is None or ops.op_name(call) not in BLOCKS:
        return "not a pool or a reduction."
    x = ops.shape_of(call.args[0])
    if "pool" in ops.op_name(call):
        layout = str(call.attrs["layout"])
        if layout != "NHWC":
            return f"the layout is {layout}, not NHWC."
    else:
        axes = call.attrs.axis
        reduced = range(len(x)) if axes is None else [int(a) % len(x) for a in axes]
        if len(x) - 1 in reduced:
            return "the last axis is reduced."
        if all(x[a] == 1 for a in reduced):
            return "nothing is reduced."
    return None


class Window:
    """max_pool2d, sum_pool2d, sum, max, min over other axes than the last."""

    name = "cpu.window"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """A window in NHWC, or a reduction that keeps the last axis, of channels that fill vectors."""
        why = keeps_last_axis(layer)
        if why:
            return why
        channels = ops.shape_of(layer.anchor_call)[-1]
        if gcd(channels, 64) < 4:
            return f"{channels} channels do not fill vectors."
        return layer.epilogue_moves_data()

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """See the loops at the top of this file."""
        call = layer.anchor_call
        assert call is not None
        emission = Emission(layer)
        sch = s_tir.Schedule(emission.prim_func())
        inline_all(sch)
        acc = sch.get_sblock(BLOCKS[ops.op_name(call)])
        width = int(tvm.DataType(str(sch.get(acc).writes[0].source.dtype)).bits)
        tile = WindowTile(gcd(ops.shape_of(call)[-1], max(1, VectorUnit.of(target).lanes * 32 // width)))
        (out,) = sch.get_output_blocks(sch.get_sblock("root"))
        rank = len(ops.shape_of(call))
        loops = sch.get_loops(acc)
        outer, window = loops[: rank - 1], loops[rank:]
        c_outer, c_inner = sch.split(loops[rank - 1], [None, tile.lanes])
        sch.reorder(*outer, c_outer, *window, c_inner)
        copy = sch.cache_write(acc, 0, "local")
        sch.reverse_compute_at(copy, c_outer, preserve_unit_loops=True)
        if sch.get(out).name_hint != sch.get(acc).name_hint:
            sch.reverse_compute_at(out, c_outer, preserve_unit_loops=True)
            sch.vectorize(sch.get_loops(out)[-1])
        sch.vectorize(sch.get_loops(copy)[-1])
        sch.vectorize(c_inner)
        if outer:
            sch.parallel(sch.fuse(*outer))
        sch.decompose_reduction(acc, window[0])
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), tile)
