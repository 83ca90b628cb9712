"""A PACKED module of one layer, compiled and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

import schedules
from hawq_tvm import arith, build, ops, stages
from schedules.layer import Layer

Array = np.ndarray[Any, Any]
Body = Callable[..., relax.Expr]
TARGET = tvm.target.Target({"kind": "llvm"})


def packed(body: Body, inputs: Sequence[tuple[tuple[int, ...], str]], layer: str = "layer") -> tvm.IRModule:
    """`main` calling one private function; body(emit, *params) builds its expressions with emit(expr)."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(inputs)]
    with builder.function("fused", params, attrs={"Primitive": 1, "hawq.layer": layer}, private=True):
        with builder.dataflow():
            result = builder.emit_output(body(lambda e, name="v": builder.emit(e, name_hint=name), *params))
        builder.emit_func_output(result)
    module = builder.get()
    gv = module.get_global_var("fused")
    builder = relax.BlockBuilder(module)
    outer = [relax.Var(f"x{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(inputs)]
    with builder.function("main", outer):
        with builder.dataflow():
            value = builder.emit(relax.Call(gv, outer), name_hint=layer)
            fields = value.ty.fields if isinstance(value.ty, relax.TupleType) else None
            items = [relax.TupleGetItem(value, k) for k in range(len(fields))] if fields else [value]
            result = builder.emit_output(relax.Tuple(items))
        builder.emit_func_output(result)
    module = builder.get()
    stages.verify(module, stages.Stage.PACKED)
    return module


def in_two_steps(emit: Callable[..., relax.Expr], sums: relax.Expr, bits: int = 4) -> relax.Expr:
    """(A23a): sums / (3 2^bits) in two requantizes, at whose ties half go up."""
    fine = arith.QType(-228 << bits, 156 << bits, "int32")
    first = emit(ops.requantize([sums], [715827883], 40000, 31, qtype=fine, zero_point=0, rounding="half_up"))
    return ops.requantize([first], [1], 0, bits, qtype=arith.QType(-128, 127, "int8"), zero_point=100, rounding="half_even")


def layer_of(module: tvm.IRModule) -> Layer:
    """The only layer of a PACKED module."""
    ((name, func),) = stages.private_functions(module).items()
    return Layer.of(module.get_global_var(name), func)


def zeros_for(layer: Layer) -> list[Array]:
    """Arrays for a layer's results."""
    returned = layer.func.ret_ty
    types = returned.fields if isinstance(returned, relax.TupleType) else [returned]
    return [np.zeros([int(d) for d in t.shape.values], str(t.dtype)) for t in types]


def lower(module: tvm.IRModule, target: tvm.target.Target = TARGET) -> tvm.IRModule:
    """The TIR stage of a PACKED module, checked."""
    lowered, count = schedules.lower_to_tir(module, target)
    assert count == len(stages.private_functions(module))
    stages.verify(lowered, stages.Stage.TIR)
    return lowered


def run(body: Body, *arrays: Array, target: tvm.target.Target = TARGET, rule: str = "") -> list[Array]:
    """The results of one layer compiled and run on `arrays`; rule: the name of the rule that must have made it."""
    lowered = lower(packed(body, [(a.shape, str(a.dtype)) for a in arrays]), target)
    if rule:
        assert [r["rule"] for r in schedules.report(lowered)] == [rule]
    vm = relax.VirtualMachine(build.build(lowered, target), tvm.cpu())
    result = vm["main"](*(tvm.runtime.tensor(a) for a in arrays))
    return [r.numpy() for r in result]
