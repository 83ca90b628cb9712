"""Convolutions and matrix products on any CPU: a block of accumulators in registers, its epilogue while it is hot.

    for (lead, rows, vectors of channels) in parallel:          one task
      for row, for block of pixels:
        acc[pixels][vectors] = 0                                registers
        for kh, t, step of the run:
          acc[p][v] += data[p] * weights[v]                     unrolled over p and v
        out = epilogue(acc)                                     vectors of L channels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd, isqrt, prod
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm import arith, ops

from .contraction import Packing, Shape, contraction, flat_shape_of, not_a_contraction, shape_of, without_offset
from .emit import Emission, Operand, immediate
from .intrinsics import multiply_add
from .layer import Layer
from .loops import (
    inline_all,
    join_lines,
    parallel_outer,
    schedule_epilogue,
    spell_high_half,
    spells_high_half,
    vectorize_plain,
)
from .rule import Kernel
from .vector_unit import VectorUnit

ALIKE, ENOUGH = 1.05, 14
L2_BYTES = 256 * 1024
TASKS = 8
JOIN = 0.98  # lines are joined where that leaves so much of the estimated work at most: less than a measurement can tell apart is no reason
# The space of tiles: blocks whose estimated work is at most so many times the least, so many at most; tiles in all.
WORTH_TRYING, BLOCKS, TILES = 1.4, 10, 24


@dataclass(frozen=True)
class ContractTile:
    """Accumulators of `pixels` x `vectors` registers of `lanes` int32 each.

    depth: products per lane and step (2 or 4 where an instruction adds so many, 8 for two such instructions).  rows: output rows per task,
    or blocks of pixels per task where all lines of an image are one row.
    """

    pixels: int
    vectors: int
    lanes: int
    depth: int
    rows: int

    def __post_init__(self) -> None:
        if self.depth not in (1, 2, 4, 8) or min(self.pixels, self.vectors, self.lanes, self.rows) < 1:
            raise ValueError(f"not a tile: {self}")

    def __str__(self) -> str:
        return f"{self.pixels}x{self.vectors} vectors of {self.lanes}, depth {self.depth}, {self.rows} rows"


def choose_tile(shape: Shape, unit: VectorUnit, depth: int) -> ContractTile:
    """The block of accumulators with the least estimated work for a shape, and the rows that suit the second level cache."""
    return tiles_of(shape, unit, depth)[0]


def tiles_of(shape: Shape, unit: VectorUnit, depth: int) -> list[ContractTile]:
    """The tiles worth trying for a shape, the most promising first: good blocks with several numbers of rows each."""
    blocks = _blocks(shape, unit, depth)
    least = min(work for work, *_ in blocks)
    ranked = []
    for i, (work, pixels, vectors) in enumerate(blocks[:BLOCKS]):
        if work <= WORTH_TRYING * least:
            block = ContractTile(pixels, vectors, unit.lanes, depth, 1)
            ranked += [(i + j, i, replace(block, rows=rows)) for j, rows in enumerate(_rows(shape, block))]
    # A prefix of the space, all that few trials allow, holds other blocks and other rows than the first.
    return [tile for *_, tile in sorted(ranked, key=lambda r: r[:2])[:TILES]]


def _blocks(shape: Shape, unit: VectorUnit, depth: int) -> list[tuple[float, int, int]]:
    """(estimated work, pixels, vectors) of the blocks of accumulators that fit the registers, the least work first.

    Work per step and block: one multiply-add per accumulator (at least eight to hide its latency), one load per
    pixel and one and a half per vector of weights; blocks that stick out of the tensor count in full. Whole vectors
    of channels make whole blocks, so that their epilogue can be spelled out. Where estimates hardly differ, fewer
    accumulators go first, as long as they hide the latency: a shorter epilogue at a time disturbs the caches less. A prime
    number of blocks in a joined row makes tasks of a single block or one of all, neither of which is good.
    """
    found = []
    # Weights of one step, data, and for nibbles their mask.
    wanted, held = -(-shape.channels // unit.lanes), 2 if depth == 8 else 1
    for vectors in range(1, 9):
        if shape.channels % unit.lanes == 0 and wanted % vectors:
            continue
        for pixels in range(1, 15):
            if pixels * vectors + held * vectors + 1 + held > unit.registers:
                continue
            blocks = -(-shape.pixels // pixels) * -(-wanted // vectors)
            work = blocks * (max(2 * pixels * vectors, 8) + pixels + 1.5 * vectors)
            found.append((work, pixels, vectors))
    least = min(work for work, *_ in found)

    def rank(block: tuple[float, int, int]) -> tuple[int, float]:
        work, pixels, vectors = block
        alike = unit.quads and work <= ALIKE * least and pixels * vectors >= ENOUGH and not (shape.width and is_prime(-(-shape.pixels // pixels)))
        return (0, pixels * vectors) if alike else (1, work)

    return sorted(found, key=rank)


def is_prime(n: int) -> bool:
    """Whether a positive number has no divisor but 1 and itself."""
    return all(n % d for d in range(2, isqrt(n) + 1))


def _rows(shape: Shape, tile: ContractTile) -> list[int]:
    """Rows per task: as many as keep their data in the second level cache while the vectors of channels change, in TASKS or more.

    Then what else is worth trying: the next divisors below and above, a single row, and all.
    """
    lines, length = shape.lead[-1] if shape.lead else 1, shape.row_length
    groups = -(-shape.channels // (tile.lanes * tile.vectors)) * prod(shape.lead[:-1])
    if shape.width:
        lines, length, groups = -(-shape.pixels // tile.pixels), tile.pixels * shape.step, groups * shape.lead[-1]
    most = max(1, min(L2_BYTES // (2 * length), lines * groups // TASKS))
    divisors = [n for n in range(1, lines + 1) if lines % n == 0]
    at = max(i for i, n in enumerate(divisors) if n <= most)
    return list(dict.fromkeys([divisors[at], *divisors[max(at - 1, 0) : at], *divisors[at + 1 : at + 2], 1, lines]))


def form_of(call: relax.Call, unit: VectorUnit, depth: int) -> Shape:
    """The sizes of a contraction: with the lines of an image joined to one row where blocks of pixels stick out of a line and then waste less."""
    plain, flat = shape_of(call, unit.lanes), flat_shape_of(call)
    if flat is None or plain.pixels % choose_tile(plain, unit, depth).pixels == 0:
        return plain
    joined, apart = (prod(s.lead) * min(work for work, *_ in _blocks(s, unit, depth)) for s in (flat, plain))
    return flat if joined <= JOIN * apart else plain


@dataclass(frozen=True)
class Products:
    """How a kernel multiplies: `depth` products per lane and step of data stored as `stored` after adding `offset`.

    intrinsic: its name, for types of data and weights.  in_place: data that needs no border is read where it lies.
    What the offset adds, its product with the sum of an output's weights, is taken off at the end.  bits: the sums
    are 2^bits times too large, which the epilogue's shift makes up for.
    """

    depth: int
    stored: str
    intrinsic: Callable[[str, str], str]
    offset: int = 0
    in_place: bool = False
    bits: int = 0


class Contract:
    """Convolutions and matrix products with any element-wise epilogue.

    unit: the vector unit to write for, by default the target's.
    """

    name = "cpu.contract"

    def __init__(self, unit: VectorUnit | None = None) -> None:
        self.unit = unit

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """One conv2d in NHWC or one matmul of matrices, with at most 16 bits each."""
        if why := not_a_contraction(layer):
            return why
        call = layer.anchor_call
        assert call is not None
        x, w = call.args
        if ops.op_name(call) == "relax.matmul":
            if len(ops.shape_of(x)) < 2 or len(ops.shape_of(w)) < 2:
                return "a matrix times a vector, which has no pixels or no channels."
        elif int(call.attrs.groups) > 1 and not layer.is_constant(w):
            return "grouped weights that are computed at run time."
        return layer.epilogue_moves_data()

    def products(self, layer: Layer, unit: VectorUnit) -> Products:
        """Pairs of 16 bits where the CPU adds them, else one by one in the type of the sums."""
        call = layer.anchor_call
        assert call is not None
        acc = ops.dtype_of(call)
        small = all(fits_int16(ops.dtype_of(a)) for a in call.args)
        depth, stored = 2 if unit.pairs and small else 1, "int16" if small else acc
        return Products(depth, stored, lambda data, weight: multiply_add(unit.lanes, depth, data, weight, acc))

    def _unit(self, call: relax.Call, target: tvm.target.Target) -> VectorUnit:
        unit = self.unit or VectorUnit.of(target)
        return replace(unit, lanes=max(1, unit.lanes // 2), pairs=False) if ops.dtype_of(call) == "int64" else unit

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[ContractTile]:
        """Blocks of accumulators and rows per task."""
        call = layer.anchor_call
        assert call is not None
        unit = self._unit(call, target)
        depth = self.products(layer, unit).depth
        return tiles_of(form_of(call, unit, depth), unit, depth)

    def build(self, layer: Layer, target: tvm.target.Target, tile: ContractTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        call = layer.anchor_call
        assert call is not None
        unit = self._unit(call, target)
        products = self.products(layer, unit)
        shape = form_of(call, unit, products.depth)
        tile = tile or choose_tile(shape, unit, products.depth)
        in_place = products.in_place and layer.is_parameter(call.args[0]) and _fits_in_place(shape, tile)
        products = replace(products, in_place=in_place)
        overrides = {ops.op_name(call): lambda e, c: _emit(e, c, shape, tile, products), "hawq.unpack_int4": constant_int4}
        emission = Emission(layer, overrides)
        sch = s_tir.Schedule(emission.prim_func())
        opened = tile.depth in (2, 4) and layer.is_four_bits(call.args[1])
        weight = "int8" if opened else ops.dtype_of(call.args[1])
        data = ops.dtype_of(call.args[0]) if in_place else products.stored
        _schedule(sch, shape, tile, products.intrinsic(data, weight))
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), tile)


def fits_int16(dtype: str) -> bool:
    """Whether every value of an integer type is an int16."""
    low, high = arith.RANGES[dtype]
    return low >= -(2**15) and high < 2**15


def constant_int4(e: Emission, call: relax.Call) -> Operand:
    """4-bit weights that stay packed."""
    packed, shape, signed = ops.const_value(call.args[0]), ops.shape_of(call), bool(int(call.attrs["signed"]))
    return Operand(e, value=arith.unpack_int4(packed, shape, signed), four_bits=True)


def _emit(e: Emission, call: relax.Call, s: Shape, tile: ContractTile, products: Products) -> Operand:
    """Stages: rows (the padded data as stored; none where the data can be read in place), acc (rounded up to whole
    tiles), and the view of it the layer sees."""
    blocks = -(-s.channels // (tile.lanes * tile.vectors))
    c = contraction(e, call, Packing(blocks, tile.vectors, tile.lanes, tile.depth), s if s.width else None)
    pixels, length = _rounded_up(s, tile)

    def element(*i: Any) -> tirx.Expr:
        value = c.element(i[:-1], i[-1])
        return value.astype("int32") + immediate(products.offset, "int32") if products.offset else value

    def row_element(*i: Any) -> tirx.Expr:
        value = element(*i).astype(products.stored)
        if length == s.row_length:
            return value
        return tirx.if_then_else(i[-1] < s.row_length, value, immediate(0, products.stored))

    rows = element if products.in_place else te.compute((*s.rows, length), row_element, name="rows")
    kh, t = te.reduce_axis((0, s.taps[0]), "kh"), te.reduce_axis((0, s.taps[1]), "t")
    j = te.reduce_axis((0, -(-s.run // tile.depth)), "j")
    p = [te.reduce_axis((0, tile.depth), "p")] if tile.depth > 1 else []

    def accumulate(*i: Any) -> tirx.Expr:
        *lead, w, vector, lane = i
        start = s.start(tirx.Min(vector, immediate((s.channels - 1) // tile.lanes, "int32")), tile.lanes)
        if products.in_place and pixels > s.pixels:
            w = tirx.Min(w, immediate(s.pixels - 1, "int32"))  # what lies beyond the data must not be read
        x = rows(*c.row(lead, kh), w * s.step + t * s.hop + start + sum(p, j * tile.depth))
        block, own = vector // tile.vectors, vector % tile.vectors
        weight = c.weights(*c.weight_lead(lead), block, kh, t, j, own, lane, *p)
        return te.sum(x.astype(c.dtype) * weight.astype(c.dtype), axis=[kh, t, j, *p])

    acc = te.compute((*s.lead, pixels, blocks * tile.vectors, tile.lanes), accumulate, name="acc")

    def element_of(*i: Any) -> tirx.Expr:
        *first, channel = [i[0], i[1] * s.width + i[2], i[3]] if s.width else i
        return acc(*first, channel // tile.lanes, channel % tile.lanes)

    view = te.compute(ops.shape_of(call), element_of, name="view")
    return without_offset(e, call, view, products.offset, products.bits)


def _rounded_up(s: Shape, tile: ContractTile) -> tuple[int, int]:
    """The pixels of a row in whole tiles, and the elements of data that they read: whole pixels."""
    pixels = -(-s.pixels // tile.pixels) * tile.pixels
    needed = max(s.row_needed(pixels, tile.lanes, tile.depth), s.row_length)
    return pixels, -(-needed // s.per_pixel) * s.per_pixel


def _fits_in_place(s: Shape, tile: ContractTile) -> bool:
    """Whether whole tiles read nothing beyond a row, which joined rows of single taps see to, and a step lies within a pixel."""
    inside = _rounded_up(s, tile)[1] == s.row_length or (s.width > 0 and s.taps == (1, 1))
    return inside and s.per_pixel % tile.depth == 0 and s.groups == 1


def _schedule(sch: s_tir.Schedule, shape: Shape, tile: ContractTile, intrinsic: str) -> None:
    spelled = ("high",) if spells_high_half(shape.channels, tile.lanes) else ()
    inline_all(sch, keep=("acc", "rows", "packed", "unpacked", *spelled))
    acc = sch.get_sblock("acc")
    (out,) = sch.get_output_blocks(sch.get_sblock("root"))
    if shape.width:
        join_lines(sch, out, shape.width)

    loops = sch.get_loops(acc)
    lead, (w, vector, lane, kh, t, j, *p) = loops[: len(shape.lead)], loops[len(shape.lead) :]
    w_outer, w_inner = sch.split(w, [None, tile.pixels])
    v_outer, v_inner = sch.split(vector, [None, tile.vectors])
    tasks, inside = lead, []
    if shape.width:
        task, w_outer = sch.split(w_outer, [None, tile.rows])
        tasks = [*lead, task]
    elif lead:
        row_outer, row_inner = sch.split(lead[-1], [None, tile.rows])
        tasks, inside = [*lead[:-1], row_outer], [row_inner]
    sch.reorder(*tasks, v_outer, *inside, w_outer, kh, t, j, w_inner, v_inner, lane, *p)
    task = sch.fuse(*tasks, v_outer)
    sch.parallel(task)

    schedule_operands(sch, sch.get_producers(acc), shape, task, tile.lanes, tile.depth)
    copy = sch.cache_write(acc, 0, "local")
    sch.transform_layout(copy, ("write", 0), lambda *i: (*i[:-2], i[-2] * tile.lanes + i[-1]))
    high = spell_high_half(sch, tile.lanes)
    sch.reverse_compute_at(copy, w_outer, preserve_unit_loops=True)
    init = sch.decompose_reduction(acc, kh)
    for block in (init, copy):
        *_, in_w, in_v, in_lane = sch.get_loops(block)
        sch.unroll(in_w)
        sch.unroll(in_v)
        sch.vectorize(in_lane)
    sch.unroll(w_inner)
    sch.unroll(v_inner)
    sch.tensorize(lane, intrinsic)

    schedule_epilogue(sch, high, out, w_outer, gcd(shape.channels, tile.lanes))


def schedule_operands(
    sch: s_tir.Schedule, producers: Sequence[s_tir.schedule.SBlockRV], shape: Shape, task: s_tir.schedule.LoopRV, lanes: int, depth: int
) -> None:
    """The stages that prepare a contraction's operands: 4-bit weights opened, run-time weights packed, rows copied."""
    for producer in producers:
        name = sch.get(producer).name_hint
        if name == "unpacked":
            _schedule_unpacked(sch, producer, task)
        elif name == "packed":
            parallel_outer(sch, producer)
        elif name == "rows":
            _schedule_rows(sch, producer, shape, lanes, depth)


def _schedule_unpacked(sch: s_tir.Schedule, unpacked: s_tir.schedule.SBlockRV, task: s_tir.schedule.LoopRV) -> None:
    """Open a task's 4-bit weights before it starts."""
    sch.compute_at(unpacked, task)
    *_, both, depth = sch.get_loops(unpacked)
    nibble, half = sch.split(both, [2, None])
    sch.unroll(nibble)
    sch.vectorize(sch.fuse(half, depth))


def _schedule_rows(sch: s_tir.Schedule, rows: s_tir.schedule.SBlockRV, shape: Shape, lanes: int, depth: int) -> None:
    """Copy the data: whole pixels in parallel, or, where a pixel fills no vector, whole lines."""
    wide = gcd(shape.per_pixel, lanes) >= 4
    if wide:
        # Whole pixels, so that the border's conditions leave the loop over channels.
        vectorize_plain(sch, sch.split(sch.get_loops(rows)[-1], [None, shape.per_pixel])[-1], lanes * depth)
    parallel_outer(sch, rows, inner=2 if wide else 1)
