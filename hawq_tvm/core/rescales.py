"""A requantize and the real formula it stands for: of one channel, or of all channels of a layer side by side.

Side by side they are arrays of Python's integers: as exact as Fractions, and tens of times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from operator import attrgetter
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from . import arith
from .errors import ModelError

Array = NDArray[Any]

_bit_length = np.frompyfunc(int.bit_length, 1, 1)
_numerator = np.frompyfunc(attrgetter("numerator"), 1, 1)
_denominator = np.frompyfunc(attrgetter("denominator"), 1, 1)


@dataclass(frozen=True)
class Rescale:
    """One requantize at one channel: real ratios and constant, the dyadic numbers for them, and what can reach it.

    ratios, multipliers, lows, highs: one entry per operand.  constant: the real addend in output steps.
    apart: pairs of operands of which one is always 0, the two halves of a LeakyRelu.
    """

    ratios: tuple[Fraction, ...]
    constant: Fraction
    multipliers: tuple[int, ...]
    offset: int
    shift: int
    lows: tuple[int, ...]
    highs: tuple[int, ...]
    apart: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Lines:
    """(sum_i x_i factors_i + constant) / denominator, one a row: arrays of Python's integers, denominators above 0.

    factors: rows x operands.
    """

    factors: Array
    constant: Array
    denominator: Array

    @staticmethod
    def of(ratios: Array, constant: Array) -> Lines:
        """The lines of Fractions: ratios of rows x operands, constants of rows."""
        below = _denominator(ratios)
        denominator = np.lcm(np.lcm.reduce(below, axis=1), _denominator(constant))
        factors = _numerator(ratios) * (denominator[:, None] // below)
        return Lines(factors, _numerator(constant) * (denominator // _denominator(constant)), denominator)

    def over(self, step: Array, added: int) -> Lines:
        """The lines in steps (Fractions above 0, of rows) with an integer added, in lowest terms."""
        factors, denominator = self.factors * _denominator(step)[:, None], self.denominator * _numerator(step)
        constant = self.constant * _denominator(step) + added * denominator
        common = np.gcd(np.gcd.reduce(factors, axis=1), np.gcd(constant, denominator))
        return Lines(factors // common[:, None], constant // common, denominator // common)

    def __getitem__(self, rows: Any) -> Lines:
        """Some of the rows."""
        return Lines(self.factors[rows], self.constant[rows], self.denominator[rows])

    def at(self, row: int, values: Sequence[int]) -> Fraction:
        """The value of one line at one point."""
        total = sum(f * v for f, v in zip(self.factors[row], values, strict=True)) + self.constant[row]
        return Fraction(total, self.denominator[row])


@dataclass(frozen=True, eq=False)
class Rescales(Sequence[Rescale]):
    """Requantizes of the same operands at several channels, each a `Rescale`: arrays of Python's integers.

    real: sum x_i ratio_i + constant.  dyadic: sum x_i multiplier_i + offset, over 2^shift.  lows, highs: rows x
    operands.  given: how far the operands' sum is at most from the model's own, in steps, whatever the numbers are.
    """

    real: Lines
    dyadic: Lines
    shift: Array
    lows: Array
    highs: Array
    apart: tuple[tuple[int, int], ...] = ()
    given: Fraction = Fraction(0)

    @staticmethod
    def of(rescales: Sequence[Rescale]) -> Rescales:
        """The same, side by side; at least one."""
        if isinstance(rescales, Rescales):
            return rescales
        real = Lines.of(_rows([r.ratios for r in rescales]), _column([r.constant for r in rescales]))
        multipliers, lows, highs = (
            _rows([getattr(r, name) for r in rescales]) for name in ("multipliers", "lows", "highs")
        )
        shift = _column([r.shift for r in rescales])
        dyadic = Lines(multipliers, _column([r.offset for r in rescales]), 1 << shift)
        (apart,) = {r.apart for r in rescales}
        return Rescales(real, dyadic, shift, lows, highs, apart)

    def __len__(self) -> int:
        """How many channels there are."""
        return len(self.shift)

    @overload
    def __getitem__(self, index: int) -> Rescale: ...

    @overload
    def __getitem__(self, index: slice) -> Rescales: ...

    def __getitem__(self, index: int | slice) -> Rescale | Rescales:
        """One channel's, or some channels'."""
        if isinstance(index, slice):
            parts = (self.real[index], self.dyadic[index], self.shift[index], self.lows[index], self.highs[index])
            return Rescales(*parts, self.apart, self.given)
        below = self.real.denominator[index]
        return Rescale(
            tuple(Fraction(f, below) for f in self.real.factors[index]),
            Fraction(self.real.constant[index], below),
            tuple(self.dyadic.factors[index]),
            self.dyadic.constant[index],
            self.shift[index],
            tuple(self.lows[index]),
            tuple(self.highs[index]),
            self.apart,
        )

    def boxes(self) -> list[tuple[Array, Array]]:
        """The bounds of all operands, once for every choice of the operands that are 0."""
        columns = np.arange(self.lows.shape[1])
        zero = [np.isin(columns, chosen) for chosen in product(*self.apart[:8])]
        return [(np.where(z, 0, self.lows), np.where(z, 0, self.highs)) for z in zero]

    def rows(self, chosen: Array) -> Rescales:
        """Some channels', by their numbers or by truth values."""
        parts = (self.real[chosen], self.dyadic[chosen], self.shift[chosen], self.lows[chosen], self.highs[chosen])
        return Rescales(*parts, self.apart, self.given)

    @staticmethod
    def joined(parts: Sequence[Rescales]) -> Rescales:
        """The channels of all parts, one after another; of the same operands."""
        real, dyadic = (
            Lines(*(np.concatenate(column) for column in zip(*((n.factors, n.constant, n.denominator) for n in lines))))
            for lines in ([p.real for p in parts], [p.dyadic for p in parts])
        )
        shift, lows, highs = (np.concatenate([getattr(p, n) for p in parts]) for n in ("shift", "lows", "highs"))
        return Rescales(real, dyadic, shift, lows, highs, parts[0].apart, parts[0].given)

    def changed(self, multipliers: Array, offset: Array) -> Rescales:
        """With other multipliers and offsets."""
        return replace(self, dyadic=Lines(multipliers, offset, self.dyadic.denominator))

    def shortened(self, most: int) -> Rescales:
        """With shifts of at most `most`, where there is one operand; its multipliers have fewer bits then."""
        long, shift = self.shift > most, np.minimum(self.shift, most)
        if self.lows.shape[1] != 1 or not long.any():
            return self
        multipliers = nearest(self.real.factors, self.real.denominator[:, None], shift[:, None])
        offset = nearest(self.real.constant, self.real.denominator, shift)
        dyadic = Lines(
            np.where(long[:, None], multipliers, self.dyadic.factors),
            np.where(long, offset, self.dyadic.constant),
            1 << shift,
        )
        return replace(self, dyadic=dyadic, shift=shift)

    def off(self) -> Fraction:
        """How far a sum with m / 2^s and b / 2^s can be from the real one, in steps, before the rounding."""
        real, dyadic = self.real, self.dyadic
        wrong = dyadic.factors * real.denominator[:, None] - real.factors * dyadic.denominator[:, None]
        constant = dyadic.constant * real.denominator - real.constant * dyadic.denominator
        ends = (wrong * self.lows, wrong * self.highs)
        most = np.maximum(*(np.abs(constant + choose(*ends).sum(axis=1)) for choose in (np.minimum, np.maximum)))
        return self.given + max(map(Fraction, most.tolist(), (real.denominator * dyadic.denominator).tolist()))


def _column(values: Sequence[Any]) -> Array:
    column = np.empty(len(values), object)
    column[:] = values
    return column


def _rows(values: Sequence[Sequence[Any]]) -> Array:
    return np.array([list(v) for v in values], object).reshape(len(values), -1)


# -- the dyadic numbers of real ones -----------------------------------------------------------------


def dyadic_rescale(
    ratios: tuple[Fraction, ...],
    zeros: Sequence[int],
    constant: Fraction,
    lows: tuple[int, ...],
    highs: tuple[int, ...],
    rounding: str,
    where: str,
    apart: tuple[tuple[int, int], ...] = (),
) -> Rescale:
    """(A3), (A4): the widest multipliers for sum (x_i - zero_i) ratio_i + constant that cannot overflow 64 bits.

    lows, highs: the least and greatest x_i.  where: the layer, for errors.  apart: see Rescale.
    Raises ModelError when a ratio is too large, or every precision overflows.
    """
    real = Lines.of(_rows([ratios]), _column([constant]))
    return dyadic_rescales(real, _rows([zeros]), _rows([lows]), _rows([highs]), rounding, where, apart)[0]


def dyadic_rescales(
    real: Lines,
    zeros: Array,
    lows: Array,
    highs: Array,
    rounding: str,
    where: str,
    apart: tuple[tuple[int, int], ...] = (),
) -> Rescales:
    """(A3), (A4) for every row of sum (x_i - zero_i) ratio_i + constant; see `dyadic_rescale`."""
    reach = np.maximum(np.abs(lows), np.abs(highs))
    largest = np.maximum.reduce(np.abs(real.factors), axis=1)
    shift = _widest(largest, real.denominator, where)
    multipliers, offset = np.empty_like(real.factors), np.empty_like(real.constant)
    left = np.arange(len(shift))
    while left.size:
        line, bits = real[left], shift[left]
        multipliers[left] = nearest(line.factors, line.denominator[:, None], bits[:, None])
        offset[left] = nearest(line.constant, line.denominator, bits) - (zeros[left] * multipliers[left]).sum(axis=1)
        worst = (reach[left] * np.abs(multipliers[left])).sum(axis=1) + np.abs(offset[left])
        fits = worst + arith.rounding_room(bits, rounding) < arith.INT64_LIMIT
        if rounding == "double":
            fits &= reach[left, 0] << np.maximum(0, 31 - bits) < 2**31
        left = left[~fits.astype(bool)]
        if np.any(shift[left] == 0):
            raise ModelError(
                "a requantize overflows 64 bits at every precision",
                where=where,
                found=f"operands up to {max(reach[left[shift[left] == 0][0]])}",
                remedy="use fewer bits or fewer terms in this layer",
            )
        shift[left] -= 1
    constant = real.constant - (zeros * real.factors).sum(axis=1)
    lines = Lines(real.factors, constant, real.denominator), Lines(multipliers, offset, 1 << shift)
    return Rescales(*lines, shift, lows, highs, apart)


def _widest(numerator: Array, denominator: Array, where: str) -> Array:
    """The shifts at which ratios >= 0 have 31 bits (A3), at most 62.  Raises ModelError for a ratio of 2^31 or more."""
    # 2^exponent is the power of two just above the ratio.
    exponent = _bit_length(numerator) - _bit_length(denominator)
    exponent += numerator << np.maximum(0, -exponent) >= denominator << np.maximum(0, exponent)
    exponent = np.where(numerator == 0, 0, exponent)
    shift: Array = np.minimum(arith.MANTISSA_BITS - exponent, arith.MAX_SHIFT)
    shift -= nearest(numerator, denominator, np.maximum(0, shift)) == 2**arith.MANTISSA_BITS
    if np.any(shift < 0):
        raise ModelError(
            "a requantize has a scale ratio that no dyadic number holds",
            where=where,
            found=f"a ratio of about 2^{exponent[shift < 0][0] - 1}",
            remedy="check the scales of this layer's inputs and output",
        )
    return shift


def nearest(numerator: Array, denominator: Array, shift: Array) -> Array:
    """`arith.scaled` of quotients: the integers nearest to them times 2^shift, ties away from zero."""
    magnitude = ((np.abs(numerator) << shift + 1) + denominator) // (2 * denominator)
    result: Array = np.where(numerator >= 0, magnitude, -magnitude)
    return result
