"""Attention in one kernel: a block of rows goes from its scores to its results within the first cache.

    keys, values packed in the order in which they are multiplied; their sums           in parallel, once
    for (batch, head, block of rows) in parallel:
        rows = the block of the left factor
        acc = rows . keys, in registers; scores = what is done to it                    int32
        maximum, exponents, their sum, reciprocal; probabilities = their products       8 bits
        acc = probabilities . values, in registers; out = what is done to it, where the movements put it
Factors of 8 bits are multiplied as they are stored: u8 a and s8 b by vpdpbusd, s8 both by sdot, their signs flipped
where they have the other. With A and B what a and b then are too large by,

    sum (a - A) (b - B) = sum a b - B sum a - A (sum b - n B)

Without these instructions, and where a factor has more than 8 bits, 16 bits are multiplied, in pairs on x86.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import arith, ops
from hawq_tvm.core.attention import SOFTMAXES, Attention, Side
from schedules.emit.emit import EMITTERS, Emission, Operand, immediate
from schedules.emit.stored import stored
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.intrinsics import dot_u8s8, multiply_add
from schedules.spelling.neon_intrinsics import dot_s8s8

from .attention_blocks import in_blocks, place_of, reach
from .loops import extent, inline_all, parallel_outer
from .powers import Powers
from .vector_unit import VectorUnit

EIGHT = {"int8", "uint8"}
DOTS = {"dotprod", "i8mm"}  # extensions of Arm with sdot
TALLEST = 8  # rows of a block: as many registers of sums for every vector of channels


@dataclass(frozen=True)
class Product:
    """How a product is made: `depth` products per lane and step.

    a, b: the types of the factors as they are multiplied.  flip_a, flip_b: what is added to them first.  above_a,
    above_b: what they are too large by then.  reach: no sum is larger.
    """

    depth: int
    a: str
    b: str
    flip_a: int
    flip_b: int
    above_a: int
    above_b: int
    reach: int

    @staticmethod
    def of(left: Side, right: Side, length: int, unit: VectorUnit) -> Product:
        """In 8 bits where factors, sums and the CPU allow it, else in 16."""
        signed = not unit.neon.isdisjoint(DOTS)
        most = length * left.reach * right.reach
        eight = {left.dtype, right.dtype} <= EIGHT and reach(length, left, right) <= arith.RANGES["int32"][1]
        if not eight or not (unit.quads or signed):
            return Product(2 if unit.pairs else 1, "int16", "int16", -left.zero, -right.zero, 0, 0, most)
        a = "int8" if signed else "uint8"
        flip_a, flip_b = (_flip(s.dtype, to) for s, to in ((left, a), (right, "int8")))
        return Product(4, a, "int8", flip_a, flip_b, left.zero + flip_a, right.zero + flip_b, most)

    def intrinsic(self, lanes: int) -> str:
        """The name of the tensor intrinsic of one step."""
        if self.depth == 4:
            return dot_s8s8() if self.a == "int8" else dot_u8s8(lanes, self.a)
        return multiply_add(lanes, self.depth, self.a, self.b, "int32")


def _flip(dtype: str, to: str) -> int:
    """What is added to a byte of another sign."""
    return 0 if dtype == to else -128 if to == "int8" else 128


@dataclass(frozen=True)
class AttentionTile:
    """Blocks of `height` rows; `vectors` of `lanes` sums of each at once, for the scores and for the results."""

    height: int
    vectors: tuple[int, int]
    lanes: int

    def __str__(self) -> str:
        return f"{self.height} rows x {self.vectors[0]} and {self.vectors[1]} vectors of {self.lanes}"


class CpuAttention:
    """A layer of two products of run-time factors with a softmax between them, 8 or 16 bits each."""

    name = "cpu.attention"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """Attention with one result."""
        if isinstance(layer.func.body.ty, relax.TupleType):
            return "several results."
        found = Attention.of(layer.bindings)
        return found if isinstance(found, str) else None

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """See the loops at the top of this file."""
        found, unit = Attention.of(layer.bindings), VectorUnit.of(target)
        assert isinstance(found, Attention)
        calls = [found.first.value, found.second.value]
        products = [
            Product.of(*sides, ops.shape_of(call.args[0])[-1], unit)
            for sides, call in zip(found.factors, calls, strict=True)
        ]
        widths = [-(-ops.shape_of(c)[-1] // unit.lanes) for c in calls]
        tile = tile_of(found.count, (widths[0], widths[1]), unit)
        powers = Powers.of(found.softmax.value, unit)
        emission = _emission(in_blocks(layer, found, tile.height), products, tile, powers)
        result = ops.shape_of(layer.func.body.body)
        ragged = found.count % tile.height != 0
        func = stored(
            emission.prim_func(),
            result,
            lambda d: place_of(found, tile.height, d),
            lambda d: [d[-3] * tile.height + d[-2] < found.count] if ragged else [],
        )
        sch = s_tir.Schedule(func)
        _schedule(sch, len(found.lead), products, tile)
        return Kernel(powers.spelled(sch), tuple(a for _, a in emission.arguments), tile)


def tile_of(count: int, widths: tuple[int, int], unit: VectorUnit) -> AttentionTile:
    """The tallest block that wastes least, and divisors of the vectors that leave registers for factors."""
    most = TALLEST if unit.registers > 16 else TALLEST // 2
    height = min(range(most, 0, -1), key=lambda n: -(-count // n) * (n + 2))
    room = (unit.registers - 4) // height
    vectors = [max(d for d in range(1, width + 1) if width % d == 0 and d <= max(1, room)) for width in widths]
    return AttentionTile(height, (vectors[0], vectors[1]), unit.lanes)


def _emission(layer: Layer, products: Sequence[Product], tile: AttentionTile, powers: Powers) -> Emission:
    """The stages of a layer in blocks; those of the first product are called ..1, of the second ..2."""
    left = list(enumerate(products, 1))

    def product(e: Emission, call: relax.Call) -> Operand:
        number, made = left.pop(0)
        return _product(e, call, made, tile, number)

    def softmax(e: Emission, call: relax.Call) -> te.Tensor:
        x = e.operand(call.args[0])
        scores = te.compute(x.shape, lambda *i: x.at(i), name="scores")
        e.values[call.args[0]] = Operand(e, scores)
        made = (powers.overrides.get(ops.op_name(call)) or EMITTERS[ops.op_name(call)])(e, call)
        assert isinstance(made, te.Tensor)
        return made

    return Emission(layer, {"relax.matmul": product, **dict.fromkeys(SOFTMAXES, softmax)})


def _product(e: Emission, call: relax.Call, p: Product, tile: AttentionTile, number: int) -> Operand:
    """rows and packed (the factors as they are multiplied), acc (whole vectors), and the sums that the layer sees."""
    a, b = (e.operand(x) for x in call.args)
    *lead, run = a.shape
    width, lanes = b.shape[-1], tile.lanes
    vectors, steps = -(-width // lanes), -(-run // p.depth)
    wide = "int32" if p.depth == 4 else "int16"

    def moved(x: tirx.Expr, by: int, dtype: str) -> tirx.Expr:
        return (x.astype(wide) + immediate(by, wide)).astype(dtype) if by else x.astype(dtype)

    def inside(value: tirx.Expr, dtype: str, *conditions: Any) -> tirx.Expr:
        return tirx.if_then_else(tirx.all(*conditions), value, immediate(0, dtype)) if conditions else value

    def row(*i: Any) -> tirx.Expr:
        return inside(moved(a.at(i), p.flip_a, p.a), p.a, *([i[-1] < run] if steps * p.depth > run else []))

    rows = te.compute((*lead, steps * p.depth), row, name=f"rows{number}")

    def weight(*i: Any) -> tirx.Expr:
        *first, v, j, lane = i[: len(i) - len(deep)]
        column, place = v * lanes + lane, j * p.depth + (i[-1] if deep else 0)
        conditions = [column < width] if vectors * lanes > width else []
        conditions += [place < run] if steps * p.depth > run else []
        return inside(moved(b.at([*first, 0, place, column]), p.flip_b, p.b), p.b, *conditions)

    deep = [p.depth] if p.depth > 1 else []
    packed = te.compute((*b.shape[:-3], vectors, steps, lanes, *deep), weight, name=f"packed{number}")
    j, k = te.reduce_axis((0, steps), "j"), [te.reduce_axis((0, n), "k") for n in deep]

    def accumulate(*i: Any) -> tirx.Expr:
        *first, v, lane = i
        place = j * p.depth + (k[0] if k else 0)
        return te.sum(
            rows(*first, place).astype("int32") * packed(*first[:-2], v, j, lane, *k).astype("int32"), axis=[j, *k]
        )

    acc = te.compute((*lead, vectors, lanes), accumulate, name=f"acc{number}")

    def corrected(*i: Any) -> tirx.Expr:
        *first, v, lane = i
        total = acc(*i)
        if p.above_b:
            total = total - across(*first) * immediate(p.above_b, "int32")
        return total - down(*first[:-2], v, lane) * immediate(p.above_a, "int32") if p.above_a else total

    if p.above_b:
        n = te.reduce_axis((0, run), "n")
        across = te.compute(lead, lambda *i: te.sum(rows(*i, n).astype("int32"), axis=n), name=f"across{number}")
    if p.above_a:
        m = te.reduce_axis((0, run), "m")

        def column(*i: Any) -> tirx.Expr:
            *first, v, lane = i
            at = v * lanes + lane
            element = inside(b.at([*first, 0, m, at]), b.dtype, *([at < width] if vectors * lanes > width else []))
            # The sum of b less run times B: of what b is before the sign is flipped, less its zero.
            return te.sum(element.astype("int32") + immediate(p.flip_b - p.above_b, "int32"), axis=m)

        down = te.compute((*b.shape[:-3], vectors, lanes), column, name=f"down{number}")
    sums = te.compute((*lead, vectors, lanes), corrected, name=f"sums{number}")
    whole = te.compute((*lead, width), lambda *i: sums(*i[:-1], i[-1] // lanes, i[-1] % lanes))
    return Operand(e, whole, reach=p.reach)


def _schedule(sch: s_tir.Schedule, batches: int, products: Sequence[Product], tile: AttentionTile) -> None:
    kept = {f"{stage}{n}" for n in (1, 2) for stage in ("rows", "packed", "acc", "sums", "across", "down")}
    inline_all(sch, keep=(*kept, "scores", "exponents"))
    stages = {str(sch.get(b).name_hint): b for b in sch.get_child_blocks(sch.get_sblock("root"))}
    (out,) = sch.get_output_blocks(sch.get_sblock("root"))
    for n in (1, 2):
        if f"packed{n}" in stages:
            parallel_outer(sch, stages[f"packed{n}"], inner=3)
        if f"down{n}" in stages:
            parallel_outer(sch, stages[f"down{n}"], inner=3)
    for n in (1, 2):
        sch.set_scope(stages[f"acc{n}"], 0, "local")

    task = sch.fuse(*sch.get_loops(out)[: batches + 1])
    sch.parallel(task)
    for name in ("sums2", "acc2"):
        sch.compute_at(stages[name], task, preserve_unit_loops=True)
    for name in ("across2", "rows2"):
        if name in stages:
            sch.compute_at(stages[name], task, preserve_unit_loops=True)
    last = str(sch.get(out).name_hint)
    softmax = [name for name in stages if name not in (*kept, "scores", last)]  # "maximum" to "row_reciprocal"
    for name in reversed(softmax):
        sch.compute_at(stages[name], task, preserve_unit_loops=True)
    sch.compute_at(stages["scores"], task, preserve_unit_loops=True)
    for name in ("sums1", "acc1", "across1", "rows1"):
        if name in stages:
            sch.compute_at(stages[name], task, preserve_unit_loops=True)
    for name in (*softmax, "across1", "across2"):
        if name in stages and sch.get(stages[name]).init is not None:
            sch.decompose_reduction(stages[name], sch.get_loops(stages[name])[-1])
    for n, product in enumerate(products, 1):
        _schedule_product(sch, stages[f"acc{n}"], stages[f"sums{n}"], tile.vectors[n - 1], tile.lanes, product)


def _schedule_product(
    sch: s_tir.Schedule,
    acc: s_tir.schedule.SBlockRV,
    sums: s_tir.schedule.SBlockRV,
    vectors: int,
    lanes: int,
    product: Product,
) -> None:
    """Sums of a block of rows and of `vectors` at a time in registers."""
    *_, row, vector, lane = sch.get_loops(sums)
    outer, inner = sch.split(vector, [None, vectors])
    sch.reorder(outer, row, inner, lane)
    sch.compute_at(acc, outer, preserve_unit_loops=True)
    *_, row, inner, lane, step = sch.get_loops(acc)[: -1 if product.depth > 1 else None]
    sch.reorder(step, row, inner, lane)
    init = sch.decompose_reduction(acc, step)
    for block in (init, sums):
        *_, in_row, in_vector, in_lane = sch.get_loops(block)
        sch.unroll(in_row)
        sch.unroll(in_vector)
        sch.vectorize(in_lane)
    sch.unroll(row)
    sch.unroll(inner)
    if extent(sch, lane) == lanes:  # else a result is narrower than a register
        sch.tensorize(lane, product.intrinsic(lanes))
