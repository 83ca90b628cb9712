"""Convolutions of small images with an image's lines in one sequence, so that tiles are full of pixels.

    data: 0 a b c 0 d e f 0 g h i 0 ..     a border column is the end of one line and the beginning of the next
    sums: A B C . D E F . G H I .          as many pixels a line; those at the places of the border are left out

A line of 7 pixels leaves more than half of a tile empty, and all weights are read for every two lines. Of 7 lines of 8
pixels a kernel makes four tiles of 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d, Pad
from schedules.layer import Layer

from .borders import looped
from .contraction import Shape
from .joined import reads_its_pixels
from .loops import nodes


@dataclass(frozen=True)
class Images:
    """How the images of a convolution's results [image, line, pixel, channel] lie: `pitch` pixels of the sums to a
    line.
    """

    lines: int
    width: int
    pitch: int

    @staticmethod
    def of(layer: Layer) -> Images | None:
        """Those of a layer that may be computed so: of stride 1, whose border is of zeros, if it has one, and whose
        epilogue reads, beside constants, tensors with its pixels that the convolution does not read.
        """
        call = layer.anchor_call
        assert call is not None
        if ops.op_name(call) != "relax.nn.conv2d" or not layer.is_constant(call.args[1]) or layer.packs_result:
            return None
        a, (_, kw, *_) = Conv2d.of(call), ops.shape_of(call.args[1])
        if a.strides != (1, 1) or a.groups > 1 or (a.dilation[1] > 1 and kw > 1):
            return None
        if not reads_its_pixels(layer, _read_after(layer)) or set(_read_after(layer)) & set(_read_before(layer)):
            return None
        pad, beside = layer.definition(call.args[0]), 0
        if ops.op_name(pad) == "relax.nn.pad":
            border = Pad.of(pad)
            beside = min(border.before[2], border.after[2]) if border.value == 0 else 0
        _, lines, width, _ = ops.shape_of(call)
        return Images(lines, width, max(ops.shape_of(call.args[0])[2] - max(beside, 0), width))

    @property
    def pixels(self) -> int:
        """The sums of an image up to the last that is a result."""
        return (self.lines - 1) * self.pitch + self.width

    def shape(self, call: relax.Call, pixels: int) -> Shape:
        """The sizes of a conv2d with `pixels` sums an image; images are its lines."""
        (n, h, _, c), (kh, kw, *_) = (ops.shape_of(x) for x in call.args)
        return Shape(
            lead=(1, n),
            pixels=pixels,
            channels=ops.shape_of(call)[3],
            taps=(1, kh),
            run=kw * c,
            step=c,
            hop=Conv2d.of(call).dilation[0] * self.pitch * c,
            rows=(n,),
            row_length=h * self.pitch * c,
            inputs=c,
            width=self.pitch,
            side_by_side=kw,
        )


def _read_before(layer: Layer) -> list[relax.Var]:
    """The parameters that the anchor is computed from."""
    anchor = layer.anchor
    assert anchor is not None
    before = layer.bindings[: layer.bindings.index(anchor) + 1]
    return [v for b in before for v in ops.variables(b.value) if v in set(layer.func.params)]


def _read_after(layer: Layer) -> list[relax.Var]:
    """The parameters that the epilogue reads."""
    return [v for b in layer.epilogue for v in ops.variables(b.value) if v in set(layer.func.params)]


STAND_IN = "relax.zeros"  # an operator without operands, in place of the anchor of `of_images`


def of_images(layer: Layer, pixels: int) -> Layer:
    """A layer of `Images` with sums [1, image, pixel, channel], and what its epilogue reads and makes alike."""
    anchor, call = layer.anchor, layer.anchor_call
    assert anchor is not None and call is not None
    after = set(_read_after(layer))

    def shape(old: tuple[int, ...]) -> tuple[int, ...]:
        return 1, old[0], pixels, old[3]

    renamed: dict[relax.Var, relax.Expr] = {
        p: relax.Var(p.name, relax.TensorType(shape(ops.shape_of(p)), ops.dtype_of(p))) for p in after
    }
    params = [renamed.get(p, p) for p in layer.func.params]
    builder = ops.Builder()
    with builder.function("images", params):
        with builder.dataflow():
            for b in layer.bindings[: layer.bindings.index(anchor)]:
                builder.emit_normalized(b)
            renamed[anchor.var] = builder.emit(relax.op.zeros(shape(ops.shape_of(call)), ops.dtype_of(call)))
            for b in layer.epilogue:
                renamed[b.var] = builder.emit(ops.renamed(b.value, renamed))
            result = builder.emit_output(renamed[layer.func.body.body])
        builder.emit_func_output(result)
    return Layer(layer.name, builder.get()["images"])


def as_images(layer: Layer, func: tirx.PrimFunc, images: Images, pixel: tirx.Var) -> tirx.PrimFunc:
    """The scheduled function of a layer's form `of_images` with parameters of the layer's own shapes.

    pixel: the variable of the innermost loop around a pixel of the epilogue, which leaves out what is no result.
    """
    root, params = func.body.block, list(func.params)
    after, own = set(_read_after(layer)), dict[tirx.Var, tirx.Var]()
    for at, expr in [*enumerate(layer.func.params), (-1, layer.func.body.body)]:
        if at < 0 or expr in after:
            seen = params[at]
            own[seen] = params[at] = tirx.decl_buffer(ops.shape_of(expr), seen.dtype, seen.name)

    def place(index: Any) -> list[tirx.Expr]:
        _, image, q, channel = index
        return [image, q // images.pitch, q % images.pitch, channel]

    def region(r: Any) -> Any:
        if r.source not in own:
            return r
        extents = [d.extent for d in r.region]
        firsts = place([d.min for d in r.region])
        return tirx.BufferRegion(
            own[r.source], [tvm.ir.Range.from_min_extent(f, n) for f, n in zip(firsts, extents, strict=True)]
        )

    def load(node: Any) -> Any:
        return tirx.BufferLoad(own[node.source], place(node.indices)) if node.source in own else node

    def store(node: Any) -> Any:
        return tirx.BufferStore(own[node.buffer], node.value, place(node.indices)) if node.buffer in own else node

    def guarded(loop: tirx.For) -> tirx.For:
        if not loop.loop_var.same_as(pixel):
            return loop
        q = _sum_of(loop, func.params[-1])
        is_result = (q // images.pitch < images.lines) & (q % images.pitch < images.width)
        return looped(loop, loop.min, loop.extent, tirx.IfThenElse(is_result, loop.body, None))

    places = [(tvm.ir.expr.TensorRegion, region), (tvm.ir.expr.TensorLoad, load), (tirx.BufferStore, store)]
    body = tvm_ffi.structural_map(tvm_ffi.structural_map(root.body, [(tirx.For, guarded)]), places)
    block = s_tir.SBlock([], [], [], root.name_hint, body, alloc_buffers=root.alloc_buffers)
    return tirx.PrimFunc(params, s_tir.SBlockRealize([], True, block), attrs=func.attrs)


def _sum_of(loop: tirx.For, result: tirx.Var) -> tirx.Expr:
    """Which sum of its image becomes the pixel of the result that is written in a loop."""
    realize = next(
        r for r in nodes(s_tir.SBlockRealize, loop) if any(written.source.same_as(result) for written in r.block.writes)
    )
    values = [(i.var, v) for i, v in zip(realize.block.iter_vars, realize.iter_values, strict=True)]
    (q,) = (w.region[2].min for w in realize.block.writes)
    return tvm_ffi.structural_map(q, [(tirx.Var, lambda v: next((new for old, new in values if old.same_as(v)), v))])
