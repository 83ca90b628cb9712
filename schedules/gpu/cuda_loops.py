"""Schedule steps that the CUDA rules share: stages as grids of threads."""

from __future__ import annotations

from math import gcd, prod
from typing import Any

import tvm
import tvm_ffi
from tvm import ir, relax, s_tir, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.errors import ScheduleError
from schedules.cpu.loops import extent, inline_all
from schedules.emit.emit import Emission
from schedules.layer import Layer

THREADS = 256  # of a block, where nothing speaks for another number; no GPU allows more than 1024
WARP = 32
MANY_THREADS = 1 << 16  # about what fills a large GPU
MOST = 2**31  # elements: positions are 32-bit integers, and so is the number of blocks of a grid


def start(layer: Layer, emission: Emission, keep: tuple[str, ...] = ()) -> s_tir.Schedule:
    """A schedule of a layer in which everything is inlined that can be, except the stages named.

    Raises ScheduleError when a tensor is too large for 32-bit positions.
    """
    sizes = [
        prod(int(d) for d in t.shape)
        for t in [*emission.inputs, *emission.results, *(t for t, _ in emission.arguments)]
    ]
    sizes += [prod(ops.shape_of(b.var)) for b in layer.anchors if not isinstance(b.var.ty, relax.TupleType)]
    if max(sizes, default=0) >= MOST:
        raise ScheduleError(
            "a tensor is too large for a GPU kernel",
            where=layer.name,
            expected=f"less than {MOST} elements",
            found=str(max(sizes)),
            remedy="use a smaller batch",
        )
    sch = s_tir.Schedule(for_gpu(emission.prim_func()))
    inline_all(sch, keep)
    return sch


def for_gpu(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function without what is for CPUs only.

    `emit.fence` is an intrinsic of LLVM: nvcc is told by an option to fuse no product with a sum. Division by a
    number that is not known before the kernel runs becomes a call of `hawq_divide`, because a GPU divides in
    floating point.
    """

    def call(node: ir.Call) -> Any:
        is_fence = str(getattr(node.op, "name", "")) == "tirx.call_llvm_pure_intrin"
        return node.args[-1] if is_fence else node

    def divide(node: tirx.Div) -> Any:
        if str(node.ty.dtype).startswith("float") or isinstance(node.b, tirx.IntImm):
            return node
        wide = [n.astype("int64") for n in (node.a, node.b)]
        return tirx.call_extern("int64", "hawq_divide", *wide).astype(str(node.ty.dtype))

    return tvm_ffi.structural_map(func, [(ir.Call, call), (tirx.Div, divide)])


def blocks(sch: s_tir.Schedule) -> list[s_tir.schedule.SBlockRV]:
    """The stages that are left, producers first."""
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def spatial_and_reduction(
    sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV
) -> tuple[list[s_tir.schedule.LoopRV], list[s_tir.schedule.LoopRV]]:
    """The loops of a stage over its result, and those that reduce."""
    kinds = [int(v.iter_type) for v in sch.get(block).iter_vars]
    loops = sch.get_loops(block)
    return [lp for lp, k in zip(loops, kinds) if k == 0], [lp for lp, k in zip(loops, kinds) if k != 0]


def threads_for(work: int, most: int = THREADS) -> int:
    """Threads of a block for so much work: whole warps, at least half of `most`, that divide it if any do; else
    `most`, or fewer where there is less work."""
    even = [t for t in range(most, most // 2 - 1, -WARP) if t and work % t == 0]
    return even[0] if even else min(most, -(-work // WARP) * WARP)


def fuse_outer(
    sch: s_tir.Schedule, loops: list[s_tir.schedule.LoopRV], block: s_tir.schedule.SBlockRV
) -> s_tir.schedule.LoopRV:
    """Some outermost loops (perhaps none) of a stage as one, whose steps will be threads."""
    return sch.fuse(*loops) if loops else sch.add_unit_loop((sch.get_loops(block) or [block])[0])


def bind_grid(
    sch: s_tir.Schedule,
    loop: s_tir.schedule.LoopRV,
    most: int = THREADS,
    exact: bool = False,
    axis: str = "threadIdx.x",
) -> None:
    """One thread per step of an outermost loop; to be called when everything that belongs into it is there.

    `split` guards what the loop holds where blocks of threads do not divide it. A stage that is computed at a loop
    later gets no
    guard: its indices only look larger, and it writes beyond its buffer.  exact: threads of a block divide the
    steps.  axis: of these threads.
    """
    steps = extent(sch, loop)
    threads = next(t for t in range(min(most, steps), 0, -1) if steps % t == 0) if exact else threads_for(steps, most)
    grid, thread = sch.split(loop, [None, threads])
    sch.bind(grid, "blockIdx.x")
    sch.bind(thread, axis)


def share_reduction(sch: s_tir.Schedule, loops: list[s_tir.schedule.LoopRV], threads: int, axis: str) -> None:
    """Split a reduction among threads of a block, which put their parts together at the end."""
    sch.bind(sch.split(sch.fuse(*loops), [None, threads])[1], axis)


def lanes_for(channels: int, elements: int, *bounds: int) -> int:
    """Channels that a thread computes: up to 16 bytes of 8-bit data, but rather fewer than too few threads to hide
    memory behind.

    bounds: where a vector may not reach across.
    """
    lanes = gcd(channels, 16, *bounds)
    while lanes > 4 and elements // lanes < MANY_THREADS:
        lanes //= 2
    return lanes


def vector_reads(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> None:
    """Load what a stage reads at its own position, and only there, in vectors of the innermost loop below `loop`."""
    found = sch.get(block)
    own = [v.var for v in found.iter_vars]
    for k, region in enumerate(found.reads):
        at = [r.min for r in region.region]
        whole = (
            len(at) == len(own)
            and all(a.same_as(v) for a, v in zip(at, own))
            and all(int(r.extent) == 1 for r in region.region)
        )
        if whole:
            copy = sch.cache_read(block, k, "local")
            sch.compute_at(copy, loop, preserve_unit_loops=True)
            vectorize_copy(sch, copy)


def vector_write(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> None:
    """Collect what a stage computes below `loop`, and store it in vectors of its innermost loop."""
    copy = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(copy, loop, preserve_unit_loops=True)
    vectorize_copy(sch, copy)


def vectorize_copy(sch: s_tir.Schedule, copy: s_tir.schedule.SBlockRV) -> None:
    """Copy vectors of at most 16 bytes, what a GPU loads and stores at once; the last loop has a power of two of
    steps.
    """
    loop = sch.get_loops(copy)[-1]
    bits = int(tvm.DataType(str(sch.get(copy).writes[0].source.dtype)).bits)
    width = min(extent(sch, loop), 128 // max(bits, 8))
    if width > 1:
        outer, inner = sch.split(loop, [None, width])
        sch.unroll(outer)
        sch.vectorize(inner)
