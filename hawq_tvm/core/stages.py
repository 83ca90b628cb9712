"""The stages of the one IRModule, and the grammar of each; `verify` runs after every pass, always.

ANNOTATED  float Relax operators between hawq.quantize / hawq.dequantize, as the frontend wrote them (NCHW)
INTEGER    integer tensors and hawq.requantize; float only at the border
PACKED     layout chosen, 4-bit weights packed; `main` calls one private function per fused layer
TIR        `main` calls PrimFuncs only, each naming its rule
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator

import tvm
from tvm import relax

from . import arith, ops
from .errors import ModelError, StageError
from .operators import OPERATORS
from .operators import is_border as is_border_operator


class Stage(enum.IntEnum):
    """The stages in the order a module passes through them."""

    ANNOTATED = 0
    INTEGER = 1
    PACKED = 2
    TIR = 3


def bindings(func: relax.Function) -> Iterator[relax.VarBinding]:
    """Every binding of a function, in order of execution."""
    for block in func.body.blocks:
        yield from block.bindings[:]


def outputs(func: relax.Function) -> tuple[relax.Expr, set[relax.Var]]:
    """What a function returns, and the variables that only name it: they need no copy in a rebuilt function."""
    bound = {b.var: b.value for b in bindings(func)}
    expr, aliases = func.body.body, set()
    while isinstance(expr, relax.Var) and isinstance(bound.get(expr), relax.Var | relax.Tuple):
        aliases.add(expr)
        expr = bound[expr]
    return expr, aliases


def model_nodes(func: relax.Function) -> set[str]:
    """The names of the model's nodes, as the frontend left them on `main` (attribute `hawq.nodes`)."""
    return {str(n) for n in (func.attrs or {}).get("hawq.nodes", [])}


def model_node(layer: str, nodes: Collection[str]) -> str:
    """The node of the model that an intermediate value (`node.acc`) belongs to; other names stay as they are."""
    name = layer
    while name not in nodes and "." in name:
        name = name.rpartition(".")[0]
    return name if name in nodes else layer


def private_functions(module: tvm.IRModule) -> dict[str, relax.Function]:
    """The fused layer functions of a PACKED module by name (everything Relax but `main`)."""
    return {
        gv.name_hint: f
        for gv, f in module.functions_items()
        if isinstance(f, relax.Function) and gv.name_hint != "main"
    }


def called_kernels(module: tvm.IRModule) -> list[str]:
    """The names of the kernels that `main` of a TIR module calls, in order; one may stand for several equal layers."""
    calls = [b.value for b in bindings(module["main"]) if ops.op_name(b.value) == "relax.call_tir"]
    return [call.args[0].name_hint for call in calls]


def input_ranges(func: relax.Function) -> list[tuple[int, int]]:
    """What the integers of every input lie between: its declared range (attribute `hawq.input_ranges`), or that of its
    type in the model (`hawq.input_types`); 0 and 0 for a float.

    Raises ModelError for a type that no integer kernel takes.
    """
    attrs = func.attrs or {}
    if "hawq.input_ranges" in attrs:
        ends = [int(v) for v in attrs["hawq.input_ranges"]]
        return list(zip(ends[::2], ends[1::2], strict=True))
    types = [str(t) for t in attrs["hawq.input_types"]] if "hawq.input_types" in attrs else []
    kinds = [types[i] if i < len(types) else ops.dtype_of(p) for i, p in enumerate(func.params)]
    return [range_of_type(kind, f"input {p.name}") for kind, p in zip(kinds, func.params, strict=True)]


def declared_ranges(func: relax.Function) -> dict[str, tuple[float, float]]:
    """What float inputs saturate at, by name: those whose range the user has declared (attribute
    `hawq.declared_ranges`).
    """
    declared = (func.attrs or {}).get("hawq.declared_ranges", {})
    return {str(name): (float(low), float(high)) for name, (low, high) in declared.items()}


def narrow_inputs(func: relax.Function) -> list[tuple[int, int] | None]:
    """The declared range of every input that takes fewer integers than its type holds, None for the others."""
    if "hawq.input_ranges" not in (func.attrs or {}):
        return [None] * len(func.params)
    of_types = input_ranges(func.without_attr("hawq.input_ranges"))
    return [r if r != t else None for r, t in zip(input_ranges(func), of_types, strict=True)]


def range_of_type(name: str, where: str) -> tuple[int, int]:
    """What an element type can hold; 0 and 0 for a float.

    where: the input or layer, for errors.  Raises ModelError for a type that no integer kernel takes.
    """
    if name.startswith(("float", "bfloat")):
        return 0, 0
    if name == "bool":
        return 0, 1
    if name not in arith.RANGES:
        raise ModelError(
            "has a type that no integer kernel takes",
            where=where,
            expected="int2 to int64, bool or float",
            found=name,
        )
    return arith.RANGES[name]


def is_float(expr: relax.Expr) -> bool:
    """Whether an expression is a float tensor, or a tuple with one inside."""
    fields = getattr(expr.ty, "fields", None)
    types = list(fields) if fields is not None else [expr.ty]
    return any(str(t.dtype).startswith(("float", "bfloat")) for t in types if hasattr(t, "dtype"))


def is_border(binding: relax.VarBinding) -> bool:
    """Whether a binding is one of the operations that join the float and the integer world."""
    return is_border_operator(ops.op_name(binding.value))


def verify(module: tvm.IRModule, stage: Stage) -> None:
    """Check a module against TVM's own grammar and that of `stage`.

    Raises StageError naming the first layer that breaks the latter.
    """
    check_form(module)
    check_grammar(module, stage)


def check_form(module: tvm.IRModule) -> None:
    """Check a module against TVM's own grammar; it takes as long as a pass does."""
    relax.analysis.well_formed(module)


def check_grammar(module: tvm.IRModule, stage: Stage) -> None:
    """Check a module against the grammar of `stage`.

    Raises StageError naming the first layer that breaks it.
    """
    _GRAMMARS[stage](module)


def _fail(binding: relax.VarBinding, stage: Stage, why: str) -> None:
    found = ops.op_name(binding.value) or type(binding.value).__name__
    raise StageError(
        f"breaks the {stage.name} grammar: {why}", where=binding.var.name, found=f"{found} : {binding.var.ty}"
    )


def _verify_annotated(module: tvm.IRModule) -> None:
    for b in bindings(module["main"]):
        name = ops.op_name(b.value)
        if name in OPERATORS and not OPERATORS[name].before_lowering:
            _fail(b, Stage.ANNOTATED, "integer arithmetic before the lowering")


def float_tail(func: relax.Function) -> set[str]:
    """Names of the variables of `func` in its allowed float head or tail (attribute `hawq.float_tail`)."""
    return {str(n) for n in (func.attrs or {}).get("hawq.float_tail", [])}


def _check_integer_function(func: relax.Function, stage: Stage, allow_calls: bool) -> None:
    outside = float_tail(func)
    for b in bindings(func):
        value, name = b.value, ops.op_name(b.value)
        if (
            b.var.name in outside
            or is_border_operator(name)
            or isinstance(value, relax.Var | relax.TupleGetItem | relax.Tuple)
        ):
            continue
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            if not allow_calls:
                _fail(b, stage, "a call of another function")
            continue
        if ops.is_const(value) and not is_float(value):
            continue
        if name not in OPERATORS:
            _fail(b, stage, "not an integer operator")
        if is_float(b.var) or any(is_float(a) for a in value.args if hasattr(a, "ty")):
            _fail(b, stage, "a float tensor inside the integer region")


def _verify_integer(module: tvm.IRModule) -> None:
    _check_integer_function(module["main"], Stage.INTEGER, allow_calls=False)


def _verify_packed(module: tvm.IRModule) -> None:
    _check_integer_function(module["main"], Stage.PACKED, allow_calls=True)
    for func in private_functions(module).values():
        _check_integer_function(func, Stage.PACKED, allow_calls=False)


def _verify_tir(module: tvm.IRModule) -> None:
    outside = float_tail(module["main"])
    for b in bindings(module["main"]):
        name = ops.op_name(b.value)
        if isinstance(b.value, relax.Call) and name != "relax.call_tir" and b.var.name not in outside:
            _fail(b, Stage.TIR, "not a call of a PrimFunc")
    for gv, func in module.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc) and "hawq.rule" not in (func.attrs or {}):
            raise StageError("does not name the rule that scheduled it", where=gv.name_hint)


_GRAMMARS: dict[Stage, Callable[[tvm.IRModule], None]] = {
    Stage.ANNOTATED: _verify_annotated,
    Stage.INTEGER: _verify_integer,
    Stage.PACKED: _verify_packed,
    Stage.TIR: _verify_tir,
}
