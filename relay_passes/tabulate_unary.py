"""Replace a float function of one quantized tensor by a table (A16; ANNOTATED -> ANNOTATED).

For each hawq.quantize, walk back over element-wise operators to their leaves. The region becomes a hawq.lookup when
1. its leaves are scalar constants and exactly one hawq.dequantize of an 8 or 16-bit tensor with one scale, and
2. it is not linear: relu, clip, leakyrelu and arithmetic with constants are left to requantize, which is vectorised
   and proved.
A sum such as x * sigmoid(x), or the pieces of GELU and hard-swish, is one region: its leaf is the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.rewriter import Rebuild, rewrite_main
from hawq_tvm.core.thresholds import round_exactly
from relay_passes.integer.values import rational

Array = np.ndarray[Any, Any]


def _erf(x: Array) -> Array:
    values: Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return values


def _sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


Function = Callable[..., Array]
LINEAR: dict[str, Function] = {
    "relax.add": lambda c, a, b: a + b,
    "relax.subtract": lambda c, a, b: a - b,
    "relax.multiply": lambda c, a, b: a * b,
    "relax.divide": lambda c, a, b: a / b,
    "relax.negative": lambda c, a: -a,
    "relax.abs": lambda c, a: np.abs(a),
    "relax.maximum": lambda c, a, b: np.maximum(a, b),
    "relax.minimum": lambda c, a, b: np.minimum(a, b),
    "relax.nn.relu": lambda c, a: np.maximum(a, 0),
    "relax.clip": lambda c, a, low, high: np.clip(a, low, high),
    "relax.nn.leakyrelu": lambda c, a: np.where(
        a >= 0, a, a * (Fraction if a.dtype == object else float)(float(c.attrs.alpha))
    ),
}
NONLINEAR: dict[str, Function] = {
    "relax.sigmoid": lambda c, a: _sigmoid(a),
    "relax.erf": lambda c, a: _erf(a),
    "relax.rsqrt": lambda c, a: 1 / np.sqrt(a),
    "relax.square": lambda c, a: a * a,
    "relax.round": lambda c, a: np.rint(a),
    "relax.power": lambda c, a, b: np.power(a, b),
    "relax.nn.silu": lambda c, a: a * _sigmoid(a),
    "relax.nn.gelu": lambda c, a: 0.5 * a * (1 + _erf(a / math.sqrt(2))),
    "relax.nn.gelu_tanh": lambda c, a: 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "relax.nn.softplus": lambda c, a: np.logaddexp(0, a * float(c.attrs.beta)) / float(c.attrs.beta),
    **{
        f"relax.{f.__name__}": (lambda c, a, f=f: f(a))
        for f in (np.tanh, np.exp, np.log, np.sqrt, np.floor, np.ceil, np.sin, np.cos)
    },
}
ELEMENTWISE = LINEAR | NONLINEAR
# Functions whose values for fractions are fractions: what they give can lie on a tie, where float64 falls to either
# side.
RATIONAL = frozenset(LINEAR) | {"relax.square"}


class _Region:
    """The element-wise operators behind one quantize, and the leaf they hang on."""

    def __init__(self, values: dict[relax.Var, relax.Expr], places: dict[relax.Var, int]) -> None:
        self.values, self.places, self.leaf = values, places, None
        self.nonlinear, self.rational = False, True
        self.inside: set[relax.Var] = set()
        self.products = 0

    def collect(self, root: relax.Var) -> bool:
        """Whether everything behind `root` is element-wise on one leaf; remembers that leaf, and what lies between."""
        waiting = [root]
        while waiting:
            var = waiting.pop()
            if var in self.inside:
                continue
            self.inside.add(var)
            call = self.values.get(var, var)
            name = ops.op_name(call)
            if name in ELEMENTWISE:
                self.rational &= name in RATIONAL
                depends = [a for a in call.args if isinstance(a, relax.Var)]
                # A product (or quotient) of two functions of the tensor is not linear in it.
                product = name == "relax.square" or (name in ("relax.multiply", "relax.divide") and len(depends) == 2)
                self.products += product
                self.nonlinear |= (
                    product or name in NONLINEAR or (name == "relax.divide" and isinstance(call.args[1], relax.Var))
                )
                waiting += depends
                if not all(isinstance(a, relax.Var) or _is_scalar(a) for a in call.args):
                    return False
            elif not (self._leaf(call) if name == "hawq.dequantize" else ops.is_const(call) and _is_scalar(call)):
                return False
        # Every product can double the digits of a fraction: beyond these, exact values would take hours.
        self.rational &= self.products <= 6 and len(self.inside) <= 256
        return True

    def _leaf(self, call: relax.Call) -> bool:
        data = call.args[0]
        one_scale = all(ops.const_value(a).size == 1 for a in call.args[1:])
        narrow = ops.dtype_of(data) in ("int8", "uint8", "int16", "uint16")
        if ops.is_const(data) or (self.values.get(data) is not None and ops.is_const(self.values[data])):
            return False
        if not one_scale or not narrow:
            return False
        if self.leaf is None:
            self.leaf = call
        return self._same_leaf(call)

    def _same_leaf(self, call: relax.Call) -> bool:
        """Two dequantizes of one tensor with one scale are the same leaf."""
        assert self.leaf is not None
        return call.args[0].same_as(self.leaf.args[0]) and all(
            np.array_equal(ops.const_value(a), ops.const_value(b))
            for a, b in zip(call.args[1:], self.leaf.args[1:], strict=True)
        )

    def evaluate(self, root: relax.Var, x: Array) -> Array:
        """The region's value for every level of the leaf, in float64, or in Fractions where x is of these."""
        order = sorted(self.inside, key=self.places.__getitem__)
        last = {a: var for var in order for a in ops.variables(self.values[var])}
        known: dict[relax.Var, Array] = {}
        for var in order:
            call = self.values[var]
            if ops.op_name(call) == "hawq.dequantize":
                known[var] = x
            elif ops.is_const(call):
                known[var] = _scalar(call, x)
            else:
                known[var] = ELEMENTWISE[ops.op_name(call)](
                    call, *(known[a] if isinstance(a, relax.Var) else _scalar(a, x) for a in call.args)
                )
                for a in {a for a in call.args if isinstance(a, relax.Var) and last[a].same_as(var)}:
                    del known[a]
        return known[root]


def _is_scalar(expr: relax.Expr) -> bool:
    return ops.const_value(expr).size == 1 if ops.is_const(expr) else hasattr(expr, "value")


def _scalar(expr: relax.Expr, like: Array) -> Array:
    value = float(ops.const_value(expr).reshape(-1)[0] if ops.is_const(expr) else expr.value)
    return np.asarray(Fraction(value) if like.dtype == object and math.isfinite(value) else value, like.dtype)


def tabulate_unary(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with every non-linear unary region turned into a table.

    Raises ModelError when a table entry would be NaN, naming the layer.
    """
    values = {b.var: b.value for b in stages.bindings(module["main"])}
    places = {var: i for i, var in enumerate(values)}
    count = 0

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        call = binding.value
        if ops.op_name(call) != "hawq.quantize" or not isinstance(call.args[0], relax.Var):
            return None
        if any(ops.const_value(a).size != 1 for a in call.args[1:]):
            return None
        region = _Region(values, places)
        if not region.collect(call.args[0]) or not region.nonlinear or region.leaf is None:
            return None
        if ops.shape_of(call) != ops.shape_of(region.leaf):
            return None
        count += 1
        return ops.lookup(rebuild.map(region.leaf.args[0]), _table(region, call, binding.var.name))

    return rewrite_main(module, visit), count


def _table(region: _Region, call: relax.Call, layer: str) -> Array:
    """(A16)"""
    leaf = region.leaf
    assert leaf is not None
    low, high = arith.RANGES[ops.dtype_of(leaf.args[0])]
    scale, zero = (ops.const_value(a).astype(np.float64).reshape(-1)[0] for a in leaf.args[1:])
    levels = np.arange(low, high + 1)
    # Levels outside the declared range cannot occur; their entries repeat the nearest that can.
    reachable = np.clip(levels, int(leaf.attrs["qmin"]), int(leaf.attrs["qmax"]))
    with np.errstate(all="ignore"):
        real = np.broadcast_to(region.evaluate(call.args[0], (reachable - zero) * scale), levels.shape)
    if np.any(np.isnan(real)):
        at = float(((reachable - zero) * scale)[np.isnan(real)][0])
        raise ModelError(
            "its function is not a number for some quantized inputs",
            where=layer,
            found=f"NaN at x = {at:g}",
            remedy="clip the input to where the function is defined",
        )
    out_scale, out_zero = (ops.const_value(a).astype(np.float64).reshape(-1)[0] for a in call.args[1:])
    attrs = call.attrs
    steps = np.clip(
        real * (1 / out_scale) if str(attrs["form"]) == "reciprocal" else real / out_scale, -(2.0**40), 2.0**40
    )
    inside = out_zero if str(attrs["form"]) == "affine" else 0.0
    rounding = str(attrs["rounding"])
    rounded = arith.round_real(steps + inside, rounding) + out_zero - inside
    twice = 2 * (steps + inside)
    unsure = (np.abs(twice - np.rint(twice)) < 1e-9 * (np.abs(twice) + 1)) & (np.abs(steps) < 2.0**30) & region.rational
    # Functions that are not rational know nothing of Fractions, not even of none.
    with suppress(ZeroDivisionError):  # 1 / 0 is infinite in float64, and no fraction
        if unsure.any():
            exact = rational((reachable - zero)[unsure]) * Fraction(scale)
            values = np.broadcast_to(region.evaluate(call.args[0], exact), exact.shape)
            steps_of = [v / Fraction(out_scale) + int(inside) for v in values.tolist()]
            rounded[unsure] = [round_exactly(v, rounding) + out_zero - inside for v in steps_of]
    return np.clip(rounded, int(attrs["qmin"]), int(attrs["qmax"])).astype(str(attrs["out_dtype"]))
