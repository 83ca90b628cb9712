"""Rounding that training sees through: the value is the deployed integer, the gradient that of the real formula it
stands for (straight-through).

Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013; with the division by the scale
inside, the gradient of a scale is that of Esser et al., "Learned Step Size Quantization", 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from hawq_tvm.core import thresholds, two_steps

Tensor = torch.Tensor
Array = np.ndarray[Any, Any]
# float32 holds every integer up to here, so that sums below it are exact in whatever order they are made.
EXACT_FLOAT32, EXACT_FLOAT64 = 1 << 24, 1 << 53
# What quantizers of ours write rounds half to even (A6).
ROUNDING = "half_even"


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, soft: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0], None


def straight(soft: Tensor, exact: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `soft`."""
    return _Straight.apply(soft, exact.to(soft.dtype))


def rounded(soft: Tensor) -> Tensor:
    """The nearest integers, ties to even."""
    return straight(soft, soft.detach().round())


@dataclass(frozen=True)
class Operand:
    """Integers on their way to a requantize: real = codes scale.

    codes: integers in a floating type that holds them exactly.  scale: a tensor that broadcasts against codes and
    carries the gradient.  exact: the same scale, floats or Fractions, as the compiler computes it.  low, high:
    bounds of codes that broadcast against exact.
    """

    codes: Tensor
    scale: Tensor
    exact: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Numbers:
    """The integers of (A9), int64 arrays that broadcast: one multiplier per operand, offset and shift.

    bits: 0, or those after the point of (A23a), whose first step they are.
    """

    multipliers: tuple[Array, ...]
    offset: Array
    shift: Array
    bits: int = 0


def requantized(
    operands: Sequence[Operand], constant: Array, scale: Tensor, step: float, bounds: tuple[int, int], where: str
) -> Tensor:
    """(A9): the sum of operands and a real constant at the scale `step`, as integers with the zero point taken away.

    scale: `step` with its gradient.  bounds: of the result, less the zero point as well.  where: the layer, for errors.
    Raises ModelError when no dyadic numbers hold the scales.
    """
    soft = sum((o.codes * (o.scale / scale) for o in operands), torch.zeros((), device=scale.device))
    if np.any(constant):
        added = np.asarray(constant, np.float64)
        soft = soft + torch.as_tensor(added, dtype=soft.dtype, device=soft.device) / scale
    with torch.no_grad():
        exact = shifted([o.codes for o in operands], dyadic_numbers(operands, constant, step, bounds, where)).clamp(
            *bounds
        )
    return straight(soft.clamp(*bounds), exact).float()


def shifted(codes: Sequence[Tensor], numbers: Numbers) -> Tensor:
    """round((sum x_i m_i + b) / 2^s), ties to even (A6), in int64; in two steps where the numbers ask for it (A23a)."""
    device = codes[0].device
    total = torch.as_tensor(numbers.offset, device=device)
    for x, multiplier in zip(codes, numbers.multipliers, strict=True):
        total = total + x.to(torch.int64) * torch.as_tensor(multiplier, device=device)
    shift = torch.as_tensor(numbers.shift, device=device)
    if numbers.bits:
        fine = total >> shift
        return (fine + (1 << numbers.bits - 1) - 1 + ((fine >> numbers.bits) & 1)) >> numbers.bits
    rounded_up = (
        total
        + torch.as_tensor((np.int64(1) << np.maximum(numbers.shift, 1) - 1) - 1, device=device)
        + ((total >> shift) & 1)
    ) >> shift
    return rounded_up if numbers.shift.min() > 0 else torch.where(shift > 0, rounded_up, total)


def dyadic_numbers(
    operands: Sequence[Operand], constant: Array, step: float, bounds: tuple[int, int], where: str
) -> Numbers:
    """The numbers with which the compiler computes this requantize, or others of the same thresholds (A22).

    The compiler may know narrower bounds of the operands. Inside them both step where the real formula does.
    """
    columns = [np.asarray(a) for o in operands for a in (o.exact, o.low, o.high)]
    shape = np.broadcast_shapes(*(c.shape for c in columns), np.shape(constant))
    rows = list(zip(*(np.broadcast_to(c, shape).ravel().tolist() for c in (*columns, constant)), strict=True))
    unit, steps = Fraction(step), (bounds[0] + 1, bounds[1])
    known = {}
    for row in dict.fromkeys(rows):
        ratios = tuple(Fraction(scale) / unit for scale in row[0:-1:3])
        known[row] = thresholds.dyadic_rescale(
            ratios, [0] * len(ratios), Fraction(row[-1]) / unit, row[1:-1:3], row[2:-1:3], ROUNDING, where
        )
    made: Sequence[thresholds.Rescale] = list(known.values())
    proof, exact = thresholds.Proof(), None
    if len(operands) == 1:
        made, proof = thresholds.settle(made, [1] * len(made), ROUNDING, steps)
    # The compiler looks for exact numbers where thresholds of several operands differ; where they have a common
    # measure, this is as fast.
    if proof.differing or (len(operands) > 1 and all(map(two_steps.common_measure, made))):
        exact = two_steps.exactly(made, [1] * len(made), ROUNDING, steps, where)
    each = [r.multipliers for r in made]
    if exact is not None:
        made = exact.rescales
        each = [tuple(c * r.multipliers[0] for c in counts) for r, counts in zip(made, exact.counts, strict=True)]
    index = dict(zip(known, range(len(known)), strict=True))
    found = [made[index[row]] for row in rows]

    def back(values: Sequence[int]) -> Array:
        return np.array(values, np.int64).reshape(shape)

    multipliers = tuple(back([each[index[row]][i] for row in rows]) for i in range(len(operands)))
    bits = exact.bits if exact is not None else 0
    return Numbers(multipliers, back([r.offset for r in found]), back([r.shift for r in found]), bits)
