"""The rule that fits every layer on every CPU: correct, inlined where possible, parallel, left to LLVM to vectorise."""

from __future__ import annotations

import tvm
from tvm import s_tir

from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .loops import inline_all


class Generic:
    """Every layer, with its stages in order."""

    name = "cpu.generic"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """Fits everything."""
        return None

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """Inline what can be inlined, nothing more."""
        emission = Emission(layer)
        sch = s_tir.Schedule(emission.prim_func())
        inline_all(sch)
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments))
