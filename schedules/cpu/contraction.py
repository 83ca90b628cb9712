"""Convolutions and matrix products in one form: rows of data against packed weights.

    acc[lead, w, o] += rows[row(lead, kh), w * step + t * hop + start(o) + r] * weights[lead', kh, t, r, o]

A row is one line of the padded NHWC input, its pixels' channels in sequence, so that the taps of one
kernel line are contiguous when there is one group and no dilation. The weights of a vector of L output channels
that lies in several groups cover the inputs of all of them, with zeros in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d
from schedules.emit.emit import Array, Emission, Operand, immediate
from schedules.factors import Factors
from schedules.layer import Layer
from schedules.narrow import fields, in_high_bits, opened, opened_at_once, split

Index = Sequence[Any]
QUAD = 4  # the bytes of a lane that an instruction multiplies


@dataclass(frozen=True)
class Shape:
    """The sizes of a contraction.

    lead: output dimensions before the last two.  pixels, channels: the last two.  taps: (KH, T).  run: contiguous
    elements per tap.  step, hop: elements between neighbouring pixels, between taps.  rows: the dimensions that
    choose a row of the data.  row_length: elements of the data in a row.  groups, inputs: of a
    convolution, and the input channels of one group.  width: 0, or that of the lines when a whole image is one row.
    side_by_side: taps of a kernel's line that one run goes through.
    """

    lead: tuple[int, ...]
    pixels: int
    channels: int
    taps: tuple[int, int]
    run: int
    step: int
    hop: int
    rows: tuple[int, ...]
    row_length: int
    groups: int = 1
    inputs: int = 1
    width: int = 0
    side_by_side: int = 1

    def start(self, vector: Any, lanes: int) -> Any:
        """The first input channel that an output vector reads: that of its first channel's group."""
        if self.groups == 1:
            return 0
        return (vector * lanes // (self.channels // self.groups)) * self.inputs

    def row_needed(self, pixels: int, lanes: int, depth: int) -> int:
        """The elements a row must have so that `pixels` pixels in whole steps of `depth` stay inside it."""
        last = int(self.start(-(-self.channels // lanes) - 1, lanes))
        return (pixels - 1) * self.step + (self.taps[1] - 1) * self.hop + last + -(-self.run // depth) * depth

    @property
    def per_pixel(self) -> int:
        """The elements of one pixel: a row is a whole number of them."""
        return self.inputs * self.groups


@dataclass(frozen=True, eq=False)
class Contraction:
    """A shape with its operands: data at (row, element), the row of an output, the weights' leading index."""

    shape: Shape
    dtype: str
    element: Callable[[Index, Any], tirx.Expr]
    row: Callable[[Index, Any], list[Any]]
    weights: te.Tensor
    weight_lead: Callable[[Index], list[Any]]


@dataclass(frozen=True)
class Packing:
    """Weights as [.., block, kh, t, step, vector, inner, L, depth], zeros at the ends, so that one block is read in
    sequence.

    blocks: of `vectors` vectors of `lanes` channels.  A step is r / (depth inner); depth and inner are left out
    where they are 1.
    whole: the number of steps is a multiple of it.  width: the bits of weights that are opened in registers, else 8.
    values: the bits that constant weights need (`Layer.width`), which are int8 if fewer than 8.  pixels: those of a
    task, which the weights that it opens are for.
    """

    blocks: int
    vectors: int
    lanes: int
    depth: int
    whole: int = 1
    inner: int = 1
    width: int = 8
    values: int = 8
    pixels: int = 0

    def steps(self, run: int) -> int:
        """The number of steps of a run."""
        return -(-run // (self.depth * self.inner * self.whole)) * self.whole

    @property
    def last(self) -> tuple[int, ...]:
        """The dimensions after the vector's."""
        return (*([self.inner] if self.inner > 1 else []), self.lanes, *([self.depth] if self.depth > 1 else []))


def not_a_contraction(layer: Layer) -> str | None:
    """None for a layer of one conv2d (NHWC, HWIO) or one matmul with one result, else a sentence."""
    call = layer.anchor_call
    if call is None or ops.op_name(call) not in ("relax.nn.conv2d", "relax.matmul"):
        return "not a convolution or a matrix product."
    if isinstance(layer.func.body.ty, relax.TupleType):
        return "several results."
    layouts = (
        (str(call.attrs.data_layout), str(call.attrs.kernel_layout))
        if ops.op_name(call) == "relax.nn.conv2d"
        else ("NHWC", "HWIO")
    )
    return None if layouts == ("NHWC", "HWIO") else f"the layout is {', '.join(layouts)}, not NHWC, HWIO."


def shape_of(call: relax.Call, lanes: int) -> Shape:
    """The sizes of a conv2d (NHWC, HWIO) or of a matmul of matrices; `lanes` matters when a vector spans groups."""
    out = ops.shape_of(call)
    if ops.op_name(call) == "relax.matmul":
        *lead, pixels, depth = ops.shape_of(call.args[0])
        return Shape(
            lead=out[:-2],
            pixels=out[-2],
            channels=out[-1],
            taps=(1, 1),
            run=depth,
            step=depth,
            hop=0,
            rows=tuple(lead),
            row_length=pixels * depth,
            inputs=depth,
        )
    a = Conv2d.of(call)
    (n, h, w, c), (kh, kw, inputs, channels) = (ops.shape_of(x) for x in call.args)
    stride, dilation, groups = a.strides[1], a.dilation[1], a.groups
    taps, run, side_by_side = (kh, kw), c, 1
    if groups == 1 and (dilation == 1 or kw == 1):
        taps, run, side_by_side = (kh, 1), kw * c, kw
    if groups > 1:
        per_group = channels // groups
        first = np.arange(0, channels, lanes)
        last = np.minimum(first + lanes, channels) - 1
        run = int((last // per_group - first // per_group + 1).max()) * inputs
    return Shape(
        lead=out[:2],
        pixels=out[2],
        channels=channels,
        taps=taps,
        run=run,
        step=stride * c,
        hop=dilation * c,
        rows=(n, h),
        row_length=w * c,
        groups=groups,
        inputs=inputs,
        side_by_side=side_by_side,
    )


def flat_shape_of(call: relax.Call) -> Shape | None:
    """The sizes of a conv2d as one row of pixels per image, or None where its lines cannot be joined.

    They can be where a kernel is one pixel wide and takes every pixel: a tap down is then one line further in the row.
    """
    if ops.op_name(call) != "relax.nn.conv2d":
        return None
    a, out = Conv2d.of(call), ops.shape_of(call)
    (n, h, w, c), (kh, kw, *_) = (ops.shape_of(x) for x in call.args)
    if kw > 1 or a.strides != (1, 1) or a.groups > 1 or out[1] == 1:
        return None
    return Shape(
        lead=out[:1],
        pixels=out[1] * w,
        channels=out[3],
        taps=(1, kh),
        run=c,
        step=c,
        hop=a.dilation[0] * w * c,
        rows=(n,),
        row_length=h * w * c,
        inputs=c,
        width=w,
    )


def contraction(
    e: Emission,
    call: relax.Call,
    form: Packing,
    flat: Shape | None = None,
    data: relax.Expr | None = None,
    origin: tuple[int, int] = (0, 0),
    factors: Factors | None = None,
) -> Contraction:
    """The operands of an anchor in the common form; flat: what `flat_shape_of` says, to use that form.

    data: where a convolution's data really are, whose first line and column those of `origin` are.
    factors: of a product of bytes that are computed at run time, of which the right one is packed as it is multiplied.
    """
    shape, dtype = flat or shape_of(call, form.lanes), ops.dtype_of(call)
    data = factors.left.data if factors is not None else data
    x, w = e.operand(call.args[0] if data is None else data), e.operand(call.args[1])
    if ops.op_name(call) == "relax.matmul":
        own = w.shape[:-2]
        if factors is not None:
            right = factors.element(e.operand, 1)
            weights = _stage(own, shape, form, factors.types[1], lambda lead, kh, t, r, o: right([*lead, r, o]))
        elif w.value is not None:
            weights = _constant(e, w, w.value.reshape(*own, 1, 1, shape.run, shape.channels), shape, form)
        else:
            weights = _stage(own, shape, form, w.dtype, lambda lead, kh, t, r, o: w.at([*lead, r, o]))

        def row(index: Index, kh: Any) -> list[Any]:
            return [0 if d == 1 else i for d, i in zip(shape.rows, index[len(index) - len(shape.rows) :], strict=True)]

        def lead(index: Index) -> list[Any]:
            return [0 if d == 1 else i for d, i in zip(own, index[len(index) - len(own) :], strict=True)]

        return Contraction(shape, dtype, lambda r, k: x.at([*r, k // shape.run, k % shape.run]), row, weights, lead)

    stride, dilation = Conv2d.of(call).strides[0], Conv2d.of(call).dilation[0]
    c, inputs = x.shape[3], w.shape[2]
    if w.value is not None:
        dense = w.value.reshape(*shape.taps, shape.run, shape.channels) if shape.groups == 1 else w.value
        weights = _constant(e, w, dense, shape, form)
    elif flat:
        weights = _stage((), shape, form, w.dtype, lambda _, kh, t, r, o: w.at([t, 0, r, o]))
    elif shape.taps == w.shape[:2]:
        weights = _stage((), shape, form, w.dtype, lambda _, kh, t, r, o: w.at([kh, t, r, o]))
    else:
        weights = _stage((), shape, form, w.dtype, lambda _, kh, t, r, o: w.at([kh, r // inputs, r % inputs, o]))
    width, (top, left) = shape.width, origin

    def at(*place: Any) -> tirx.Expr:
        image, line, k = place
        return x.at([image, line - top, k // c - left, k % c])

    if flat:
        return Contraction(
            shape,
            dtype,
            lambda r, k: at(*r, k // (width * c), k % (width * c)),
            lambda i, _: [i[-1]],
            weights,
            lambda _: [],
        )
    return Contraction(
        shape, dtype, lambda r, k: at(*r, k), lambda i, kh: [i[0], i[1] * stride + kh * dilation], weights, lambda _: []
    )


def without_offset(e: Emission, call: relax.Call, view: te.Tensor, offset: int, bits: int = 0) -> Operand:
    """The sums of an anchor from a view of sums that are 2^bits times too large, of data with `offset` added.

    What the offset adds is the offset times the sum of an output's weights, which are constant unless it is 0.
    """
    if not offset:
        return Operand(e, view, bits=bits)
    weights = e.layer.constant(call.args[1])
    sums = weights.reshape(-1, weights.shape[-1]).astype(np.int64).sum(0)
    return Operand(e, view, addend=Operand(e, value=(-offset * sums).astype(np.int32)), bits=bits)


def pack(weights: Array, shape: Shape, form: Packing) -> Array:
    """[.., kh, t, r, O] weights (HWIO when grouped) as `form` says."""
    lanes, depth = form.lanes, form.depth
    vectors = form.blocks * form.vectors
    if shape.groups == 1:
        extra = vectors * lanes - shape.channels
        full = np.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, extra)])
        dense = np.moveaxis(full.reshape(*full.shape[:-1], vectors, lanes), -2, -5)
    else:
        per_group = shape.channels // shape.groups
        dense = np.zeros((vectors, *shape.taps, shape.run, lanes), weights.dtype)
        for o in range(shape.channels):
            vector, lane = divmod(o, lanes)
            begin = o // per_group * shape.inputs - int(shape.start(vector, lanes))
            dense[vector, :, :, begin : begin + shape.inputs, lane] = weights[..., o]
    dense = np.pad(
        dense, [(0, 0)] * (dense.ndim - 2) + [(0, form.steps(shape.run) * depth * form.inner - shape.run), (0, 0)]
    )
    *lead, _, kh, t, padded, _ = dense.shape
    steps = dense.reshape(
        *lead, form.blocks, form.vectors, kh, t, padded // (depth * form.inner), form.inner, depth, lanes
    )
    steps = np.swapaxes(np.moveaxis(steps, -7, -4), -1, -2)
    return np.ascontiguousarray(steps.reshape(*steps.shape[:-3], *form.last))


def _constant(e: Emission, w: Operand, dense: Array, shape: Shape, form: Packing) -> te.Tensor:
    """Constant weights as an argument, in as few bits as their values have and as is worth it (see `narrow.py`).

    Opened in registers they are in the high bits of bytes: no shift can lose a sign that way. Else a stage of their
    own opens them.
    """
    packed = pack(dense, shape, form)
    if len(form.last) == 1:
        return e.argument(packed, "weights")
    if form.width < 8:
        return _for_registers(e, packed, form)
    finest = [n for n in opened_at_once(form.values, form.pixels) if form.lanes % fields(n) == 0]
    if not finest:
        return e.argument(packed.astype(np.int8) if form.values < 8 else packed, "weights")
    # Fields are steps, so that vectors are whole, or lanes.
    width = finest[0]
    axis = packed.ndim - 2 - (2 + (form.inner > 1)) * (form.steps(shape.run) % fields(width) == 0)
    bytes_, count = e.argument(split(packed, axis, width), "weights"), packed.shape[axis]

    def element(*i: Any) -> tirx.Expr:
        return opened(lambda byte: bytes_(*i[:axis], byte, *i[axis + 1 :]), i[axis], count, width, w.dtype == "int8")

    return te.compute(packed.shape, element, name="unpacked", attrs={"fields": fields(width), "axis": axis})


def _for_registers(e: Emission, packed: Array, form: Packing) -> te.Tensor:
    """Weights that every instruction opens: it finds its own in one field of the bytes of one or several vectors."""
    if form.inner > 1:
        axis = -len(form.last)
        bytes_ = e.argument(split(packed, axis, form.width), "weights")

        def in_steps(*i: Any) -> tirx.Expr:
            at = len(i) + axis
            return in_high_bits(lambda byte: bytes_(*i[:at], byte, *i[at + 1 :]), i[at], form.inner, form.width)

        return te.compute(packed.shape, in_steps, name="narrow")
    held = split(packed, -1, form.width)
    vectors = held.shape[-1] // QUAD
    if vectors > 1:
        held = np.ascontiguousarray(np.swapaxes(held.reshape(*held.shape[:-1], vectors, QUAD), -2, -3))
    bytes_ = e.argument(held, "weights")

    def in_quads(*i: Any) -> tirx.Expr:
        def byte(at: Any) -> tirx.Expr:
            return bytes_(*i[:-2], *([at // QUAD] if vectors > 1 else []), i[-2], at % QUAD if vectors > 1 else at)

        return in_high_bits(byte, i[-1], form.depth, form.width)

    return te.compute(packed.shape, in_quads, name="narrow")


def _stage(lead: tuple[int, ...], shape: Shape, form: Packing, dtype: str, at: Callable[..., tirx.Expr]) -> te.Tensor:
    """The packing of weights that are computed at run time; one group only."""
    steps = form.steps(shape.run)

    def element(*i: Any) -> tirx.Expr:
        *first, block, kh, t, step, vector = i[: len(lead) + 5]
        digits = dict(zip(("inner", "lane", "depth")[form.inner == 1 :], i[len(lead) + 5 :], strict=False))
        r = (step * form.inner + digits.get("inner", 0)) * form.depth + digits.get("depth", 0)
        o = (block * form.vectors + vector) * form.lanes + digits["lane"]
        value = at(first, kh, t, r, o)
        inside = [o < shape.channels] if shape.channels != form.blocks * form.vectors * form.lanes else []
        inside += [r < shape.run] if shape.run < steps * form.depth * form.inner else []
        return tirx.if_then_else(tirx.all(*inside), value, immediate(0, dtype)) if inside else value

    return te.compute((*lead, form.blocks, *shape.taps, steps, form.vectors, *form.last), element, name="packed")
