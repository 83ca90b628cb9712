"""What follows a contraction, element by element, in another index: the same operators on the digits of a tiled
output.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.core.operators import reads_tables
from schedules.layer import Layer

from .emit import Array


def epilogue(layer: Layer, shape: tuple[int, ...], constant: Callable[[Array], Array]) -> tuple[Layer, list[relax.Var]]:
    """The layer's bindings after its anchor as a layer of their own, whose tensors all have `shape`, and the
    variables from before the anchor that it reads.

    Its parameters are the anchor's result, then those. A last pack_int4 is left out.  constant: a constant of the
    old layer, which varies over the last dimension at most, as one that broadcasts into `shape`.
    """
    anchor = layer.anchor
    assert anchor is not None
    own = {b.var for b in layer.epilogue} | {anchor.var}
    read = list(dict.fromkeys(v for b in layer.epilogue for v in ops.variables(b.value) if v not in own))
    params = [relax.Var(v.name, relax.TensorType(shape, ops.dtype_of(v))) for v in (anchor.var, *read)]
    renamed: dict[relax.Var, relax.Expr] = dict(zip([anchor.var, *read], params, strict=True))
    builder = ops.Builder()

    def mapped(expr: relax.Expr) -> relax.Expr:
        if isinstance(expr, relax.Var):
            return renamed[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([mapped(f) for f in expr.fields])
        if ops.is_const(expr):
            return ops.const(constant(ops.const_value(expr)), ops.dtype_of(expr))
        if isinstance(expr, relax.Call):
            # A table is indexed by values, not by places.
            args = (
                [mapped(expr.args[0]), *expr.args[1:]]
                if reads_tables(ops.op_name(expr))
                else [mapped(a) for a in expr.args]
            )
            return relax.Call(expr.op, args, attrs=expr.attrs, ty_args=expr.ty_args)
        return expr

    with builder.function("epilogue", params):
        with builder.dataflow():
            last: relax.Expr = params[0]
            for b in layer.epilogue:
                if ops.op_name(b.value) != "hawq.pack_int4":
                    last = renamed[b.var] = builder.emit(mapped(b.value))
            result = builder.emit_output(last)
        builder.emit_func_output(result)
    return Layer(layer.name, builder.get()["epilogue"]), read
