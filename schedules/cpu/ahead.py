"""Data of a convolution that come from beyond the second cache are fetched into it while others are multiplied.

    for task (lines, block of channels), for block of pixels:
      fetch a share of what the next task for other lines reads        added
      sums = 0 ...

A processor fetches what is read in sequence, but a block of sums reads several pixels at once: the first task for some
lines waits for them, the tasks for other channels do not, and these fetch the next lines. A batch of images makes
tensors large of which a second cache holds one image's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import tvm_ffi
from tvm import relax, s_tir, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d, Pad
from schedules.emit.emit import immediate
from schedules.layer import Layer
from schedules.spelling.pair import prefetch

from .borders import at_start, iterators, looped

# Bytes: beside its result and weights a tensor of fewer stays in a second cache of 1 MB.
LARGE = 512 * 1024
# Bytes of a cache line: shorter pixels are read nearly in sequence, which a processor sees for itself.
LINE = 64


@dataclass(frozen=True)
class Place:
    """Where in a schedule a block of sums is: the loop around its sums and epilogue, one around its products alone.

    lead: the outputs' dimensions before the pixels: image and line, or the image alone where all its lines are one row.
    lines: of a task, or the blocks of pixels of one where lines are joined.  pixels, vectors: of a block.  shares: the
    blocks of channels, which read the same data.
    """

    loop: s_tir.schedule.LoopRV
    products: s_tir.schedule.LoopRV
    lead: int
    lines: int
    pixels: int
    vectors: int
    shares: int


def fetched_ahead(sch: s_tir.Schedule, func: tirx.PrimFunc, layer: Layer, place: Place) -> tirx.PrimFunc:
    """The kernel of a finished schedule, as `func`, with the fetches where they are worth it: of a convolution of large
    8-bit data in NHWC that are read where they lie, with or without a border to be thought around them.
    """
    data, before = _source(layer)
    if data is None or prod(ops.shape_of(data)) < LARGE or ops.shape_of(data)[-1] < LINE:
        return func
    loop = sch.get(place.loop)
    own = [at_start(p, loop.body) for p in iterators(sch.get(place.products))]
    *lead, pixel, vector = own[: place.lead + 2]
    if place.lead == 1:
        start = [*lead, immediate(0, "int32"), pixel + place.lines * place.pixels]
    else:
        start = [lead[0], lead[1] + place.lines, pixel]
    fetches = _fetches(layer, data, before, func, start, place.pixels, place.shares, vector // place.vectors)

    def with_fetches(found: tirx.For) -> tirx.For:
        if fetches is None or not found.loop_var.same_as(loop.loop_var):
            return found
        return looped(found, found.min, found.extent, tirx.SeqStmt([fetches, found.body]))

    return tvm_ffi.structural_map(func, [(tirx.For, with_fetches)])


def _source(layer: Layer) -> tuple[relax.Var | None, int]:
    """The parameter that a convolution reads, and the lines of a border above it; None for other layers."""
    call = layer.anchor_call
    if call is None or ops.op_name(call) != "relax.nn.conv2d":
        return None, 0
    data, before = layer.definition(call.args[0]), 0
    if ops.op_name(data) == "relax.nn.pad":
        data, before = layer.definition(data.args[0]), Pad.of(data).before[1]
    return (data, before) if layer.is_parameter(data) else (None, 0)


def _fetches(
    layer: Layer,
    data: relax.Var,
    before: int,
    func: tirx.PrimFunc,
    start: Sequence[tirx.Expr],
    pixels: int,
    shares: int,
    share: tirx.Expr,
) -> tirx.Stmt | None:
    """A loop that fetches one of `shares` parts of what `pixels` outputs from `start` (image, line, pixel) on read and
    those of the line above do not; None where that is less than a cache line for each.
    """
    call = layer.anchor_call
    assert call is not None
    conv, (kh, kw, *_) = Conv2d.of(call), ops.shape_of(call.args[1])
    shape, buffer = ops.shape_of(data), func.params[list(layer.func.params).index(data)]
    _, height, width, channels = shape
    down, along = conv.strides
    # Pixels of data beside each other are one piece, unless steps leave some out.
    pieces, size = (1, pixels * along * channels) if kw >= along else (pixels, kw * channels)
    lines = -(-size // LINE)
    wanted = min(down, kh) * pieces * lines
    if wanted < shares:
        return None
    image, line, pixel = start
    var = tirx.Var("ahead", "int32")
    number = var * shares + share
    last = line * down + (kh - 1) * conv.dilation[0] - before
    row = image * height + last - number // (pieces * lines)
    column = (pixel + number // lines % pieces) * along
    at: tirx.Expr = (row * width + column) * channels + number % lines * LINE
    at = tirx.Max(tirx.Min(at, prod(shape) - 1), 0)  # what lies beyond the data is not looked for
    index: list[tirx.Expr] = []
    for extent in shape[:0:-1]:
        index.insert(0, at % extent)
        at = at // extent
    fetch = tirx.Evaluate(prefetch(buffer[tuple([at, *index])], 0, second=True))
    return tirx.For(var, immediate(0, "int32"), immediate(-(-wanted // shares), "int32"), tirx.ForKind.SERIAL, fetch)
