"""Arrays of Fractions: the numbers of a model's file, exactly."""

from __future__ import annotations

from fractions import Fraction
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_fractions = np.frompyfunc(lambda x: x if type(x) is Fraction else Fraction(x), 1, 1)
_nearest = np.frompyfunc(round, 1, 1)
_numerator = np.frompyfunc(attrgetter("numerator"), 1, 1)
integral = np.frompyfunc(lambda x: x.denominator == 1, 1, 1)


def rational(array: Any) -> Array:
    """The numbers of an array as Fractions, exactly.  Raises ValueError or OverflowError for a number that is not
    finite.
    """
    given: Array = np.asarray(array)
    if given.dtype == object and set(map(type, given.ravel().tolist())) == {Fraction}:
        return given
    return np.asarray(_fractions(given), object)


def product(a: Array, b: Array) -> Array:
    """The exact products of two arrays' numbers, as Fractions.

    Where all numbers are float32's, float64 holds them: that is faster than to multiply Fractions.
    """
    singles = [_of_singles(np.asarray(array)) for array in (a, b)]
    if singles[0] is not None and singles[1] is not None:
        return rational(singles[0] * singles[1])
    return np.asarray(rational(a) * rational(b), object)


def _of_singles(array: Array) -> Array | None:
    """The array in float64 where it is known to hold float32's."""
    if array.dtype == object and array.size == 1 and isinstance(number := array.flat[0], Fraction):
        below = number.denominator
        short = number.numerator.bit_length() <= 24 and below & (below - 1) == 0 and below.bit_length() < 127
        return np.full(array.shape, float(number)) if short else None
    return array.astype(np.float64) if array.dtype == np.float32 else None


def negative(array: Array) -> Array:
    """Which Fractions are below 0."""
    return np.asarray(_numerator(array) < 0, bool)


def nearest(array: Array) -> Array:
    """Fractions rounded to the nearest integers, ties to even, as Python's integers."""
    return np.asarray(_nearest(array), object)
