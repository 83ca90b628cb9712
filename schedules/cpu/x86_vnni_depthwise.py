"""Depthwise convolutions with vpdpbusd: the taps of a column, four to a 32-bit lane, are one step of sixteen channels.

    for (n, lines of results) in parallel, for group of channels:
      quads[g, column, c] = the 8-bit data of rows 4 g .. 4 g + 3 under the window     32 bits each, in the first cache
      for line, for block of pixels:
        acc[pixels, vectors] = 0                                                       registers
        for vector, for g, kw (unrolled): acc[p] += quads[g, p + kw] . weights[g, kw]  four products per lane
        out = epilogue(acc)
A column's quads are made once and serve every window that it lies in, and two lines of results where both windows have
no more than four rows. A group is several vectors where sums become bytes (`quads.py`), else one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d
from schedules.emit.begun import begun
from schedules.emit.emit import Emission, Emitter, Operand, immediate
from schedules.emit.emit_requantize import requantize
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.intrinsics import dot_quads

from .ahead import Place, fetched_ahead
from .contraction import without_offset
from .cpu_depthwise import Depthwise, blocks_of_pixels
from .epilogue import Epilogue, at_once, in_rows, is_in_rows
from .loops import inline_all
from .quads import Woven
from .vector_unit import VectorUnit
from .x86_vnni import shift_leaves_int32


@dataclass(frozen=True)
class QuadsTile:
    """Accumulators of `pixels` x `vectors` vectors of `lanes` channels; several vectors are woven (`quads.py`)."""

    pixels: int
    lanes: int
    vectors: int = 1

    def __post_init__(self) -> None:
        if min(self.pixels, self.lanes) < 1 or self.vectors not in (1, 2, 4):
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{self.pixels} pixels of {self.vectors * self.lanes} channels, depth 4"


def tiles_of(pixels: int, unit: VectorUnit, vectors: int = 1) -> list[QuadsTile]:
    """The blocks of pixels that waste least, and of those the largest first, that leave registers for data and
    constants.
    """
    if vectors > 1:
        most, enough = (28, 8) if unit.registers > 16 else (12, 4)
        whole = [p for p in range(1, most // vectors + 1) if pixels % p == 0]
        whole.sort(key=lambda p: (p * vectors < enough, abs(p * vectors - enough)))
        return [QuadsTile(p, unit.lanes, vectors) for p in whole]
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
        unit, pixels = VectorUnit.of(target), ops.shape_of(layer.anchor_call)[2]
        for vectors in (4, 2):
            tiles = tiles_of(pixels, unit, vectors)
            if tiles and _Form.of(layer, tiles[0], unit).tile == tiles[0]:
                return tiles
        return tiles_of(pixels, unit)

    def build(self, layer: Layer, target: tvm.target.Target, tile: QuadsTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        unit = VectorUnit.of(target)
        tile = tile or self.tiles(layer, target)[0]
        form = _Form.of(layer, tile, unit)
        tile = form.tile
        size = tile.vectors * tile.lanes
        unscheduled = begun(form.emission.prim_func(), lambda v: v[3] * size + v[4] * tile.lanes + v[5])
        sch = s_tir.Schedule(unscheduled)
        func = _schedule(sch, layer, form, unit)
        return Kernel(func, tuple(a for _, a in form.emission.arguments), tile)


@dataclass(frozen=True, eq=False)
class _Form:
    """A layer written for a tile.  woven: how its quads are made; None where its channels follow each other."""

    emission: Emission
    tile: QuadsTile
    woven: Woven | None

    @staticmethod
    def of(layer: Layer, tile: QuadsTile, unit: VectorUnit) -> _Form:
        """With woven quads where the tile has several vectors and the layer can be written so."""
        call = layer.anchor_call
        assert call is not None
        (*_, pixels, channels), vectors, woven = ops.shape_of(call), tile.vectors, None
        if vectors == 1 or at_once(channels, tile.lanes, vectors, unit.packs, whole=True) == vectors:
            woven = Woven.of(layer, call, vectors, tile.lanes)

        def emitted(packs: int, rows: bool = False) -> Emission:
            overrides: dict[str, Emitter] = {
                "relax.nn.conv2d": lambda e, c: _emit(e, c, tile, woven),
                "hawq.requantize": lambda e, c: requantize(
                    e, c, packs, vectors if vectors > 1 else 0, begins=packs > 0, rows=rows
                ),
            }
            return Emission(layer, overrides)

        whole = pixels % tile.pixels == 0
        if vectors == 1 and in_rows(tile.pixels, channels, tile.lanes, vectors, unit.packs, whole):
            emission = emitted(tile.lanes, rows=True)
            if is_in_rows(emission):
                return _Form(emission, tile, woven)
        emission = emitted(tile.lanes if vectors > 1 and woven else 0)
        if vectors > 1 and not (woven and _becomes_bytes(emission.results)):
            return _Form.of(layer, QuadsTile(tile.pixels, tile.lanes), unit)
        return _Form(emission, tile, woven)


def _becomes_bytes(results: Sequence[te.Tensor]) -> bool:
    """Whether nothing but a stage of bytes reads the sums."""
    stages, readers = list(results), set()
    while stages:
        stage = stages.pop()
        for tensor in stage.op.input_tensors:
            if tensor.op.name == "view":
                readers.add(str(stage.op.name))
            stages.append(tensor)
    return readers == {"scaled_bytes"}


def _emit(e: Emission, call: relax.Call, tile: QuadsTile, woven: Woven | None) -> Operand:
    x, w = e.operand(call.args[0]), e.layer.constant(call.args[1])
    n, _, w_in, channels = x.shape
    _, oh, ow, _ = ops.shape_of(call)
    a = Conv2d.of(call)
    (sh, sw), (dh, dw) = a.strides, a.dilation
    kh, kw = w.shape[:2]
    lines, rows = (woven.lines, woven.rows) if woven else (1, kh)
    words, size = -(-rows // 4), tile.vectors * tile.lanes
    groups = -(-channels // size)
    pixels = -(-ow // tile.pixels) * tile.pixels
    columns = max(w_in, (pixels - 1) * sw + (kw - 1) * dw + 1)
    offset = 128 if x.dtype == "int8" else 0

    def quad(b: Any, y: Any, g: Any, column: Any, group: Any, v: Any, lane: Any) -> tirx.Expr:
        c = group * size + (woven.channel(v, lane) if woven else lane)
        total: tirx.Expr = immediate(0, "int32")
        for k in range(4):
            if words == 1 and k >= rows:
                break
            value = x.at([b, y * (lines * sh) + (4 * g + k) * dh, column, c]).astype("int32")
            value = value + immediate(offset, "int32")
            if words > 1 and k >= rows - 4 * (words - 1):
                value = tirx.if_then_else(g < words - 1, value, immediate(0, "int32"))
            total = total + (value << immediate(8 * k, "int32"))
        inside = [column < w_in] if columns > w_in else []
        inside += [c < channels] if channels % size else []
        return tirx.if_then_else(tirx.all(*inside), total, immediate(0, "int32")) if inside else total

    quads = te.compute((n, oh // lines, words, columns, groups, tile.vectors, tile.lanes), quad, name="quads")
    packed = _weights(w, lines, sh, words, groups * size)
    packed = packed.reshape(*packed.shape[:3], groups, size, 4)
    if woven:
        vs, lanes = np.indices((tile.vectors, tile.lanes))
        packed = packed[..., woven.channel(vs, lanes), :]
    kernel = e.argument(np.ascontiguousarray(packed.reshape(*packed.shape[:4], tile.vectors, tile.lanes, 4)), "weights")
    g, t, k = (te.reduce_axis((0, size), name) for size, name in ((words, "g"), (kw, "kw"), (4, "k")))

    def accumulate(b: Any, y: Any, p: Any, group: Any, v: Any, lane: Any) -> tirx.Expr:
        quad = quads(b, y // lines, g, p * sw + t * dw, group, v, lane)
        weight = kernel(y % lines, g, t, group, v, lane, k)
        return te.sum(((quad >> (k * 8)) & 255) * weight.astype("int32"), axis=[g, t, k])

    acc = te.compute((n, oh, pixels, groups, tile.vectors, tile.lanes), accumulate, name="acc")

    def element(*i: Any) -> tirx.Expr:
        c = i[-1]
        place = woven.order.in_register(c) if woven else (0, c % size)
        return acc(*i[:-1], c // size, *place)

    return without_offset(e, call, te.compute((n, oh, ow, channels), element, name="view"), offset)


def _weights(w: np.ndarray[Any, Any], lines: int, stride: int, words: int, channels: int) -> np.ndarray[Any, Any]:
    """HWIO weights as [line, word, kw, channel, 4], zeros at the ends and where a line of results has no tap."""
    kh, kw, *_, own = w.shape
    full = np.zeros((lines, 4 * words, kw, channels), np.int8)
    for line in range(lines):
        full[line, line * stride : line * stride + kh, :, :own] = w.reshape(kh, kw, own)
    return np.moveaxis(full.reshape(lines, words, 4, kw, channels), 2, -1)


def _schedule(sch: s_tir.Schedule, layer: Layer, form: _Form, unit: VectorUnit) -> tirx.PrimFunc:
    """The kernel of a layer."""
    tile, woven = form.tile, form.woven
    _, _, ow, channels = ops.shape_of(layer.anchor_call)
    whole = ow % tile.pixels == 0
    several = tile.vectors > 1
    packs = unit.packs if several else 0
    epilogue = Epilogue(sch, channels, tile.lanes, tile.vectors, packs, dot=unit.quads, whole=whole, woven=several)
    inline_all(sch, keep=("acc", "quads", *epilogue.kept))
    acc, quads = sch.get_sblock("acc"), sch.get_sblock("quads")
    n, y, w, group, v, lane, g, t, k = sch.get_loops(acc)
    y_outer, y_inner = sch.split(y, [None, woven.lines if woven else 1])
    w_outer, w_inner = sch.split(w, [None, tile.pixels])
    sch.reorder(n, y_outer, group, y_inner, w_outer, v, g, t, w_inner, lane, k)
    sch.parallel(sch.fuse(n, y_outer))
    sch.compute_at(quads, group, preserve_unit_loops=True)
    if not woven:
        sch.vectorize(sch.get_loops(quads)[-1])
    copy = sch.cache_write(acc, 0, "local")
    if not several:
        sch.transform_layout(copy, ("write", 0), lambda *i: (*i[:3], i[3] * tile.lanes + i[5]))
    epilogue.spell()
    sch.reverse_compute_at(copy, w_outer, preserve_unit_loops=True)
    init = sch.decompose_reduction(acc, v)
    # The copy has the loop of one group between its pixels and their vectors, the zeros have none.
    for loops in (sch.get_loops(init)[-3:], sch.get_loops(copy)[-4:]):
        for loop in loops[:-1]:
            sch.unroll(loop)
        sch.vectorize(loops[-1])
    for loop in (v, g, t, w_inner):
        sch.unroll(loop)
    sch.tensorize(lane, dot_quads(tile.lanes))
    epilogue.compute_at(w_outer, gcd(channels, tile.lanes))
    lines, groups = (woven.lines if woven else 1), -(-channels // (tile.vectors * tile.lanes))
    func = fetched_ahead(sch, sch.mod["main"], layer, Place(w_outer, v, 2, lines, tile.pixels, 1, groups))
    if woven:
        func = woven.rewritten(func, layer, sch.get(sch.get_loops(quads)[-7]))
    return epilogue.finished(func)
