"""PACKED to TIR: every private function becomes one scheduled PrimFunc, called with its constants by `main`."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from hawq_tvm.core import ops, stages
from hawq_tvm.targets.gpu import is_cuda

from .emit import (  # noqa: F401  (their emitters)
    emit_divide,
    emit_ibert,
    emit_layer_norm,
    emit_movement,
    emit_reduce,
    emit_requantize,
)
from .layer import Layer
from .record import recorded_tile
from .rule import Kernel, Rule, Tiled, choose
from .rules import rules_for

Arrays = tuple[np.ndarray[Any, Any], ...]


def lower_to_tir(module: tvm.IRModule, target: tvm.target.Target) -> tuple[tvm.IRModule, int]:
    """The module with every fused layer lowered by the first rule that fits it, and the number of layers.

    Every layer has a kernel; on a CPU `main` calls one of equal kernels for all their layers.

    A tile that `apply_records` wrote into a layer's function is used; the rule chooses the others.
    Raises UsageError when no rules exist for the kind of target, ScheduleError when a recorded tile does not fit.
    """
    rules = rules_for(target)
    kernels: dict[str, Kernel] = {}
    functions: dict[str, tirx.PrimFunc] = {}
    for name, func in stages.private_functions(module).items():
        layer = Layer.of(module.get_global_var(name), func)
        choice = choose(rules, layer, target)
        kernel, origin = build(choice.rule, layer, target)
        attrs = {
            "tirx.noalias": True,
            "tirx.is_scheduled": True,
            "hawq.rule": choice.rule.name,
            "hawq.layer": layer.name,
            "hawq.tile": str(kernel.tile),
            "hawq.tile_from": origin,
            "hawq.refused": choice.sentence(),
        }
        kernels[name], functions[name] = kernel, kernel.func.with_attr(attrs)
    shared = {} if is_cuda(target) else _equal(functions)
    return _call_kernels(module, functions, {n: k.arguments for n, k in kernels.items()}, shared), len(functions)


def check_rules_of(module: tvm.IRModule, target: tvm.target.Target) -> None:
    """Raise what `lower_to_tir` raises of a module without records; rules for CPUs that are chosen make their kernel of
    every layer, so that it need not be made.
    """
    if is_cuda(target):
        lower_to_tir(module, target)
        return
    rules = rules_for(target)
    for name, func in stages.private_functions(module).items():
        choose(rules, Layer.of(module.get_global_var(name), func), target)


def _equal(functions: dict[str, tirx.PrimFunc]) -> dict[str, str]:
    """For every kernel that only differs from an earlier one in what the report says of it, the earlier one."""
    first: dict[int, tuple[str, tirx.PrimFunc]] = {}
    shared = {}
    for name in sorted(functions):  # a module's own order is not the same in every process
        func = functions[name]
        for attribute in ("hawq.layer", "hawq.tile_from", "hawq.refused"):
            func = func.without_attr(attribute)
        own, other = first.setdefault(tvm_ffi.structural_hash(func), (name, func))
        if own != name and tvm_ffi.structural_equal(func, other):
            shared[name] = own
    return shared


def build(rule: Rule, layer: Layer, target: tvm.target.Target) -> tuple[Kernel, str]:
    """The kernel of a layer, and where its tile comes from: a record, the cost model, or the rule, which has no
    other.
    """
    tile = recorded_tile(rule, layer, target)
    if not isinstance(rule, Tiled):
        return rule.build(layer, target), "rule"
    return rule.build(layer, target, tile), "cost model" if tile is None else "record"


def _call_kernels(
    module: tvm.IRModule, functions: dict[str, tirx.PrimFunc], arguments: dict[str, Arrays], shared: dict[str, str]
) -> tvm.IRModule:
    main = module["main"]
    builder = ops.Builder()
    callees = {name: builder.add_func(func, name) for name, func in functions.items()}
    renamed: dict[relax.Var, relax.Expr] = {}

    def called(expr: relax.Expr) -> relax.Expr:
        """A layer's call as a call of its kernel, anything else with its variables renamed."""
        if not isinstance(expr, relax.Call) or not isinstance(expr.op, tvm.ir.GlobalVar):
            return ops.renamed(expr, renamed)
        name = expr.op.name_hint
        constants = [relax.const(a, str(a.dtype)) for a in arguments[name]]
        types = list(expr.ty.fields) if isinstance(expr.ty, relax.TupleType) else [expr.ty]
        types = [relax.TensorType(tuple(int(d) for d in t.shape.values), str(t.dtype)) for t in types]
        return relax.call_tir(
            callees[shared.get(name, name)],
            [*(ops.renamed(a, renamed) for a in expr.args), *constants],
            types if isinstance(expr.ty, relax.TupleType) else types[0],
        )

    emit = ops.Emitter(builder, [p.name for p in main.params])
    with builder.function("main", list(main.params), attrs=dict(main.attrs or {}), private=False):
        with builder.dataflow():
            result = main.body.body
            for b in stages.bindings(main):
                value = called(b.value)
                if b.var.same_as(result):
                    renamed[b.var] = builder.emit_output(value, name_hint=b.var.name)
                else:
                    is_alias = isinstance(value, relax.Var)
                    renamed[b.var] = value if is_alias else emit(value, b.var.name)
            result = called(result) if isinstance(result, relax.Var) else builder.emit_output(called(result))
        builder.emit_func_output(result)
    return builder.get()
