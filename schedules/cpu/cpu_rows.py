"""Softmax and normalizations over the last axes, on any CPU: a row at a time, whose stages stay in the first cache.

for (outer dimensions) in parallel:
    maximum or sums of the row; what is computed once a row, its division among it
    exponents of the row, and their sum
    out = epilogue(one rounded product an element)
Every loop over a row is plain, so that LLVM makes vectors of it: integers may be summed in any order.
"""

from __future__ import annotations

import tvm
from tvm import relax, s_tir

from hawq_tvm.core import ops
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .loops import inline_all
from .powers import Powers
from .vector_unit import VectorUnit


def _axes(call: relax.Call) -> list[int]:
    """The axes that a row lies along."""
    rank = len(ops.shape_of(call))
    return sorted(int(a) % rank for a in (call.attrs["axes"] if "axes" in call.attrs else [call.attrs["axis"]]))


ROWS = ("hawq.softmax", "hawq.softmax_wide", "hawq.layer_norm", "hawq.i_softmax", "hawq.i_layer_norm")


class Rows:
    """Softmax and normalizations of several rows, each in one piece."""

    name = "cpu.rows"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """A softmax or a normalization over the last axes with an element-wise epilogue."""
        call = layer.anchor_call
        if call is None or ops.op_name(call) not in ROWS:
            return "not a softmax or a normalization."
        if isinstance(layer.func.body.ty, relax.TupleType):
            return "several results."
        axes, rank = _axes(call), len(ops.shape_of(call))
        if axes != list(range(rank - len(axes), rank)):
            return "a row does not lie in one piece."
        if len(axes) == rank:
            return "a single row."
        return layer.epilogue_moves_data()

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """See the loops at the top of this file."""
        call = layer.anchor_call
        assert call is not None
        # What is computed of the scores on their way is no part of the vectors that `Powers` spells.
        powers = Powers.of(call, VectorUnit.of(target)) if layer.is_parameter(call.args[0]) else Powers()
        emission = Emission(layer, powers.overrides)
        sch = s_tir.Schedule(emission.prim_func())
        inline_all(sch, keep=("exponents",))
        *stages, out = sch.get_child_blocks(sch.get_sblock("root"))
        row = sch.fuse(*sch.get_loops(out)[: -len(_axes(call))])
        sch.parallel(row)
        for stage in reversed(stages):
            sch.compute_at(stage, row, preserve_unit_loops=True)
        for stage in stages:
            if sch.get(stage).init is not None:
                sch.decompose_reduction(stage, sch.get_loops(stage)[-len(_axes(call))])
        return Kernel(powers.spelled(sch), tuple(a for _, a in emission.arguments))
