"""The exponents of a softmax of wide scores (A24) on CPUs whose registers hold its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax, s_tir, tirx

from hawq_tvm.core import ops
from schedules.emit.emit import Emitter
from schedules.emit.emit_reduce import has_short_tables, softmax
from schedules.spelling.power_intrinsics import LANES, powers_of

from .loops import extent
from .vector_unit import VectorUnit
from .vectors import spelled


@dataclass(frozen=True)
class Powers:
    """How the stage "exponents" of a row is computed; fraction: that of (A24) where registers hold the tables, else
    0.
    """

    fraction: int = 0

    @staticmethod
    def of(call: relax.Call, unit: VectorUnit) -> Powers:
        """Of a softmax of any kind."""
        fits = unit.packs == LANES and has_short_tables(call) and ops.shape_of(call)[-1] >= LANES
        return Powers(int(call.attrs["fraction"]) if fits else 0)

    @property
    def overrides(self) -> dict[str, Emitter]:
        """The emitter of the softmax, where it is another."""
        return {"hawq.softmax_wide": lambda e, call: softmax(e, call, in_registers=True)} if self.fraction else {}

    def spelled(self, sch: s_tir.Schedule) -> tirx.PrimFunc:
        """The kernel of a finished schedule, with vectors of exponents."""
        if not self.fraction:
            return sch.mod["main"]
        element = sch.get_loops(sch.get_sblock("exponents"))[-1]
        length = extent(sch, element)
        if length % LANES:
            element = sch.loop_partition(element, [length // LANES * LANES, None])[0]
        lane = sch.split(element, [None, LANES])[-1]

        def powers(operands: Sequence[tirx.Expr], tables: Sequence[tirx.Buffer]) -> list[tirx.Expr]:
            maximum, scores = operands
            return [powers_of(tirx.Broadcast(maximum, LANES) - scores, tables[0], self.fraction)]

        return spelled(sch.mod["main"], [sch.get(lane)], powers)
