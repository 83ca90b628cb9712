"""What the integers of an input must lie between, because of what reads them (ANNOTATED -> ANNOTATED).

An input of integers that are positions (Gather, an embedding) takes those that the axis has, from its end too where
ONNX counts so; one that is a mask, (1 - mask) C with a constant C of -20 or less, quantized or not, takes 0 and 1. The
attribute `hawq.input_ranges` of `main` holds two numbers for each input; a run refuses others.

What a float input saturates at only a user can declare (`with_declared_ranges`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite, prod

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.operators import Kind, kind_of

# A factor of a mask that shuts a score out of a softmax: exp(-20) is less than half a unit of any 16-bit result.
SHUTS_OUT = 20.0
# Magnitudes of a declared range: the grid's scale is a float32 number (A26b).
LEAST, MOST = 2.0**-64, 2.0**64
Ranges = Mapping[str, tuple[float, float]]


def with_declared_ranges(main: relax.Function, ranges: Ranges) -> relax.Function:
    """`main` with the attribute `hawq.declared_ranges`: what float inputs saturate at, (least, greatest) by name, each
    rounded to the input's type.

    Raises UsageError for a range that is empty or not finite, or beyond MOST, and for a name that is no float input's.
    """
    params = {p.name: p for p in main.params}
    floats = [name for name, p in params.items() if stages.is_float(p)]
    declared: dict[str, list[float]] = {}
    for name, given in ranges.items():
        where, found = f"--range {name}", ":".join(f"{float(end):g}" for end in given)
        if name not in params:
            raise UsageError(
                "is not an input of the model", where=where, expected=", ".join(params) or "no inputs", found=name
            )
        kind = ops.dtype_of(params[name])
        if name not in floats:
            raise UsageError(
                "is an input of integers, whose range its type and its readers tell",
                where=where,
                expected=f"a float input: {', '.join(floats) or 'there is none'}",
                found=kind,
                remedy=f"leave out --range {name}",
            )
        low, high = (float(np.asarray(end).astype(kind)) for end in given)
        if not (isfinite(low) and isfinite(high) and low < high and LEAST <= max(-low, high) <= MOST):
            raise UsageError(
                "is no range that an input can saturate at",
                where=where,
                expected=f"LOW:HIGH with LOW below HIGH, both finite {kind} numbers of {LEAST:g} to {MOST:g}",
                found=found,
            )
        declared[name] = [low, high]
    return main.with_attr("hawq.declared_ranges", declared)


class _Graph:
    """Who reads every variable of `main`, and what its constants are."""

    def __init__(self, main: relax.Function) -> None:
        self.values = {b.var: b.value for b in stages.bindings(main)}
        self.readers: dict[relax.Var, list[relax.VarBinding]] = {}
        for b in stages.bindings(main):
            for v in dict.fromkeys(ops.variables(b.value)):
                self.readers.setdefault(v, []).append(b)

    def number(self, expr: relax.Expr) -> float | None:
        """The only number of a constant, quantized or not."""
        value = self.values.get(expr, expr) if isinstance(expr, relax.Var) else expr
        if ops.op_name(value) == "hawq.dequantize":
            data, scale, zero = (self.number(a) for a in value.args)
            return None if data is None or scale is None or zero is None else (data - zero) * scale
        if not ops.is_const(value) or ops.const_value(value).size != 1:
            return None
        return float(ops.const_value(value).reshape(-1)[0])


def declare_ranges(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with the ranges of its integer inputs, and how many of them are narrower than their type."""
    main = module["main"]
    graph = _Graph(main)
    ranges: list[int] = []
    narrowed = 0
    for p, (low, high) in zip(main.params, stages.input_ranges(main), strict=True):
        whole = (low, high)
        for least, most in () if stages.is_float(p) else _wanted(p, graph):
            low, high = max(low, least), min(high, most)
        narrowed += (low, high) != whole
        ranges += [low, high]
    if not narrowed:
        return module, 0
    return tvm.IRModule({"main": main.with_attr("hawq.input_ranges", ranges)}), narrowed


def _wanted(var: relax.Var, graph: _Graph) -> Iterator[tuple[int, int]]:
    """The ranges that the readers of an integer tensor ask for, through what only moves or casts it."""
    waiting = [var]
    while waiting:
        read = waiting.pop()
        for b in graph.readers.get(read, []):
            call, name = b.value, ops.op_name(b.value)
            if name == "relax.take" and call.args[1].same_as(read):
                shape, axis = ops.shape_of(call.args[0]), call.attrs.axis
                size = prod(shape) if axis is None else shape[int(axis)]
                # Of a fast one no id counts from the end.
                yield -size if call.attrs.mode == "wrap" else 0, size - 1
            elif name == "relax.astype" and stages.is_float(b.var):
                if _is_mask(b.var, graph):
                    yield 0, 1
            elif (name == "relax.astype" and _holds(b.var)) or (
                kind_of(name) is Kind.MOVEMENT and not isinstance(call.args[0], relax.Tuple)
            ):
                waiting.append(b.var)


def _holds(var: relax.Var) -> bool:
    """Whether a cast leaves integers that are positions as they are."""
    return ops.dtype_of(var) in ("int16", "int32", "int64", "uint16", "uint32")


def _is_mask(var: relax.Var, graph: _Graph) -> bool:
    """Whether every reader of a tensor takes it from 1 and multiplies the rest with a large negative number."""
    waiting = [(var, False)]
    while waiting:
        read, inverted = waiting.pop()
        if read not in graph.readers:
            return False
        for b in graph.readers[read]:
            name = ops.op_name(b.value)
            if not isinstance(b.value, relax.Call):
                return False
            other = next((graph.number(a) for a in b.value.args if not a.same_as(read)), None)
            if kind_of(name) is Kind.MOVEMENT or name in ("hawq.quantize", "hawq.dequantize"):
                waiting.append((b.var, inverted))
            elif name == "relax.subtract" and not inverted and b.value.args[1].same_as(read) and _is_one(other):
                waiting.append((b.var, True))
            elif not (name == "relax.multiply" and inverted and other is not None and other <= -SHUTS_OUT):
                return False
    return True


def _is_one(number: float | None) -> bool:
    return number is not None and abs(number - 1) < 2**-7  # a quantizer of 8 bits has rounded it
