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

from hawq_tvm.core import ops, stages
from hawq_tvm.core.rewriter import Rebuild, rewrite_main

from .integer.inputs import narrowed


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
            narrower = narrowed(call, values[call.args[0]].args[0], *bounds)
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
