"""Outline every layer as a function: an anchor, what feeds it alone, the element-wise chain after it (to PACKED).

1. conv2d, matmul, pools, reductions, softmax start a group and take in the pad, dilate2d, unpack_int4, casts and
   differences that feed only them.
2. An element-wise operator joins the group of an operand that nothing else reads and that has its shape; at most one
   such group may have an anchor, groups that only move or map elements all join, as long as the written-out expression
   of one element stays below MOST_NODES.
3. concat takes in the element-wise groups that feed only it.
4. Every other operator is a group of its own, border operators always; a float head or tail stays in main.
A group is placed where its last member was, so everything it reads exists by then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import tvm
from tvm import relax

from hawq_tvm.core import division, ops, stages
from hawq_tvm.core.operators import OPERATORS, Kind, kind_of
from hawq_tvm.core.rewriter import use_counts

# A kernel writes a chain as one expression, in which a rounding repeats its operand: every requantize of a chain
# doubles or triples it, and the compiler's time grows with its size. A convolution with its residual join has 10 to 30.
MOST_NODES = 200


@dataclass(eq=False)
class _Group:
    members: list[relax.VarBinding] = field(default_factory=list)
    anchored: bool = False
    closed: bool = False

    @property
    def output(self) -> relax.Var:
        return self.members[-1].var


def fuse_epilogues(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The PACKED module, and how many operators joined another one's group."""
    main = module["main"]
    groups = _partition(main)
    operators = sum(len(g.members) for g in groups.values())
    distinct = {id(g) for g in groups.values()}
    return _outline(module, groups), len(groups) - len(distinct) if operators else 0


def _partition(main: relax.Function) -> dict[relax.Var, _Group]:
    uses = use_counts(main)
    outside = stages.float_tail(main)
    feeds_anchor = _feeding(main, uses)
    group_of: dict[relax.Var, _Group] = {}
    nodes: dict[relax.Var, int] = {}  # of one element's expression, 1 where it is a load

    def written_out(call: relax.Call, taken: list[_Group]) -> int:
        inside = {g.output for g in taken}
        return 1 + sum(_repeats(call, v) * (nodes[v] if v in inside else 1) for v in ops.variables(call))

    def candidates(call: relax.Call) -> list[_Group]:
        """Open groups whose output only this call reads."""
        found = []
        for v in ops.variables(call):
            group = group_of.get(v)
            if (
                group is not None
                and uses[v] == 1
                and group.output.same_as(v)
                and not group.closed
                and group not in found
            ):
                found.append(group)
        return found

    for binding in stages.bindings(main):
        value, name = binding.value, ops.op_name(binding.value)
        kind = kind_of(name)
        if not isinstance(value, relax.Call) or binding.var.name in outside:
            continue
        group = _Group(anchored=kind is Kind.REDUCTION, closed=kind is Kind.BORDER)
        taken: list[_Group] = []
        if kind is Kind.REDUCTION:
            taken = [g for g in candidates(value) if all(_feeds(m) for m in g.members)]
        elif binding.var in feeds_anchor and _maps_and_feeds(binding):
            taken = [g for g in candidates(value) if all(_maps_and_feeds(m) for m in g.members)]
        elif kind is Kind.ELEMENTWISE:
            same = [g for g in candidates(value) if ops.shape_of(g.output) == ops.shape_of(binding.var)]
            anchored = [g for g in same if g.anchored]
            # Of two anchors (a residual join of two convolutions) the later one takes the sum.
            taken = [g for g in same if not g.anchored and not _is_pad(g)] + anchored[-1:]
            while taken and written_out(value, taken) > MOST_NODES:
                taken.remove(max(taken, key=lambda g: nodes[g.output]))
            group.anchored = any(g.anchored for g in taken)
        elif name == "relax.concat":
            taken = [g for g in candidates(value) if not g.anchored and not _is_pad(g)]
        nodes[binding.var] = written_out(value, taken) if kind is Kind.ELEMENTWISE else 1
        members = [m for g in taken for m in g.members]
        order = {b.var: i for i, b in enumerate(stages.bindings(main))} if len(taken) > 1 else {}
        group.members = [*(sorted(members, key=lambda m: order[m.var]) if order else members), binding]
        for m in group.members:
            group_of[m.var] = group
    return group_of


def _feeding(main: relax.Function, uses: Mapping[relax.Var, int]) -> set[relax.Var]:
    """What only an anchor reads, or only a chain of casts and differences of elements that only an anchor reads.

    It belongs to that anchor: in the producer's group a cast would be stored, four bytes an element.
    """
    found: set[relax.Var] = set()
    for b in reversed(list(stages.bindings(main))):
        if kind_of(ops.op_name(b.value)) is Kind.REDUCTION or (b.var in found and _maps_and_feeds(b)):
            found |= {v for v in ops.variables(b.value) if uses[v] == 1}
    return found


def _feeds(binding: relax.VarBinding) -> bool:
    row = OPERATORS.get(ops.op_name(binding.value))
    return row is not None and row.feeds


def _maps_and_feeds(binding: relax.VarBinding) -> bool:
    return _feeds(binding) and kind_of(ops.op_name(binding.value)) is Kind.ELEMENTWISE


def _repeats(call: relax.Call, operand: relax.Var) -> int:
    """How often an operand's expression stands in the expression of a call (`schedules/emit/emit_requantize.py`)."""
    if ops.op_name(call) == division.NAME:
        return 20
    if ops.op_name(call) != "hawq.requantize":
        return 1
    rounding = str(call.attrs["rounding"])
    if rounding in ("half_up", "floor", "ceil"):
        return 2 if ops.dtype_of(operand) in ("int8", "uint8") else 1
    return 12 if rounding == "double" else 3


def _is_pad(group: _Group) -> bool:
    return any(ops.op_name(m.value) in ("relax.nn.pad", "hawq.dilate2d", "relax.concat") for m in group.members)


def _function_name(group: _Group) -> str:
    kinds = [re.sub(r"^(relax|hawq)\.(nn\.)?", "", ops.op_name(m.value)) for m in group.members]
    return "_".join(dict.fromkeys(kinds))[:60]


def _outline(module: tvm.IRModule, group_of: dict[relax.Var, _Group]) -> tvm.IRModule:
    main = module["main"]
    returned, aliases = stages.outputs(main)
    builder = ops.Builder()
    env: dict[relax.Var, relax.Expr] = {p: p for p in main.params}
    emit = ops.Emitter(builder, [p.name for p in main.params])
    functions = {}
    for group in dict.fromkeys(group_of.values()):
        functions[group] = _function(builder, group)

    with builder.function("main", list(main.params)):
        with builder.dataflow():
            for binding in stages.bindings(main):
                if binding.var in aliases:
                    continue
                home = group_of.get(binding.var)
                if home is None:
                    env[binding.var] = emit(ops.renamed(binding.value, env), binding.var.name)
                elif home.output.same_as(binding.var):
                    gv, outer = functions[home]
                    env[binding.var] = emit(relax.Call(gv, [env[v] for v in outer]), binding.var.name)
            output = builder.emit_output(ops.renamed(returned, env))
        builder.emit_func_output(output)
    new = builder.get()
    func = new["main"]
    for key, value in (main.attrs or {}).items():
        if key != "global_symbol":
            func = func.with_attr(key, value)
    new.update_func(new.get_global_var("main"), func)
    return new


def _function(builder: relax.BlockBuilder, group: _Group) -> tuple[tvm.ir.GlobalVar, list[relax.Var]]:
    inside = {m.var for m in group.members}
    outer = list(dict.fromkeys(v for m in group.members for v in ops.variables(m.value) if v not in inside))
    env: dict[relax.Var, relax.Expr] = {v: relax.Var(f"p{i}", v.ty) for i, v in enumerate(outer)}
    params = [env[v] for v in outer]
    inner = ops.Builder()
    emit = ops.Emitter(inner)

    with inner.function("layer", params, private=True):
        with inner.dataflow():
            for m in group.members[:-1]:
                env[m.var] = emit(ops.renamed(m.value, env), m.var.name)
            last = inner.emit_output(ops.renamed(group.members[-1].value, env))
        inner.emit_func_output(last)
    func = inner.get()["layer"].with_attr("Primitive", 1).with_attr("hawq.layer", group.output.name)
    return builder.add_func(func, _function_name(group)), outer
