"""Schedule steps that the CUDA rules share: stages as grids of threads."""

from __future__ import annotations

from math import prod

from tvm import s_tir

from hawq_tvm import ops
from hawq_tvm.errors import ScheduleError

from .emit import Emission
from .layer import Layer
from .loops import extent, inline_all

THREADS = 256  # of a block, where nothing speaks for another number; no GPU allows more than 1024
WARP = 32
MOST = 2**31  # elements: positions are 32-bit integers, and so is the number of blocks of a grid


def start(layer: Layer, emission: Emission, keep: tuple[str, ...] = ()) -> s_tir.Schedule:
    """A schedule of a layer in which everything is inlined that can be, except the stages named.

    Raises ScheduleError when a tensor is too large for 32-bit positions.
    """
    sizes = [prod(int(d) for d in t.shape) for t in [*emission.inputs, *emission.results, *(t for t, _ in emission.arguments)]]
    sizes += [prod(ops.shape_of(b.var)) for b in layer.anchors]
    if max(sizes, default=0) >= MOST:
        raise ScheduleError("a tensor is too large for a GPU kernel", where=layer.name, expected=f"less than {MOST} elements", found=str(max(sizes)), remedy="use a smaller batch")
    sch = s_tir.Schedule(emission.prim_func())
    inline_all(sch, keep)
    return sch


def blocks(sch: s_tir.Schedule) -> list[s_tir.schedule.SBlockRV]:
    """The stages that are left, producers first."""
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def spatial_and_reduction(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV) -> tuple[list[s_tir.schedule.LoopRV], list[s_tir.schedule.LoopRV]]:
    """The loops of a stage over its result, and those that reduce."""
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    loops = sch.get_loops(block)
    return [lp for lp, k in zip(loops, kinds) if k == 0], [lp for lp, k in zip(loops, kinds) if k != 0]


def threads_for(work: int, most: int = THREADS) -> int:
    """Threads of a block for so much work: no more than it has, in whole warps."""
    return min(most, -(-work // WARP) * WARP)


def bind_grid(sch: s_tir.Schedule, loops: list[s_tir.schedule.LoopRV], block: s_tir.schedule.SBlockRV, most: int = THREADS) -> s_tir.schedule.LoopRV:
    """One thread per step of some outermost loops (perhaps none) of a stage; the loop over the threads of a block."""
    fused = sch.fuse(*loops) if loops else sch.add_unit_loop(block)
    grid, thread = sch.split(fused, [None, threads_for(extent(sch, fused), most)])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread
