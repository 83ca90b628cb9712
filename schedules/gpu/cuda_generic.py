"""The rule that fits every layer on every GPU: each stage that cannot be inlined is a grid with one thread per element.

    for element in parallel:
        acc = identity; for reduction: acc = reduce(acc, x)     registers
        out = epilogue(acc)

A long reduction to few elements is shared by the threads of a warp.
"""

from __future__ import annotations

from math import prod

import tvm
from tvm import s_tir

from schedules.cpu.generic import Generic
from schedules.cpu.loops import extent
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .cuda_loops import (
    MANY_THREADS,
    THREADS,
    WARP,
    bind_grid,
    blocks,
    fuse_outer,
    share_reduction,
    spatial_and_reduction,
    start,
)

_SHARE_FROM = 64  # steps of a reduction


class CudaGeneric(Generic):
    """Every layer, with its stages in order."""

    name = "cuda.generic"

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """See the loops at the top of this file."""
        emission = Emission(layer)
        sch = start(layer, emission)
        done: set[str] = set()
        for block in blocks(sch):
            if sch.get(block).name_hint not in done:
                done |= grid(sch, block)
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments))


def grid(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> set[str]:
    """Make a stage a grid, and what follows it element by element a part of it; the names of the stages that then
    run.
    """
    names = {str(sch.get(block).name_hint)}
    spatial, reduction = spatial_and_reduction(sch, block)
    sch.reorder(*spatial, *reduction)
    steps, elements = (prod(extent(sch, lp) for lp in loops) for loops in (reduction, spatial))
    # Values of 32 bits and more are shuffled; narrower ones TVM would pass through shared memory with no barrier
    # between.
    wide = int(tvm.DataType(str(sch.get(block).writes[0].source.dtype)).bits) >= 32
    shared = bool(reduction) and wide and steps >= _SHARE_FROM and elements < MANY_THREADS
    consumer = _only_consumer(sch, block) if reduction else None
    element = fuse_outer(sch, spatial, block)
    if not reduction:
        bind_grid(sch, element)
        return names
    if consumer is not None:
        try:
            sch.reverse_compute_at(consumer, element, preserve_unit_loops=True)
            sch.set_scope(block, 0, "local")
            names.add(str(sch.get(consumer).name_hint))
        except s_tir.ScheduleError:
            consumer = None  # it moves elements: another grid
    if consumer is None:
        sch.reverse_compute_at(sch.cache_write(block, 0, "local"), element, preserve_unit_loops=True)
    if shared:
        share_reduction(sch, reduction, WARP, "threadIdx.x")
        # No guard, which the threads would have to pass together to reduce together.
        bind_grid(sch, element, THREADS // WARP, exact=True, axis="threadIdx.y")
    else:
        bind_grid(sch, element)
        sch.decompose_reduction(block, reduction[0])
    return names


def _only_consumer(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> s_tir.schedule.SBlockRV | None:
    """The stage that alone reads a stage and does nothing but compute element by element from it."""
    consumers = sch.get_consumers(block)
    if len(consumers) != 1:
        return None
    (consumer,) = consumers
    is_map = all(int(v.iter_type) == 0 for v in sch.get(consumer).iter_vars)
    return consumer if is_map and len(sch.get_producers(consumer)) == 1 else None
