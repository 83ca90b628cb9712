"""What a tile is measured for: a layer's structure, without its name and the values of its constants, on a target."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import tvm
from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.targets.gpu import architectures, is_cuda
from hawq_tvm.targets.target import describe

from .layer import Layer
from .rule import Modelled, Tiled

# Attributes that are values, as constants are: layers that differ in them alone run equally fast.
VALUES = frozenset(
    {"zero_point", "qmin", "qmax", "fill", "pad_value", "multiplier", "shift", "epsilon", "thresholds", "differing"}
)
# The fields of a CPU's tiles that are searched; the others say how a rule multiplies, which may depend on the weights'
# values.
SEARCHED = frozenset({"lines", "columns", "pixels", "vectors", "rows", "halves", "inside", "form", "stores"})


def structure(layer: Layer) -> str:
    """The parameters' types, then one line per binding: operator, operands, attributes and type."""
    names = {p: f"p{i}" for i, p in enumerate(layer.func.params)}
    lines = [f"{name}: {_type(p)}" for p, name in names.items()]

    def operand(expr: Any) -> str:
        if isinstance(expr, relax.Var):
            return names[expr]
        if isinstance(expr, relax.Tuple):
            return f"({', '.join(operand(f) for f in expr.fields)})"
        if isinstance(expr, relax.TupleGetItem):
            return f"{operand(expr.tuple_value)}[{expr.index}]"
        return f"const {_type(expr)}" if ops.is_const(expr) else type(expr).__name__

    for i, b in enumerate(layer.bindings):
        names[b.var] = f"v{i}"
        if isinstance(b.value, relax.Call):
            right = (
                f"{ops.op_name(b.value)}({', '.join(operand(a) for a in b.value.args)}) {_attributes(b.value.attrs)}"
            )
        else:
            right = operand(b.value)
        lines.append(f"v{i} = {right}: {_type(b.var)}")
    return "\n".join(lines)


def _type(expr: relax.Expr) -> str:
    if isinstance(expr.ty, relax.TupleType):
        return f"({', '.join(_tensor(t) for t in expr.ty.fields)})"
    return _tensor(expr.ty)


def _tensor(ty: Any) -> str:
    return f"{ty.dtype}[{', '.join(str(int(d)) for d in ty.shape.values)}]"


def _attributes(attrs: Any) -> str:
    if attrs is None:
        return "{}"
    if isinstance(attrs, tvm.ir.attrs.DictAttrs):
        found = {str(k): attrs[k] for k in attrs.keys()}  # noqa: SIM118  (no iteration of its own)
    else:
        found = {f.name: getattr(attrs, f.name) for f in type(attrs).__tvm_ffi_type_info__.fields}
    return "{" + ", ".join(f"{k}: {v}" for k, v in sorted(found.items()) if k not in VALUES) + "}"


def target_text(target: tvm.target.Target) -> str:
    """A target in one line: everything that decides which instructions a kernel may use."""
    if is_cuda(target):
        return f"cuda -arch={','.join(architectures(target))}"  # the CPU only launches
    fields = describe(target)
    options = [f"-{k}={','.join(v) if isinstance(v, list) else v}" for k, v in sorted(fields.items()) if k != "kind"]
    return " ".join([fields["kind"], *options])


def keys(rule: Tiled, layer: Layer, target: tvm.target.Target) -> dict[str, str]:
    """The key of a layer's workload by class of threads, "many" and "one"; they are equal where no tile divides tasks.

    On a GPU every field of a tile is searched.
    """
    first = asdict(rule.tiles(layer, target)[0]) if not is_cuda(target) else {}  # type: ignore[call-overload]
    fixed = {name: value for name, value in first.items() if name not in SEARCHED}
    if isinstance(rule, Modelled):
        fixed["form"] = rule.form(layer)
    digest = hashlib.sha256(f"{structure(layer)}\n{fixed}".encode()).hexdigest()[:20]
    base, divides = f"{rule.name} {digest} {target_text(target)}", "rows" in first
    return {c: f"{base} {c}" if divides else base for c in ("many", "one")}


def threads_class(threads: int) -> str:
    """The class of a number of threads: with several, a task must be small enough that everybody has work."""
    return "one" if threads == 1 else "many"
