"""Quads of a depthwise convolution's data, woven out of whole vectors of bytes instead of widened one by one.

    row k = the bytes of a group of channels, of a line k under the window               or the border's
    quads[v] = rows 0 and 1, and rows 2 and 3, in turns by bytes; both, in turns by pairs of bytes

Of every 16 (or 8) channels of a group a vector gets four, which is the order that packssdw and packuswb undo when sums
become bytes: neither costs a permutation. A group of one vector is made of quarters, and its channels follow each
other. Lines may serve several lines of results, whose weights are zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d, Pad
from schedules.emit.emit import immediate
from schedules.layer import Layer
from schedules.spelling.byte_intrinsics import Order, beside

from .borders import at_start
from .contraction import QUAD


@dataclass(frozen=True)
class Woven:
    """Where the bytes are: parameter `data` of a layer, with `top` lines and `left` columns of a border of `value`.

    call: the convolution.  lines: those of results that share their rows.  vectors, lanes: of a group of channels.
    """

    data: relax.Var
    top: int
    left: int
    value: int
    call: relax.Call
    lines: int
    vectors: int
    lanes: int

    @staticmethod
    def of(layer: Layer, call: relax.Call, vectors: int, lanes: int) -> Woven | None:
        """That of a depthwise convolution of bytes that lie in memory, whose channels are whole groups."""
        data, top, left, value = layer.definition(call.args[0]), 0, 0, 0
        if ops.op_name(data) == "relax.nn.pad":
            pad = Pad.of(data)
            if pad.before[0] or pad.after[0] or pad.before[3] or pad.after[3]:
                return None
            (_, top, left, _), value, data = pad.before, pad.value, layer.definition(data.args[0])
        size = vectors * lanes
        if not layer.is_parameter(data) or ops.shape_of(data)[3] % size or size % 16:
            return None
        a, (kh, *_), (_, oh, *_) = Conv2d.of(call), ops.shape_of(call.args[1]), ops.shape_of(call)
        fit = [n for n in range(2, QUAD + 1) if (n - 1) * a.strides[0] + kh <= QUAD and oh % n == 0]
        lines = fit[-1] if fit and a.dilation[0] == 1 else 1
        return Woven(data, top, left, value, call, lines, vectors, lanes)

    @property
    def rows(self) -> int:
        """Those of data under the windows of `lines` lines of results."""
        return (self.lines - 1) * Conv2d.of(self.call).strides[0] + int(ops.shape_of(self.call.args[1])[0])

    @property
    def order(self) -> Order:
        """Where channels are in vectors."""
        return Order(self.lanes, self.vectors)

    def channel(self, v: Any, lane: Any) -> Any:
        """The channel of a group that is in a lane of a vector."""
        return lane // 4 * (4 * self.vectors) + v * 4 + lane % 4

    def rewritten(self, func: tirx.PrimFunc, layer: Layer, loop: tirx.For) -> tirx.PrimFunc:
        """The kernel of a finished schedule in which `loop`, around the stage "quads", makes vectors."""
        x = func.params[list(layer.func.params).index(self.data)]

        def remade(found: tirx.For) -> Any:
            return self._nest(found, x) if found.loop_var.same_as(loop.loop_var) else found

        return tvm_ffi.structural_map(func, [(tirx.For, remade)])

    def _nest(self, loop: tirx.For, x: tirx.Buffer) -> tirx.Stmt:
        """What `loop` becomes: for every word of rows, the columns of the border and those of the data."""
        realize: Any = loop
        extents = []
        while isinstance(realize, tirx.For):
            extents.append(int(realize.extent))
            realize = realize.body
        *_, words, columns, _, _, _ = extents
        n, y, _, _, group, *_ = [at_start(value, loop) for value in realize.iter_values]
        left = min(self.left, columns)
        right = min(left + ops.shape_of(self.data)[2], columns)
        parts = [
            self._columns(realize.block.writes[0].source, x if inside else None, (n, y, word, group), first, last)
            for word in range(words)
            for first, last, inside in ((0, left, False), (left, right, True), (right, columns, False))
            if first < last
        ]
        return tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]

    def _columns(
        self, quads: tirx.Buffer, x: tirx.Buffer | None, at: tuple[Any, Any, int, Any], first: int, last: int
    ) -> tirx.Stmt:
        """A loop over columns first ..< last of the quads of one word of a group; x: None beside the data."""
        axes = [tirx.Var(name, "int32") for name in ("n", "y", "word", "column", "group")]
        n, y, _, column, group = axes
        word, size, body, rows = at[2], self.vectors * self.lanes, list[tirx.Stmt](), list[tirx.Expr]()
        flipped = 128 if ops.dtype_of(self.data) == "int8" else 0
        border = tirx.Broadcast(tirx.const((self.value & 255) ^ flipped, "uint8"), size)
        for k in range(QUAD * word, min(QUAD * word + QUAD, self.rows)):
            if x is None:
                rows.append(border)
                continue
            line, where = self._line(y, k, int(quads.shape[1]))
            value = x.vload([n, line, column - self.left, group * size], f"{x.dtype}x{size}")
            value = tirx.reinterpret(f"uint8x{size}", value)
            if flipped:
                value = value ^ tirx.Broadcast(tirx.const(flipped, "uint8"), size)
            rows.append(tirx.Var(f"row{k}", f"uint8x{size}"))
            body.append(tirx.Bind(rows[-1], tirx.if_then_else(tirx.all(*where), value, border) if where else value))
        made = _woven(rows, self.vectors)
        for k, vector in enumerate(made):
            v, lane = divmod(k * size // len(made), self.lanes)
            body.append(tirx.BufferStore(quads, vector, [*axes, v, tirx.Ramp(lane, 1, size // len(made))]))
        iterators = [
            tirx.IterVar(tvm.ir.Range(0, int(extent)), var, tirx.IterVar.DataPar)
            for extent, var in zip(quads.shape[:5], axes, strict=True)
        ]
        written = [tvm.ir.Range.from_min_extent(var, 1) for var in axes]
        written += [tvm.ir.Range(0, self.vectors), tvm.ir.Range(0, self.lanes)]
        reads = [] if x is None else [tirx.BufferRegion(x, [tvm.ir.Range(0, int(d)) for d in x.shape])]
        block = s_tir.SBlock(iterators, reads, [tirx.BufferRegion(quads, written)], "quads", tirx.SeqStmt(body))
        own = tirx.Var("column", "int32")
        realize = s_tir.SBlockRealize([at[0], at[1], immediate(word, "int32"), own, at[3]], True, block)
        return tirx.For(own, immediate(first, "int32"), immediate(last - first, "int32"), tirx.ForKind.SERIAL, realize)

    def _line(self, y: Any, k: int, tasks: int) -> tuple[tirx.Expr, list[tirx.Expr]]:
        """The data's line that is row k of task y, and the conditions under which there is such a line."""
        a, height = Conv2d.of(self.call), ops.shape_of(self.data)[1]
        step, first = self.lines * a.strides[0], k * a.dilation[0] - self.top
        line = y * step + first
        where = [line >= 0] if first < 0 else []
        where += [line < height] if (tasks - 1) * step + first >= height else []
        return line, where


def _woven(rows: Sequence[tirx.Expr], vectors: int) -> list[tirx.Expr]:
    """Vectors of four bytes in each lane, of one to four rows; weights are zeros where a row is missing."""
    size = int(rows[0].ty.dtype.lanes)
    r0, r1, r2, r3 = [*rows, *[rows[-1]] * (QUAD - len(rows))]
    if vectors == 2:
        wide = [row.astype(f"uint16x{size}") for row in (r0, r1, r2, r3)]
        byte = tirx.Broadcast(tirx.const(8, "uint16"), size)
        words = [[wide[0] | (wide[1] << byte), wide[2] | (wide[3] << byte)]]
    else:
        words = [
            [tirx.reinterpret(f"int16x{size // 2}", beside(a, b, 16, first)) for a, b in ((r0, r1), (r2, r3))]
            for first in (0, 8)
        ]
    quads = [beside(a, b, 8, first) for a, b in words for first in (0, 4)]
    return [tirx.reinterpret(f"int32x{size // len(quads)}", q) for q in quads]
