"""Normalizations that are written out as their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.verify.reference import evaluate
from relay_passes.match_normalization import match_normalization

from .modules import RNG, module

R = relax.op
X = (RNG.normal(size=(2, 5, 12)) * 3 + 1).astype(np.float32)


def number(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


SQUARES: dict[str, Callable[[Any, relax.Expr], relax.Expr]] = {
    "power": lambda e, d: e(R.power(d, number(2))),
    "product": lambda e, d: e(R.multiply(d, d)),
    "square": lambda e, d: e(R.square(d)),
}
ENDINGS: dict[str, Callable[[Any, relax.Expr, relax.Expr], relax.Expr]] = {
    "divide by sqrt": lambda e, d, v: R.divide(d, e(R.sqrt(v))),
    "times 1 / sqrt": lambda e, d, v: R.multiply(e(R.divide(number(1), e(R.sqrt(v)))), d),
    "times rsqrt": lambda e, d, v: R.multiply(d, e(R.rsqrt(v))),
    "power 1/2": lambda e, d, v: R.divide(d, e(R.power(v, number(0.5)))),
    "power -1/2": lambda e, d, v: R.multiply(d, e(R.power(v, number(-0.5)))),
}


def normalization(
    axes: list[int],
    square: str = "power",
    ending: str = "divide by sqrt",
    *,
    centered: bool = True,
    twice: bool = False,
    second: list[int] | None = None,
    epsilon: float = 1e-5,
    keepdims: bool = True,
) -> Any:
    """A module of one; twice: the difference is computed once for the variance, once for the result."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> relax.Expr:
        (x,) = p

        def difference() -> relax.Expr:
            return bb.emit(R.subtract(x, bb.emit(R.mean(x, axes, keepdims=True)))) if centered else x

        d = difference()
        v = bb.emit(R.mean(SQUARES[square](bb.emit, d), second or axes, keepdims=keepdims))
        v = bb.emit(R.add(number(epsilon), v) if twice else R.add(v, number(epsilon)))
        y = bb.emit(ENDINGS[ending](bb.emit, difference() if twice else d, v), "y")
        return bb.emit(R.add(bb.emit(R.multiply(y, relax.const(X[0, 0]))), relax.const(X[0, 1])))

    return module(build, {"x": (X.shape, "float32")})


def names(mod: Any) -> list[str]:
    return [ops.op_name(b.value) for b in stages.bindings(mod["main"])]


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("centered", [True, False])
def test_every_form(square: str, ending: str, twice: bool, centered: bool) -> None:
    before = normalization([-1], square, ending, centered=centered, twice=twice)
    after, count = match_normalization(before)
    assert count == 1 and ("relax.nn.layer_norm" if centered else "relax.nn.rms_norm") in names(after)
    wanted, got = (evaluate(m, {"x": X})["out0"] for m in (before, after))
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)  # both in float64, narrowed at the end


def test_other_axes() -> None:
    before = normalization([1, 2])
    after, count = match_normalization(before)
    assert count == 1
    wanted, got = (evaluate(m, {"x": X})["out0"] for m in (before, after))
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


def test_a_variance_over_another_axis() -> None:
    """The difference is divided by its own mean square, which is no variance there."""
    after, count = match_normalization(normalization([-1], second=[1]))
    assert count == 1 and "relax.nn.rms_norm" in names(after) and "relax.subtract" in names(after)


@pytest.mark.parametrize("other", [{"epsilon": -0.5}, {"keepdims": False, "second": [0, 1]}])
def test_what_is_another_function_stays(other: dict[str, Any]) -> None:
    mod = normalization([-1], **other)
    assert match_normalization(mod)[1] == 0


def test_two_long_chains_of_differences_take_no_time() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> relax.Expr:
        ends = []
        for _ in range(2):
            d = p[0]
            for _ in range(64):
                d = bb.emit(R.subtract(d, d))
            ends.append(d)
        v = bb.emit(R.mean(bb.emit(R.multiply(*ends)), [2], keepdims=True))
        return bb.emit(R.divide(ends[0], bb.emit(R.sqrt(bb.emit(R.add(v, number(1e-5)))))))

    assert match_normalization(module(build, {"x": (X.shape, "float32")}))[1] == 0
