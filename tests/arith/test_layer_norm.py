"""Normalizations (A25) against the real formula in 60 digits: no value is rounded the wrong way, and (A25e) holds."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core import arith, thresholds
from hawq_tvm.core.layer_norm import Norm, normalized

RNG = np.random.default_rng(25)
CONSTANT, ONE_STEP, ONE_HOT, HALVES = range(4)


def rows(count: int, bits: int, more: int = 4) -> np.ndarray:
    """Rows of `count` integers: all equal, one step apart in one place, one-hot, both ends, then random ones."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = RNG.integers(low, high, (4 + more, count), endpoint=True)
    x[CONSTANT], x[ONE_STEP], x[ONE_HOT] = high, 5, low
    x[ONE_STEP, 0], x[ONE_HOT, -1] = 6, high
    x[HALVES] = np.where(np.arange(count) % 2, low, high)
    x[4:, 0] = np.minimum(x[4:, 0], high)
    return x


def real(row: list[int], scale: Fraction, epsilon: Fraction, zero: int | None) -> list[Decimal]:
    """The real normalized values; of a row without variance and epsilon, 0."""
    n, q = len(row), [v - (zero or 0) for v in row]
    total = sum(q) if zero is None else 0
    spread = Fraction(n * sum(v * v for v in q) - total * total) + n * n * epsilon / scale**2
    root = (Decimal(spread.numerator) / Decimal(spread.denominator)).sqrt()
    return [(n * v - total) / root if root else Decimal(0) for v in q]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100, 768, 4096])
def test_the_bound_holds(count: int, centered: bool) -> None:
    """|h 2^-H - real| <= (A25e) at every width that fits, and nothing leaves its interval."""
    zero = None if centered else 3
    with localcontext() as context:
        context.prec = 60
        for bits in (4, 8, 16, 22):
            for epsilon in (Fraction(0), Fraction(1e-12), Fraction(1e-5), Fraction(1, 10)):
                for scale in (Fraction(1, 10**7), Fraction(1, 50), Fraction(7)):
                    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                    if count << bits > 1 << 31:
                        continue
                    norm, x = Norm.of(count, bounds, scale, epsilon, zero), rows(count, bits, 1)
                    h = normalized(x, [1], norm)
                    assert np.max(np.abs(h)) <= norm.largest < 2**31
                    for got, row in zip(h.tolist(), x.tolist(), strict=True):
                        wanted = real(row, scale, epsilon, zero)
                        worst = max(abs(Decimal(g) / 2**norm.fraction - w) for g, w in zip(got, wanted, strict=True))
                        assert worst <= Decimal(norm.distance), (count, bits, epsilon, scale)
                    if centered:
                        assert not h[CONSTANT].any()


@pytest.mark.parametrize("bits, count, more", [(8, 64, 60), (8, 768, 6), (16, 128, 30), (22, 768, 6), (16, 1000, 4)])
@pytest.mark.parametrize("centered", [True, False])
def test_no_value_is_rounded_the_wrong_way(bits: int, count: int, more: int, centered: bool) -> None:
    """After its requantize to 8 bits every value is the real formula rounded half to even: 63,616 values in all."""
    scale, step = Fraction(float(np.float32(0.0173))), Fraction(float(np.float32(0.031)))
    epsilon, zero = Fraction(float(np.float32(1e-5))), None if centered else -2
    gamma = [Fraction(float(g)) for g in RNG.normal(1, 0.4, count).astype(np.float32)]
    beta = [Fraction(float(b)) for b in RNG.normal(0, 0.5, count).astype(np.float32)]
    x = rows(count, bits, more)
    x[4:, count // 2] *= 15 if bits == 8 else 1
    x = np.clip(x, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    norm = Norm.of(count, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), scale, epsilon, zero)
    h = normalized(x, [1], norm)
    got = np.empty_like(x)
    for i in range(count):
        ratio = gamma[i] / step / 2**norm.fraction
        r = thresholds.dyadic_rescale(
            (ratio,), [0], beta[i] / step, (-norm.largest,), (norm.largest,), "half_even", "layer", ()
        )
        got[:, i] = arith.requantize(
            [h[:, i]], [r.multipliers[0]], r.offset, r.shift, rounding="half_even", zero_point=0, qmin=-128, qmax=127
        )
    wrong = 0
    with localcontext() as context:
        context.prec = 60
        for line, row in zip(got.tolist(), x.tolist(), strict=True):
            for i, (y, value) in enumerate(zip(line, real(row, scale, epsilon, zero), strict=True)):
                exact = value * _decimal(gamma[i] / step) + _decimal(beta[i] / step)
                wrong += y != min(max(int(exact.to_integral_value(ROUND_HALF_EVEN)), -128), 127)
    assert wrong == 0


def _decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def test_several_axes_and_unsigned_integers() -> None:
    x = RNG.integers(0, 65536, (2, 3, 4, 5))
    norm = Norm.of(15, (0, 65535), Fraction(1, 100), Fraction(1, 10**5), None)
    apart = normalized(x, [1, 3], norm)
    joined = normalized(x.transpose(0, 2, 1, 3).reshape(2, 4, 15), [2], norm)
    assert np.array_equal(apart.transpose(0, 2, 1, 3).reshape(2, 4, 15), joined)


@pytest.mark.parametrize(
    "count, bounds, scale, epsilon, zero, text",
    [
        (1 << 20, (-128, 5000), Fraction(1), Fraction(0), None, "so many bits"),
        (1024, (-(1 << 21), 1 << 21), Fraction(1), Fraction(0), 5, "so many bits"),
        (8, (-128, 127), Fraction(1, 10**30), Fraction(1), None, "epsilon"),
    ],
)
def test_what_does_not_fit_is_refused(
    count: int, bounds: tuple[int, int], scale: Fraction, epsilon: Fraction, zero: int | None, text: str
) -> None:
    with pytest.raises(OverflowError, match=text):
        Norm.of(count, bounds, scale, epsilon, zero)
