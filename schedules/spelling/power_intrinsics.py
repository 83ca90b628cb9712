"""Exponents of wide scores (A24) from tables that registers hold: the meaning, and how AVX-512 spells it.

Each of the two tables of (A24) is a product of two powers, of 32 entries each, and what that product lacks:

    T[i] = (C[i >> L] D[i mod 2^L] >> 32) + (bit i mod 2^L of W[i >> L]),  C, D scaled to 2^31

Nothing is rounded otherwise: `short_tables` finds the bits and fails where there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import Buffer

from hawq_tvm.core import softmax_wide

LANES, ENTRIES = 16, 32  # of a register, and of a table in two of them
KINDS = 3  # C, D and W of one table of (A24)
At = Callable[[tirx.Expr], tirx.Expr]


@cache
def short_tables(fraction: int) -> np.ndarray[Any, Any]:
    """C, D and W of the coarse table, then of the fine one, int32: their bits."""
    half, parts = fraction // 2, []
    low = half - 5
    for table, bits in zip(softmax_wide.tables(fraction), (half, fraction), strict=True):
        first = softmax_wide.powers(ENTRIES, bits - low, 31)
        second = np.resize(softmax_wide.powers(1 << low, bits, 31), ENTRIES)
        index, place = np.arange(ENTRIES)[:, None], np.arange(ENTRIES)[None, :]
        lacking = table[(index << low) + place % (1 << low)] - ((first[index] * second[place]) >> 32)
        assert np.isin(lacking, (0, 1)).all()
        parts += [first, second, (lacking << (31 - place)).sum(axis=1)]
    made: np.ndarray[Any, Any] = np.concatenate(parts).astype(np.uint32).view(np.int32)
    return made


def power_of(d: tirx.Expr, at: At, fraction: int) -> tirx.Expr:
    """(A24) of a difference d >= 0 of 31 bits; at: the elements of `short_tables`."""
    word, half = tirx.const(0xFFFFFFFF, "int64"), fraction // 2

    def factor(table: int, shift: int) -> tirx.Expr:
        index = d >> tirx.const(shift, "int32")
        high = (index >> tirx.const(half - 5, "int32")) & tirx.const(ENTRIES - 1, "int32")
        place = index & tirx.const(ENTRIES - 1, "int32")
        first, second, bits = (
            at(i + tirx.const((table * KINDS + k) * ENTRIES, "int32")) for k, i in enumerate((high, place, high))
        )
        product = (first.astype("int64") & word) * (second.astype("int64") & word)
        return ((product >> tirx.const(32, "int64")).astype("int32")) - ((bits << place) >> tirx.const(31, "int32"))

    product = factor(0, half).astype("int64") * factor(1, 0).astype("int64") + tirx.const(1 << 29, "int64")
    rounded = (product >> tirx.const(30, "int64")).astype("int32")
    return rounded >> tirx.Min(d >> tirx.const(fraction, "int32"), tirx.const(31, "int32"))


def powers_of(d: tirx.Expr, t: Buffer, fraction: int) -> tirx.Expr:
    """`power_of` for the 16 lanes of d, with vpermi2d, which looks up 16 of 32 entries."""
    half = fraction // 2

    def entry(number: int, index: tirx.Expr) -> tirx.Expr:
        """The entries that the last five bits of the lanes of `index` say."""
        both = (t.vload([number * ENTRIES + k], "int32x16") for k in (0, LANES))
        return tirx.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpermi2var.d.512", next(both), index, next(both))

    def factor(table: int, shift: int) -> tirx.Expr:
        index, high = (_right(d, n) for n in (shift, shift + half - 5))
        first, second, bits = (entry(table * KINDS + k, i) for k, i in enumerate((high, index, high)))
        turned = tirx.call_llvm_pure_intrin("int32x16", "llvm.fshl", bits, bits, index)  # by its last five bits
        return _halves(_products(first, second), 32) - _right(turned, 31)

    half_unit = tirx.Broadcast(tirx.const(1 << 29, "int64"), LANES // 2)
    rounded = _halves([p + half_unit for p in _products(factor(0, half), factor(1, 0))], 30)
    return rounded >> tirx.Min(_right(d, fraction), tirx.Broadcast(tirx.const(31, "int32"), LANES))


def _right(x: tirx.Expr, by: int) -> tirx.Expr:
    return x >> tirx.Broadcast(tirx.const(by, "int32"), LANES) if by else x


def _products(a: tirx.Expr, b: tirx.Expr) -> list[tirx.Expr]:
    """The products of the even lanes and of the odd ones, unsigned."""
    word, bits = (tirx.Broadcast(tirx.const(v, "uint64"), LANES // 2) for v in (0xFFFFFFFF, 32))
    pairs = [tirx.reinterpret("uint64x8", x) for x in (a, b)]
    (even_a, odd_a), (even_b, odd_b) = ((x & word, x >> bits) for x in pairs)
    return [even_a * even_b, odd_a * odd_b]


def _halves(products: list[tirx.Expr], by: int) -> tirx.Expr:
    """Bits `by` to `by` + 31 of the even lanes' products and of the odd ones', side by side."""
    even, odd = products
    right, left = (tirx.Broadcast(tirx.const(n, "uint64"), LANES // 2) for n in (by, 32 - by))
    low, high = (tirx.Broadcast(tirx.const(m, "uint64"), LANES // 2) for m in (0xFFFFFFFF, 0xFFFFFFFF << 32))
    return tirx.reinterpret("int32x16", ((even >> right) & low) | ((odd << left) & high))
