"""Constant weights whose scales vary along what is summed: a few integer weights with one scale an output (A10a)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hawq_tvm.core import arith

from .exact import product, rational
from .values import LARGEST, Array, Constant, Context, broadcast_rank, compress

# The largest scale of an output has as many bits as any multiplier (A3); a digit of a weight is an int8.
BITS, DIGIT = arith.MANTISSA_BITS, 256
# Bits of the lower part of a float weight, whose upper part is an int8.
LOWER = 15

_exponent = np.frompyfunc(lambda x: x.numerator.bit_length() - x.denominator.bit_length(), 1, 1)
_power_of_two = np.frompyfunc(lambda e: Fraction(2) ** int(e), 1, 1)
_nearest = np.frompyfunc(arith.round_fraction, 1, 1)


def with_output_scales(
    ctx: Context, weight: Constant, factor: Array, axes: Sequence[int], op: str
) -> tuple[list[tuple[Array, Array]], float]:
    """A weight times a factor as a sum of integer arrays times scales that do not vary along `axes`; and how far off a
    sum of their products with integers of magnitude 1 can be at most, in units of the first.

    axes: what is summed.  factor: the data's scales there, of the weight's rank.
    Raises NotLowered for a weight without integers, and for very many different scales.
    """
    if weight.scale is None:
        raise ctx.fail(op, "its weight is float and not quantized", "quantize the weight of this node too")
    values = weight.values
    inner, outer = broadcast_rank(compress(weight.scale), values.ndim), broadcast_rank(factor, values.ndim)
    if _varies(outer, axes):
        inner, outer = outer, inner
    if _varies(outer, axes):
        inner, outer = _product(ctx, inner, outer, op), np.ones((), np.int64)
    steps, places = _runs(inner, axes)
    for part in (steps, outer):
        _check_few(ctx, part.shape, op)
    if not _varies(inner, axes):
        parts = halves(values) if weight.rounded else _digits(values)
        whole = product(steps, outer)
        given = [(part, whole if digit == 1 else np.asarray(digit * whole, object)) for part, digit in parts]
        return given, weight.off
    multiples, unit, off = _multiples(rational(steps), _used(values, places), axes)
    for axis, place in places.items():
        multiples, off = np.take(multiples, place, axis), np.take(off, place, axis)
    lost = most_summed(np.abs(values) * off, axes)
    parts, scale = _digits(values.astype(np.int64) * multiples), rational(outer)
    made = [(part, np.asarray(digit * unit * scale, object)) for part, digit in parts]
    return made, (lost + weight.off * float(np.max(multiples))) * (1 + 2.0**-50)


def most_summed(parts: Array, axes: Sequence[int]) -> float:
    """At least the largest sum, along axes, of numbers that are not below 0, each a product rounded once."""
    sums = np.sum(parts, axis=tuple(axes))
    # Every addition of float64 loses 2^-53 of what it has at most.
    slack: float = (parts.size // sums.size + 4) * 2.0**-52
    return float(np.max(sums)) * (1 + slack)


def halves(values: Array) -> list[tuple[Array, int]]:
    """An integer weight of 22 bits as 7 bits and 15 below them, which stay in int16: `prove` knows by it that they are
    rounded.
    """
    upper = (values + (1 << LOWER - 1)) >> LOWER
    return [(upper, 1 << LOWER), ((values - (upper << LOWER)).astype(np.int16), 1)]


def _varies(array: Array, axes: Sequence[int]) -> bool:
    return any(array.shape[a] > 1 for a in axes)


def _product(ctx: Context, a: Array, b: Array, op: str) -> Array:
    """The exact product of broadcasting constants."""
    _check_few(ctx, np.broadcast_shapes(a.shape, b.shape), op)
    return product(a, b)


def _check_few(ctx: Context, shape: Sequence[int], op: str) -> None:
    if int(np.prod(shape)) > LARGEST:
        raise ctx.fail(op, "its weight has very many different scales", "use larger blocks, or scales per channel")


def _runs(array: Array, axes: Sequence[int]) -> tuple[Array, dict[int, Array]]:
    """The array with equal neighbours along each axis as one, and for every place along it the number of its run."""
    places = {}
    for axis in axes:
        first = np.moveaxis(array, axis, 0)
        changes = np.any(first[1:] != first[:-1], axis=tuple(range(1, array.ndim)))
        places[axis] = np.concatenate([[0], np.cumsum(changes)])
        array = np.compress(np.concatenate([[True], changes]), array, axis)
    return array, {a: p for a, p in places.items() if p.size > 1}


def _used(values: Array, places: dict[int, Array]) -> Array:
    """Whether any weight of a run differs from zero; what stands beside zeros alone has no say in the scales."""
    used = np.asarray(values != 0)
    for axis, place in places.items():
        used = np.asarray(np.logical_or.reduceat(used, np.flatnonzero(np.diff(place, prepend=-1)), axis))
    return used


def _multiples(steps: Array, used: Array, axes: Sequence[int]) -> tuple[Array, Array, Array]:
    """Scales as integers times a number of each output, and how far off these are: of 31 bits where they need as many,
    as (A4) has it.
    """
    for axis in range(used.ndim):
        if steps.shape[axis] == 1 and used.shape[axis] > 1:
            used = np.asarray(used.any(axis, keepdims=True))
    steps = np.where(used, steps, rational(0))
    largest = np.max(np.abs(steps), axis=tuple(axes), keepdims=True)
    unit = np.asarray(_power_of_two(_exponent(largest) + 1 - BITS), object)
    exact = np.asarray(steps / unit, object)
    multiples = np.asarray(_nearest(exact)).astype(np.int64)
    off = np.abs(exact - multiples).astype(np.float64)
    common = multiples
    for axis in axes:
        common = np.gcd.reduce(common, axis=axis, keepdims=True)
    # Multiples that are rounded keep all of their bits, and are digits: no operator reads these but a requantize.
    common = np.where(np.any(off, axis=tuple(axes), keepdims=True), 1, np.maximum(common, 1))
    return multiples // common, np.asarray(unit * common.astype(object), object), off


def _digits(weight: Array) -> list[tuple[Array, int]]:
    """An integer weight as itself where 16 bits hold it, else as digits between -128 and 127 of base 256."""
    low, high = arith.RANGES["int16"]
    if low <= weight.min(initial=0) and weight.max(initial=0) <= high:
        return [(weight, 1)]
    parts, place = [], 1
    while np.any(weight):
        digit = (weight + DIGIT // 2) % DIGIT - DIGIT // 2
        parts.append((digit, place))
        weight, place = (weight - digit) // DIGIT, place * DIGIT
    return parts
