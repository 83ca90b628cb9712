"""Remove the bindings of `main` that no output needs; parameters stay, they are the model's interface."""

from __future__ import annotations

import tvm
from tvm import relax

from hawq_tvm import stages

from .rewriter import variables


def remove_dead_code(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module without unused bindings, and how many there were."""
    main = module["main"]
    kept: list[relax.VarBinding] = []
    needed = set(variables(main.body.body))
    everything = list(stages.bindings(main))
    for binding in reversed(everything):
        if binding.var in needed:
            kept.append(binding)
            needed.update(variables(binding.value))
    if len(kept) == len(everything):
        return module, 0
    block = relax.DataflowBlock(list(reversed(kept)))
    func = relax.Function(list(main.params), relax.SeqExpr([block], main.body.body), main.ret_ty, attrs=main.attrs)
    return tvm.IRModule({**dict(module.functions_items()), module.get_global_var("main"): func}), len(everything) - len(kept)
