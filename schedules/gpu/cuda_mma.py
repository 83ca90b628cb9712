"""Convolutions and matrix products on NVIDIA's tensor cores: an implicit matrix product with its epilogue in registers.

for block of (group, pixels, channels):                        blockIdx
  for warp, lane:                                              threadIdx
    sums = 0                                                   registers
    for step of K:                                             a pipeline of `stages` steps
      a = data of the block's pixels, zeros at the border      shared memory, asynchronous copies of 16 bytes
      b = weights, in the order of the fragments               shared memory
      sums += a * b                                            `multiply_step`
    tile = epilogue(sums)                                      registers
    out = tile                                                 vectors of neighbouring channels
K may be cut into slices for as many groups of warps, whose sums are added through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, te, tirx

from hawq_tvm.core import arith, ops
from hawq_tvm.core.attributes import Conv2d, Pad
from hawq_tvm.targets.gpu import architectures
from schedules.cpu.contraction import not_a_contraction
from schedules.emit.emit import Array, Emission, Operand, immediate
from schedules.emit.emit_movement import pair, unravel
from schedules.emit.in_tiles import epilogue
from schedules.emit.stored import stored
from schedules.layer import Layer
from schedules.rule import Kernel
from schedules.spelling.mma_intrinsics import Form, part_index, parts

from .mma_model import cycles, gpu_of, ranked_tiles
from .mma_schedule import Scheduling
from .mma_tiles import CHUNK, Digits, MmaTile, Problem, pack_weights, packing, problem_of

DATA = {"uint8": Form.U8S8, "int8": Form.S8S8}
OPENED = {Form.U8S8: Form.U8S4, Form.S8S8: Form.S8S4}
PACKED = {Form.U8S8: Form.U4S4, Form.S8S8: Form.S4S4}


class Mma:
    """8-bit and 4-bit contractions with constant weights and any element-wise epilogue.

    threads: False writes every thread as steps of a loop and every intrinsic as its meaning, to run on a CPU.
    """

    name = "cuda.mma"

    def __init__(self, threads: bool = True) -> None:
        self.threads = threads

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """One conv2d in NHWC or one product with a matrix of weights, of 8 bits each."""
        if why := not_a_contraction(layer):
            return why
        call = layer.anchor_call
        assert call is not None
        x, w = call.args
        if ops.dtype_of(x) not in DATA or ops.dtype_of(w) not in ("int8", "uint8") or ops.dtype_of(call) != "int32":
            return "more than 8 bits of data or weights, or sums of more than 32."
        if not layer.is_constant(w):
            return "weights that are computed at run time."
        if arith.RANGES["int8"][1] < int(layer.constant(w).max(initial=0)):
            return "unsigned weights beyond 127."
        if ops.op_name(call) == "relax.matmul":
            if len(ops.shape_of(x)) < 2 or len(ops.shape_of(w)) != 2:
                return "a product of vectors, or of many matrices of weights."
        elif ops.shape_of(w)[2] == 1 and Conv2d.of(call).groups > 1:
            return "a depthwise convolution, which has one product per tap."
        return layer.epilogue_moves_data(packs=True) or layer.constants_over_rows()

    def tiles(self, layer: Layer, target: tvm.target.Target) -> list[MmaTile]:
        """The best by the cost model first."""
        return ranked_tiles(self.problem(layer), gpu_of(architectures(target)))

    def possible(self, layer: Layer, target: tvm.target.Target) -> list[MmaTile]:
        """Every tile, the best by the cost model first: what it ranks low today was ranked high by another, and
        measured.
        """
        return ranked_tiles(self.problem(layer), gpu_of(architectures(target)), None)

    def problem(self, layer: Layer) -> Problem:
        """What a layer that this rule fits multiplies."""
        return _source(layer).problem

    def form(self, layer: Layer) -> str:
        """The types of its products."""
        return self.problem(layer).form.value

    def estimate(self, layer: Layer, target: tvm.target.Target, tile: MmaTile) -> float:
        """The cost model's cycles."""
        return cycles(self.problem(layer), tile, gpu_of(architectures(target)))

    def packing(self, layer: Layer, tile: MmaTile) -> dict[str, int]:
        """How `mma_pack.pack` makes the kernel's first argument of the layer's weights."""
        return packing(self.problem(layer), tile)

    def weights(self, layer: Layer) -> Array:
        """The layer's weights, [..., channels], all of which are int8."""
        call = layer.anchor_call
        assert call is not None
        return layer.constant(call.args[1]).astype(np.int8)

    def build(self, layer: Layer, target: tvm.target.Target, tile: MmaTile | None = None) -> Kernel:
        """See the loops at the top of this file."""
        tile = tile or self.tiles(layer, target)[0]
        source = _source(layer)
        digits, inputs = Digits(source.problem, tile, layer.packs_result), placeholders(layer)
        weights = pack_weights(self.weights(layer), source.problem, tile)
        w = te.placeholder(weights.shape, str(weights.dtype), "weights")
        sums = sums_of(digits, source.stages(layer, inputs, digits), w)
        sch, arguments = tiled(layer, digits, inputs, sums, [(w, weights)])
        Scheduling(sch, digits, source.is_copied, self.threads).run()
        return Kernel(sch.mod["main"], tuple(a for _, a in arguments), tile)


Placed = tuple[te.Tensor, Array]


def placeholders(layer: Layer) -> dict[relax.Var, te.Tensor]:
    """The layer's parameters as inputs of a kernel."""
    return {p: te.placeholder(ops.shape_of(p), ops.dtype_of(p), f"x{i}") for i, p in enumerate(layer.func.params)}


def tiled(
    layer: Layer, digits: Digits, inputs: dict[relax.Var, te.Tensor], sums: te.Tensor, arguments: list[Placed]
) -> tuple[s_tir.Schedule, list[Placed]]:
    """A kernel from the sums of a tiled product on, not scheduled yet, and all its constant arguments."""
    after, read = epilogue(layer, digits.shape, digits.constant)
    bits = 4 if digits.problem.form.opens_weights else 0

    def given(e: Emission) -> list[Operand]:
        return [Operand(e, sums, bits=bits), *(Operand(e, _residual(layer, v, inputs, digits)) for v in read)]

    emission = Emission(after, given=given)
    (result,) = emission.results

    def element(*d: Any) -> tirx.Expr:
        return pair(result(*d[:-1], 2 * d[-1]), result(*d[:-1], 2 * d[-1] + 1)) if digits.packed else result(*d)

    whole = te.compute(digits.stored, element, name="tile")
    arguments = [*arguments, *emission.arguments]
    func = te.create_prim_func([*inputs.values(), *(t for t, _ in arguments), whole])
    return s_tir.Schedule(stored(func, ops.shape_of(layer.func.body.body), digits.place, digits.exists)), arguments


@dataclass(frozen=True, eq=False)
class Source:
    """Where the data of a contraction comes from.

    data: a parameter of the layer, or what the layer computes from its parameters.  is_copied: it is a parameter,
    with zeros around it perhaps, whose bytes can be copied four or more at a time.
    """

    problem: Problem
    data: relax.Expr
    is_copied: bool

    def stages(self, layer: Layer, inputs: dict[relax.Var, te.Tensor], digits: Digits) -> te.Tensor:
        """The stage "a" of a block's data (and "mask", where it is copied), [group, block, slice, step, chunk, warp,
        row, g, parts(16, vector)]."""
        p, t = self.problem, digits.tile
        steps, total = p.steps(t), p.bytes // p.vector
        shape = (
            p.groups,
            p.blocks(t)[1],
            t.slices,
            steps,
            2 * t.depth,
            t.warps[0],
            2 * t.rows,
            8,
            *parts(CHUNK, p.vector)[:-1],
        )
        vectors = 2 * t.depth * (CHUNK // p.vector)

        def place(d: Sequence[Any]) -> tuple[list[Any], list[tirx.Expr]]:
            pixel = digits.row(d[1], d[5], d[6], d[7])
            vector = (d[2] * steps + d[3]) * vectors + (
                d[4] if p.vector == CHUNK else d[4] * (CHUNK // p.vector) + d[8]
            )
            tap, first = p.tap(vector)
            index, inside = p.at(pixel, tap)
            index = index[1 - len(ops.shape_of(self.data)) :]  # a left factor may have fewer dimensions than the result
            if p.pixels % t.pixels:
                inside.append(pixel < p.pixels)
            if total % (vectors * t.slices):
                inside.append(vector < total)
            if p.batch:
                own = ops.shape_of(self.data)[: -1 - len(index)]
                many = unravel(d[0], p.batch)[len(p.batch) - len(own) :]
                return [*(0 if n == 1 else i for n, i in zip(own, many, strict=True)), *index, first], inside
            return [*index, d[0] * p.run + first], inside

        if self.is_copied:
            x = inputs[self.data]
            mask = te.compute(
                shape, lambda *d: tirx.all(*place(d)[1], tirx.const(True, "bool")).astype("int32"), name="mask"
            )

            def copied(*d: Any) -> tirx.Expr:
                index, _ = place(d[:-1])
                return tirx.if_then_else(mask(*d[:-1]) != 0, x(*index[:-1], index[-1] + d[-1]), immediate(0, x.dtype))

            return te.compute((*shape, p.vector), copied, name="a")
        made = computed_before(layer, self.data, inputs)

        def computed(*d: Any) -> tirx.Expr:
            index, inside = place(d[:-1])
            value = made(*index[:-1], index[-1] + d[-1])
            return tirx.if_then_else(tirx.all(*inside), value, immediate(0, made.dtype)) if inside else value

        return te.compute((*shape, p.vector), computed, name="a")


def _source(layer: Layer) -> Source:
    call = layer.anchor_call
    assert call is not None
    x, w = call.args
    value, before = layer.definition(x), (0, 0)
    if ops.op_name(value) == "relax.nn.pad":
        pad = Pad.of(value)
        around = pad.before[0] or pad.after[0] or pad.before[3] or pad.after[3]
        if pad.value == 0 and not around and min(*pad.before, *pad.after) >= 0:
            value, before = layer.definition(value.args[0]), (pad.before[1], pad.before[2])
    form = DATA[ops.dtype_of(x)]
    if layer.is_four_bits(w) and ops.dtype_of(w) == "int8":
        opened = ops.op_name(value) == "hawq.unpack_int4" and layer.is_parameter(value.args[0])
        if opened and (ops.op_name(call) == "relax.matmul" or Conv2d.of(call).groups == 1):
            form, value = PACKED[form], layer.definition(value.args[0])
        elif 16 * _reach(layer, call) <= arith.RANGES["int32"][1]:
            form = OPENED[form]
    if value in set(layer.func.params):
        problem = problem_of(call, form, before, _size(value))
        if problem.vector >= 4 or form.is_packed:
            return Source(problem, value, problem.vector >= 4)
    return Source(problem_of(call, form, (0, 0), _size(x)), x, False)


def _size(data: relax.Expr) -> tuple[int, int]:
    shape = ops.shape_of(data)
    return (shape[1], shape[2]) if len(shape) == 4 else (1, 1)


def _reach(layer: Layer, call: relax.Call) -> int:
    """The largest magnitude of a partial sum of a contraction of 8-bit data."""
    low, high = arith.RANGES[ops.dtype_of(call.args[0])]
    weights = layer.constant(call.args[1])
    columns = weights.reshape(-1, weights.shape[-1]).astype(np.int64)
    return max(-low, high) * int(np.abs(columns).sum(0).max(initial=0))


def computed_before(layer: Layer, data: relax.Expr, inputs: dict[relax.Var, te.Tensor]) -> te.Tensor:
    """The stages that compute something from before the anchor."""
    builder = ops.Builder()
    anchor = layer.anchor
    assert anchor is not None
    params = list(layer.func.params)
    with builder.function("prologue", params):
        with builder.dataflow():
            for b in layer.bindings[: layer.bindings.index(anchor)]:
                builder.emit_normalized(b)
            result = builder.emit_output(data)
        builder.emit_func_output(result)
    emission = Emission(
        Layer(layer.name, builder.get()["prologue"]), given=lambda e: [Operand(e, inputs[p]) for p in params]
    )
    assert not emission.arguments, "a constant before the contraction"
    return emission.results[0]


def sums_of(digits: Digits, a: te.Tensor, w: te.Tensor) -> te.Tensor:
    """The stages "b", "sums" and, where K is sliced, "spilled": the sums over the digits of the output."""
    p, t = digits.problem, digits.tile
    form, steps = p.form, p.steps(t)
    b = te.compute(w.shape, lambda *i: w(*i), name="b")
    step, k, byte = (te.reduce_axis((0, n), name) for n, name in ((steps, "step"), (t.depth, "k"), (32, "byte")))

    def accumulate(*d: Any) -> tirx.Expr:
        group, pixels, channels, s, warp, across, g, lane, row, own = d
        data = a(
            group, pixels, s, step, k * 2 + byte // CHUNK, warp, row, g, *part_index(CHUNK, p.vector, byte % CHUNK)
        )
        at = part_index(t.depth * form.width, CHUNK, k * form.width + form.at(byte))
        weights = b(group, channels, s, step, across, own // 2, lane * 8 + own % 2 * 4 + byte % 16 // 4, *at)
        return te.sum(form.product(data, weights, byte), axis=[step, k, byte])

    sums = te.compute((*p.blocks(t), t.slices, *t.warps, 8, 4, 2 * t.rows, digits.own), accumulate, name="sums")
    if t.slices == 1:
        return te.compute(digits.shape, lambda *d: sums(*d[:3], 0, *d[3:]), name="whole")
    # Lanes last, so that a warp writes and reads whole lines of shared memory.
    spilled = te.compute(
        (*p.blocks(t), t.slices, *t.warps, 2 * t.rows, digits.own, 8, 4),
        lambda *d: sums(*d[:6], *d[8:], *d[6:8]),
        name="spilled",
    )

    def whole(*d: Any) -> tirx.Expr:
        total = spilled(*d[:3], 0, *d[3:5], *d[7:], *d[5:7])
        for s in range(1, t.slices):
            total = total + spilled(*d[:3], s, *d[3:5], *d[7:], *d[5:7])
        return total

    return te.compute(digits.shape, whole, name="whole")


def _residual(layer: Layer, v: relax.Var, inputs: dict[relax.Var, te.Tensor], digits: Digits) -> te.Tensor:
    """The stage "residual" of another operand of the epilogue, broadcast to the output; what is loaded as it is can
    be vectorised.
    """
    x = inputs[v] if v in inputs else computed_before(layer, v, inputs)
    shape = [int(d) for d in x.shape]

    def element(*d: Any) -> tirx.Expr:
        index = digits.index(d, clamped=True)
        return x(*(0 if n == 1 else i for n, i in zip(shape, index[len(index) - len(shape) :], strict=True)))

    return te.compute(digits.shape, element, name="residual" if v in inputs and shape[-1] > 1 else "opened")
