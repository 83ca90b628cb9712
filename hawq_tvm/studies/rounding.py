"""How many results of softmax (A17), (A24) and LayerNorm (A25) are not the correctly rounded real formula.

    python -m hawq_tvm.studies.rounding [--rows N] [--seed S]

Every row of two and of three 8-bit integers, random rows of 8 to 512; rows of 64 to 1,024 for LayerNorm, of 8, 16 and
22 bits, with channels 15 and 60 times the others. The real formula is taken in long double, and by decimals of 60
digits where that is nearer to a boundary than it can tell.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core import arith, softmax_wide, thresholds
from hawq_tvm.core.layer_norm import Norm, normalized

Array = NDArray[Any]
Exact = Callable[[tuple[int, ...]], Decimal]
STEPS = (Fraction(1, 256), Fraction(float(np.float32(1 / 255))), Fraction(1, 200))
LENGTHS = (8, 32, 64, 128, 256, 512)
UNSURE = 1e-9  # of a step: far more than long double's error, far less than what is common


@dataclass
class Count:
    """Values compared, of them not the correctly rounded real formula, and decided by decimals.

    beyond: the most, in steps, that a wrong one is further than 1/2 from the real formula.
    """

    values: int = 0
    wrong: int = 0
    close: int = 0
    beyond: float = 0.0

    def add(self, got: Array, real: Array, low: int, high: int, exact: Exact) -> None:
        """Compare integers with real numbers in steps; exact: the number at an index in 60 digits."""
        nearest = np.clip(np.rint(real), low, high).astype(np.int64)
        for index in np.argwhere(np.abs(np.abs(real - np.floor(real)) - np.longdouble(0.5)) < UNSURE):
            at = tuple(int(i) for i in index)
            self.close += 1
            with localcontext() as context:
                context.prec = 60
                nearest[at] = min(max(int(exact(at).to_integral_value(ROUND_HALF_EVEN)), low), high)
        self.values += got.size
        wrong = got != nearest
        self.wrong += int(np.count_nonzero(wrong))
        self.beyond = max(self.beyond, float(np.max(np.abs(got - real)[wrong], initial=0.5)) - 0.5)


def decimal(value: Fraction) -> Decimal:
    """A fraction to the digits of the context."""
    return Decimal(value.numerator) / Decimal(value.denominator)


def softmax(count: Count, x: Array, scale: Fraction, step: Fraction, wide: bool = False) -> None:
    """Rows of integers of a scale through softmax to uint8 of a step; wide: by (A24), of scores 2^-20 ln 2 x."""
    m, k = arith.softmax_dyadic(1 / step, x.shape[-1])
    output: dict[str, int] = {"zero_point": 0, "qmin": 0, "qmax": 255}
    below = x.max(axis=-1, keepdims=True) - x
    if wide:
        got = softmax_wide.softmax(x, -1, 20, m, k, **output)
        e = np.exp2(-below.astype(np.longdouble) / 2**20)
    else:
        table = arith.softmax_table(scale, int(below.max()) + 1)
        got = arith.softmax(x, table.astype(np.int64), -1, m, k, **output)
        e = np.exp(-(np.longdouble(scale.numerator) / np.longdouble(scale.denominator)) * below.astype(np.longdouble))
    inverse = np.longdouble(step.denominator) / np.longdouble(step.numerator)

    def exact(at: tuple[int, ...]) -> Decimal:
        def power(d: int) -> Decimal:
            return Decimal(2) ** (Decimal(-d) / 2**20) if wide else (-decimal(scale) * d).exp()

        row = below[at[:-1]].tolist()
        if not any(row):
            return decimal(1 / step / len(row))
        return power(row[at[-1]]) / sum(power(d) for d in row) * decimal(1 / step)

    count.add(got, e / e.sum(axis=-1, keepdims=True) * inverse, 0, 255, exact)


def layer_norm(count: Count, x: Array, bits: int, epsilon: Fraction, rng: np.random.Generator) -> None:
    """Rows of integers of so many bits through LayerNorm with random gamma and beta to int8."""
    scale, step, n = Fraction(float(np.float32(0.0173))), Fraction(float(np.float32(0.031))), x.shape[-1]
    gamma, beta = (
        [Fraction(float(v)) for v in rng.normal(m, s, n).astype(np.float32)] for m, s in ((1, 0.4), (0, 0.5))
    )
    norm = Norm.of(n, (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), scale, epsilon, None)
    h, got = normalized(x, [-1], norm), np.empty_like(x)
    for i in range(n):
        ends = (-norm.largest,), (norm.largest,)
        ratio = gamma[i] / step / 2**norm.fraction
        r = thresholds.dyadic_rescale((ratio,), [0], beta[i] / step, *ends, "half_even", "layer", ())
        got[:, i] = arith.requantize(
            [h[:, i]], [r.multipliers[0]], r.offset, r.shift, rounding="half_even", zero_point=0, qmin=-128, qmax=127
        )
    total = x.sum(axis=-1, keepdims=True)
    spread = [
        Fraction(n * sum(v * v for v in row) - t * t) + n * n * epsilon / scale**2
        for row, t in zip(x.tolist(), total.ravel().tolist(), strict=True)
    ]
    root = np.sqrt(np.array([np.longdouble(s.numerator) / np.longdouble(s.denominator) for s in spread]))[:, None]
    by, add = (
        np.array([np.longdouble(v.numerator) / np.longdouble(v.denominator) for v in (w / step for w in numbers)])
        for numbers in (gamma, beta)
    )

    def exact(at: tuple[int, ...]) -> Decimal:
        row, i = at[0], at[1]
        d = n * int(x[row, i]) - int(total[row, 0])
        return d / decimal(spread[row]).sqrt() * decimal(gamma[i] / step) + decimal(beta[i] / step)

    count.add(got, (n * x - total).astype(np.longdouble) / root * by + add, -128, 127, exact)


def scales(number: int) -> list[Fraction]:
    """Scales of scores, from fine to coarse."""
    return [Fraction(float(np.float32(s))) for s in np.geomspace(0.002, 0.5, number)]


def rows_of(n: int, every: int = 1) -> Array:
    """Every row of n 8-bit integers up to order and a constant, each `every`-th."""
    return np.array([(0, *r) for r in itertools.combinations_with_replacement(range(256), n - 1)][::every])


def counts(
    rows: int,
    seed: int,
    fine: int = 60,
    coarse: int = 8,
    every: int = 1,
    widths: Sequence[int] = (64, 384, 768, 1024),
) -> dict[str, Count]:
    """The counts by what is counted.

    rows: values of each kind of random rows.  fine, coarse: scales for rows of two and three.  every: of the rows of
    three.  widths: of LayerNorm.
    """
    rng = np.random.default_rng(seed)
    names = ("rows of two", "rows of three", "random rows", "random rows of wide scores", "LayerNorm")
    found = {name: Count() for name in names}
    for step in STEPS:
        for scale in scales(fine):
            softmax(found["rows of two"], rows_of(2), scale, step)
        for scale in scales(coarse):
            softmax(found["rows of three"], rows_of(3, every), scale, step)
    for n, step in itertools.product(LENGTHS, STEPS):
        for scale in scales(4):
            x = rng.integers(-128, 128, (max(1, rows // n), n))
            softmax(found["random rows"], x, scale, step)
            grid = np.rint(rng.normal(0, float(scale) * 128, x.shape) * 2**20).astype(np.int64)
            softmax(found["random rows of wide scores"], grid, scale, step, wide=True)
    for n, bits, outlier, epsilon in itertools.product(widths, (8, 16, 22), (1, 15, 60), (1e-12, 1e-5)):
        if n << bits > 1 << 32:
            continue
        most = 2 ** (bits - 1) - 1
        x = np.rint(rng.normal(0, most / 60, (max(1, rows // n), n)))
        x[:, n // 3] *= outlier
        numbers = np.clip(x, -most - 1, most).astype(np.int64)
        layer_norm(found["LayerNorm"], numbers, bits, Fraction(float(np.float32(epsilon))), rng)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=27000, help="values of each kind of random rows")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    for name, c in counts(asked.rows, asked.seed).items():
        off = f", by {c.beyond:.1e} of a step" if c.wrong else ""
        print(f"{name:<28} {c.values:>9} values, {c.wrong} not the correctly rounded real formula{off}")


if __name__ == "__main__":
    main()
