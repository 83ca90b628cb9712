"""What follows a contraction, element by element, in another index: the same operators on the digits of a tiled output."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from hawq_tvm import ops

from .emit import Array
from .layer import Layer


def epilogue(layer: Layer, shape: tuple[int, ...], constant: Callable[[Array], Array]) -> tuple[Layer, list[relax.Var]]:
    """The layer's bindings after its anchor as a layer of their own, whose tensors all have `shape`, and the parameters of the
    old layer that it reads.

    Its parameters are the anchor's result, then those.  constant: a constant of the old layer, which varies over the last
    dimension at most, as one that broadcasts into `shape`.
    """
    anchor = layer.anchor
    assert anchor is not None
    after = layer.bindings[layer.bindings.index(anchor) + 1 :]
    read = list(dict.fromkeys(v for b in after for v in _variables(b.value) if v in set(layer.func.params)))
    first = relax.Var("sums", relax.TensorType(shape, ops.dtype_of(anchor.var)))
    params = [first, *(relax.Var(p.name, relax.TensorType(shape, ops.dtype_of(p))) for p in read)]
    renamed: dict[relax.Var, relax.Expr] = dict(zip([anchor.var, *read], params, strict=True))
    builder = relax.BlockBuilder()

    def mapped(expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return renamed[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([mapped(f) for f in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(mapped(expr.tuple_value), expr.index)
        if ops.is_const(expr):
            return ops.const(constant(ops.const_value(expr)), ops.dtype_of(expr))
        if isinstance(expr, relax.Call):
            # A table is indexed by values, not by places.
            args = [mapped(expr.args[0]), *expr.args[1:]] if ops.op_name(expr) == "hawq.lookup" else [mapped(a) for a in expr.args]
            return relax.Call(expr.op, args, attrs=expr.attrs, ty_args=expr.ty_args)
        return expr

    with builder.function("epilogue", params):
        with builder.dataflow():
            for b in layer.bindings:
                if b in after:
                    renamed[b.var] = builder.emit(mapped(b.value))
                elif isinstance(b.value, relax.Var) or ops.is_const(b.value):
                    renamed[b.var] = b.value
            result = builder.emit_output(mapped(layer.func.body.body))
        builder.emit_func_output(result)
    return Layer(layer.name, builder.get()["epilogue"]), read


def _variables(expr: relax.Expr) -> list[relax.Var]:
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Tuple):
        return [v for f in expr.fields for v in _variables(f)]
    if isinstance(expr, relax.Call):
        return [v for a in expr.args for v in _variables(a)]
    return _variables(expr.tuple_value) if isinstance(expr, relax.TupleGetItem) else []
