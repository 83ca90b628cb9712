"""Layers that compute element by element or move data, on any CPU: one nest per result, its last axis in vectors."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

import tvm
from tvm import s_tir

from hawq_tvm.core import ops
from schedules.emit.emit import Emission
from schedules.layer import Layer
from schedules.rule import Kernel

from .loops import inline_all
from .vector_unit import VectorUnit

# Below this many elements a second thread costs more than it brings.
WORTH_A_THREAD = 1 << 14
# A shorter last axis is left to LLVM, which makes vectors of the last two together, where the others are enough tasks
# for any machine.
SHORT, ENOUGH = 8, 64


@dataclass(frozen=True)
class ElementwiseTile:
    """Elements of the last axis computed at once, one number per result; 1 leaves the axis to LLVM."""

    lanes: tuple[int, ...]

    def __str__(self) -> str:
        return "vectors of " + ", ".join(str(n) if n > 1 else "LLVM's choice" for n in self.lanes)


class Elementwise:
    """Layers without a reduction."""

    name = "cpu.elementwise"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """No operator that reduces."""
        return f"{ops.op_name(layer.anchors[0].value)} reduces." if layer.anchors else None

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """Inline every stage, then vectors of the last axis inside a parallel loop over the others."""
        emission = Emission(layer)
        sch = s_tir.Schedule(emission.prim_func())
        inline_all(sch)
        most = 4 * VectorUnit.of(target).lanes
        bounds = boundaries(layer)
        chosen = []
        for block, result in zip(sch.get_output_blocks(sch.get_sblock("root")), emission.results, strict=True):
            shape = [int(d) for d in result.shape]
            loops = sch.get_loops(block)
            lanes = gcd(shape[-1], most, *bounds) if shape else 1
            short = bool(shape) and shape[-1] < SHORT and prod(shape[:-2]) >= ENOUGH
            lanes = 1 if short and not bounds else lanes
            chosen.append(lanes)
            if not loops:
                continue
            inner = 2 if short else 1
            if prod(shape) >= WORTH_A_THREAD and len(loops) > inner:
                sch.parallel(sch.fuse(*loops[:-inner]))
            if lanes > 1:
                sch.vectorize(sch.split(loops[-1], [None, lanes])[-1])
        return Kernel(sch.mod["main"], tuple(a for _, a in emission.arguments), ElementwiseTile(tuple(chosen)))


def boundaries(layer: Layer) -> list[int]:
    """Where a vector along the last axis may not reach across: the parts of a concatenation, the edges of a pad."""
    found: list[int] = []
    for b in layer.bindings:
        name = ops.op_name(b.value)
        rank = len(ops.shape_of(b.var)) if name in ("relax.concat", "relax.nn.pad", "hawq.dilate2d") else 0
        if name == "relax.concat" and int(b.value.attrs.axis or 0) % rank == rank - 1:
            found += [ops.shape_of(f)[-1] for f in b.value.args[0].fields]
        elif name == "relax.nn.pad":
            found += [int(p) for p in b.value.attrs.pad_width[-2:]]
            found += [ops.shape_of(b.value.args[0])[-1]]
        elif name == "hawq.dilate2d" and str(b.value.attrs["layout"])[-1] in "HW":
            found.append(1)
    return found
