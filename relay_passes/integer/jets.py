"""Bounds of a function's first three derivatives over intervals, as Taylor coefficients: f, f', f''/2, f'''/6.

A polynomial's distance from a function is proved with them (A31). Where a function has a bend within an interval, its
slopes are bounded and the rest is not; where it jumps, nothing but its values is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from tvm import relax

from .functions import ELEMENTWISE, Array, Bounds, Clip, Function, Region, bounds_of, erf, hull, sigmoid

Jet = tuple[Bounds, Bounds, Bounds, Bounds]
ANYTHING: Bounds = (np.asarray(-np.inf), np.asarray(np.inf))
NOTHING: Bounds = (np.zeros(()), np.zeros(()))
FLAT = frozenset(f"relax.{n}" for n in ("round", "floor", "ceil"))


def jet_of(function: Function, low: Array, high: Array) -> Jet:
    """The Taylor coefficients of a function over every interval low .. high."""
    jet: Jet = ((low, high), (np.ones(()), np.ones(())), NOTHING, NOTHING)
    with np.errstate(all="ignore"):
        for stage in function.stages:
            jet = _clipped(stage, jet) if isinstance(stage, Clip) else _walked(stage, jet)
    shape = low.shape
    return tuple((np.broadcast_to(c[0], shape), np.broadcast_to(c[1], shape)) for c in jet)  # type: ignore[return-value]


def _walked(stage: object, jet: Jet) -> Jet:
    assert isinstance(stage, Region)
    made: Jet = stage.walk(jet, _constant, _apply)
    return made


def _clipped(stage: Clip, jet: Jet) -> Jet:
    low, high = (_constant(float(v)) for v in (stage.low, stage.high))
    return _larger(_smaller(jet, high), low)


def _constant(value: float) -> Jet:
    return (np.asarray(value, np.float64),) * 2, NOTHING, NOTHING, NOTHING


# -- arithmetic of bounds, rounded outward -----------------------------------------------------------


def _out(low: Array, high: Array) -> Bounds:
    """A little wider: by more than the last bits of a sum, a product or a library's function."""
    unknown = np.isnan(low) | np.isnan(high)
    room = [np.where(np.isfinite(x), np.abs(x) * 2.0**-49 + 2.0**-1060, 0.0) for x in (low, high)]
    return np.where(unknown, -np.inf, low - room[0]), np.where(unknown, np.inf, high + room[1])


def _plus(a: Bounds, b: Bounds) -> Bounds:
    return _out(a[0] + b[0], a[1] + b[1])


def _times(a: Bounds, b: Bounds | float) -> Bounds:
    other = (b, b) if isinstance(b, float) else b
    return _out(*hull(*(x * y for x in a for y in other)))


def _minus(a: Jet) -> Jet:
    return tuple((-c[1], -c[0]) for c in a)  # type: ignore[return-value]


def _sum(a: Jet, b: Jet) -> Jet:
    return tuple(_plus(x, y) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _product(a: Jet, b: Jet) -> Jet:
    def coefficient(n: int) -> Bounds:
        total = _times(a[0], b[n])
        for i in range(1, n + 1):
            total = _plus(total, _times(a[i], b[n - i]))
        return total

    return coefficient(0), coefficient(1), coefficient(2), coefficient(3)


def _composed(outer: tuple[Bounds, Bounds, Bounds, Bounds], x: Jet) -> Jet:
    """The coefficients of g(h): those of g over the values of h, and those of h."""
    value, g1, g2, g3 = outer
    _, h1, h2, h3 = x
    square = _times(h1, h1)
    third = _plus(_times(g1, h3), _times(_times(g2, 2.0), _times(h1, h2)))
    return (
        value,
        _times(g1, h1),
        _plus(_times(g1, h2), _times(g2, square)),
        _plus(third, _times(g3, _times(square, h1))),
    )


# -- bends and jumps -----------------------------------------------------------------------------------


def _pieces(first: Array, second: Array, a: Jet, b: Jet) -> Jet:
    """a where `first` holds, b where `second` does, and else either, with a bend in between."""

    def chosen(x: Bounds, y: Bounds, else_: Bounds) -> Bounds:
        return tuple(np.where(first, p, np.where(second, q, r)) for p, q, r in zip(x, y, else_, strict=True))  # type: ignore[return-value]

    ends = [(np.minimum(x[0], y[0]), np.maximum(x[1], y[1])) for x, y in zip(a[:2], b[:2], strict=True)]
    return tuple(chosen(x, y, e) for x, y, e in zip(a, b, [*ends, ANYTHING, ANYTHING], strict=True))  # type: ignore[return-value]


def _larger(a: Jet, b: Jet) -> Jet:
    made = _pieces(a[0][0] >= b[0][1], b[0][0] >= a[0][1], a, b)
    return ((np.maximum(a[0][0], b[0][0]), np.maximum(a[0][1], b[0][1])), *made[1:])


def _smaller(a: Jet, b: Jet) -> Jet:
    return _minus(_larger(_minus(a), _minus(b)))


def _by_sign(x: Jet, above: Jet, below: Jet) -> Jet:
    return _pieces(x[0][0] >= 0, x[0][1] <= 0, above, below)


# -- functions by their own derivatives ----------------------------------------------------------------

Outer = Callable[[relax.Call, Bounds], tuple[Bounds, Bounds, Bounds, Bounds]]


def _logistic(x: Bounds) -> tuple[Bounds, Bounds, Bounds, Bounds]:
    """1 / (1 + exp(-x)): with p = s (1 - s), its derivatives are p, p (1 - 2 s) and p (1 - 6 p)."""

    s, rest = (_out(sigmoid(low), sigmoid(high)) for low, high in (x, (-x[1], -x[0])))
    p = _times(s, rest)
    second = _times(p, _plus(rest, (-s[1], -s[0])))
    third = _times(p, _plus((np.ones(()),) * 2, _times(p, -6.0)))
    return s, p, _times(second, 0.5), _times(third, 1 / 6)


def _scaled(outer: tuple[Bounds, ...], by: float, start: float = 1.0) -> tuple[Bounds, ...]:
    """The coefficients of start g(by x), from those of g over by x."""
    return tuple(_times(c, start * by**n) for n, c in enumerate(outer))


def _density(x: Bounds) -> tuple[Bounds, Bounds, Bounds]:
    """exp(-x^2 / 2) / sqrt(2 pi) and its first two coefficients."""
    square = _magnitude_squared(x)
    phi = _times(_out(np.exp(-square[1] / 2), np.exp(-square[0] / 2)), 1 / math.sqrt(2 * math.pi))
    return phi, _times((-x[1], -x[0]), phi), _times(_times(_plus(square, (-np.ones(()),) * 2), 0.5), phi)


def _magnitude_squared(x: Bounds) -> Bounds:
    low, high = hull(x[0] * x[0], x[1] * x[1])
    return _out(np.where((x[0] <= 0) & (x[1] >= 0), 0.0, low), high)


def _normal(x: Bounds) -> tuple[Bounds, Bounds, Bounds, Bounds]:
    """The normal distribution function; float64 knows 1 + erf to 2^-52."""
    low, high = (0.5 * (1 + erf(v / math.sqrt(2))) for v in x)
    phi, first, second = _density(x)
    return _out(low - 2.0**-50, high + 2.0**-50), phi, _times(first, 0.5), _times(second, 1 / 3)


def _erf(call: relax.Call, x: Bounds) -> tuple[Bounds, ...]:
    return _scaled(_normal(_times(x, math.sqrt(2))), math.sqrt(2), 2.0)


def _exponential(call: relax.Call, x: Bounds) -> tuple[Bounds, ...]:
    value = _out(np.exp(x[0]), np.exp(x[1]))
    return value, value, _times(value, 0.5), _times(value, 1 / 6)


def _powers(exponent: float, x: Bounds) -> tuple[Bounds, ...]:
    """x^p: p (p - 1) .. x^(p - n) / n!; where x may be 0 or less, only of whole p that leave nothing to divide by."""
    coefficients, factor = [], 1.0
    for n in range(4):
        coefficients.append(_times(_power(x, exponent - n), factor) if factor else NOTHING)
        factor *= (exponent - n) / (n + 1)
    return tuple(coefficients)


def _power(x: Bounds, exponent: float) -> Bounds:
    ends = hull(np.power(x[0], exponent), np.power(x[1], exponent))
    whole = exponent >= 0 and float(exponent).is_integer()
    inside = (x[0] <= 0) & (x[1] >= 0)
    low = np.where(inside & (exponent != 0) & (exponent % 2 == 0), np.minimum(ends[0], 0.0), ends[0])
    known = np.isfinite(ends[0]) & (whole | (x[0] > 0) | ((x[1] < 0) & float(exponent).is_integer()))
    return _out(np.where(known, low, -np.inf), np.where(known, ends[1], np.inf))


def _logarithm(call: relax.Call, x: Bounds) -> tuple[Bounds, ...]:
    inverse = _power(x, -1.0)
    return NOTHING, inverse, _times(_power(x, -2.0), -0.5), _times(_power(x, -3.0), 1 / 3)


def _waves(turn: int) -> Callable[[relax.Call, Bounds], tuple[Bounds, ...]]:
    """sin (0) and cos (1): each derivative is the one before, a quarter turn on."""

    def outer(call: relax.Call, x: Bounds) -> tuple[Bounds, ...]:
        names = ("relax.sin", "relax.cos")
        ends = [bounds_of(call, names[(turn + n) % 2], [x]) for n in range(4)]
        signs = [-1.0 if (turn + n) % 4 in (2, 3) else 1.0 for n in range(4)]
        return tuple(_times(e, s / math.factorial(n)) for n, (e, s) in enumerate(zip(ends, signs, strict=True)))

    return outer


def _softplus(call: relax.Call, x: Bounds) -> tuple[Bounds, ...]:
    beta = float(call.attrs.beta)
    s, first, second, _ = _logistic(_times(x, beta))
    return NOTHING, s, _times(first, beta / 2), _times(second, beta**2 / 3)


OUTER: dict[str, Callable[[relax.Call, Bounds], tuple[Bounds, ...]]] = {
    "relax.sigmoid": lambda c, x: _logistic(x),
    "relax.tanh": lambda c, x: _scaled(_logistic(_times(x, 2.0)), 2.0, 2.0),
    "relax.erf": _erf,
    "relax.exp": _exponential,
    "relax.log": _logarithm,
    "relax.sqrt": lambda c, x: _powers(0.5, x),
    "relax.rsqrt": lambda c, x: _powers(-0.5, x),
    "relax.nn.softplus": _softplus,
    "relax.sin": _waves(0),
    "relax.cos": _waves(1),
}


def _composite(outer: Callable[[Bounds], tuple[Bounds, ...]], x: Jet) -> Jet:
    return _composed(outer(x[0]), x)  # type: ignore[arg-type]


def _quotient(call: relax.Call, a: Jet, b: Jet) -> Jet:
    return _product(a, _composite(partial(_powers, -1.0), b))


def _gelu_tanh(call: relax.Call, x: Jet) -> Jet:
    """x s(2 c) with c the cubic that the tanh is taken of."""
    cube = _product(_product(x, x), x)
    inner = _sum(x, _product(_constant(0.044715), cube))
    twice = _product(_constant(2 * math.sqrt(2 / math.pi)), inner)
    return _product(x, _composite(_logistic, twice))


def _general_power(call: relax.Call, a: Jet, b: Jet) -> Jet:
    exponent, base = b[0], a[0]
    if np.size(exponent[0]) == 1 and np.array_equal(*exponent):
        return _composite(partial(_powers, float(exponent[0])), a)
    if np.size(base[0]) == 1 and np.array_equal(*base) and float(base[0]) > 0:
        return _composite(lambda x: _exponential(call, x), _product(_constant(math.log(float(base[0]))), b))
    return ANYTHING, ANYTHING, ANYTHING, ANYTHING


def _leaky(call: relax.Call, x: Jet) -> Jet:
    return _by_sign(x, x, _product(_constant(float(call.attrs.alpha)), x))


RULES: dict[str, Callable[..., Jet]] = {
    "relax.add": lambda c, a, b: _sum(a, b),
    "relax.subtract": lambda c, a, b: _sum(a, _minus(b)),
    "relax.multiply": lambda c, a, b: _product(a, b),
    "relax.divide": _quotient,
    "relax.negative": lambda c, a: _minus(a),
    "relax.square": lambda c, a: _product(a, a),
    "relax.power": _general_power,
    "relax.abs": lambda c, a: _by_sign(a, a, _minus(a)),
    "relax.nn.relu": lambda c, a: _larger(a, _constant(0.0)),
    "relax.nn.leakyrelu": _leaky,
    "relax.maximum": lambda c, a, b: _larger(a, b),
    "relax.minimum": lambda c, a, b: _smaller(a, b),
    "relax.clip": lambda c, a, low, high: _larger(_smaller(a, high), low),
    "relax.nn.silu": lambda c, a: _product(a, _composite(_logistic, a)),
    "relax.nn.gelu": lambda c, a: _product(a, _composite(_normal, a)),
    "relax.nn.gelu_tanh": _gelu_tanh,
    **{name: (lambda c, a, f=f: _composite(partial(f, c), a)) for name, f in OUTER.items()},
}


def _apply(call: relax.Call, name: str, args: list[Jet]) -> Jet:
    values = bounds_of(call, name, [a[0] for a in args])
    if name in FLAT:
        first, last = (ELEMENTWISE[name](call, end) for end in args[0][0])
        still = (np.where(first == last, 0.0, -np.inf), np.where(first == last, 0.0, np.inf))
        return values, still, still, still
    return (values, *RULES[name](call, *args)[1:])
