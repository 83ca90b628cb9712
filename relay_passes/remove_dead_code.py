"""Remove the bindings of `main` that no output needs; parameters stay, they are the model's interface."""

from __future__ import annotations

import tvm

from hawq_tvm.core import ops, stages
from hawq_tvm.core.rewriter import rewrite_main


def remove_dead_code(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module without unused bindings, and how many there were."""
    main = module["main"]
    needed = set(ops.variables(main.body.body))
    dead = set()
    for binding in reversed(list(stages.bindings(main))):
        if binding.var in needed:
            needed.update(ops.variables(binding.value))
        else:
            dead.add(binding.var)
    if not dead:
        return module, 0
    return rewrite_main(module, lambda rebuild, binding, value: None, drop=dead), len(dead)
