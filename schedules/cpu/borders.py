"""Products with a border of zeros are left out: a scheduled contraction skips the taps and pixels that lie beside
its data.

    for kh where the data has a line:                           instead of all
      for t:                                                    a tap
        where it needs the pixels first ..< last of the block:  one body per such range, unrolled over its pixels alone
          for step of the run:
            ...

Pixels of a block that stick out of a row are left out, too. A 3x3 convolution of 7x7 pixels saves 18 % of its products,
and where no zero is left to be read, the data need no copy with a border around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d, Pad
from schedules.emit.emit import immediate
from schedules.layer import Layer

from .contract_tiles import ContractTile, LoadedTile
from .contraction import Shape
from .loops import nodes

# Bodies of the innermost loop at most, and steps of one at least: else the loops around them cost more than what is
# left out.
BODIES, STEPS = 12, 16
SAVED = 0.01  # the share of products that is worth leaving out for itself


@dataclass(frozen=True)
class Axis:
    """One axis of a contraction's data: output o reads o * stride + tap * dilation - before, which is a zero outside
    of 0 ..< size.
    """

    size: int
    before: int
    stride: int
    dilation: int

    def data(self, output: Any, tap: Any) -> Any:
        """Where an output's tap reads."""
        return output * self.stride + tap * self.dilation - self.before

    def outputs(self, tap: Any) -> tuple[Any, Any]:
        """The first output for which a tap reads data, and the one after the last; either may lie beside the
        outputs.
        """
        first = self.before - tap * self.dilation + self.stride - 1
        return first // self.stride, (first + self.size) // self.stride


@dataclass(frozen=True)
class Ranges:
    """Which pixels of a block need a tap: `first ..< last`, which depends on the block's first pixel and the tap.

    axis: along a row, where it has zeros beside it.  scale: the pixels of one output of the axis.  pixels, block,
    taps: how many there are.
    """

    axis: Axis | None
    scale: int
    pixels: int
    block: int
    taps: int

    @property
    def all(self) -> list[tuple[int, int]]:
        """That of each block and tap."""
        return [self._of(base, tap, min, max) for base in range(0, self.pixels, self.block) for tap in range(self.taps)]

    @property
    def needed(self) -> list[tuple[int, int]]:
        """The different ones that are not empty."""
        return sorted({(first, last) for first, last in self.all if first < last})

    @property
    def saved(self) -> float:
        """The share of the products that is left out."""
        return 1 - sum(max(last - first, 0) for first, last in self.all) / (self.block * len(self.all))

    def _of(self, base: Any, tap: Any, least: Callable[..., Any], most: Callable[..., Any]) -> tuple[Any, Any]:
        first, last = (
            (edge * self.scale - base for edge in self.axis.outputs(tap)) if self.axis else (-base, self.pixels - base)
        )
        return most(first, 0), least(least(last, self.pixels - base), self.block)

    def choose(self, base: tirx.Expr, tap: tirx.Expr, body: Callable[[int, int], tirx.Stmt]) -> tirx.Stmt:
        """The body for each range that is not empty, behind a condition."""
        first, last = self._of(base, tap, tirx.Min, tirx.Max)
        *others, final = [(first.equal(a) & last.equal(b), body(a, b)) for a, b in self.needed]
        # Never without an else: TVM's HoistIfThenElse would take a chain that ends so apart and lose the bodies before.
        chain = final[1] if all(a < b for a, b in self.all) else tirx.IfThenElse(*final, tirx.Evaluate(0))
        for condition, statement in others:
            chain = tirx.IfThenElse(condition, statement, chain)
        return chain


@dataclass(frozen=True)
class Borders:
    """What a contraction leaves out.

    lines: where kernel lines above and below the data are skipped.  ranges: where pixels are skipped.  beside: the
    taps that the loop over a line's steps is to be split into for that.  unpadded: the data without their border,
    where no zero of it is read.  origin: the lines above and the columns before them.
    """

    lines: Axis | None = None
    ranges: Ranges | None = None
    beside: int = 1
    unpadded: relax.Expr | None = None
    origin: tuple[int, int] = (0, 0)

    @staticmethod
    def of(layer: Layer, call: relax.Call, shape: Shape, tile: ContractTile, offset: int, in_place: bool) -> Borders:
        """Those of a conv2d (NHWC) or a matmul in the form `shape`.

        What is multiplied is the data with `offset` added; in_place: it could be read where it lies.
        """
        lines, columns = (None, None) if offset else axes_of(layer, call)
        along, across = (lines, columns) if shape.width else (columns, lines)
        single = shape.run // shape.side_by_side % tile.length == 0  # a step lies within one tap
        beside = shape.side_by_side if single else 1
        ranges = Ranges(
            along if single else None, max(shape.width, 1), shape.pixels, tile.pixels, shape.taps[1] * beside
        )
        # Which loads the data of a block's pixels for all of its taps, and multiplies neighbours at once.
        loaded = isinstance(tile, LoadedTile)
        worth = ranges.saved >= SAVED or ranges.axis is not None
        skips = worth and 0 < len(ranges.needed) <= BODIES and shape.run // beside // tile.length >= STEPS
        zeros = bool(along and (loaded or not (skips and single))) or bool(across and shape.width)
        pad = layer.definition(call.args[0])
        kept = Borders(None if shape.width else lines, *((ranges, beside) if skips else (None, 1)))
        if not in_place or not (lines or columns) or zeros or not layer.is_parameter(pad.args[0]):
            return kept
        return replace(
            kept, unpadded=pad.args[0], origin=(lines.before if lines else 0, columns.before if columns else 0)
        )


def axes_of(layer: Layer, call: relax.Call) -> tuple[Axis | None, Axis | None]:
    """The lines and the columns of a conv2d's data; None where there is no border, or one of other values than 0 or
    around channels or images.
    """
    pad = layer.definition(call.args[0])
    if ops.op_name(call) != "relax.nn.conv2d" or ops.op_name(pad) != "relax.nn.pad" or Pad.of(pad).value:
        return None, None
    border, conv, sizes = Pad.of(pad), Conv2d.of(call), ops.shape_of(pad.args[0])
    if border.before[0] or border.after[0] or border.before[3] or border.after[3]:
        return None, None
    lines, columns = (
        Axis(sizes[d], border.before[d], conv.strides[d - 1], conv.dilation[d - 1])
        if border.before[d] or border.after[d]
        else None
        for d in (1, 2)
    )
    return lines, columns


@dataclass(frozen=True)
class Nest:
    """The loops of a contraction's products, scheduled: kernel lines, the taps of one, and a block's pixels,
    `together` in each step.

    pixels is any loop around nothing but a block's products.  height: the output lines of a block.
    """

    lines: s_tir.schedule.LoopRV
    taps: s_tir.schedule.LoopRV
    pixels: s_tir.schedule.LoopRV
    together: int = 1
    height: int = 1


def without_borders(
    sch: s_tir.Schedule, func: tirx.PrimFunc, shape: Shape, borders: Borders, nest: Nest
) -> tirx.PrimFunc:
    """The kernel of a finished schedule, as `func`, with fewer products, all of which would be with zeros or never
    looked at.
    """
    lines, taps, pixels = (sch.get(loop) for loop in (nest.lines, nest.taps, nest.pixels))
    places, have_data = iterators(pixels), lines_with_data(sch, shape, borders, nest)

    def leave_out(loop: tirx.For) -> tirx.For:
        if borders.ranges and loop.loop_var.same_as(taps.loop_var):
            base = at_start(places[len(shape.lead)], pixels) * nest.together

            def body(first: int, last: int) -> tirx.Stmt:
                return _only(loop.body, pixels.loop_var, first // nest.together, -(-last // nest.together))

            return looped(loop, loop.min, loop.extent, borders.ranges.choose(base, loop.loop_var, body))
        if have_data is not None and loop.loop_var.same_as(lines.loop_var):
            # A condition, because loops from 0 on are what TVM's simplifier understands.
            return looped(loop, loop.min, loop.extent, tirx.IfThenElse(have_data, loop.body, None))
        return loop

    return tvm_ffi.structural_map(func, [(tirx.For, leave_out)])


def lines_with_data(sch: s_tir.Schedule, shape: Shape, borders: Borders, nest: Nest) -> tirx.Expr | None:
    """Whether a kernel line meets data in any line of a block; None where all do."""
    if borders.lines is None:
        return None
    lines = sch.get(nest.lines)
    output = at_start(iterators(sch.get(nest.pixels))[len(shape.lead) - 1], lines.body)
    first, last = (borders.lines.data(output + i, lines.loop_var) for i in (0, nest.height - 1))
    return (last >= 0) & (first < borders.lines.size)


def iterators(loop: tirx.For) -> list[tirx.Expr]:
    """What the iterators of the one block inside a loop are."""
    (realize,) = nodes(s_tir.SBlockRealize, loop)
    return list(realize.iter_values)


def at_start(expr: tirx.Expr, body: tirx.Stmt) -> tirx.Expr:
    """An expression where all loops of a body begin."""
    inside = [loop.loop_var for loop in nodes(tirx.For, body)]
    return tvm_ffi.structural_map(
        expr, [(tirx.Var, lambda v: immediate(0, "int32") if any(v.same_as(i) for i in inside) else v)]
    )


def _only(body: tirx.Stmt, var: tirx.Var, first: int, last: int) -> tirx.Stmt:
    """A copy of a body in which the loop of `var` runs over first ..< last; its variables and views are its own, as
    TVM wants of a function.
    """

    def shorter(loop: tirx.For) -> tirx.For:
        return (
            looped(loop, immediate(first, "int32"), immediate(last - first, "int32"), loop.body)
            if loop.loop_var.same_as(var)
            else loop
        )

    return copied(tvm_ffi.structural_map(body, [(tirx.For, shorter)]))


def copied(body: tirx.Stmt) -> tirx.Stmt:
    """A copy of a statement whose variables and views are its own, as TVM wants of a function."""
    own: dict[tirx.Var, tirx.Var] = {}

    def fresh(v: tirx.Var) -> tirx.Var:
        own[v] = tirx.Var(v.name, v.ty)
        return own[v]

    def renamed(v: tirx.Var, defines: int) -> tirx.Var:
        if defines and isinstance(v.ty, tvm.ir.PrimType):
            return own[v] if v in own else fresh(v)
        if defines:
            # A view's strides and offset are defined with it.
            strides = [fresh(n) if isinstance(n, tirx.Var) else n for n in v.strides]
            offset = fresh(v.elem_offset) if isinstance(v.elem_offset, tirx.Var) else v.elem_offset
            own[v] = tirx.decl_buffer(
                v.shape,
                v.dtype,
                v.name,
                strides=strides or None,
                elem_offset=offset,
                scope=v.scope(),
                offset_factor=v.offset_factor,
                layout=None,
            )
        return own.get(v, v)

    return tvm_ffi.structural_map(body, [], with_def_region_kind=[(tirx.Var, renamed)])


def looped(loop: tirx.For, first: tirx.Expr, extent: tirx.Expr, body: tirx.Stmt) -> tirx.For:
    """A loop like another one."""
    return tirx.For(loop.loop_var, first, extent, loop.kind, body, None, loop.annotations)
