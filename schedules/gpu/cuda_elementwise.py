"""Layers that compute element by element or move data, on a GPU: a thread takes a vector of channels.

for (outer dimensions, vectors of channels) in parallel:
    load a vector of every operand of the same shape
    for lane (unrolled): compute
    store a vector
"""

from __future__ import annotations

from math import prod

import tvm
from tvm import s_tir

from hawq_tvm.core import ops
from hawq_tvm.core.operators import OPERATORS
from schedules.cpu.cpu_elementwise import Elementwise, ElementwiseTile, boundaries
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .cuda_loops import bind_grid, fuse_outer, lanes_for, start, vector_reads, vector_write


class CudaElementwise(Elementwise):
    """Layers without a reduction."""

    name = "cuda.elementwise"

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """See the loops at the top of this file."""
        emission = Emission(layer)
        sch = start(layer, emission)
        bounds = boundaries(layer)
        moves = all(_in_lines(ops.op_name(b.value)) for b in layer.bindings if isinstance(b.value, tvm.relax.Call))
        chosen = []
        for block, result in zip(sch.get_output_blocks(sch.get_sblock("root")), emission.results, strict=True):
            shape = [int(d) for d in result.shape]
            lanes = lanes_for(shape[-1], prod(shape), *bounds) if shape else 1
            chosen.append(lanes)
            _schedule(sch, block, lanes, moves and bool(bounds))
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), ElementwiseTile(tuple(chosen)))


def _in_lines(name: str) -> bool:
    row = OPERATORS.get(name)
    return row is not None and row.in_lines


def _schedule(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, lanes: int, moves: bool) -> None:
    loops = sch.get_loops(block)
    if lanes == 1:
        bind_grid(sch, fuse_outer(sch, loops, block))
        return
    vectors, lane = sch.split(loops[-1], [None, lanes])
    element = fuse_outer(sch, [*loops[:-1], vectors], block)
    if moves:
        sch.vectorize(lane)
    else:
        vector_reads(sch, block, element)
        vector_write(sch, block, element)
        sch.unroll(sch.get_loops(block)[-1])
    bind_grid(sch, element)
