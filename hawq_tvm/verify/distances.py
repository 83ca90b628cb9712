"""How far a layer's integers can be from the real formula of its inputs, where that is bounded and not enumerated.

A normalization (A25) is near its real value, not equal to it, and so is a softmax (A17). Everything that only moves or
rescales such integers hands the distance on; a requantize turns it into steps of its result, where it ends: what the
next layer reads are integers as the model quantizes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.layer_norm import norm_of
from hawq_tvm.core.operators import Kind, kind_of


def distances(packed: tvm.IRModule) -> dict[str, float]:
    """For every layer near the real formula, by name: d with |y - real| <= 1/2 + d in steps of its result, unless
    clamped.

    Where d is below 1, the result is at most one step from the real formula rounded.
    """
    walk = _Walk(packed)
    main = packed["main"]
    walk.function(main, dict.fromkeys(main.params, 0.0), "")
    return walk.found


class _Walk:
    """The distance of every tensor from its real value, in its own units."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.found: dict[str, float] = {}

    def function(self, func: relax.Function, near: dict[relax.Var, Any], layer: str) -> Any:
        for b in stages.bindings(func):
            near[b.var] = self._of(b.value, near, layer or b.var.name)
        return self._of(func.body.body, near, layer)

    def _of(self, expr: relax.Expr, near: dict[relax.Var, Any], layer: str) -> Any:
        if isinstance(expr, relax.Var):
            return near[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._of(f, near, layer) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            whole = self._of(expr.tuple_value, near, layer)
            return whole[expr.index] if isinstance(whole, tuple) else whole
        if not isinstance(expr, relax.Call):
            return 0.0
        args = [self._of(a, near, layer) for a in expr.args]
        if isinstance(expr.op, tvm.ir.GlobalVar):
            func = self.module[expr.op]
            name = str((func.attrs or {}).get("hawq.layer", layer))
            return self.function(func, dict(zip(func.params, args, strict=True)), name)
        return self._call(expr, args, layer)

    def _call(self, call: relax.Call, args: list[Any], layer: str) -> float:
        name = ops.op_name(call)
        if name == "hawq.layer_norm":
            norm = norm_of(call.attrs, ops.shape_of(call.args[0]))
            return norm.distance * 2.0**norm.fraction
        if name == "hawq.softmax":
            self._note(layer, _softmax(call))
        if name == "hawq.requantize" and any(args[0]):
            self._note(layer, _requantized(call, args[0]))
        passes = kind_of(name) is Kind.MOVEMENT or name in ("relax.maximum", "relax.minimum", "relax.clip")
        return max((float(d) for a in args for d in (a if isinstance(a, tuple) else (a,))), default=0.0) * passes

    def _note(self, layer: str, distance: float) -> None:
        self.found[layer] = max(self.found.get(layer, 0.0), distance)


def _softmax(call: relax.Call) -> float:
    """(A17e)"""
    multiplier, shift = int(call.attrs["multiplier"]), int(call.attrs["shift"])
    count = ops.shape_of(call.args[0])[int(call.attrs["axis"])]
    return multiplier / 2.0**shift * (count + 3) * 2.0**-31 + 2.0**-shift


def _requantized(call: relax.Call, near: tuple[float, ...]) -> float:
    """The distances of the operands in steps of the result, and what the dyadic numbers lose (A3): half a unit of each
    multiplier and of the offset.
    """
    data, multipliers, _, shift = call.args
    unit = 2.0 ** -ops.const_value(shift).astype(np.float64)
    total = unit / 2
    for x, m, d in zip(data.fields, multipliers.fields, near, strict=True):
        largest = float(max(abs(v) for v in arith.RANGES[ops.dtype_of(x)]))
        total = total + (np.abs(ops.const_value(m).astype(np.float64)) * d + largest / 2) * unit
    return float(np.max(total))
