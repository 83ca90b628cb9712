"""Depthwise convolutions with vpdpbusd: the taps of a column, four to a 32-bit lane, are one step of sixteen channels.

    for (n, row) in parallel:
      quads[g, column, c] = the 8-bit data of rows 4 g .. 4 g + 3 under the window     32 bits each, in the first cache
      for block of pixels, for vector of channels:
        acc[pixels] = 0                                                                registers
        for g, kw (unrolled): acc[p] += quads[g, p + kw] . weights[g, kw]              four products per lane
        out = epilogue(acc)
A column's quads are made once and serve every window that it lies in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, te, tirx
from tvm.s_tir.schedule import LoopRV

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d
from schedules.emit.emit import Emission, Operand, immediate
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.intrinsics import dot_quads

from .ahead import Place, fetched_ahead
from .contraction import without_offset
from .cpu_depthwise import Depthwise, blocks_of_pixels
from .epilogue import Epilogue
from .loops import inline_all
from .vector_unit import VectorUnit
from .x86_vnni import shift_leaves_int32


@dataclass(frozen=True)
class QuadsTile:
    """Accumulators of `pixels` vectors of `lanes` channels."""

    pixels: int
    lanes: int

    def __post_init__(self) -> None:
        if min(self.pixels, self.lanes) < 1:
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{self.pixels} pixels of {self.lanes} channels, depth 4"


def tiles_of(pixels: int, unit: VectorUnit) -> list[QuadsTile]:
    """The blocks of pixels that waste least, and of those the largest first, that leave registers for data and
    constants.
    """
    return [QuadsTile(p, unit.lanes) for p in blocks_of_pixels(pixels, 14 if unit.registers > 16 else 6)]


class VnniDepthwise:
    """conv2d with one input and one output channel per group, of u8 or s8 data and s8 weights."""

    name = "x86.vnni_depthwise"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """A depthwise convolution of 8 bits on a CPU with vpdpbusd."""
        if not VectorUnit.of(target).quads:
            return "the target has no VNNI."
        why = Depthwise().applies(layer, target)
        call = layer.anchor_call
        if why or call is None:
            return why
        x, w = call.args
        if ops.dtype_of(x) not in ("uint8", "int8") or (ops.dtype_of(w) != "int8" and layer.width(w) == 8):
            return "data or weights of more than 8 bits, or weights that are not int8."
        if ops.shape_of(call)[3] != ops.shape_of(x)[3]:
            return "several outputs per input channel."
        return shift_leaves_int32(layer, call)

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[QuadsTile]:
        """Blocks of pixels."""
        return tiles_of(ops.shape_of(layer.anchor_call)[2], VectorUnit.of(target))

    def build(self, layer: Layer, target: tvm.target.Target, tile: QuadsTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        channels = ops.shape_of(layer.anchor_call)[3]
        tile = tile or self.tiles(layer, target)[0]
        emission = Emission(layer, {"relax.nn.conv2d": lambda e, c: _emit(e, c, tile)})
        sch = s_tir.Schedule(emission.prim_func())
        block, products = _schedule(sch, tile, channels)
        place = Place(block, products, 2, 1, tile.pixels, 1, -(-channels // tile.lanes))
        func = fetched_ahead(sch, sch.mod["main"], layer, place)
        return Kernel(func, tuple(a for _, a in emission.arguments), tile)


def _emit(e: Emission, call: relax.Call, tile: QuadsTile) -> Operand:
    x, w = e.operand(call.args[0]), e.layer.constant(call.args[1])
    n, _, w_in, channels = x.shape
    _, oh, ow, _ = ops.shape_of(call)
    a = Conv2d.of(call)
    (sh, sw), (dh, dw) = a.strides, a.dilation
    kh, kw = w.shape[:2]
    words, vectors = -(-kh // 4), -(-channels // tile.lanes)
    pixels = -(-ow // tile.pixels) * tile.pixels
    columns = max(w_in, (pixels - 1) * sw + (kw - 1) * dw + 1)
    offset = 128 if x.dtype == "int8" else 0

    def quad(b: Any, y: Any, g: Any, column: Any, c: Any) -> tirx.Expr:
        total: tirx.Expr = immediate(0, "int32")
        for k in range(4):
            if words == 1 and k >= kh:
                break
            value = x.at([b, y * sh + (4 * g + k) * dh, column, c]).astype("int32") + immediate(offset, "int32")
            if words > 1 and k >= kh - 4 * (words - 1):
                value = tirx.if_then_else(g < words - 1, value, immediate(0, "int32"))
            total = total + (value << immediate(8 * k, "int32"))
        inside = [column < w_in] if columns > w_in else []
        inside += [c < channels] if channels % tile.lanes else []
        return tirx.if_then_else(tirx.all(*inside), total, immediate(0, "int32")) if inside else total

    quads = te.compute((n, oh, words, columns, vectors * tile.lanes), quad, name="quads")
    kernel = e.argument(_weights(w, words, vectors, tile.lanes), "weights")
    g, t, k = (te.reduce_axis((0, size), name) for size, name in ((words, "g"), (kw, "kw"), (4, "k")))

    def accumulate(b: Any, y: Any, p: Any, v: Any, lane: Any) -> tirx.Expr:
        quad = quads(b, y, g, p * sw + t * dw, v * tile.lanes + lane)
        return te.sum(((quad >> (k * 8)) & 255) * kernel(g, t, v, lane, k).astype("int32"), axis=[g, t, k])

    acc = te.compute((n, oh, pixels, vectors, tile.lanes), accumulate, name="acc")
    view = te.compute(
        (n, oh, ow, channels), lambda *i: acc(*i[:-1], i[-1] // tile.lanes, i[-1] % tile.lanes), name="view"
    )
    return without_offset(e, call, view, offset)


def _weights(w: np.ndarray[Any, Any], words: int, vectors: int, lanes: int) -> np.ndarray[Any, Any]:
    """HWIO weights as [word, kw, vector, lane, 4], zeros at the ends."""
    kh, kw, *_, channels = w.shape
    full = np.zeros((4 * words, kw, vectors * lanes), np.int8)
    full[:kh, :, :channels] = w.reshape(kh, kw, channels)
    return np.ascontiguousarray(np.moveaxis(full.reshape(words, 4, kw, vectors, lanes), 1, -1))


def _schedule(sch: s_tir.Schedule, tile: QuadsTile, channels: int) -> tuple[LoopRV, LoopRV]:
    """The loop around a block with its epilogue, and that around its products."""
    epilogue = Epilogue(sch, channels, tile.lanes)
    inline_all(sch, keep=("acc", "quads", *epilogue.kept))
    acc, quads = sch.get_sblock("acc"), sch.get_sblock("quads")
    n, y, w, v, lane, g, t, k = sch.get_loops(acc)
    w_outer, w_inner = sch.split(w, [None, tile.pixels])
    sch.reorder(n, y, w_outer, v, g, t, w_inner, lane, k)
    task = sch.fuse(n, y)
    sch.parallel(task)
    sch.compute_at(quads, task)
    sch.vectorize(sch.split(sch.get_loops(quads)[-1], [None, tile.lanes])[-1])
    copy = sch.cache_write(acc, 0, "local")
    sch.transform_layout(copy, ("write", 0), lambda *i: (*i[:-2], i[-2] * tile.lanes + i[-1]))
    epilogue.spell()
    sch.reverse_compute_at(copy, v, preserve_unit_loops=True)
    init = sch.decompose_reduction(acc, g)
    # The copy keeps a loop of one vector between its pixels and their lanes, the zeros have none.
    for in_w, in_lane in (sch.get_loops(init)[-2:], sch.get_loops(copy)[-3::2]):
        sch.unroll(in_w)
        sch.vectorize(in_lane)
    for loop in (g, t, w_inner):
        sch.unroll(loop)
    sch.tensorize(lane, dot_quads(tile.lanes))
    epilogue.compute_at(v, gcd(channels, tile.lanes))
    return v, g
