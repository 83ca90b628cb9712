"""Products of two tensors of bytes that are computed at run time, on tensor cores: the right one is packed first.

packed = the right factor in the order in which lanes read fragments     a grid
across, down = sums along rows and columns, where zero points need them  a grid each
out = epilogue(sums of products, less what the factors are too large by) as in cuda_mma.py, a group for each matrix
"""

from __future__ import annotations

from math import prod
from typing import Any

import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import ops
from hawq_tvm.targets.gpu import architectures
from schedules.cpu.contraction import not_a_contraction
from schedules.emit.emit import Operand, immediate
from schedules.emit.emit_movement import unravel
from schedules.factors import Factors
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.mma_intrinsics import parts

from .cuda_generic import grid
from .cuda_loops import bind_grid, vector_write
from .cuda_mma import DATA, Source, computed_before, placeholders, sums_of, tiled
from .mma_model import gpu_of, ranked_tiles
from .mma_pack import LANES
from .mma_schedule import Scheduling
from .mma_tiles import CHUNK, Digits, MmaTile, Problem

WORD = 4  # neighbouring bytes of a lane, which one thread packs


class CudaProducts:
    """Matrix products of bytes of any sign and zero point, of one matrix or many.

    threads: as in Mma.
    """

    name = "cuda.products"

    def __init__(self, threads: bool = True) -> None:
        self.threads = threads

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """One product of matrices of bytes, both computed at run time."""
        if why := not_a_contraction(layer):
            return why
        call = layer.anchor_call
        assert call is not None
        factors = _factors(layer, call)
        if factors is None:
            return "not a product of two tensors of bytes that are computed at run time."
        if min(len(ops.shape_of(x)) for x in call.args) < 2:
            return "a product of vectors."
        return factors.too_long() or layer.epilogue_moves_data() or layer.constants_over_rows()

    def build(self, layer: Layer, target: tvm.target.Target, tile: MmaTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        call = layer.anchor_call
        assert call is not None
        factors = _factors(layer, call)
        assert factors is not None
        problem = _problem(call, factors)
        tile = tile or ranked_tiles(problem, gpu_of(architectures(target)))[0]
        digits, inputs = Digits(problem, tile), placeholders(layer)

        def tensor(data: relax.Expr) -> te.Tensor:
            return inputs[data] if data in inputs else computed_before(layer, data, inputs)

        def operand(data: relax.Expr) -> Operand:
            return Operand(None, tensor(data))  # type: ignore[arg-type]  # no constant, which would need the emission

        copied = factors.left.data in inputs and problem.vector >= 4
        source = Source(problem, factors.left.data, copied)
        raw = sums_of(
            digits, source.stages(layer, inputs, digits), _packed(digits, factors, operand(factors.right.data))
        )
        sums = factors.sums(operand)
        finished = te.compute(
            digits.shape, lambda *d: factors.finished(raw(*d), digits.index(d, clamped=True), sums), name="finished"
        )
        sch, arguments = tiled(layer, digits, inputs, finished, [])
        Scheduling(sch, digits, copied, self.threads).run()
        for name in sums:
            grid(sch, sch.get_sblock(name))
        _schedule_packed(sch)
        return Kernel(sch.mod["main"], tuple(a for _, a in arguments), tile)


def _factors(layer: Layer, call: relax.Call) -> Factors | None:
    """Weights of tensor cores are signed; data are of both signs."""
    found = Factors.of(layer, call)
    return found.turned(found.types[0], "int8") if found is not None else None


def _problem(call: relax.Call, factors: Factors) -> Problem:
    (*lead, pixels, channels), form = ops.shape_of(call), DATA[factors.types[0]]
    if all(n == 1 for n in ops.shape_of(call.args[1])[:-2]):
        return Problem((*lead, pixels), channels, 1, factors.length, form)
    return Problem((pixels,), channels, prod(lead), factors.length, form, batch=tuple(lead))


def _packed(digits: Digits, factors: Factors, right: Operand) -> te.Tensor:
    """The right factor as `mma_pack.pack` orders constants."""
    p, t = digits.problem, digits.tile
    width = t.depth * p.form.width
    shape = (
        *(p.blocks(t)[i] for i in (0, 2)),
        t.slices,
        p.steps(t),
        t.warps[1],
        t.columns,
        LANES,
        *parts(width, CHUNK),
    )
    value, own = factors.element(lambda _: right, 1), right.shape[:-2]

    def element(*i: Any) -> tirx.Expr:
        group, block, part, step, warp, column, lane, *byte = i
        byte = byte[0] if len(byte) == 1 else byte[0] * CHUNK + byte[1]
        halves = ((part * p.steps(t) + step) * t.depth + byte // 8) * 2 + byte % 8 // 4
        k = halves * 16 + lane % 4 * 4 + byte % 4
        channel = (((block * t.warps[1] + warp) * 4 + lane // 8) * t.columns + column) * 2 + lane // 4 % 2
        many = unravel(group, p.batch)[len(p.batch) - len(own) :] if p.batch else [0] * len(own)
        at = [*(0 if n == 1 else j for n, j in zip(own, many, strict=True)), k, channel]
        return tirx.if_then_else(tirx.all(k < factors.length, channel < p.channels), value(at), immediate(0, "int8"))

    return te.compute(shape, element, name="packed")


def _schedule_packed(sch: s_tir.Schedule) -> None:
    packed = sch.get_sblock("packed")
    *outer, byte = sch.get_loops(packed)
    word, _ = sch.split(byte, [None, WORD])
    thread = sch.fuse(*outer, word)
    vector_write(sch, packed, thread)
    bind_grid(sch, thread)
