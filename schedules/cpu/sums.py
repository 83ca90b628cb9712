"""Sums along rows and columns before a product of bytes begins, which make up for what its factors are too large by.

They are a function of their own, put before the product's: a schedule that runs through blocks of its sums could not
leave its first stages where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm_ffi
from tvm import s_tir, te, tirx

from schedules.emit.emit import Emission
from schedules.factors import Factors

from .loops import vectorize_plain


class Sums:
    """The sums that a product needs, if any: stages, and what stands for them in the product.

    factors: None of other contractions.
    """

    def __init__(self, factors: Factors | None) -> None:
        self.factors = factors
        self._stages: dict[str, te.Tensor] = {}
        self._places: dict[str, te.Tensor] = {}

    def finished(self, e: Emission, shape: tuple[int, ...], raw: Callable[..., tirx.Expr]) -> te.Tensor:
        """The stage "view" of the product, from its elements as the factors are multiplied."""
        assert self.factors is not None
        factors, self._stages = self.factors, self.factors.sums(e.operand)
        self._places = {n: te.placeholder(s.shape, s.dtype, n) for n, s in self._stages.items()}
        return te.compute(shape, lambda *i: factors.finished(raw(*i), i, self._places), name="view")

    @property
    def kept(self) -> tuple[str, ...]:
        """The stages of the product that are not to be inlined."""
        return ("view",) if self._stages else ()

    def prim_func(self, e: Emission) -> tirx.PrimFunc:
        """The unscheduled product, the sums among its parameters."""
        return e.prim_func(*self._places.values())

    def finish(self, sch: s_tir.Schedule, loop: s_tir.schedule.LoopRV, lanes: int) -> None:
        """Make up for them in `loop`, where a block of sums of products is complete; an epilogue follows."""
        if self._stages and sch.get_consumers(view := sch.get_sblock("view")):
            sch.reverse_compute_at(view, loop, preserve_unit_loops=True)
            vectorize_plain(sch, sch.get_loops(view)[-1], lanes)

    def before(self, func: tirx.PrimFunc, e: Emission, lanes: int) -> tirx.PrimFunc:
        """The scheduled product with its sums before it, which are then no parameters."""
        if not self._stages:
            return func
        sch = s_tir.Schedule(te.create_prim_func([*e.inputs, *self._stages.values()]))
        for name in self._stages:
            _schedule(sch, sch.get_sblock(name), lanes)
        first, own = sch.mod["main"], {str(p.name): p for p in func.params}
        names = [str(t.op.name) for t in e.inputs] + list(self._stages)
        same = {p: own[n] for p, n in zip(first.params, names, strict=True)}
        begin = tvm_ffi.structural_map(first.body.block.body, [(tirx.Var, lambda v: same.get(v, v))])
        root = func.body.block
        held = [*root.alloc_buffers, *(own[n] for n in self._stages)]
        block = s_tir.SBlock([], [], [], "root", tirx.SeqStmt([begin, root.body]), alloc_buffers=held)
        params = [p for p in func.params if str(p.name) not in self._stages]
        return tirx.PrimFunc(params, s_tir.SBlockRealize([], True, block), attrs=func.attrs)


def _schedule(sch: s_tir.Schedule, block: s_tir.schedule.SBlockRV, lanes: int) -> None:
    *outer, element, k = sch.get_loops(block)
    if str(sch.get(block).name_hint) == "across":
        sch.parallel(sch.fuse(*outer, element))
        return
    group, element = sch.split(element, [None, min(4 * lanes, int(sch.get(element).extent))])
    sch.reorder(group, k, element)
    sch.parallel(sch.fuse(*outer, group))
    vectorize_plain(sch, element, lanes)
    sch.decompose_reduction(block, k)
