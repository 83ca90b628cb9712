"""The schedule of a tensor-core product: blocks, threads, the pipeline of copies; see the loops at the top of
cuda_mma.py.
"""

from __future__ import annotations

from math import gcd

import tvm
from tvm import s_tir

from schedules.cpu.loops import inline_all
from schedules.spelling.mma_intrinsics import copy_always, copy_or_zero, multiply_step

from .mma_pack import LANES
from .mma_tiles import CHUNK, Digits

VECTOR_BITS = 128  # of the largest load or store


class Scheduling:
    """The schedule of a kernel.

    threads: False writes every thread as steps of a loop and every intrinsic as its meaning.
    """

    def __init__(self, sch: s_tir.Schedule, digits: Digits, is_copied: bool, threads: bool) -> None:
        self.sch, self.digits, self.is_copied, self.threads = sch, digits, is_copied, threads
        self.tile, self.form = digits.tile, digits.problem.form

    def run(self) -> None:
        """Everything, from the output to what it is computed from."""
        sch, t = self.sch, self.tile
        inline_all(sch, keep=("mask", "a", "b", "packed", "sums", "spilled", "residual", "opened", "tile"))
        lanes = self.results()
        sums = sch.get_sblock("sums")
        sch.compute_at(sums, lanes, preserve_unit_loops=True)
        *outer, row, own, step, k, byte = sch.get_loops(sums)
        sch.reorder(step, row, own, k, byte)
        self.scope(sums, "local")
        self.operands(step)
        init = sch.decompose_reduction(sums, step)
        if self.threads:
            self.unroll(init, len(outer))
            sch.tensorize(row, multiply_step(t.rows, t.columns, t.depth, self.form, self.digits.problem.vector))
            self.pipeline(step)

    def results(self) -> s_tir.schedule.LoopRV:
        """Blocks and threads of the output and of all that leads to it from the sums, and the loop over the lanes
        that compute these.

        Where K is sliced, the output is dealt out to all threads anew.
        """
        sch, t = self.sch, self.tile
        store = sch.get_sblock("store")
        group, bm, bn, warp, across, g, lane, row, own = sch.get_loops(store)
        block = sch.fuse(group, bm, bn)
        self.bind(block, "blockIdx.x")
        part, own = sch.split(own, [t.slices, None])
        sch.reorder(part, warp, across, g, lane, row, own)
        lanes = self.bind_threads(sch.fuse(part, warp, across), sch.fuse(g, lane))
        self.vectorize(own, store)
        for b in (*self.named("tile"), *self.named("residual"), *self.named("opened")):
            sch.compute_at(b, lanes, preserve_unit_loops=True)
            self.scope(b, "local")
        for b in self.named("residual"):
            self.vectorize(sch.get_loops(b)[-1], b)
        if t.slices == 1:
            return lanes
        spilled = sch.get_sblock("spilled")
        self.scope(spilled, "shared.dyn")
        sch.compute_at(spilled, block, preserve_unit_loops=True)
        *_, s, warp, across, row, own, g, lane = sch.get_loops(spilled)
        sch.reorder(s, warp, across, g, lane, row, own)
        return self.bind_threads(sch.fuse(s, warp, across), sch.fuse(g, lane))

    def bind(self, loop: s_tir.schedule.LoopRV, thread: str) -> None:
        """Bind a loop where threads are written."""
        if self.threads:
            self.sch.bind(loop, thread)

    def bind_threads(self, warps: s_tir.schedule.LoopRV, lanes: s_tir.schedule.LoopRV) -> s_tir.schedule.LoopRV:
        """Bind a loop over a block's warps and one over their lanes, which is returned."""
        self.bind(warps, "threadIdx.y")
        self.bind(lanes, "threadIdx.x")
        return lanes

    def vectorize(self, loop: s_tir.schedule.LoopRV, block: s_tir.schedule.SBlockRV) -> None:
        """Load or store neighbouring channels together, where the output has them all or none."""
        if not self.threads or not self.digits.whole:
            return
        bits = int(tvm.DataType(str(self.sch.get(block).writes[0].source.dtype)).bits)
        width = gcd(int(self.sch.get(loop).extent), VECTOR_BITS // bits)
        if width > 1:
            self.sch.vectorize(self.sch.split(loop, [None, width])[1])

    def scope(self, block: s_tir.schedule.SBlockRV, scope: str) -> None:
        """Where a block's result lies, where threads are written."""
        if self.threads:
            self.sch.set_scope(block, 0, scope)

    def unroll(self, block: s_tir.schedule.SBlockRV, outer: int) -> None:
        """Unroll all but the `outer` outermost loops of a block: registers have no addresses."""
        for loop in self.sch.get_loops(block)[outer:]:
            self.sch.unroll(loop)

    def operands(self, step: s_tir.schedule.LoopRV) -> None:
        """Data and weights of a step in shared memory, copied by all threads of the block."""
        sch, p = self.sch, self.digits.problem
        a, b = sch.get_sblock("a"), sch.get_sblock("b")
        for block in (a, b):
            self.scope(block, "shared.dyn")  # first, so that it is computed for all threads
            sch.compute_at(block, step, preserve_unit_loops=True)
        loops = self.inner(a, step)
        first, (chunk, *rows), rest = loops[:4], loops[4:8], loops[8:]
        sch.reorder(*first, *rows, chunk, *rest)
        if self.is_copied:
            self.scope(sch.get_sblock("mask"), "local")
            sch.compute_at(sch.get_sblock("mask"), rest[0] if p.vector < CHUNK else chunk)
            a = self.spelled(a, copy_or_zero(self.form.data, p.vector))
        self.deal_out(sch.fuse(*first, *rows, chunk))
        if self.threads:
            # Chunks of neighbouring rows and of one row both fall into different banks.
            sch.storage_align(a, 0, 4, 128, 32)
        vectors = self.inner(b, step)[:-1]
        self.spelled(b, copy_always(self.form.weights, min(CHUNK, self.tile.depth * self.form.width)))
        self.deal_out(sch.fuse(*vectors))

    def spelled(self, block: s_tir.schedule.SBlockRV, intrinsic: str) -> s_tir.schedule.SBlockRV:
        """A block whose innermost loop is spelled as an intrinsic, where threads are written.

        To be called before its loops are dealt out: `tensorize` takes no block with a condition.
        """
        if not self.threads:
            return block
        name = str(self.sch.get(block).name_hint)
        self.sch.tensorize(self.sch.get_loops(block)[-1], intrinsic)
        return self.sch.get_sblock(f"{name}_o")

    def inner(self, block: s_tir.schedule.SBlockRV, loop: s_tir.schedule.LoopRV) -> list[s_tir.schedule.LoopRV]:
        """The loops of a block inside of one that it was computed at."""
        loops = self.sch.get_loops(block)
        depth = [self.sch.get(lp).loop_var.name for lp in loops].index(self.sch.get(loop).loop_var.name)
        return list(loops[depth + 1 :])

    def deal_out(self, loop: s_tir.schedule.LoopRV) -> None:
        """Deal a loop out to all threads of the block."""
        _, warps, lanes = self.sch.split(loop, [None, self.tile.threads // LANES, LANES])
        self.bind_threads(warps, lanes)

    def named(self, name: str) -> list[s_tir.schedule.SBlockRV]:
        """The blocks whose name begins with `name`."""
        return [
            b
            for b in self.sch.get_child_blocks(self.sch.get_sblock("root"))
            if str(self.sch.get(b).name_hint).startswith(name)
        ]

    def pipeline(self, step: s_tir.schedule.LoopRV) -> None:
        """Copies of a step, `stages` - 1 steps before its products."""
        self.sch.annotate(step, "software_pipeline_stage", [0, 0, self.tile.stages - 1])
        self.sch.annotate(step, "software_pipeline_order", [0, 1, 2])
        self.sch.annotate(step, "software_pipeline_async_stages", [0])
