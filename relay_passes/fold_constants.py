"""Fold what depends on constants alone (ANNOTATED and INTEGER).

1. hawq.quantize of a float constant      -> the integer constant (A2)
2. a movement or integer operator of constants, and element-wise float arithmetic of constants -> a constant
Not folded: hawq.dequantize of a constant, which is how a quantized weight is written, and hawq.unpack_int4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.rewriter import Rebuild, rewrite_main
from relay_passes.integer.movement import MOVES

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.negative": np.negative,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
}


def fold_constants(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with every foldable call of constants replaced by its value."""
    constants: dict[relax.Var, relax.Expr] = {}
    count = 0

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        known = any(v in constants for v in ops.variables(binding.value))
        if known:
            value = _with_constants(rebuild, binding.value, constants)
        if ops.is_const(value):
            constants[binding.var] = value
            return value
        folded = _fold(value, binding.var.name)
        if folded is None:
            return value if known else None
        count += 1
        constants[binding.var] = folded
        return folded

    return rewrite_main(module, visit), count


def _with_constants(rebuild: Rebuild, expr: relax.Expr, constants: dict[relax.Var, relax.Expr]) -> relax.Expr:
    if isinstance(expr, relax.Var):
        return constants.get(expr, rebuild.map(expr))
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([_with_constants(rebuild, f, constants) for f in expr.fields])
    if isinstance(expr, relax.Call):
        args = [_with_constants(rebuild, a, constants) for a in expr.args]
        return relax.Call(expr.op, args, attrs=expr.attrs, ty_args=expr.ty_args, ret_ty=expr.ty)
    return rebuild.map(expr)


def _fold(expr: relax.Expr, layer: str) -> relax.Expr | None:
    name = ops.op_name(expr)
    if not name:
        return None
    if name == "relax.concat":
        fields = expr.args[0].fields if isinstance(expr.args[0], relax.Tuple) else []
        if fields and all(ops.is_const(f) for f in fields):
            return _const(np.concatenate([ops.const_value(f) for f in fields], int(expr.attrs.axis)))
        return None
    if not expr.args or not ops.is_const(expr.args[0]):
        return None
    first = ops.const_value(expr.args[0])
    if name in MOVES and not ops.variables(expr):
        return _const(MOVES[name](expr, first))
    if name == "hawq.quantize" and first.dtype.kind == "f":
        if np.isnan(first).any():
            raise ModelError(
                "quantizes a constant that is not a number", where=layer, found="NaN", remedy="correct the constant"
            )
        attrs = expr.attrs
        scale, zero = ops.const_value(expr.args[1]), ops.const_value(expr.args[2]).astype(np.int64)
        quantized = arith.quantize(
            first,
            scale,
            zero,
            qmin=int(attrs["qmin"]),
            qmax=int(attrs["qmax"]),
            storage=str(attrs["out_dtype"]),
            rounding=str(attrs["rounding"]),
            form=str(attrs["form"]),
            through=str(attrs["through"]),
        )
        return _const(quantized)
    if name in _ELEMENTWISE and all(ops.is_const(a) for a in expr.args):
        values = [ops.const_value(a) for a in expr.args]
        wide = [v.astype(np.int64) if v.dtype.kind in "iu" else v for v in values]
        with np.errstate(all="ignore"):  # what is no number is refused where it is read
            return _const(_ELEMENTWISE[name](*wide).astype(first.dtype))
    if name == "relax.astype":
        return _const(first.astype(str(expr.attrs.dtype)))
    return None


def _const(array: Any) -> relax.Expr:
    return ops.const(array, str(array.dtype))
