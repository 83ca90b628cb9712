"""Constants that programs make, and truth values of integers: what masks are written with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.frontend.common.elementwise import check_broadcast
from hawq_tvm.frontend.common.values import FLOAT_KINDS, Array, Constant, Result

from .node import Node, expression, handles

# The elements of one constant that an import makes.
LIMIT = 1 << 24
KINDS = ("float32", "bool", "int8", "uint8", "int16", "int32", "int64")


@handles(
    *(f"aten.{n}" for n in ("full", "zeros", "ones")),
    *(f"aten.{n}_like" for n in ("full", "zeros", "ones")),
    *(f"aten.new_{n}" for n in ("full", "zeros", "ones")),
)
def full(node: Node) -> Constant:
    """A constant of one number, in the given type or in that of what it is like."""
    name = node.op.removeprefix("aten.")
    value = _finite_or_infinite(node, "fill_value") if "full" in name else int("ones" in name)
    like = name.endswith("_like") or name.startswith("new_")
    shape = node.shape() if name.endswith("_like") else tuple(node.integers("size"))
    plain = "bool" if isinstance(value, bool) else "int64" if isinstance(value, int) and "full" in name else "float32"
    kind = node.arguments.get("dtype") or (node.value(0).kind if like else plain)
    return Constant(np.full(_checked(node, shape, kind), value, kind))


def _finite_or_infinite(node: Node, name: str) -> float:
    value = node.arguments.get(name)
    if not isinstance(value, int | float) or math.isnan(value):
        raise node.fail(f"has a {name} that is no number", expected="a number", found=value)
    return value


def _checked(node: Node, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    node.need(kind in KINDS, "makes a constant of a type that is not supported", expected=", ".join(KINDS), found=kind)
    node.need(math.prod(shape) <= LIMIT, "makes a very large constant", expected=f"at most {LIMIT}", found=list(shape))
    return shape


@handles("aten.arange")
def arange(node: Node) -> Constant:
    """Every step-th number from start to end, without the end."""
    start, step, end = node.number("start", 0), node.number("step", 1), node.number("end")
    node.need(step != 0, "takes no step", expected="a step other than 0")
    whole = all(isinstance(v, int) for v in (start, step, end))
    kind = node.arguments.get("dtype") or ("int64" if whole else "float32")
    count = max(0, math.ceil((end - start) / step))
    return Constant((start + step * np.arange(*_checked(node, (count,), kind))).astype(kind))


@handles("aten.tril", "aten.triu")
def triangle(node: Node) -> Constant:
    """A constant with zeros above or below a diagonal."""
    array = node.constant(0, "matrix")
    return Constant((np.tril if node.op == "aten.tril" else np.triu)(array, node.integer("diagonal", 0)))


TRUTHS: dict[str, tuple[Callable[..., Array], Callable[..., relax.Expr]]] = {
    "gt": (np.greater, relax.op.greater),
    "ge": (np.greater_equal, relax.op.greater_equal),
    "lt": (np.less, relax.op.less),
    "le": (np.less_equal, relax.op.less_equal),
    "eq": (np.equal, relax.op.equal),
    "ne": (np.not_equal, relax.op.not_equal),
    **{
        form.format(n): (getattr(np, f"logical_{n}"), getattr(relax.op, f"logical_{n}"))
        for form in ("logical_{}", "bitwise_{}", "__{}__")
        for n in ("and", "or", "xor", "not")
        if form.format(n) != "__not__"
    },
}


@handles(*(f"aten.{n}" for n in TRUTHS))
def truth(node: Node) -> Result:
    """Truth values of integers, or of truth values; real numbers are compared where they are constant."""
    name = node.op.removeprefix("aten.")
    known, at_run_time = TRUTHS[name]
    kinds = [v.kind for v in node.inputs if v is not None]
    node.need(
        not name.startswith(("bitwise", "__")) or set(kinds) == {"bool"},
        "works on bits",
        expected="truth values",
        found=kinds,
    )
    check_broadcast(node, *(v for v in node.inputs if v is not None))
    given = [node.arguments[n] for n in ("self", "other") if n in node.arguments]
    if all(isinstance(v, int | float | Constant) for v in given):
        return Constant(np.asarray(known(*(v.array if isinstance(v, Constant) else v for v in given))))
    operands = [
        Constant(np.asarray(v, kinds[0])) if isinstance(v, int) and kinds[0] not in (*FLOAT_KINDS, "bool") else v
        for v in given
    ]
    numbers: list[Any] = [v if isinstance(v, int | float) else v.kind for v in operands]
    node.need(
        all(isinstance(n, str) and n not in FLOAT_KINDS for n in numbers) and len(set(numbers)) == 1,
        "compares real numbers, or different types, at run time",
        expected="integers of one type, or truth values",
        found=", ".join(map(str, numbers)),
        remedy="compare the integers that the numbers are made of",
    )
    return at_run_time(*map(expression, operands))
