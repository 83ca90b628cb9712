"""Fold a ReLU or clip between a graph input and its quantize into the quantize's range (A12; ANNOTATED -> ANNOTATED).

1. quantize(relu(input)), quantize(clip(input))  -> quantize(input) with a narrower range; also a chain of them
Rounding and clamping are monotone in float32 too, so the integers stay the same. Bounds whose level differs between
channels stay as they are. Inside the network the lowering does the same to integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.rewriter import Rebuild, rewrite_main


def fold_input_clip(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module whose quantizes read its float inputs themselves, and how many clips were folded."""
    main = module["main"]
    values: dict[relax.Var, Any] = {b.var: b.value for b in stages.bindings(main)}
    inputs = set(main.params)
    count = 0

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        if ops.op_name(value) != "hawq.quantize":
            return None
        call, folded = binding.value, 0
        while (bounds := _bounds(values.get(call.args[0]))) is not None:
            narrower = _narrowed(call, *bounds, values[call.args[0]].args[0])
            if narrower is None:
                return None
            call, folded = narrower, folded + 1
        if not folded or call.args[0] not in inputs:
            return None
        count += folded
        return rebuild.map(call)

    return rewrite_main(module, visit), count


def _bounds(call: Any) -> tuple[float, float] | None:
    """What a ReLU or clip keeps its operand between."""
    name = ops.op_name(call)
    if name == "relax.nn.relu":
        return 0.0, np.inf
    return (float(call.args[1].value), float(call.args[2].value)) if name == "relax.clip" else None


def _narrowed(call: relax.Call, low: float, high: float, source: relax.Expr) -> relax.Call | None:
    """A quantize of `source` for the quantize of its clip, None where the bounds are not the same integer in every
    channel.
    """
    attrs, (scale, zero) = call.attrs, (ops.const_value(a) for a in call.args[1:])
    qmin, qmax, kind = int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["out_dtype"])
    rounding, form = str(attrs["rounding"]), str(attrs["form"])
    levels = []
    for bound in (low, high):
        level = arith.quantize(
            np.full(scale.shape, bound, np.float32),
            scale,
            zero,
            qmin=qmin,
            qmax=qmax,
            storage=kind,
            rounding=rounding,
            form=form,
        )
        if np.any(level != level.flat[0]):
            return None
        levels.append(int(level.flat[0]))
    return ops.quantize(
        source,
        scale,
        zero,
        qtype=arith.QType(levels[0], levels[1], kind),
        rounding=rounding,
        form=form,
        branches=str(attrs["branches"]),
        through=str(attrs["through"]),
    )
