"""(A31): bounds of derivatives, and of polynomials in the cells of a grid, against 60 digits."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import stages
from hawq_tvm.core.interpolation import interpolated, worst
from relay_passes.integer.functions import Clip, Function, Functions
from relay_passes.integer.jets import OUTER, RULES, jet_of
from relay_passes.integer.polynomials import Polynomials, bends, fitted_grid, polynomials

from .modules import module

mp = mpmath.mp
R, N = relax.op, relax.op.nn
EVERYTHING = (-np.inf, np.inf)


def _constant(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


def _gelu_tanh(x: Any) -> Any:
    # The constants of the formula are float64 numbers, as PyTorch has them.
    return x * mp.mpf(1) / 2 * (1 + mp.tanh(mp.mpf(np.sqrt(2 / np.pi)) * (x + mp.mpf(0.044715) * x**3)))


# What builds it, what it is, and an interval without bends.
MADE: dict[str, tuple[Callable[..., Any], Callable[[Any], Any], tuple[float, float]]] = {
    "relax.sigmoid": (lambda bb, x: R.sigmoid(x), lambda x: 1 / (1 + mp.exp(-x)), (-30, 30)),
    "relax.tanh": (lambda bb, x: R.tanh(x), mp.tanh, (-9, 9)),
    "relax.erf": (lambda bb, x: R.erf(x), mp.erf, (-5, 5)),
    "relax.exp": (lambda bb, x: R.exp(x), mp.exp, (-20, 20)),
    "relax.log": (lambda bb, x: R.log(x), mp.log, (0.01, 50)),
    "relax.sqrt": (lambda bb, x: R.sqrt(x), mp.sqrt, (0.01, 50)),
    "relax.rsqrt": (lambda bb, x: R.rsqrt(x), lambda x: 1 / mp.sqrt(x), (0.01, 50)),
    "relax.sin": (lambda bb, x: R.sin(x), mp.sin, (-7, 7)),
    "relax.cos": (lambda bb, x: R.cos(x), mp.cos, (-7, 7)),
    "relax.square": (lambda bb, x: R.square(x), lambda x: x * x, (-3, 3)),
    "relax.nn.silu": (lambda bb, x: N.silu(x), lambda x: x / (1 + mp.exp(-x)), (-30, 30)),
    "relax.nn.gelu": (lambda bb, x: N.gelu(x), lambda x: x * mp.ncdf(x), (-9, 9)),
    "relax.nn.gelu_tanh": (lambda bb, x: N.gelu_tanh(x), _gelu_tanh, (-6, 6)),
    "relax.nn.softplus": (lambda bb, x: N.softplus(x, 2.0, 20.0), lambda x: mp.log(1 + mp.exp(2 * x)) / 2, (-9, 9)),
    "relax.nn.relu": (lambda bb, x: N.relu(bb.emit(R.tanh(x))), mp.tanh, (0.1, 3)),
    "relax.nn.leakyrelu": (lambda bb, x: N.leakyrelu(bb.emit(R.sin(x)), 0.25), lambda x: mp.sin(x) / 4, (-3, -0.1)),
    "relax.abs": (lambda bb, x: R.abs(bb.emit(R.tanh(x))), lambda x: -mp.tanh(x), (-3, -0.1)),
    "relax.negative": (lambda bb, x: R.negative(bb.emit(R.exp(x))), lambda x: -mp.exp(x), (-2, 2)),
    "relax.maximum": (lambda bb, x: R.maximum(bb.emit(R.exp(x)), _constant(1)), mp.exp, (0.1, 2)),
    "relax.minimum": (lambda bb, x: R.minimum(bb.emit(R.exp(x)), _constant(1)), mp.exp, (-2, -0.1)),
    "relax.clip": (lambda bb, x: R.clip(bb.emit(R.tanh(x)), -0.5, 0.5), mp.tanh, (-0.5, 0.5)),
    "relax.add": (lambda bb, x: R.add(x, bb.emit(R.exp(x))), lambda x: x + mp.exp(x), (-2, 2)),
    "relax.subtract": (lambda bb, x: R.subtract(x, bb.emit(R.exp(x))), lambda x: x - mp.exp(x), (-2, 2)),
    "relax.multiply": (lambda bb, x: R.multiply(x, bb.emit(R.sigmoid(x))), lambda x: x / (1 + mp.exp(-x)), (-9, 9)),
    "relax.divide": (lambda bb, x: R.divide(x, bb.emit(R.exp(x))), lambda x: x / mp.exp(x), (-2, 2)),
    "relax.power": (lambda bb, x: R.power(bb.emit(R.exp(x)), _constant(3)), lambda x: mp.exp(3 * x), (-2, 2)),
}


def function_of(build: Callable[..., Any]) -> Function:
    before = module(lambda bb, p: bb.emit(build(bb, p[0])), {"x": ((4,), "float32")})
    functions = Functions(before["main"])
    regions = [functions.of(b.var) for b in stages.bindings(before["main"])]
    return Function(([r for r in regions if r is not None][-1],))


def test_every_function_has_a_rule_and_a_test() -> None:
    assert set(MADE) == set(RULES)
    assert set(OUTER) < set(RULES)


@pytest.mark.parametrize("name", MADE)
def test_bounds_hold_the_derivatives(name: str) -> None:
    build, real, (low, high) = MADE[name]
    edges = np.linspace(low, high, 41)
    for first, last in ((edges, edges), (edges[:-1], edges[1:])):
        jet = jet_of(function_of(build), first, last)
        with mpmath.workdps(40):
            for i, (a, b) in enumerate(zip(first, last, strict=True)):
                at = mp.mpf(float(a)) + (mp.mpf(float(b)) - mp.mpf(float(a))) * mp.mpf("0.37")
                for (least, most), wanted in zip(jet, mpmath.taylor(real, at, 3), strict=True):
                    assert least[i] <= wanted <= most[i]
        # At a point, they are as near as float64 can say.
        if first is last:
            for least, most in jet:
                assert np.all(most - least <= 1e-12 * (1 + np.abs(least)) * max(1, abs(low), high) ** 3)


# -- polynomials ---------------------------------------------------------------------------------------


def hard_swish(bb: Any, x: relax.Expr) -> relax.Expr:
    shifted = bb.emit(R.add(bb.emit(R.multiply(x, _constant(0.125))), _constant(0.5)))
    return R.multiply(x, bb.emit(R.clip(shifted, 0, 1)))


SMOOTH: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "silu": (lambda bb, x: N.silu(x), lambda x: x / (1 + mp.exp(-x))),
    "gelu": (lambda bb, x: N.gelu(x), lambda x: x * mp.ncdf(x)),
    "tanh": (lambda bb, x: R.tanh(x), mp.tanh),
    "hard_swish": (hard_swish, lambda x: x * min(max(x / 8 + mp.mpf(1) / 2, 0), 1)),
    "bent_sigmoid": (lambda bb, x: R.sigmoid(bb.emit(N.leakyrelu(x, 0.125))), lambda x: _bent_sigmoid(x)),
}


def _bent_sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-(x if x >= 0 else x / 8)))


def made(name: str, ends: tuple[float, float], bits: int) -> Polynomials:
    found = polynomials(function_of(SMOOTH[name][0]), EVERYTHING, ends, ends, Fraction(2) ** -bits)
    assert found is not None
    return found


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("ends, bits", [((-9.7, 7.3), 20), ((-113.1, 250.9), 16), ((-0.3, 0.2), 25)])
def test_no_result_is_further_from_the_function_than_its_bound(name: str, ends: tuple[float, float], bits: int) -> None:
    p = made(name, ends, bits)
    table, grid = p.table.astype(np.int64), p.grid
    assert worst(table, p.steps) < 2**31 and p.table.shape == (3, grid.cells)
    assert p.bound < 2.5
    # The first and the last place of cells, and some between, inside the interval.
    first = np.arange(0, grid.cells, max(1, grid.cells // 97)) << grid.cell
    inside = np.random.default_rng(3).integers(0, grid.last + 1, 400)
    u = np.concatenate([first, first + (1 << grid.cell) - 1, inside])
    u = u[(grid.real(u) > ends[0]) & (grid.real(u) < ends[1])]
    got = interpolated(u, table, p.steps)
    before = None
    with mpmath.workdps(40):
        origin, step = (mp.mpf(v.numerator) / v.denominator for v in (grid.origin, grid.step))
        for place, y in zip(u.tolist(), got.tolist(), strict=True):
            wanted = SMOOTH[name][1](origin + place * step) * mp.mpf(2) ** bits
            assert abs(y - wanted) <= mp.mpf(1) / 2 + p.bound
            if before is not None and before[0] != place:
                assert abs(wanted - before[1]) <= p.slope * abs(place - before[0]) * (1 + 1e-9)
            before = place, wanted


def test_bends_lie_between_cells() -> None:
    """Pieces of the second degree are then exact, but for what the integers round."""
    function = function_of(hard_swish)
    assert bends(function, -9.7, 7.3) == pytest.approx([-4, 4], abs=1e-9)
    p = made("hard_swish", (-9.7, 7.3), 20)
    assert p.bound < 0.5
    for bend in (-4, 4):
        place = (bend - float(p.grid.origin)) / float(p.grid.step) + 0.5
        assert abs(place / (1 << p.grid.cell) - round(place / (1 << p.grid.cell))) < 1e-6


def test_a_grid_covers_its_interval() -> None:
    for bent in ([], [0.25], [-1.0, 2.0], [-1.0, 0.3, 2.0]):
        grid = fitted_grid(-3.5, 6.25, bent, 512)
        assert grid.real(np.array(0)) - float(grid.step) / 2 <= -3.5
        assert grid.real(np.array(grid.last)) + float(grid.step) / 2 >= 6.25


def test_beyond_the_cells_the_ends_must_do() -> None:
    """What lies beyond is compared with the last value: as it is, or cut off where nobody can tell."""
    function, scale = function_of(lambda bb, x: N.silu(x)), Fraction(2) ** -12
    open_ = polynomials(function, EVERYTHING, (-20.0, 10.0), (-30.0, 30.0), scale)
    closed = polynomials(function, (Fraction(-1), Fraction(9)), (-20.0, 10.0), (-30.0, 30.0), scale)
    assert open_ is not None and abs(open_.bound - 20 * 2**12) < 100
    assert closed is not None and closed.bound < 1


@pytest.mark.parametrize("build", [lambda bb, x: R.sqrt(x), lambda bb, x: R.floor(x), lambda bb, x: R.rsqrt(x)])
def test_without_a_bound_of_the_slope_there_is_none(build: Callable[..., Any]) -> None:
    assert polynomials(function_of(build), EVERYTHING, (0.0, 4.0), (0.0, 4.0), Fraction(2) ** -12) is None


def test_a_clip_bends() -> None:
    function = function_of(lambda bb, x: R.tanh(x)).then(Clip(Fraction(-1, 2), Fraction(1, 4)))
    assert bends(function, -2.0, 2.0) == pytest.approx([-np.arctanh(0.5), np.arctanh(0.25)], abs=1e-9)
