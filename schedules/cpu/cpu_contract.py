"""Convolutions and matrix products on any CPU: a block of accumulators in registers, its epilogue while it is hot.

    for (lead, rows, vectors of channels) in parallel:          one task
      for row, for block of pixels:
        acc[pixels][vectors] = 0                                registers
        for kh, t, step of the run:
          acc[p][v] += data[p] * weights[v]                     unrolled over p and v
        out = epilogue(acc)                                     vectors of L channels

Where a lane of a register can multiply (NEON), every step first loads registers of data, data[p] of several products
each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import arith, ops
from hawq_tvm.core.attributes import Conv2d
from schedules.emit.begun import begun
from schedules.emit.emit import Emission, Emitter, Operand, immediate
from schedules.emit.emit_requantize import requantize
from schedules.emit.tables import lookup
from schedules.factors import Factors
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.intrinsics import multiply_add

from .ahead import Place, fetched_ahead
from .borders import Borders, Nest, without_borders
from .contract_tiles import ContractTile, LoadedTile, Step, choose_tile, form_of, tiles_of
from .contraction import Packing, Shape, contraction, not_a_contraction, without_offset
from .epilogue import Epilogue, at_once, in_rows, is_in_rows
from .loops import inline_all, parallel_outer, vectorize_plain
from .sums import Sums
from .vector_unit import VectorUnit

EPILOGUE = 16  # channels of an epilogue's vectors at most, where those of sums are shorter: a whole vector of bytes


@dataclass(frozen=True)
class Products:
    """How a kernel multiplies: the steps of its innermost loop, of data stored as `stored` after adding `offset`.

    intrinsic: its name, for types of data and weights.  in_place: data that needs no border is read where it lies.
    What the offset adds, its product with the sum of an output's weights, is taken off at the end.  bits: the sums
    are 2^bits times too large, which the epilogue's shift makes up for.  registers: the type of loaded data as it is
    multiplied.  factors: of bytes that are computed at run time, to which `offset` is what the left one's turn adds.
    """

    step: Step
    stored: str
    intrinsic: Callable[[str, str], str]
    offset: int = 0
    in_place: bool = False
    bits: int = 0
    registers: str = ""
    factors: Factors | None = None


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
        elif Conv2d.of(call).groups > 1 and not layer.is_constant(w):
            return "grouped weights that are computed at run time."
        return layer.epilogue_moves_data()

    def products(self, layer: Layer, unit: VectorUnit) -> Products:
        """Pairs of 16 bits where the CPU adds them, else one by one in the type of the sums."""
        call = layer.anchor_call
        assert call is not None
        acc = ops.dtype_of(call)
        small = all(fits_int16(ops.dtype_of(a)) for a in call.args)
        depth, stored = 2 if unit.pairs and small else 1, "int16" if small else acc
        return Products(Step(depth), stored, lambda data, weight: multiply_add(unit.lanes, depth, data, weight, acc))

    def _unit(self, call: relax.Call, target: tvm.target.Target) -> VectorUnit:
        unit = self.unit or VectorUnit.of(target)
        return replace(unit, lanes=max(1, unit.lanes // 2), pairs=False) if ops.dtype_of(call) == "int64" else unit

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[ContractTile]:
        """Blocks of accumulators and rows per task."""
        call = layer.anchor_call
        assert call is not None
        unit = self._unit(call, target)
        step = self.products(layer, unit).step
        return tiles_of(form_of(call, unit, step), unit, step)

    def build(self, layer: Layer, target: tvm.target.Target, tile: ContractTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        call = layer.anchor_call
        assert call is not None
        unit = self._unit(call, target)
        products = self.products(layer, unit)
        shape = form_of(call, unit, products.step)
        tile = tile or choose_tile(shape, unit, products.step)
        in_place = products.in_place and shape.per_pixel % tile.length == 0 and shape.groups == 1
        borders = Borders.of(layer, call, shape, tile, products.offset, in_place)
        if borders.unpadded is None:
            left = products.factors.left.data if products.factors else call.args[0]
            in_place = in_place and layer.is_parameter(left) and _fits_in_place(shape, tile)
        products, sums = replace(products, in_place=in_place), Sums(products.factors)
        here = VectorUnit.of(target)
        packs = here.packs
        whole = shape.pixels % tile.pixels == 0
        width = layer.width(call.args[1])

        def emitted(packs: int, rows: bool = False) -> Emission:
            overrides: dict[str, Emitter] = {
                ops.op_name(call): lambda e, c: _emit(e, c, shape, tile, products, borders, sums, width),
                "hawq.unpack_int4": constant_int4,
                "hawq.requantize": lambda e, c: requantize(e, c, packs, begins=not sums.factors, rows=rows),
                "hawq.lookup": lambda e, c: lookup(e, c, here.permutes if packs else ""),
            }
            return Emission(layer, overrides)

        form = (shape.channels, tile.lanes, tile.vectors, packs, whole)
        emission = emitted(tile.lanes, rows=True) if in_rows(tile.pixels, *form) and not sums.factors else None
        if emission is None or not is_in_rows(emission):
            emission = emitted(tile.lanes if at_once(*form) else 0)
        first = len(shape.lead) + 1
        unscheduled = begun(sums.prim_func(emission), lambda v: v[first] * tile.lanes + v[first + 1])
        sch = s_tir.Schedule(unscheduled)
        data, weight = products.factors.stored if products.factors else map(ops.dtype_of, call.args)
        weight, data = (
            "int8" if tile.length > 1 and width < 8 else weight,
            products.registers or (data if in_place else products.stored),
        )
        epilogue = Epilogue(
            sch,
            shape.channels,
            tile.lanes,
            tile.vectors,
            packs,
            bool(unit.neon),
            unit.quads,
            whole,
            permutes=here.permutes,
        )
        nest, block = _schedule(sch, shape, tile, products.intrinsic(data, weight), epilogue, borders, sums)
        func = without_borders(sch, sch.mod["main"], shape, borders, nest)
        if unit.quads and products.in_place:
            shares = -(-shape.channels // (tile.lanes * tile.vectors))
            place = Place(block, nest.pixels, len(shape.lead), tile.rows, tile.pixels, tile.vectors, shares)
            func = fetched_ahead(sch, func, layer, place)
        func = epilogue.finished(func)
        func = sums.before(func, emission, tile.lanes)
        return Kernel(func, tuple(a for _, a in emission.arguments), tile)


def fits_int16(dtype: str) -> bool:
    """Whether every value of an integer type is an int16."""
    low, high = arith.RANGES[dtype]
    return low >= -(2**15) and high < 2**15


def constant_int4(e: Emission, call: relax.Call) -> Operand:
    """The values of packed weights: how they are stored is the kernel's to say (see `narrow.py`)."""
    return Operand(e, value=e.layer.constant(call))


def _emit(
    e: Emission,
    call: relax.Call,
    s: Shape,
    tile: ContractTile,
    products: Products,
    borders: Borders,
    sums: Sums,
    width: int,
) -> Operand:
    """Stages: rows (the padded data as stored; none where the data can be read in place), acc (rounded up to whole
    tiles), and the view of it the layer sees."""
    blocks = -(-s.channels // (tile.lanes * tile.vectors))
    packing = Packing(
        blocks,
        tile.vectors,
        tile.lanes,
        tile.depth,
        inner=tile.inner,
        width=8 - products.bits,
        values=width,
        pixels=tile.pixels_of_task(s),
    )
    c = contraction(e, call, packing, s if s.width else None, borders.unpadded, borders.origin, products.factors)
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

    def data_at(*i: Any) -> tirx.Expr:
        *lead, vector, kh, t, j, w, r = i
        start = s.start(tirx.Min(vector, immediate((s.channels - 1) // tile.lanes, "int32")), tile.lanes)
        if products.in_place and pixels > s.pixels:
            w = tirx.Min(w, immediate(s.pixels - 1, "int32"))  # what lies beyond the data must not be read
        return rows(*c.row(lead, kh), w * s.step + t * s.hop + start + (j * tile.length + r))

    data = _loaded(s, products, blocks, packing.steps(s.run), pixels, data_at) if products.registers else data_at
    kh, t = te.reduce_axis((0, s.taps[0]), "kh"), te.reduce_axis((0, s.taps[1]), "t")
    j = te.reduce_axis((0, packing.steps(s.run)), "j")
    zero = immediate(0, "int32")
    q = [te.reduce_axis((0, tile.inner), "q")] if tile.inner > 1 else []
    p = [te.reduce_axis((0, tile.depth), "p")] if tile.depth > 1 else []

    def accumulate(*i: Any) -> tirx.Expr:
        *lead, w, vector, lane = i
        w, lane = _of_register(tile, w, lane)
        x = data(*lead, vector, kh, t, j, w, sum(p, sum(q, zero) * tile.depth))
        block, own = vector // tile.vectors, vector % tile.vectors
        weight = c.weights(*c.weight_lead(lead), block, kh, t, j, own, *q, lane, *p)
        return te.sum(x.astype(c.dtype) * weight.astype(c.dtype), axis=[kh, t, j, *q, *p])

    acc = te.compute(
        (*s.lead, pixels // tile.together, blocks * tile.vectors, tile.lanes * tile.together), accumulate, name="acc"
    )

    def element_of(*i: Any) -> tirx.Expr:
        *first, w, channel = [i[0], i[1] * s.width + i[2], i[3]] if s.width else i
        return acc(*first, w // tile.together, channel // tile.lanes, _in_register(tile, w, channel))

    if sums.factors is not None:
        return Operand(e, sums.finished(e, ops.shape_of(call), element_of))
    view = te.compute(ops.shape_of(call), element_of, name="view")
    return without_offset(e, call, view, products.offset, products.bits)


def _loaded(
    s: Shape, products: Products, blocks: int, steps: int, pixels: int, at: Callable[..., tirx.Expr]
) -> Callable[..., tirx.Expr]:
    """The stage of data in registers: a vector per pixel of every step; where there are groups, of every vector of
    channels too.
    """
    own = (blocks,) if s.groups > 1 else ()

    def element(*i: Any) -> tirx.Expr:
        lead, place = list(i[:-5]), i[-5:]
        vector = lead.pop() if own else immediate(0, "int32")
        return at(*lead, vector, *place).astype(products.registers)

    data = te.compute((*s.lead, *own, *s.taps, steps, pixels, products.step.length), element, name="data")
    return lambda *i: data(*i[:-6], *(i[-6:-5] if own else ()), *i[-5:])


# A register of sums of two pixels at once holds two channels of each: channels 0 and 1, 2 and 3 of a vector make two
# registers.
def _of_register(tile: ContractTile, w: Any, lane: Any) -> tuple[Any, Any]:
    """The pixel and the channel of a vector that a lane of the sums of neighbouring pixels belongs to."""
    return (w, lane) if tile.together == 1 else (w * 2 + lane // 2 % 2, lane // 4 * 2 + lane % 2)


def _in_register(tile: ContractTile, w: Any, channel: Any) -> Any:
    """The lane of the sums of neighbouring pixels where a pixel and a channel are."""
    lane = channel % tile.lanes
    return lane if tile.together == 1 else lane // 2 * 4 + w % 2 * 2 + lane % 2


def _rounded_up(s: Shape, tile: ContractTile) -> tuple[int, int]:
    """The pixels of a row in whole tiles, and the elements of data that they read: whole pixels."""
    pixels = -(-s.pixels // tile.pixels) * tile.pixels
    needed = max(s.row_needed(pixels, tile.lanes, tile.length), s.row_length)
    return pixels, -(-needed // s.per_pixel) * s.per_pixel


def _fits_in_place(s: Shape, tile: ContractTile) -> bool:
    """Whether whole tiles read nothing beyond a row, which joined rows of single taps see to."""
    return _rounded_up(s, tile)[1] == s.row_length or (s.width > 0 and s.taps == (1, 1))


def _schedule(
    sch: s_tir.Schedule,
    shape: Shape,
    tile: ContractTile,
    intrinsic: str,
    epilogue: Epilogue,
    borders: Borders,
    sums: Sums,
) -> tuple[Nest, s_tir.schedule.LoopRV]:
    """The loops of the products, and the one around a block with its epilogue."""
    loaded = isinstance(tile, LoadedTile)
    inline_all(sch, keep=("acc", "rows", "packed", "unpacked", "data", *sums.kept, *epilogue.kept))
    acc = sch.get_sblock("acc")
    if shape.width:
        epilogue.join_lines(shape.width)

    loops = sch.get_loops(acc)
    lead, (w, vector, lane, kh, t, j, *inner) = loops[: len(shape.lead)], loops[len(shape.lead) :]
    taps = [t]
    if borders.beside > 1:
        tap, j = sch.split(j, [borders.beside, None])
        taps.append(tap)
    w_outer, w_inner = sch.split(w, [None, tile.pixels // tile.together])
    v_outer, v_inner = sch.split(vector, [None, tile.vectors])
    tasks, inside = lead, []
    if shape.width:
        task, w_outer = sch.split(w_outer, [None, tile.rows])
        tasks = [*lead, task]
    elif lead:
        row_outer, row_inner = sch.split(lead[-1], [None, tile.rows])
        tasks, inside = [*lead[:-1], row_outer], [row_inner]
    # Where data are loaded first, the weights of one vector of channels are live at a time.
    block = (v_inner, w_inner) if loaded else (w_inner, v_inner)
    sch.reorder(*tasks, v_outer, *inside, w_outer, kh, *taps, j, *block, lane, *inner)
    task = sch.fuse(*tasks, v_outer)
    sch.parallel(task)

    producers = _schedule_data(sch, acc, j) if loaded else sch.get_producers(acc)
    schedule_operands(sch, producers, shape, task, tile.lanes, tile.length)
    copy = sch.cache_write(acc, 0, "local")

    def joined(*i: Any) -> tuple[Any, ...]:
        *lead, w, vector, lane = i
        w, lane = _of_register(tile, w, lane)
        return *lead, w, vector * tile.lanes + lane

    sch.transform_layout(copy, ("write", 0), joined)
    epilogue.spell()
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

    sums.finish(sch, w_outer, tile.lanes)
    # Vectors of sums may be shorter than one of bytes, but a block's channels are whole vectors of the epilogue.
    whole = gcd(tile.lanes * tile.vectors, EPILOGUE) if loaded else tile.lanes
    epilogue.compute_at(w_outer, gcd(shape.channels, whole))
    return Nest(kh, taps[-1], w_inner, tile.together), w_outer


def _schedule_data(
    sch: s_tir.Schedule, acc: s_tir.schedule.SBlockRV, step: s_tir.schedule.LoopRV
) -> list[s_tir.schedule.SBlockRV]:
    """Load a step's data into registers: the producers that are left."""
    data = sch.get_sblock("data")
    others = [b for b in sch.get_producers(acc) if sch.get(b).name_hint != "data"]
    producers = [*sch.get_producers(data), *others]
    sch.set_scope(data, 0, "local")
    sch.compute_at(data, step, preserve_unit_loops=True)
    *_, pixel, element = sch.get_loops(data)
    sch.unroll(pixel)
    sch.vectorize(element)
    return producers


def schedule_operands(
    sch: s_tir.Schedule,
    producers: Sequence[s_tir.schedule.SBlockRV],
    shape: Shape,
    task: s_tir.schedule.LoopRV,
    lanes: int,
    depth: int,
) -> None:
    """The stages that prepare a contraction's operands: narrow weights opened, run-time weights packed, rows copied."""
    for producer in producers:
        name = sch.get(producer).name_hint
        if name == "unpacked":
            _schedule_unpacked(sch, producer, task)
        elif name == "packed":
            parallel_outer(sch, producer)
        elif name == "rows":
            _schedule_rows(sch, producer, shape, lanes, depth)


def _schedule_unpacked(sch: s_tir.Schedule, unpacked: s_tir.schedule.SBlockRV, task: s_tir.schedule.LoopRV) -> None:
    """Open a task's weights before it starts, one field of its bytes after another."""
    fields, axis = (int(sch.get(unpacked).annotations[name]) for name in ("fields", "axis"))
    rank = len(sch.get(unpacked).iter_vars)
    sch.compute_at(unpacked, task, preserve_unit_loops=True)
    loops = list(sch.get_loops(unpacked)[-rank:])
    field, loops[axis] = sch.split(loops[axis], [fields, None])
    lanes, depth = loops[-2:]
    sch.reorder(*loops[axis:-2], field, lanes, depth)
    sch.unroll(field)
    sch.vectorize(sch.fuse(lanes, depth))


def _schedule_rows(sch: s_tir.Schedule, rows: s_tir.schedule.SBlockRV, shape: Shape, lanes: int, depth: int) -> None:
    """Copy the data: whole pixels in parallel, or, where a pixel fills no vector, whole lines."""
    wide = gcd(shape.per_pixel, lanes) >= 4
    if wide:
        # Whole pixels, so that the border's conditions leave the loop over channels.
        vectorize_plain(sch, sch.split(sch.get_loops(rows)[-1], [None, shape.per_pixel])[-1], lanes * depth)
    parallel_outer(sch, rows, inner=2 if wide else 1)
