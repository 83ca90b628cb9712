"""Join the layers of an attention into one (PACKED -> PACKED), whose scores never leave the first cache.

1. Members: a softmax's layer, the product of run-time tensors that alone makes its scores, the product that alone reads
   it.
2. In front of them movements and casts that nothing else reads; behind them movements of the only result.
3. They become one function where that is an attention (`core/attention.py`), called where the last of them was.
For CPUs, whose kernels take a block of rows from its scores to its results; on a GPU each layer has a kernel.
"""

from __future__ import annotations

import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.attention import MOVES, SOFTMAXES, Attention
from hawq_tvm.core.operators import OPERATORS, is_anchor
from hawq_tvm.core.rewriter import Rebuild, rewrite_main, use_counts


def join_attention(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with its attentions joined, and how many there were."""
    graph = _Graph(module)
    joined: dict[relax.Var, tuple[list[relax.VarBinding], relax.Function, list[relax.Var]]] = {}
    for call in graph.calls.values():
        if (members := graph.members(call)) and (made := _function(module, members)) is not None:
            joined[members[-1].var] = (members, *made)
    if not joined:
        return module, 0
    return _rewritten(module, joined), len(joined)


class _Graph:
    """The calls of layers in `main`, who reads whom, and what they hold."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.module, self.uses = module, use_counts(module["main"])
        self.order = {b.var: i for i, b in enumerate(stages.bindings(module["main"]))}
        self.calls = {
            b.var: b
            for b in stages.bindings(module["main"])
            if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar)
        }
        self.reader = {v: b for b in self.calls.values() for v in b.value.args if self.uses.get(v) == 1}

    def values(self, call: relax.VarBinding) -> list[relax.Expr]:
        """What a layer computes, in order."""
        return [b.value for b in stages.bindings(self.module[call.value.op])]

    def anchor(self, call: relax.VarBinding | None) -> str:
        """The operator of a layer's only anchor."""
        names = [ops.op_name(v) for v in self.values(call)] if call is not None else []
        anchors = [n for n in names if is_anchor(n)]
        return anchors[0] if len(anchors) == 1 else ""

    def members(self, call: relax.VarBinding) -> list[relax.VarBinding]:
        """The layers of the attention whose softmax a layer is, in order; none where it is of none."""
        if self.anchor(call) not in SOFTMAXES:
            return []
        made = [self.calls[v] for v in call.value.args if v in self.reader and v in self.calls]
        first = [c for c in made if self.anchor(c) == "relax.matmul"]
        second = self.reader.get(call.var)
        if len(first) != 1 or self.anchor(second) != "relax.matmul":
            return []
        assert second is not None
        found = {c.var: c for c in (first[0], call, second)}
        queue = list(found.values())
        while queue:
            for v in queue.pop().value.args:
                feeding = self.calls.get(v)
                if feeding is not None and v in self.reader and v not in found and self._feeds(feeding):
                    found[v] = feeding
                    queue.append(feeding)
        last: relax.VarBinding | None = second
        while last is not None:
            last = self.reader.get(last.var)
            if last is None or any(ops.op_name(v) not in MOVES for v in self.values(last)):
                break
            found[last.var] = last
        return sorted(found.values(), key=lambda c: self.order[c.var])

    def _feeds(self, call: relax.VarBinding) -> bool:
        """Whether a layer only moves and casts."""
        names = [ops.op_name(v) for v in self.values(call)]
        return all(n in MOVES or (n in OPERATORS and OPERATORS[n].feeds and n != "relax.nn.pad") for n in names)


def _function(module: tvm.IRModule, members: list[relax.VarBinding]) -> tuple[relax.Function, list[relax.Var]] | None:
    """The members as one function and the variables of `main` that it reads; None where that is no attention."""
    inside = {c.var for c in members}
    outer = list(dict.fromkeys(v for c in members for v in c.value.args if v not in inside))
    params = [relax.Var(f"p{i}", v.ty) for i, v in enumerate(outer)]
    made: dict[relax.Var, relax.Expr] = dict(zip(outer, params, strict=True))
    builder = ops.Builder()
    emit = ops.Emitter(builder)
    with builder.function("layer", params, private=True):
        with builder.dataflow():
            for call in members:
                layer = module[call.value.op]
                names = dict(zip(layer.params, (made[v] for v in call.value.args), strict=True))
                for b in stages.bindings(layer):
                    value, is_result = ops.renamed(b.value, names), b.var.same_as(layer.body.body)
                    if is_result and call is members[-1]:
                        result = builder.emit_output(value)
                    else:
                        names[b.var] = emit(value, call.var.name if is_result else b.var.name)
                made[call.var] = names.get(layer.body.body)
        builder.emit_func_output(result)
    func = builder.get()["layer"]
    if isinstance(Attention.of(list(stages.bindings(func))), str):
        return None
    return func.with_attr("Primitive", 1).with_attr("hawq.layer", members[-1].var.name), outer


def _rewritten(
    module: tvm.IRModule, joined: dict[relax.Var, tuple[list[relax.VarBinding], relax.Function, list[relax.Var]]]
) -> tvm.IRModule:
    members = {c.var: c for calls, *_ in joined.values() for c in calls}
    added: dict[tvm.ir.GlobalVar, relax.Function] = {}

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        if binding.var not in joined:
            return None
        _, func, outer = joined[binding.var]
        callee = rebuild.builder.add_func(func, "attention")
        added[callee] = func
        return relax.Call(callee, [rebuild.map(v) for v in outer])

    new = rewrite_main(module, visit, drop=members.keys() - joined.keys())
    gone = {c.value.op.name_hint for c in members.values()}
    return tvm.IRModule({**{gv: f for gv, f in new.functions_items() if gv.name_hint not in gone}, **added})
