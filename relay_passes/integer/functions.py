"""Element-wise functions of one float tensor: which tensor each one hangs on, their values, and bounds of their values.

A tensor's leaf is the deepest one of which it is an element-wise function with scalar constants alone. x sigmoid(x),
the pieces of GELU and of hard-swish are one function of x; a bias by channel ends it: the biased sum is the leaf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from tvm import relax

from hawq_tvm.core import ops, stages

Array = np.ndarray[Any, Any]
Bounds = tuple[Array, Array]


def erf(x: Array) -> Array:
    values: Array = np.vectorize(math.erf, otypes=[np.float64])(x)
    return values


def sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def _softplus(c: relax.Call, a: Array) -> Array:
    return np.logaddexp(0, a * float(c.attrs.beta)) / float(c.attrs.beta)


def _cubic(a: Array) -> Array:
    """What the tanh of GELU's approximation is taken of."""
    return math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)


Evaluate = Callable[..., Array]
LINEAR: dict[str, Evaluate] = {
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
NONLINEAR: dict[str, Evaluate] = {
    "relax.sigmoid": lambda c, a: sigmoid(a),
    "relax.erf": lambda c, a: erf(a),
    "relax.rsqrt": lambda c, a: 1 / np.sqrt(a),
    "relax.square": lambda c, a: a * a,
    "relax.round": lambda c, a: np.rint(a),
    "relax.power": lambda c, a, b: np.power(a, b),
    "relax.nn.silu": lambda c, a: a * sigmoid(a),
    "relax.nn.gelu": lambda c, a: 0.5 * a * (1 + erf(a / math.sqrt(2))),
    "relax.nn.gelu_tanh": lambda c, a: 0.5 * a * (1 + np.tanh(_cubic(a))),
    "relax.nn.softplus": _softplus,
    **{
        f"relax.{f.__name__}": (lambda c, a, f=f: f(a))
        for f in (np.tanh, np.exp, np.log, np.sqrt, np.floor, np.ceil, np.sin, np.cos)
    },
}
ELEMENTWISE = LINEAR | NONLINEAR
# Functions whose values for fractions are fractions: what they give can lie on a tie, where float64 falls to either
# side.
RATIONAL = frozenset(LINEAR) | {"relax.square"}
# Functions that never fall: their bounds are their values at both ends.
RISING = frozenset(
    f"relax.{name}"
    for name in (
        "sigmoid",
        "erf",
        "round",
        "nn.softplus",
        "nn.relu",
        "clip",
        "add",
        "maximum",
        "minimum",
        "tanh",
        "exp",
        "log",
        "sqrt",
        "floor",
        "ceil",
    )
)


# -- bounds of values ------------------------------------------------------------------------------


def hull(*values: Array) -> Bounds:
    """The least and the greatest of some values; 0 times infinity counts as 0."""
    known = [np.where(np.isnan(v), 0.0, v) for v in values]
    low = high = known[0]
    for v in known[1:]:
        low, high = np.minimum(low, v), np.maximum(high, v)
    return low, high


def _times(a: Bounds, b: Bounds) -> Bounds:
    return hull(*(x * y for x in a for y in b))


def _over(a: Bounds, b: Bounds) -> Bounds:
    low, high = hull(*(x / y for x in a for y in b))
    open_ = (b[0] <= 0) & (b[1] >= 0)
    return np.where(open_, -np.inf, low), np.where(open_, np.inf, high)


def _magnitude(a: Bounds) -> Bounds:
    low, high = hull(np.abs(a[0]), np.abs(a[1]))
    return np.where((a[0] <= 0) & (a[1] >= 0), 0.0, low), high


def _power(call: relax.Call, a: Bounds, b: Bounds) -> Bounds:
    if np.array_equal(b[0], b[1]) and b[0].size == 1:
        exponent = float(b[0])
        if exponent < 0:
            return _over((np.ones(()), np.ones(())), _power(call, a, (-b[0], -b[1])))
        return hull(*(np.power(x, exponent) for x in (_magnitude(a) if exponent % 2 == 0 else a)))
    if np.array_equal(a[0], a[1]) and a[0].size == 1 and float(a[0]) > 0:
        return hull(*(np.power(a[0], x) for x in b))
    return np.full(np.shape(b[0]), -np.inf), np.full(np.shape(b[0]), np.inf)


def _wave(function: Callable[[Array], Array], crest: float) -> Callable[..., Bounds]:
    """Bounds of a sine or cosine, whose greatest value lies at `crest` and its least half a turn from it."""

    def bounds(call: relax.Call, a: Bounds) -> Bounds:
        low, high = hull(function(a[0]), function(a[1]))

        def passes(top: float) -> Array:
            return np.floor((a[1] - top) / (2 * np.pi) + 1e-9) > np.floor((a[0] - top) / (2 * np.pi) - 1e-9)

        return np.where(passes(crest + np.pi), -1.0, low), np.where(passes(crest), 1.0, high)

    return bounds


def _gated(gate: Callable[[Array], Array]) -> Callable[..., Bounds]:
    """Bounds of x times a rising function of x."""
    return lambda call, a: _times(a, (gate(a[0]), gate(a[1])))


BOUNDS: dict[str, Callable[..., Bounds]] = {
    "relax.subtract": lambda c, a, b: (a[0] - b[1], a[1] - b[0]),
    "relax.multiply": lambda c, a, b: _times(a, b),
    "relax.divide": lambda c, a, b: _over(a, b),
    "relax.negative": lambda c, a: (-a[1], -a[0]),
    "relax.abs": lambda c, a: _magnitude(a),
    "relax.nn.leakyrelu": lambda c, a: hull(*(LINEAR["relax.nn.leakyrelu"](c, x) for x in (*a, np.clip(0.0, *a)))),
    "relax.square": lambda c, a: tuple(x * x for x in _magnitude(a)),  # type: ignore[dict-item, return-value]
    "relax.rsqrt": lambda c, a: (1 / np.sqrt(a[1]), 1 / np.sqrt(a[0])),
    "relax.power": _power,
    "relax.sin": _wave(np.sin, np.pi / 2),
    "relax.cos": _wave(np.cos, 0.0),
    "relax.nn.silu": _gated(sigmoid),
    "relax.nn.gelu": _gated(lambda x: 0.5 * (1 + erf(x / math.sqrt(2)))),
    "relax.nn.gelu_tanh": _gated(lambda x: 0.5 * (1 + np.tanh(_cubic(x)))),
}


def bounds_of(call: relax.Call, name: str, args: list[Bounds]) -> Bounds:
    """Bounds of a call's value, a little too wide: a library function errs in its last bits."""
    if name in RISING:
        low, high = (ELEMENTWISE[name](call, *(a[end] for a in args)) for end in (0, 1))
    else:
        low, high = BOUNDS[name](call, *args)
    unknown = np.isnan(low) | np.isnan(high)
    low, high = np.where(unknown, -np.inf, low), np.where(unknown, np.inf, high)
    # What a cancellation leaves is wrong by the last bits of what it was taken from: 0.5 (1 + erf(x)) by those of 1.
    units = 2.0**-52 if name in ("relax.nn.gelu", "relax.nn.gelu_tanh") else 0.0
    most = np.max([np.max(np.abs(a)) for a in args[0]]) if units else 0.0

    def room(x: Array) -> Array:
        return np.where(np.isfinite(x), np.abs(x) * 2.0**-49 + units * most + 2.0**-1060, 0.0)

    return low - room(low), high + room(high)


# -- functions and where they are ------------------------------------------------------------------


class Stage(Protocol):
    """One of the functions that a Function applies one after the other."""

    @property
    def rational(self) -> bool: ...

    def evaluate(self, x: Array) -> Array: ...

    def bounds(self, x: Bounds) -> Bounds: ...


@dataclass(frozen=True)
class Clip:
    """min(max(x, low), high)."""

    low: Fraction | float
    high: Fraction | float
    rational: bool = True

    def evaluate(self, x: Array) -> Array:
        """The clipped values; in float64, or in Fractions where x is of these."""
        kind = (lambda v: v) if x.dtype == object else float
        return np.asarray(np.minimum(np.maximum(x, kind(self.low)), kind(self.high)))

    def bounds(self, x: Bounds) -> Bounds:
        """Bounds of the clipped values."""
        return self.evaluate(x[0]), self.evaluate(x[1])


class Region:
    """The element-wise operators between a tensor and its leaf."""

    def __init__(self, graph: Functions, root: relax.Var) -> None:
        self.graph, self.root, self.leaf = graph, root, graph.leaves[root]

    @cached_property
    def order(self) -> list[relax.Var]:
        """The results of its operators, each after what it reads."""
        inside, waiting = {self.root}, [self.root]
        while waiting:
            var = waiting.pop()
            for a in ops.variables(self.graph.values[var]):
                if a not in inside and a not in self.graph.constants and not self._is_leaf(a):
                    inside.add(a)
                    waiting.append(a)
        return sorted(inside, key=self.graph.places.__getitem__)

    def _is_leaf(self, var: relax.Var) -> bool:
        return bool(self.graph.same.get(var, var).same_as(self.leaf))

    @cached_property
    def rational(self) -> bool:
        """Whether it gives fractions for fractions, of not too many digits: every product can double them."""
        calls = [self.graph.values[v] for v in self.order]
        products = sum(_is_product(c) for c in calls)
        return all(ops.op_name(c) in RATIONAL for c in calls) and products <= 6 and len(calls) <= 256

    def evaluate(self, x: Array) -> Array:
        """The values for x, in float64, or in Fractions where x is of these."""

        def constant(value: float) -> Array:
            return np.asarray(Fraction(value) if x.dtype == object and math.isfinite(value) else value, x.dtype)

        values: Array = self.walk(x, constant, lambda call, name, args: ELEMENTWISE[name](call, *args))
        return values

    def bounds(self, x: Bounds) -> Bounds:
        """Bounds of the values over every interval of `x`, which hold in spite of float64's roundings."""

        def constant(value: float) -> Bounds:
            return np.asarray(value, np.float64), np.asarray(value, np.float64)

        ends: Bounds = self.walk(x, constant, bounds_of)
        return ends

    def walk(self, x: Any, constant: Callable[[float], Any], apply: Callable[..., Any]) -> Any:
        """What `apply` makes of every call and its arguments, for `x` at the leaf and `constant` of every number."""
        last = {a: var for var in self.order for a in ops.variables(self.graph.values[var])}
        known: dict[relax.Var, Any] = {}

        def read(a: relax.Expr) -> Any:
            if not isinstance(a, relax.Var):
                return constant(scalar(a))
            if a in self.graph.constants:
                return constant(self.graph.constants[a])
            return x if self._is_leaf(a) else known[a]

        for var in self.order:
            call = self.graph.values[var]
            known[var] = apply(call, ops.op_name(call), [read(a) for a in call.args])
            for a in {a for a in ops.variables(call) if last[a].same_as(var)}:
                known.pop(a, None)
        return known[self.root]


@dataclass(frozen=True, eq=False)
class Function:
    """A function of one real number: stages, one after the other."""

    stages: tuple[Stage, ...]

    @property
    def rational(self) -> bool:
        """Whether every stage gives fractions for fractions."""
        return all(s.rational for s in self.stages)

    def then(self, *stages: Stage) -> Function:
        """This function, then others."""
        return Function((*self.stages, *stages))

    def __call__(self, x: Array) -> Array:
        """The values for x: float64, or Fractions in an object array if it is rational."""
        with np.errstate(all="ignore"):
            for s in self.stages:
                x = np.broadcast_to(s.evaluate(x), x.shape)
        return x

    def bounds(self, low: Array, high: Array) -> Bounds:
        """Bounds of the values over every interval low .. high."""
        x, shape = (low, high), low.shape
        with np.errstate(all="ignore"):
            for s in self.stages:
                x = s.bounds(x)
        return np.broadcast_to(x[0], shape), np.broadcast_to(x[1], shape)


class Functions:
    """Every tensor of `main` that is a non-linear function of its leaf.

    What is linear or clipped alone needs no table: requantize computes it, and proves it.
    own: tells the functions that have an arithmetic of their own; what is computed of one of these hangs on it.
    """

    def __init__(self, main: relax.Function, own: Callable[[Region], bool] = lambda _: False) -> None:
        self.values: dict[relax.Var, relax.Expr] = {b.var: b.value for b in stages.bindings(main)}
        self.places = {var: i for i, var in enumerate(self.values)}
        self.constants: dict[relax.Var, float] = {}
        self.leaves: dict[relax.Var, relax.Var] = {}
        self.same: dict[relax.Var, relax.Var] = {}
        self._bent: set[relax.Var] = set()
        self._own, self.owned = own, dict[relax.Var, Region]()
        first: dict[Any, relax.Var] = {}
        for var, value in self.values.items():
            constant = self._constant(value)
            if constant is not None:
                self.constants[var] = constant
                continue
            if ops.op_name(value) == "hawq.dequantize" and isinstance(value.args[0], relax.Var):
                # Two dequantizes of one tensor with one scale are the same leaf.
                key = (value.args[0], *(ops.const_value(a).tobytes() for a in value.args[1:]))
                self.same[var] = first.setdefault(key, var)
            self._place(var, value)

    def of(self, var: relax.Var) -> Region | None:
        """The function that `var` is of its leaf; None where it is linear, or no function of one tensor."""
        return Region(self, var) if var in self._bent else None

    def _constant(self, value: relax.Expr) -> float | None:
        if ops.is_const(value):
            return scalar(value) if is_scalar(value) and stages.is_float(value) else None
        if ops.op_name(value) == "hawq.dequantize" and ops.is_const(value.args[0]):
            data, scale, zero = (ops.const_value(a) for a in value.args)
            if data.size == scale.size == zero.size == 1:
                return float((data.astype(np.float64) - zero).item() * scale.item())
        return None

    def _place(self, var: relax.Var, value: relax.Expr) -> None:
        self.leaves[var] = self.same.get(var, var)
        if ops.op_name(value) not in ELEMENTWISE or not isinstance(var.ty, relax.TensorType):
            return
        read = {a for a in ops.variables(value) if a not in self.constants}
        found = {self.leaves.get(a, a) for a in read}
        scalars = all(isinstance(a, relax.Var) or is_scalar(a) for a in value.args)
        if len(found) != 1 or not scalars or ops.shape_of(var) != ops.shape_of(*found):
            return
        (self.leaves[var],) = found
        by_tensor = ops.op_name(value) == "relax.divide" and value.args[1] in read
        product = _is_product(value) and len([a for a in value.args if a in read]) == len(value.args)
        if ops.op_name(value) in NONLINEAR or by_tensor or product or read & self._bent:
            self._bent.add(var)
            region = Region(self, var)
            if self._own(region):
                self.owned[var], self.leaves[var] = region, var
                self._bent.discard(var)


def _is_product(call: relax.Call) -> bool:
    name = ops.op_name(call)
    return name == "relax.square" or (
        name in ("relax.multiply", "relax.divide") and all(isinstance(a, relax.Var) for a in call.args)
    )


def is_scalar(expr: relax.Expr) -> bool:
    """Whether an argument is one number."""
    return ops.const_value(expr).size == 1 if ops.is_const(expr) else hasattr(expr, "value")


def scalar(expr: relax.Expr) -> float:
    """An argument that is one number."""
    return float(ops.const_value(expr).reshape(-1)[0] if ops.is_const(expr) else expr.value)
