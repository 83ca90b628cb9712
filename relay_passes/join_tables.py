"""Make one table of a chain of tables and integer arithmetic on one 8-bit tensor (INTEGER -> INTEGER).

A tanh-GELU with every operator quantized is such a chain: a dozen operators, and two of them tables already. Its
value for each of the 256 integers is computed here by (A9) and (A16), so the integers stay the same. A chain becomes
a hawq.lookup when 1. it has a table and at least one more table or requantize, element by element and with scalar
constants, 2. nothing else reads what lies inside it, and 3. no requantize inside differs from its real formula
anywhere: what the certificate counts is then not hidden in a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.rewriter import Rebuild, rewrite_main

Array = np.ndarray[Any, Any]
_STORED = frozenset({"int8", "uint8", "int16", "uint16"})
_PLAIN: dict[str, Callable[..., Array]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.astype": lambda x: x,
}


@dataclass(frozen=True, eq=False)
class _Chain:
    """A tensor as a function of an 8-bit one: its value for every integer of `leaf`; inside: what lies between the
    two.
    """

    leaf: relax.Var
    values: Array
    inside: frozenset[relax.Var]
    tables: int
    steps: int


def join_tables(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with one table for every such chain, and how many there are; what they replace is left unused."""
    main = module["main"]
    chains: dict[relax.Var, _Chain] = {}
    readers: dict[relax.Var, set[relax.Expr]] = defaultdict(set)
    for b in stages.bindings(main):
        for v in ops.variables(b.value):
            readers[v].add(b.var)
        chain = _chain(b, chains)
        if chain is not None:
            chains[b.var] = chain
    for v in ops.variables(main.body.body):
        readers[v].add(main.body.body)
    roots: dict[relax.Var, _Chain] = {}
    covered: set[relax.Var] = set()
    for var, chain in reversed(chains.items()):
        closed = all(readers[v] <= chain.inside | {var} for v in chain.inside)
        if var not in covered and closed and chain.tables and chain.steps > 1 and ops.dtype_of(var) in _STORED:
            roots[var] = chain
            covered |= chain.inside

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        chain = roots.get(binding.var)
        if chain is None:
            return None
        return ops.lookup(rebuild.map(chain.leaf), chain.values.astype(ops.dtype_of(binding.var)))

    return rewrite_main(module, visit), len(roots)


def _chain(binding: relax.VarBinding, chains: dict[relax.Var, _Chain]) -> _Chain | None:
    call, name = binding.value, ops.op_name(binding.value)
    if name not in _PLAIN and name not in ("hawq.requantize", "hawq.lookup"):
        return None
    operands = list(call.args[0].fields) if name == "hawq.requantize" else list(call.args)
    read = {v: chains.get(v) or _leaf(v) for v in operands if isinstance(v, relax.Var)}
    found = [c for c in read.values() if c is not None]
    constants = [a for a in operands if ops.is_const(a)] if name != "hawq.lookup" else []
    if len(found) < len(read) or not found or any(ops.const_value(a).size != 1 for a in constants):
        return None
    if any(c.leaf is not found[0].leaf and not c.leaf.same_as(found[0].leaf) for c in found):
        return None
    leaf = found[0].leaf
    if ops.shape_of(leaf) != ops.shape_of(binding.var):
        return None
    values = _evaluate(call, name, [read[a].values if a in read else a for a in operands])  # type: ignore[union-attr]
    if values is None:
        return None
    return _Chain(
        leaf,
        values,
        frozenset().union(*(c.inside for c in found), (v for v in read if not v.same_as(leaf))),
        max(c.tables for c in found) + (name == "hawq.lookup"),
        max(c.steps for c in found) + (name not in _PLAIN),
    )


def _leaf(var: relax.Var) -> _Chain | None:
    dtype = getattr(var.ty, "dtype", None)
    if str(dtype) not in ("int8", "uint8"):
        return None
    low, high = arith.RANGES[str(dtype)]
    return _Chain(var, np.arange(low, high + 1), frozenset(), 0, 0)


def _evaluate(call: relax.Call, name: str, operands: list[Any]) -> Array | None:
    """The call for every integer of the leaf in int64, None where (A9) differs from its real formula."""
    values = [_scalar(a) if isinstance(a, relax.Expr) and ops.is_const(a) else a for a in operands]
    if name in _PLAIN:
        return _PLAIN[name](*values)
    if name == "hawq.lookup":
        table = ops.const_value(call.args[1]).astype(np.int64)
        low = arith.RANGES[ops.dtype_of(call.args[0])][0]
        # Integers of the leaf that never occur may lead outside.
        return np.asarray(table[np.clip(values[0] - low, 0, table.size - 1)])
    constants = [*call.args[1].fields, *call.args[2:4]]
    attrs = call.attrs
    if any(ops.const_value(c).size != 1 for c in constants) or int(attrs["differing"]) != 0:
        return None
    *multipliers, offset, shift = (_scalar(c) for c in constants)
    return arith.requantize(
        values,
        multipliers,
        offset,
        shift,
        rounding=str(attrs["rounding"]),
        zero_point=int(attrs["zero_point"]),
        qmin=int(attrs["qmin"]),
        qmax=int(attrs["qmax"]),
    )


def _scalar(expr: relax.Expr) -> Any:
    return ops.const_value(expr).astype(np.int64).reshape(-1)[0]
