"""A convolution or matrix product cut into blocks, warps, fragments and steps of tensor-core products."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np
from tvm import relax, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d
from schedules.emit.emit import Array
from schedules.emit.emit_movement import unravel
from schedules.spelling.mma_intrinsics import Form, parts

from .mma_pack import LANES, pack

CHUNK = 16  # bytes of a row of data that are copied and read together


@dataclass(frozen=True)
class MmaTile:
    """A block computes warps[0] x warps[1] warps of rows x columns fragments, 16 pixels times 8 channels each.

    slices: so many groups of such warps share a block, each with its part of K; their sums are added at the end.
    depth: steps of 32 bytes of K between two barriers (even).  stages: steps in flight, at least 2: only a pipeline
    waits for its asynchronous copies.
    """

    warps: tuple[int, int]
    rows: int
    columns: int
    slices: int = 1
    depth: int = 2
    stages: int = 3

    def __post_init__(self) -> None:
        if (
            min(*self.warps, self.rows, self.columns, self.slices) < 1
            or min(self.stages, self.depth) < 2
            or self.depth % 2
        ):
            raise ValueError(f"not a tile: {self}")

    @property
    def pixels(self) -> int:
        """Pixels of a block."""
        return self.warps[0] * self.rows * 16

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.warps[1] * self.columns * 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return LANES * prod(self.warps) * self.slices

    @property
    def step_bytes(self) -> int:
        """Bytes of a row of data in a step."""
        return 32 * self.depth

    def shared_bytes(self, form: Form) -> int:
        """Shared memory of a block."""
        data = self.depth * 2 * (self.pixels * CHUNK + 32)
        weights = self.channels // 8 * LANES * self.depth * form.width
        sums = 4 * self.pixels * self.channels if self.slices > 1 else 0
        return self.slices * max(self.stages * (data + weights), sums)

    def __str__(self) -> str:
        sliced = f", K in {self.slices} slices" if self.slices > 1 else ""
        return (
            f"{self.pixels}x{self.channels}, {self.threads // LANES} warps{sliced}, {self.step_bytes} bytes of K,"
            f" {self.stages} stages"
        )


@dataclass(frozen=True)
class Problem:
    """The sizes of a contraction.

    lead: the output's dimensions before the channels.  channels, groups: output channels of one group, and groups.
    run: bytes of data per tap of one group.  kernel: taps.  strides, dilation, before: of a convolution, padding
    before the data.  size: height and width of the data, without padding.  batch: the dimensions of many products, each
    of which is a group.
    """

    lead: tuple[int, ...]
    channels: int
    groups: int
    run: int
    form: Form
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (1, 1)
    batch: tuple[int, ...] = ()

    @property
    def pixels(self) -> int:
        """Output pixels."""
        return prod(self.lead)

    @property
    def vector(self) -> int:
        """Bytes of data that lie side by side and aligned, 16 at most."""
        return gcd(self.run, CHUNK)

    @property
    def bytes(self) -> int:
        """Bytes of data per output pixel and group."""
        return prod(self.kernel) * self.run

    def steps(self, tile: MmaTile) -> int:
        """Steps of a slice."""
        return -(-self.bytes // (tile.step_bytes * tile.slices))

    def blocks(self, tile: MmaTile) -> tuple[int, int, int]:
        """Blocks over groups, pixels and channels."""
        return self.groups, -(-self.pixels // tile.pixels), -(-self.channels // tile.channels)

    def tap(self, vector: Any) -> tuple[list[Any], Any]:
        """The tap (kh, kw) and the first byte in its run of the vector number `vector` of a pixel's data."""
        per_tap = self.run // self.vector
        return unravel(vector // per_tap, self.kernel), vector % per_tap * self.vector

    def at(self, pixel: Any, tap: list[Any]) -> tuple[list[Any], list[tirx.Expr]]:
        """Where a tap of an output pixel lies in the data without padding, and the conditions under which it lies
        inside.
        """
        if len(self.lead) != 3:
            return unravel(pixel, self.lead), []
        image, *place = unravel(pixel, self.lead)
        inside = []
        for d in range(2):
            place[d] = place[d] * self.strides[d] + tap[d] * self.dilation[d] - self.before[d]
            first, last = (
                -self.before[d],
                (self.lead[1 + d] - 1) * self.strides[d] + (self.kernel[d] - 1) * self.dilation[d] - self.before[d],
            )
            inside += [place[d] >= 0] if first < 0 else []
            inside += [place[d] < self.size[d]] if last >= self.size[d] else []
        return [image, *place], inside


@dataclass(frozen=True)
class Digits:
    """The index of an output element in a tiled problem: (group, block of pixels, block of channels, warp of pixels,
    warp of channels, g, t, row, channel).

    g, t: the lane is 4 g + t. A thread has every eighth pixel of its warp, from g on, and 2 * columns neighbouring
    channels.
    packed: the output holds two channels to a byte.
    """

    problem: Problem
    tile: MmaTile
    packed: bool = False

    @property
    def own(self) -> int:
        """Neighbouring channels of one thread."""
        return 2 * self.tile.columns

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the digits."""
        t = self.tile
        return (*self.problem.blocks(t), *t.warps, 8, 4, 2 * t.rows, self.own)

    def pixel(self, d: Any) -> Any:
        """The output pixel; it may lie beyond the last."""
        return self.row(d[1], d[3], d[7], d[5])

    def row(self, block: Any, warp: Any, row: Any, g: Any) -> Any:
        """The pixel of a row of a block's data."""
        return block * self.tile.pixels + (warp * 2 * self.tile.rows + row) * 8 + g

    def first_channel(self, d: Any) -> Any:
        """The first of a thread's channels in its group; it may lie beyond the last."""
        return d[2] * self.tile.channels + (d[4] * 4 + d[6]) * self.own

    @property
    def stored(self) -> tuple[int, ...]:
        """The sizes of the digits of what is stored."""
        return (*self.shape[:-1], self.own // 2 if self.packed else self.own)

    def place(self, d: Any) -> list[Any]:
        """The index, in the output, of what is stored."""
        if not self.packed:
            return self.index(d)
        *lead, channel = self.index([*d[:-1], 2 * d[-1]])
        return [*lead, channel // 2]

    @property
    def whole(self) -> bool:
        """Whether a thread's channels exist all or none."""
        return self.problem.channels % self.own == 0

    def exists(self, d: Any) -> list[tirx.Expr]:
        """The conditions under which the output has this element."""
        p, (_, _, channels) = self.problem, self.problem.blocks(self.tile)
        found = [self.pixel(d) < p.pixels] if p.pixels % self.tile.pixels else []
        if p.channels != channels * self.tile.channels:
            found.append((self.first_channel(d) if self.whole else self.first_channel(d) + d[8]) < p.channels)
        return found

    def index(self, d: Any, clamped: bool = False) -> list[Any]:
        """The index of the output; clamped: that of some existing element where there is no such element."""
        p = self.problem
        pixel, channel = self.pixel(d), self.first_channel(d) + d[8]
        if clamped and self.exists(d):
            pixel = tirx.Min(pixel, tirx.const(p.pixels - 1, "int32"))
            if self.whole:
                channel = tirx.Min(self.first_channel(d), tirx.const(p.channels - self.own, "int32")) + d[8]
            else:
                channel = tirx.Min(channel, tirx.const(p.channels - 1, "int32"))
        if p.batch:
            return [*unravel(d[0], p.batch), *unravel(pixel, p.lead), channel]
        return [*unravel(pixel, p.lead), d[0] * p.channels + channel]

    def constant(self, value: Array) -> Array:
        """A constant over all channels in the digits; channels beyond the last repeat it."""
        p, t = self.problem, self.tile
        if value.size == 1:
            return value.reshape(())
        extra = p.blocks(t)[2] * t.channels - p.channels
        groups = 1 if p.batch else p.groups
        padded = np.pad(value.reshape(groups, p.channels), [(0, 0), (0, extra)], mode="edge")
        return padded.reshape(groups, 1, -1, 1, t.warps[1], 1, 4, 1, self.own)


def packing(problem: Problem, tile: MmaTile) -> dict[str, int]:
    """What `mma_pack.pack` must know, beside the weights."""
    p, t, form = problem, tile, problem.form
    return {
        "groups": p.groups,
        "channels": p.channels,
        "blocks": p.blocks(t)[2],
        "slices": t.slices,
        "steps": p.steps(t),
        "depth": t.depth,
        "across": t.warps[1],
        "columns": t.columns,
        "width": form.width,
        "packed": int(form.is_packed),
        "opened": int(form.opens_weights),
    }


def pack_weights(weights: Array, problem: Problem, tile: MmaTile) -> Array:
    """Weights as `mma_pack.pack` orders them, a lane's bytes as `parts` of them that are copied together."""
    packed = pack(weights, **packing(problem, tile))
    return packed.reshape(*packed.shape[:-1], *parts(packed.shape[-1], CHUNK))


def problem_of(call: relax.Call, form: Form, before: tuple[int, int], size: tuple[int, int]) -> Problem:
    """The problem of a conv2d (NHWC, HWIO) or of a matrix product with one matrix of weights.

    before, size: the padding before the data, and the data's height and width without padding.
    """
    out, per_byte = ops.shape_of(call), 2 if form.is_packed else 1
    if ops.op_name(call) == "relax.matmul":
        return Problem(out[:-1], out[-1], 1, ops.shape_of(call.args[0])[-1] // per_byte, form)
    kh, kw, inputs, channels = ops.shape_of(call.args[1])
    a = Conv2d.of(call)
    return Problem(
        out[:3], channels // a.groups, a.groups, inputs // per_byte, form, (kh, kw), a.strides, a.dilation, before, size
    )
