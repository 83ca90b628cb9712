"""Contractions of single pixels as lines of whole blocks: the pixels of all images follow each other in memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import relax, s_tir, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.attributes import Conv2d
from schedules.layer import Layer


def pixels_of(layer: Layer) -> int:
    """The pixels of all images of a layer whose lines may have any length; 0 where they may not.

    It is a 1x1 convolution that takes every pixel, or a product with one matrix. All that it reads beside constants has
    as many pixels, and no constant depends on them.
    """
    call = layer.anchor_call
    assert call is not None
    if not layer.is_parameter(call.args[0]) or not layer.is_constant(call.args[1]) or layer.packs_result:
        return 0
    if ops.op_name(call) == "relax.nn.conv2d":
        a, (kh, kw, *_) = Conv2d.of(call), ops.shape_of(call.args[1])
        if (kh, kw, a.strides, a.groups) != (1, 1, (1, 1), 1):
            return 0
    elif len(ops.shape_of(call.args[1])) != 2:
        return 0
    return prod(ops.shape_of(call)[:-1]) if reads_its_pixels(layer, layer.func.params) else 0


def reads_its_pixels(layer: Layer, tensors: Sequence[relax.Var]) -> bool:
    """Whether tensors have the pixels of a layer's sums, and no constant of its epilogue depends on them."""
    call = layer.anchor_call
    assert call is not None
    constants = [c for b in layer.epilogue for c in _constants(b.value)]
    same = all(ops.shape_of(t)[:-1] == ops.shape_of(call)[:-1] for t in tensors)
    return same and all(prod(ops.shape_of(c)[:-1]) <= 1 for c in constants)


def _constants(expr: relax.Expr) -> list[relax.Expr]:
    if isinstance(expr, relax.Tuple):
        return [c for f in expr.fields for c in _constants(f)]
    if isinstance(expr, relax.Call):
        return [c for a in expr.args for c in _constants(a)]
    return [expr] if ops.is_const(expr) else []


def in_lines(layer: Layer, width: int) -> Layer:
    """A layer of `pixels_of` pixels in lines of `width`, which divides them: the same bytes in other shapes."""
    anchor = layer.anchor_call
    assert anchor is not None
    rank = max(len(ops.shape_of(anchor)), 3)

    def shape(old: tuple[int, ...]) -> tuple[int, ...]:
        return (*[1] * (rank - 3), prod(old[:-1]) // width, width, old[-1])

    params = [relax.Var(p.name, relax.TensorType(shape(ops.shape_of(p)), ops.dtype_of(p))) for p in layer.func.params]
    renamed: dict[relax.Var, relax.Expr] = dict(zip(layer.func.params, params, strict=True))
    builder = ops.Builder()
    with builder.function("joined", params):
        with builder.dataflow():
            for b in layer.bindings:
                renamed[b.var] = builder.emit(ops.renamed(b.value, renamed))
            result = builder.emit_output(renamed[layer.func.body.body])
        builder.emit_func_output(result)
    return Layer(layer.name, builder.get()["joined"])


def with_shapes_of(layer: Layer, func: tirx.PrimFunc) -> tirx.PrimFunc:
    """The kernel of a layer `in_lines`, which has one result, with parameters of the layer's own shapes."""
    root = func.body.block
    params, views = list(func.params), []
    for at, own in [*enumerate(layer.func.params), (-1, layer.func.body.body)]:
        seen = params[at]
        params[at] = tirx.decl_buffer(ops.shape_of(own), seen.dtype, seen.name)
        views.append(tirx.DeclBuffer(seen, data=params[at].data))
    block = s_tir.SBlock(
        [], [], [], root.name_hint, tirx.SeqStmt([*views, root.body]), alloc_buffers=root.alloc_buffers
    )
    return tirx.PrimFunc(params, s_tir.SBlockRealize([], True, block), attrs=func.attrs)
