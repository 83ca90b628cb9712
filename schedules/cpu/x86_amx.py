"""Convolutions and matrix products of 8-bit data with AMX: tiles of up to 16 pixels x 16 channels, 64 products deep.

    for (lead, rows) in parallel:                               one task, which configures its thread's tiles
      for row, for block of up to 2 groups of pixels:
        for block of 64 channels:                               outside of the tasks where weights are large
          for half of it:
            sums[groups][vectors] = 0                           tiles
            for kh that has data, t, j (64 bytes of the run):
              data[groups], weights[vectors] = load             tiles; a tile's rows are the pixels where they lie
              sums[g][v] += data[g] . weights[v]                unrolled over g and v
            acc = sums                                          int32 in the first cache
          out = epilogue(acc)                                   64 bytes at once, a whole cache line

The groups are neighbours in an output row, or, where rows are short, the same pixels of two rows; or the pixels of an
image (images.py), or of all (joined.py), are one row. Other numbers of
channels than multiples of 64 have blocks of 32 or 16 and no halves.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd, prod
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import ops
from schedules.emit.emit import Emission, Emitter, Operand, immediate
from schedules.emit.emit_requantize import requantize
from schedules.emit.tables import lookup
from schedules.factors import Factors
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling import tile_intrinsics as tiles
from schedules.spelling.tile_intrinsics import BYTES, LANES, Tiles

from . import amx_forms
from .amx_tiles import AmxTile, vectors_of
from .borders import Borders, Nest, axes_of, lines_with_data, looped, without_borders
from .contraction import Packing, Shape, contraction, shape_of
from .cpu_contract import Contract, constant_int4, schedule_operands
from .epilogue import Epilogue, at_once
from .images import STAND_IN, as_images, of_images
from .joined import with_shapes_of
from .loops import inline_all
from .overlap import Chain, overlapped
from .sums import Sums
from .vector_unit import VectorUnit

DEPTH = 4
# Bytes multiplied per byte of data, at most, where tiles are known to be faster than vectors: a first layer of 7x7 on
# three channels has runs of 21 bytes, and takes half the time in tiles.
MOST_PADDING = BYTES / 21
FEWEST_CHANNELS = LANES
AHEAD = 32  # pixels by which residual and result are fetched before an epilogue that products do not hide needs them


class Amx(Contract):
    """u8 or s8 data and 8-bit or 4-bit weights with int32 sums.

    emulated: on any target, with calls of hawq_emulated_* in place of the tile instructions; for tests.
    """

    name = "x86.amx"

    def __init__(self, emulated: bool = False) -> None:
        super().__init__()
        self.emulated = emulated

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """An 8-bit contraction large enough for tiles, on a CPU with AMX."""
        if not (self.emulated or VectorUnit.of(target).tiles):
            return "the target has no AMX."
        why = super().applies(layer, target)
        call = layer.anchor_call
        if why or call is None:
            return why
        eight = ("uint8", "int8")
        if factors := Factors.of(layer, call):
            if why := factors.too_long():
                return why
        elif any(ops.dtype_of(x) not in eight for x in call.args) or ops.dtype_of(call) != "int32":
            return "data or weights of more than 8 bits, or sums of more than 32."
        shape = shape_of(call, LANES * vectors_of(call))
        if shape.channels < FEWEST_CHANNELS:
            return f"{shape.channels} output channels, of the {LANES} of a tile."
        real = shape.run if shape.groups == 1 else shape.inputs
        if (padded := -(-shape.run // BYTES) * BYTES) > MOST_PADDING * real:
            return f"runs of {real} elements, which tiles would pad to {padded}."
        if shape.pixels * prod(shape.lead[-1:]) == 1:
            return "a single pixel, of the 16 of a tile."
        return None

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[AmxTile]:  # type: ignore[override]
        """Blocks of tiles and rows per task."""
        return amx_forms.tiles_of(layer)

    def build(self, layer: Layer, target: tvm.target.Target, tile: AmxTile | None = None) -> Kernel:  # type: ignore[override]
        """See the loops at the top of this file."""
        tile = tile or amx_forms.tiles_of(layer)[0]
        form, given = amx_forms.form_of(layer, tile), layer
        layer, images, anchor = form.layer, form.images, ops.op_name(form.layer.anchor_call)
        call = layer.anchor_call
        assert call is not None
        shape, factors, width = shape_of(call, tile.channels), Factors.of(layer, call), layer.width(call.args[1])
        in_place = layer.is_parameter(factors.left.data if factors else call.args[0])
        if images is not None:
            shape = images.shape(call, _rounded_up(form.shape, tile)[0])
            layer, anchor = of_images(layer, shape.pixels), STAND_IN
        in_place, own = in_place and images is None and _fits_in_place(shape, tile), shape
        shape = shape if in_place or factors else _aligned(shape)
        sums = Sums(factors)
        unit = VectorUnit.of(target)
        vectors, whole = tile.halves * tile.vectors, _is_whole(shape, tile)
        spelled = LANES if at_once(shape.channels, LANES, vectors, unit.packs, whole) else 0
        overrides: dict[str, Emitter] = {
            anchor: lambda e, _: _emit(e, call, shape, tile, in_place, sums, width, own if images else None),
            "hawq.unpack_int4": constant_int4,
            "hawq.requantize": lambda e, c: requantize(e, c, spelled),
            "hawq.lookup": lambda e, c: lookup(e, c, unit.permutes if spelled else ""),
        }
        emission = Emission(layer, overrides)
        sch = s_tir.Schedule(sums.prim_func(emission))
        data, weight = factors.types if factors else map(ops.dtype_of, call.args)
        weight = "int8" if width < 8 else weight
        # What is under products has time to wait for memory.
        hidden = not factors and tile.steps_of_a_part(shape) > 0
        epilogue = Epilogue(
            sch,
            shape.channels,
            LANES,
            vectors,
            unit.packs,
            dot=unit.quads,
            whole=whole,
            stored=True,
            permutes=unit.permutes,
            ahead=0 if hidden else AHEAD,
        )
        nest, pixel, chain = _schedule(
            sch, shape, tile, tile.tiles(self.emulated), in_place, (data, weight), epilogue, sums
        )
        borders = Borders() if images else Borders(axes_of(layer, call)[0])
        func = sch.mod["main"]
        if images is not None:
            func = as_images(given, func, images, sch.get(pixel).loop_var)
        if chain is None:
            func = epilogue.finished(without_borders(sch, func, shape, borders, nest))
        else:
            have_data = lines_with_data(sch, shape, borders, nest)
            func = overlapped(sch, epilogue.finished(func), chain, "acc", have_data)
        func = sums.before(func, emission, LANES)
        if form.name == "parts":
            func = with_shapes_of(given, func)
        return Kernel(func, tuple(a for _, a in emission.arguments), tile)


def _aligned(s: Shape) -> Shape:
    """A shape whose rows are a copy that has its pixels at multiples of 64 bytes, where a run is that of one pixel.

    A tile whose rows cross cache lines takes up to five times as long to load. What lies between pixels is multiplied
    by weights of 0, as it is beyond the last pixel.
    """
    own, wide = s.per_pixel, -(-s.per_pixel // BYTES) * BYTES
    if s.groups > 1 or s.side_by_side > 1 or own % LANES or wide in (own, 2 * own):
        return s
    step, hop, length = (n // own * wide for n in (s.step, s.hop, s.row_length))
    return replace(s, step=step, hop=hop, row_length=length, inputs=wide)


def _rounded_up(s: Shape, tile: AmxTile) -> tuple[int, int]:
    """The pixels of a row in whole blocks, and the elements of data that they read: whole pixels."""
    block = tile.columns * tile.pixels
    pixels = -(-s.pixels // block) * block
    needed = max(s.row_needed(pixels, tile.channels, BYTES), s.row_length)
    return pixels, -(-needed // s.per_pixel) * s.per_pixel


def _is_whole(s: Shape, tile: AmxTile) -> bool:
    """Whether blocks make up the output exactly."""
    pixels = s.pixels % (tile.columns * tile.pixels) == 0
    return pixels and s.channels % (tile.halves * tile.channels) == 0 and (not s.lead or s.lead[-1] % tile.rows == 0)


def _fits_in_place(s: Shape, tile: AmxTile) -> bool:
    """Whether whole tiles read nothing beyond a row, and the 64 bytes of a step lie within a pixel."""
    return _rounded_up(s, tile)[1] == s.row_length and s.per_pixel % BYTES == 0 and s.groups == 1


def _emit(
    e: Emission,
    call: relax.Call,
    s: Shape,
    tile: AmxTile,
    in_place: bool,
    sums: Sums,
    width: int,
    joined: Shape | None,
) -> Operand:
    """Stages: rows (the padded data; none in place), data and weights (one tile per step and group or vector), acc
    (rounded up to whole blocks), and the view of it the layer sees."""
    blocks, factors = -(-s.channels // (tile.halves * tile.channels)) * tile.halves, sums.factors
    packing = Packing(blocks, 1, tile.channels, DEPTH, whole=BYTES // DEPTH, values=width, pixels=tile.rows * s.pixels)
    c = contraction(e, call, packing, joined, factors=factors)
    x, per_pixel = e.operand(factors.left.data if factors else call.args[0]), c.shape.per_pixel
    pixels, length = _rounded_up(s, tile)
    lead = (*s.lead[:-1], -(-s.lead[-1] // tile.lines) * tile.lines) if s.lead else ()
    steps = -(-s.run // BYTES)

    def row_element(*i: Any) -> tirx.Expr:
        at = i[-1]
        if s.per_pixel > per_pixel:
            # Between pixels the last vector of one once more: a condition there would make the copy one of bytes.
            size, channel = gcd(per_pixel, BYTES), at % s.per_pixel
            last = immediate(per_pixel // size - 1, "int32")
            at = at // s.per_pixel * per_pixel + tirx.Min(channel // size, last) * size + channel % size
        value = c.element(i[:-1], at)
        return tirx.if_then_else(i[-1] < s.row_length, value, immediate(0, x.dtype)) if length > s.row_length else value

    rows = None if in_place else te.compute((*s.rows, length), row_element, name="rows")

    def row(index: list[Any], kh: Any) -> list[Any]:
        """The row of the data; a line beyond the last is the last once more."""
        if lead != s.lead:
            index = [*index[:-1], tirx.Min(index[-1], immediate(s.lead[-1] - 1, "int32"))]
        return c.row(index, kh)

    def data_at(*i: Any) -> tirx.Expr:
        *first, block, kh, t, j, w, k = i
        if rows is None:
            steps_of_one = per_pixel // BYTES
            pixel = w * (s.step // per_pixel) + t * (s.hop // per_pixel) + j // steps_of_one
            return x.at([*row(first, kh), pixel, j % steps_of_one * BYTES + k])
        return rows(*row(first, kh), w * s.step + t * s.hop + s.start(block, tile.channels) + j * BYTES + k)

    data = te.compute((*lead, blocks, *s.taps, steps, pixels, BYTES), data_at, name="data")

    def weight_at(*i: Any) -> tirx.Expr:
        *first, j, q, o, p = i
        return c.weights(*first, j * LANES + q, 0, o, p)

    own = tuple(int(d) for d in c.weights.shape[:-4])
    weights = te.compute((*own, steps, LANES, tile.channels, DEPTH), weight_at, name="tile_weights")
    kh, t, j, q, p = (
        te.reduce_axis((0, n), name)
        for n, name in zip((*s.taps, steps, LANES, DEPTH), ("kh", "t", "j", "q", "p"), strict=True)
    )

    def accumulate(*i: Any) -> tirx.Expr:
        *first, block, w, o = i
        a, b = data(*first, block, kh, t, j, w, q * DEPTH + p), weights(*c.weight_lead(first), block, kh, t, j, q, o, p)
        return te.sum(a.astype(c.dtype) * b.astype(c.dtype), axis=[kh, t, j, q, p])

    acc = te.compute((*lead, blocks, pixels, tile.channels), accumulate, name="acc")

    def view(*i: Any) -> tirx.Expr:
        *first, w, o = i
        return acc(*first, o // tile.channels, w, o % tile.channels)

    if factors is not None:
        return Operand(e, sums.finished(e, (*s.lead, s.pixels, s.channels), view))
    return Operand(e, te.compute((*s.lead, s.pixels, s.channels), view, name="view"))


def _schedule(
    sch: s_tir.Schedule,
    shape: Shape,
    tile: AmxTile,
    form: Tiles,
    in_place: bool,
    types: tuple[str, str],
    epilogue: Epilogue,
    sums: Sums,
) -> tuple[Nest, s_tir.schedule.LoopRV, Chain | None]:
    data_type, weight_type = types
    inline_all(sch, keep=("acc", "rows", "packed", "unpacked", "data", "tile_weights", *sums.kept, *epilogue.kept))
    acc, data, weights = (sch.get_sblock(name) for name in ("acc", "data", "tile_weights"))

    loops = sch.get_loops(acc)
    lead, (block, w, o, kh, t, j, q, p) = loops[: len(shape.lead)], loops[len(shape.lead) :]
    beneath = 0 if sums.factors else tile.steps_of_a_part(shape)
    step = j
    if beneath > 1:
        j, step = sch.split(j, [None, beneath])
    w_outer, group, pixel = sch.split(w, [None, tile.columns, tile.pixels])
    vector, lane = sch.split(o, [tile.vectors, LANES])
    channels, half = sch.split(block, [None, tile.halves])
    tasks, inside, line = lead, [], []
    if lead:
        row_outer, row, last = sch.split(lead[-1], [None, tile.rows // tile.lines, tile.lines])
        tasks, inside, line = [*lead[:-1], row_outer], [row], [last]
    # Where pixels are inside, tasks of the same channels follow each other, so that their weights stay in a cache.
    tasks, inside = (
        (tasks, [*inside, w_outer, channels]) if tile.inside == "channels" else ([channels, *tasks], [*inside, w_outer])
    )
    sch.reorder(
        *tasks, *inside, half, kh, t, j, *([step] if beneath > 1 else []), *line, group, vector, pixel, lane, q, p
    )
    task, blocks = sch.fuse(*tasks), sch.fuse(*inside)
    sch.parallel(task)

    producers = [*sch.get_producers(data), *sch.get_producers(weights)]
    for loaded, loop in ((data, group if tile.fetches else step), (weights, step)):
        sch.set_scope(loaded, 0, "local")
        sch.compute_at(loaded, loop, preserve_unit_loops=True)
    # A vector of a copy with spaces between pixels must not go from one into the other.
    copied = gcd(shape.run, BYTES) // DEPTH if shape.groups == 1 and shape.run < shape.per_pixel else LANES
    schedule_operands(sch, producers, shape, task, copied, DEPTH)
    copy = sch.cache_write(acc, 0, "local")
    sch.transform_layout(copy, ("write", 0), lambda *i: (*i[:-3], i[-2], i[-3] * tile.channels + i[-1]))
    epilogue.spell()
    sch.reverse_compute_at(copy, half, preserve_unit_loops=True)
    load = tiles.tile_load_rows(form, shape.step, data_type)
    if in_place:
        load = tiles.tile_load_pixels(form, shape.step // shape.per_pixel, data_type)
    _load_data(sch, data, tile, 1 if tile.fetches else tile.columns, load)
    _load_weights(sch, weights, tile, tiles.tile_load_weights(form, weight_type, far=tile.fetches))
    _store(sch, copy, tile, tiles.tile_store(form))
    init = sch.decompose_reduction(acc, kh)
    *outer, first_group, first_vector, first_pixel, _ = sch.get_loops(init)
    _spell(sch, [*_lines(outer, tile), first_group, first_vector], first_pixel, tiles.tile_zero(form))
    _spell(sch, [*line, group, vector], pixel, tiles.tile_dot(form, data_type, weight_type))

    sums.finish(sch, blocks, LANES)
    in_tiles = sch.get(sch.get_sblock("data_o")).writes[0].source
    last_pixel = epilogue.compute_at(blocks, gcd(shape.channels, LANES), spelled_out=not beneath)
    body, own = sch.get(task), sch.get(step).loop_var
    begun = body.body
    if tile.fetches:
        begun = tvm_ffi.structural_map(
            begun, [(tirx.For, lambda lp: _with(lp, in_tiles) if lp.loop_var.same_as(own) else lp)]
        )
    statements = tirx.SeqStmt([form.begin(), begun, form.end()])
    sch.state.replace(sch.get_sref(task), tirx.For(body.loop_var, body.min, body.extent, body.kind, statements))
    nest = Nest(kh, t, vector, height=tile.lines)
    chain = (
        Chain(blocks, (half, kh, t, j), last_pixel, *tile.numbering(shape), late=tile.stores == "before")
        if beneath
        else None
    )
    return nest, last_pixel, chain


def _spell(
    sch: s_tir.Schedule, unrolled: list[s_tir.schedule.LoopRV], loop: s_tir.schedule.LoopRV, intrinsic: str
) -> None:
    """One tile instruction for the loops from `loop` on; the tiles' numbers are constants once `unrolled` are."""
    for each in unrolled:
        sch.unroll(each)
    sch.tensorize(loop, intrinsic)


def _with(loop: tirx.For, buffer: tirx.Buffer) -> tirx.For:
    """A loop in which a buffer is mentioned, so that it is one for all loops inside: its offsets are tiles."""
    mentioned = tirx.Evaluate(tirx.address_of(buffer[tuple(0 for _ in buffer.shape)]))
    return looped(loop, loop.min, loop.extent, tirx.SeqStmt([mentioned, loop.body]))


def _lines(outer: list[s_tir.schedule.LoopRV], tile: AmxTile) -> list[s_tir.schedule.LoopRV]:
    """The loop over a block's lines, the innermost of those around a line; none where there is a single one."""
    return outer[-1:] if tile.lines > 1 else []


def _load_data(sch: s_tir.Schedule, data: s_tir.schedule.SBlockRV, tile: AmxTile, groups: int, intrinsic: str) -> None:
    *outer, _block, _kh, _t, _j, w, _ = sch.get_loops(data)
    group, pixel = sch.split(w, [groups, tile.pixels])
    _spell(sch, [*_lines(outer, tile), group], pixel, intrinsic)


def _load_weights(sch: s_tir.Schedule, weights: s_tir.schedule.SBlockRV, tile: AmxTile, intrinsic: str) -> None:
    *_, q, o, _ = sch.get_loops(weights)
    vector, lane = sch.split(o, [tile.vectors, LANES])
    sch.reorder(vector, q, lane)
    _spell(sch, [vector], q, intrinsic)


def _store(sch: s_tir.Schedule, copy: s_tir.schedule.SBlockRV, tile: AmxTile, intrinsic: str) -> None:
    *outer, _block, w, o = sch.get_loops(copy)
    group, pixel = sch.split(w, [tile.columns, tile.pixels])
    vector, lane = sch.split(o, [tile.vectors, LANES])
    sch.reorder(group, vector, pixel, lane)
    _spell(sch, [*_lines(outer, tile), group, vector], pixel, intrinsic)
