"""TE stages of a normalization by a row's own mean and variance."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import relax, te, tirx

from hawq_tvm.core import ops
from hawq_tvm.core.layer_norm import Norm, norm_of
from schedules.cpu.loops import ONCE_A_ROW

from .emit import Emission, emitter, immediate


def _i64(value: int) -> tirx.Expr:
    return immediate(value, "int64")


class _Chain:
    """Values that are computed once and used often, inside one element's expression."""

    def __init__(self) -> None:
        self.steps: list[tuple[tirx.Var, tirx.Expr]] = []

    def let(self, name: str, value: tirx.Expr) -> tirx.Var:
        var = tirx.Var(name, "int64")
        self.steps.append((var, value))
        return var

    def ending(self, body: tirx.Expr) -> tirx.Expr:
        for var, value in reversed(self.steps):
            body = tirx.Let(var, value, body)
        return body


def _extra(wide: tirx.Expr) -> tirx.Expr:
    """The even number of bits that brings `wide` to 61 or 62 bits; -2 for one of 63."""
    return (tirx.clz(wide).astype("int64") - _i64(2)) & _i64(-2)


def _reciprocal(wide: tirx.Expr) -> tirx.Expr:
    """2^61 divided by the root of `wide` at 61 or 62 bits: five steps of Newton from 2^31 are at most one too many."""
    chain = _Chain()
    value = chain.let("wide", wide)
    extra = chain.let("extra", _extra(value))
    square = chain.let("square", tirx.Select(extra < _i64(0), value >> _i64(2), value << tirx.Max(extra, _i64(0))))
    root: tirx.Expr = _i64(1 << 31)
    for step in range(5):
        root = chain.let(f"root{step}", (root + tirx.truncdiv(square, root)) >> _i64(1))
    root = chain.let("root", root - (root * root > square).astype("int64"))
    return chain.ending(tirx.truncdiv(_i64(1 << 61), root))


def _divided_by(norm: Norm, wide: tirx.Expr) -> tirx.Expr:
    """The bits by which a product with the reciprocal is divided."""
    bits = _i64(61 - norm.fraction) - ((_extra(wide) + _i64(norm.shift)) >> _i64(1))
    return tirx.Min(tirx.Max(bits, _i64(1)), _i64(62))


@emitter("hawq.layer_norm")
def _layer_norm(e: Emission, call: relax.Call) -> te.Tensor:
    """(A25): sum and sum of squares, variance, root and reciprocal once a row, one rounded product an element."""
    x = e.operand(call.args[0])
    shape, axes = x.shape, [int(a) for a in call.attrs["axes"]]
    norm = norm_of(call.attrs, ops.shape_of(call.args[0]))
    outer = tuple(n for i, n in enumerate(shape) if i not in axes)
    n = prod(shape[a] for a in axes)

    def value(index: Any) -> tirx.Expr:
        element = x.at(index).astype("int64")
        return element - _i64(norm.zero_point) if norm.zero_point else element

    def row(index: Any) -> tuple[Any, ...]:
        return tuple(v for i, v in enumerate(index) if i not in axes)

    def summed(name: str, power: int) -> te.Tensor:
        along = {a: te.reduce_axis((0, shape[a]), f"k{a}") for a in axes}

        def element(*i: Any) -> tirx.Expr:
            kept = iter(i)
            q = value([along[a] if a in along else next(kept) for a in range(len(shape))])
            return te.sum(q * q if power == 2 else q, axis=list(along.values()))

        return te.compute(outer, element, name=name)

    total = summed("total", 1) if norm.centered else None
    squares = summed("squares", 2)

    def variance(*i: Any) -> tirx.Expr:
        spread = squares(*i) * _i64(n)
        spread = spread - total(*i) * total(*i) if total is not None else spread
        shifted = spread << _i64(norm.shift) if norm.shift >= 0 else spread >> _i64(-norm.shift)
        return tirx.Max(shifted + _i64(norm.epsilon), _i64(1))

    wide = te.compute(outer, variance, name=f"{ONCE_A_ROW}variance")
    reciprocal = te.compute(outer, lambda *i: _reciprocal(wide(*i)), name=f"{ONCE_A_ROW}reciprocal")
    shift = te.compute(outer, lambda *i: _divided_by(norm, wide(*i)), name=f"{ONCE_A_ROW}shift")

    def element(*i: Any) -> tirx.Expr:
        at = row(i)
        furthest = value(i) * _i64(n)
        furthest = furthest - total(*at) if total is not None else furthest
        by = shift(*at)
        rounded = furthest * reciprocal(*at) + (_i64(1) << (by - _i64(1)))
        return (rounded >> by).astype("int32")

    return te.compute(shape, element, name="layer_norm")
