"""Depthwise convolutions on any CPU: vectors of channels, a few pixels at a time, the taps of a line unrolled.

rows[n, h, w, c] = the padded data in 16 bits, each input channel repeated for its outputs
for (n, row) in parallel:
  for block of pixels, for vector of channels:
    acc[pixels] = 0                                         registers
    for kh: for kw, pixel (unrolled): acc[p] += rows[p + kw] * weights[kh, kw]
    out = epilogue(acc)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import arith, ops
from hawq_tvm.core.attributes import Conv2d
from schedules.emit.emit import Emission, immediate
from schedules.layer import Layer
from schedules.rule import Kernel

from .epilogue import Epilogue
from .loops import inline_all, parallel_outer
from .vector_unit import VectorUnit


@dataclass(frozen=True)
class DepthwiseTile:
    """Accumulators of `pixels` x `lanes` channels; product: the type that holds data times weight exactly."""

    pixels: int
    lanes: int
    product: str

    def __post_init__(self) -> None:
        if min(self.pixels, self.lanes) < 1:
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{self.pixels} pixels of {self.lanes} channels, {self.product} products"


def blocks_of_pixels(pixels: int, most: int) -> list[int]:
    """Sizes of a block of pixels up to `most`, those that waste least first; a block costs its pixels and one more.

    Sizes that cost more than half again as much as the first are not worth trying.
    """
    cost = {p: -(-pixels // p) * (p + 1) for p in range(1, most + 1)}
    return [p for p in sorted(cost, key=lambda p: (cost[p], -p)) if 2 * cost[p] <= 3 * min(cost.values())]


def tiles_of(pixels: int, channels: int, unit: VectorUnit, product: str) -> list[DepthwiseTile]:
    """Two registers of sums per pixel where there are enough channels; the pixels that waste least first, at most
    eight.
    """
    lanes = 2 * unit.lanes if channels > unit.lanes else unit.lanes
    return [DepthwiseTile(p, lanes, product) for p in blocks_of_pixels(pixels, 8 if unit.registers > 16 else 4)]


def is_depthwise(layer: Layer) -> str | None:
    """None for a depthwise convolution of constant weights whose sums of at most 16 bits each fit in int32, else a
    sentence.
    """
    call = layer.anchor_call
    if call is None or ops.op_name(call) != "relax.nn.conv2d":
        return "not a convolution."
    a = Conv2d.of(call)
    if (a.data_layout, a.kernel_layout) != ("NHWC", "HWIO"):
        return f"the layout is {a.data_layout}, {a.kernel_layout}, not NHWC, HWIO."
    if a.groups == 1 or a.groups != ops.shape_of(call.args[0])[3]:
        return "a group has more than one input channel."
    if not layer.is_constant(call.args[1]):
        return "weights that are computed at run time."
    if ops.dtype_of(call) != "int32" or any(ops.dtype_of(a) not in _SMALL for a in call.args):
        return "sums wider than int32, or operands wider than 16 bits."
    return layer.epilogue_moves_data()


class Depthwise:
    """conv2d with one input channel per group."""

    name = "cpu.depthwise"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """As many groups as input channels, constant weights, int32 sums of at most 16 bits each."""
        return is_depthwise(layer)

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[DepthwiseTile]:
        """Blocks of pixels."""
        call = layer.anchor_call
        assert call is not None
        bits = [max(-low, high) for low, high in (arith.RANGES[ops.dtype_of(a)] for a in call.args)]
        unit = VectorUnit.of(target)
        # NEON multiplies 16 bits and adds them to 32 at once (smlal).
        product = "int16" if bits[0] * bits[1] < 2**15 and not unit.neon else "int32"
        _, _, width, channels = ops.shape_of(call)
        return tiles_of(width, channels, unit, product)

    def build(self, layer: Layer, target: tvm.target.Target, tile: DepthwiseTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        channels = ops.shape_of(layer.anchor_call)[3]
        tile = tile or self.tiles(layer, target)[0]
        emission = Emission(layer, {"relax.nn.conv2d": lambda e, c: _emit(e, c, tile)})
        sch = s_tir.Schedule(emission.prim_func())
        _schedule(sch, tile, channels, bool(VectorUnit.of(target).neon))
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), tile)


_SMALL = ("int8", "uint8", "int16")


def _emit(e: Emission, call: relax.Call, tile: DepthwiseTile) -> te.Tensor:
    x, w = e.operand(call.args[0]), e.operand(call.args[1])
    n, h, w_in, c_in = x.shape
    _, oh, ow, channels = ops.shape_of(call)
    a = Conv2d.of(call)
    (sh, sw), (dh, dw) = a.strides, a.dilation
    kh_n, kw_n, times = w.shape[0], w.shape[1], channels // c_in
    wide = -(-channels // tile.lanes) * tile.lanes
    pixels = -(-ow // tile.pixels) * tile.pixels
    columns = max(w_in, (pixels - 1) * sw + (kw_n - 1) * dw + 1)

    def row_element(*i: Any) -> tirx.Expr:
        inside = [i[2] < w_in] if columns > w_in else []
        inside += [i[3] < channels] if wide > channels else []
        value = x.at([*i[:3], i[3] // times]).astype("int16")
        return tirx.if_then_else(tirx.all(*inside), value, immediate(0, "int16")) if inside else value

    rows = te.compute((n, h, columns, wide), row_element, name="rows")
    # Weights stored in 4 bits are opened now: a depthwise kernel's are too few to be worth it at run time.
    kernel = _weights(e, e.layer.constant(call.args[1]), wide)
    kh, kw = te.reduce_axis((0, kh_n), "kh"), te.reduce_axis((0, kw_n), "kw")

    def accumulate(b: Any, y: Any, p: Any, c: Any) -> tirx.Expr:
        product = rows(b, y * sh + kh * dh, p * sw + kw * dw, c).astype(tile.product) * kernel(kh, kw, c).astype(
            tile.product
        )
        return te.sum(product.astype("int32"), axis=[kh, kw])

    acc = te.compute((n, oh, pixels, wide), accumulate, name="acc")
    return te.compute((n, oh, ow, channels), lambda *i: acc(*i), name="view")


def _weights(e: Emission, w: np.ndarray[Any, Any], wide: int) -> te.Tensor:
    flat = w.reshape(w.shape[0], w.shape[1], -1).astype(np.int16)
    return e.argument(np.pad(flat, ((0, 0), (0, 0), (0, wide - flat.shape[2]))), "weights")


def _schedule(sch: s_tir.Schedule, tile: DepthwiseTile, channels: int, neon: bool) -> None:
    epilogue = Epilogue(sch, channels, tile.lanes, neon=neon)
    inline_all(sch, keep=("acc", "rows", *epilogue.kept))
    acc, rows = sch.get_sblock("acc"), sch.get_sblock("rows")
    n, y, w, c, kh, kw = sch.get_loops(acc)
    w_outer, w_inner = sch.split(w, [None, tile.pixels])
    c_outer, c_inner = sch.split(c, [None, tile.lanes])
    sch.reorder(n, y, w_outer, c_outer, kh, kw, w_inner, c_inner)
    sch.parallel(sch.fuse(n, y))
    copy = sch.cache_write(acc, 0, "local")
    epilogue.spell()
    sch.reverse_compute_at(copy, c_outer, preserve_unit_loops=True)
    copied_w, copied_c = sch.get_loops(copy)[-2:]
    for loop in (kw, w_inner, copied_w):
        sch.unroll(loop)
    for loop in (c_inner, copied_c):
        sch.vectorize(loop)
    sch.decompose_reduction(acc, kh)
    epilogue.compute_at(c_outer, gcd(channels, tile.lanes))
    sch.vectorize(sch.split(sch.get_loops(rows)[-1], [None, gcd(channels, tile.lanes)])[-1])
    parallel_outer(sch, rows, inner=3)
