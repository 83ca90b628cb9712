"""What the integers of an input must lie between, because of what reads them (ANNOTATED -> ANNOTATED).

An input of integers that are positions (Gather, an embedding) takes those that the axis has, from its end too where
ONNX counts so; one that is a mask, (1 - mask) C with a constant C of -10,000 or less, or mask C + ..., takes 0 and 1.
The attribute `hawq.input_ranges` of `main` holds two numbers for each input; a run refuses others.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.operators import Kind, kind_of

# A factor of a mask that shuts a score out of every softmax.
SHUTS_OUT = 1e4


def declare_ranges(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with the ranges of its integer inputs, and how many of them are narrower than their type."""
    main = module["main"]
    readers: dict[relax.Var, list[relax.VarBinding]] = {}
    for b in stages.bindings(main):
        for v in dict.fromkeys(ops.variables(b.value)):
            readers.setdefault(v, []).append(b)
    ranges: list[int] = []
    narrowed = 0
    for p, (low, high) in zip(main.params, stages.input_ranges(main), strict=True):
        found = [] if stages.is_float(p) else list(_wanted(p, readers, module))
        whole = (low, high)
        for least, most in found:
            low, high = max(low, least), min(high, most)
        narrowed += (low, high) != whole
        ranges += [low, high]
    if not narrowed:
        return module, 0
    return tvm.IRModule({"main": main.with_attr("hawq.input_ranges", ranges)}), narrowed


def _wanted(
    var: relax.Var, readers: dict[relax.Var, list[relax.VarBinding]], module: tvm.IRModule
) -> Iterator[tuple[int, int]]:
    """The ranges that the readers of an integer tensor ask for, through what only moves or casts it."""
    for b in readers.get(var, []):
        call, name = b.value, ops.op_name(b.value)
        if name == "relax.take" and call.args[1].same_as(var):
            shape, axis = ops.shape_of(call.args[0]), call.attrs.axis
            size = prod(shape) if axis is None else shape[int(axis)]
            yield -size if call.attrs.mode == "wrap" else 0, size - 1  # of a fast one no id counts from the end
        elif name == "relax.astype" and stages.is_float(b.var):
            if _is_mask(b.var, readers):
                yield 0, 1
        elif (name == "relax.astype" and _holds(b.var)) or (
            kind_of(name) is Kind.MOVEMENT and not isinstance(call.args[0], relax.Tuple)
        ):
            yield from _wanted(b.var, readers, module)


def _holds(var: relax.Var) -> bool:
    """Whether a cast leaves integers that are positions as they are."""
    return ops.dtype_of(var) in ("int16", "int32", "int64", "uint16", "uint32")


def _is_mask(var: relax.Var, readers: dict[relax.Var, list[relax.VarBinding]]) -> bool:
    """Whether every reader of a float tensor takes it from 1 and multiplies the rest with a large negative number."""
    behind = [b for b in readers.get(var, [])]
    return bool(behind) and all(_shuts(b, var, readers, False) for b in behind)


def _shuts(
    binding: relax.VarBinding, var: relax.Var, readers: dict[relax.Var, list[relax.VarBinding]], inverted: bool
) -> bool:
    call, name = binding.value, ops.op_name(binding.value)
    following = readers.get(binding.var, [])
    if kind_of(name) is Kind.MOVEMENT:
        return bool(following) and all(_shuts(b, binding.var, readers, inverted) for b in following)
    if name == "relax.subtract" and not inverted and call.args[1].same_as(var) and _number(call.args[0]) == 1.0:
        return bool(following) and all(_shuts(b, binding.var, readers, True) for b in following)
    if name == "relax.multiply" and inverted:
        (factor,) = [_number(a) for a in call.args if not a.same_as(var)] or [None]
        return factor is not None and factor <= -SHUTS_OUT
    return False


def _number(expr: relax.Expr) -> float | None:
    if not ops.is_const(expr) or ops.const_value(expr).size != 1:
        return None
    return float(ops.const_value(expr).reshape(-1)[0])
