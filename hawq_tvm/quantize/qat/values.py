"""What a tensor is while a network is trained in the deployed arithmetic: integers, sums that nothing has quantized
yet, concatenations, functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from .straight import EXACT_FLOAT32, Array, Operand, Tensor

INFINITY = float("inf")
# Elementwise, of floats and Fractions: exact products.
_products = np.frompyfunc(lambda a, b: Fraction(a) * Fraction(b), 2, 1)


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: real = codes scale, zero point taken away; low, high: what codes can be; step: the scale
    as the file holds it.
    """

    codes: Tensor
    scale: Tensor
    step: float
    low: int
    high: int

    def sum(self) -> Real:
        """The same as a sum of one operand."""
        return Real(
            (Operand(self.codes, self.scale, np.asarray(self.step), np.asarray(self.low), np.asarray(self.high)),)
        )

    @property
    def real(self) -> Tensor:
        """The real values."""
        return self.codes * self.scale


@dataclass(frozen=True)
class Real:
    """What nothing has quantized yet: a sum of integers with scales of their own and a constant, clipped."""

    operands: tuple[Operand, ...]
    constant: Array = field(default_factory=lambda: np.zeros(()))
    low: float | Fraction = -INFINITY
    high: float | Fraction = INFINITY

    @property
    def clips(self) -> bool:
        """Whether there are bounds."""
        return self.low > -INFINITY or self.high < INFINITY

    def clipped(self, low: float | None, high: float | None) -> Real:
        """Within bounds as well."""
        least, most = (-INFINITY if low is None else low), (INFINITY if high is None else high)
        return replace(self, low=min(max(self.low, least), most), high=min(max(self.high, least), most))

    def span(self, step: float, low: int, high: int) -> tuple[int, int]:
        """(A12): the least and the greatest of the integers low .. high at a scale that the bounds leave."""

        def level(bound: float | Fraction, limit: int) -> int:
            return limit if abs(bound) == INFINITY else min(max(round(Fraction(bound) / Fraction(step)), low), high)

        return level(self.low, low), level(self.high, high)

    def times(self, factor: Array) -> Real:
        """Multiplied by exact numbers, which may differ between channels where there are no bounds."""
        scaled = []
        for one in self.operands:
            soft = torch.as_tensor(factor.astype(np.float32), device=one.codes.device)
            scaled.append(replace(one, scale=one.scale * soft, exact=np.asarray(_products(one.exact, factor), object)))
        low, high = (v if abs(v) == INFINITY else Fraction(v) * factor.flat[0] for v in (self.low, self.high))
        return Real(tuple(scaled), np.asarray(_products(self.constant, factor), object), low, high)


@dataclass(frozen=True)
class Joined:
    """A concatenation, whose parts get one scale when it is quantized."""

    parts: tuple[Real, ...]
    axis: int


@dataclass(frozen=True)
class Curve:
    """A function of every element of one quantized tensor: its real values, which carry the gradient."""

    leaf: Codes
    real: Tensor


def added(terms: Sequence[Real]) -> Real:
    """The sum of terms without bounds, exactly."""
    constant: Array = np.zeros((), object)
    for term in terms:
        constant = constant + _products(term.constant, 1)
    return Real(tuple(o for t in terms for o in t.operands), np.asarray(constant, object))


def product(a: Codes, b: Codes) -> Real:
    """The products of two quantized tensors' integers."""
    ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    kind = torch.float32 if max(map(abs, ends)) < EXACT_FLOAT32 else torch.float64
    exact = np.asarray(Fraction(a.step) * Fraction(b.step), object)
    codes = a.codes.to(kind) * b.codes.to(kind)
    return Real((Operand(codes, a.scale * b.scale, exact, np.asarray(min(ends)), np.asarray(max(ends))),))
