"""Convolutions and matrix products on Arm: registers of 16 bytes of data, a lane of which multiplies four channels
at a time.

A family of instructions is one instance of the rule: smmla (two pixels x two channels x 8 products), sdot (four
channels x 4 products), or smlal (four channels x 1 product of 16 bits). All are exact for every operand.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from schedules.factors import Factors
from schedules.layer import Layer, reach_of
from schedules.narrow import PLANES, wider
from schedules.spelling.neon_intrinsics import LANES, Inner, inner_product

from .contract_tiles import Step
from .contraction import shape_of
from .cpu_contract import Contract, Products
from .vector_unit import VectorUnit

WASTE = 1.05  # so many more products are worth a fuller register of data
INT32_MAX = arith.RANGES["int32"][1]


@dataclass(frozen=True)
class Multiplier:
    """An instruction for a type of data: their type in registers, and what is added to them first."""

    name: str
    registers: str
    offset: int = 0


@dataclass(frozen=True)
class Family:
    """Instructions of one shape, by the types of data and of weights.

    depth, together: as in Inner.  inners: how many a register of data may serve, the most first.  weights: registers
    for them.
    """

    depth: int
    together: int
    inners: tuple[int, ...]
    multipliers: dict[tuple[str, str], Multiplier]
    weights: int = 4

    def inner(self, run: int) -> int:
        """The instructions per register of data for a run: the most that add next to no products with zeros."""
        padded = {i: -(-run // (self.depth * i)) * self.depth * i for i in self.inners}
        return next(i for i in self.inners if padded[i] <= WASTE * min(padded.values()))


_SAME = {("int8", "int8"): "s", ("uint8", "uint8"): "u"}
_MIXED = ("uint8", "int8")
MATRICES = Family(8, 2, (2, 1), {t: Multiplier(f"{s}mmla", t[0]) for t, s in [*_SAME.items(), (_MIXED, "us")]})
# Unsigned data and signed weights without usdot: data less 128 are signed.
DOTS = Family(
    4,
    1,
    (4, 2, 1),
    {**{t: Multiplier(f"{s}dot", t[0]) for t, s in _SAME.items()}, _MIXED: Multiplier("sdot", "int8", -128)},
)
MIXED_DOTS = Family(4, 1, (4, 2, 1), {**DOTS.multipliers, _MIXED: Multiplier("usdot", "uint8")})
# LLVM widens the weights of two vectors of channels ahead: with fewer registers for them, sums go to memory and back in
# the innermost loop.
PAIRS = Family(
    2,
    1,
    (4, 2, 1),
    {(x, w): Multiplier("smlal", "int16") for x in ("int8", "uint8", "int16") for w in ("int8", "uint8")},
    weights=16,
)


class Neon(Contract):
    """u8 or s8 data and 8-bit or 4-bit weights with int32 sums, up to 16 bits with smlal; 4-bit weights are opened
    in registers.

    extension: "i8mm", "dotprod" or "neon", as LLVM calls it.
    """

    def __init__(self, extension: str) -> None:
        super().__init__()
        self.extension, self.name = extension, f"arm.{extension}"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """A contraction of types that the family has an instruction for, on a CPU that has the extension."""
        unit = self.unit or VectorUnit.of(target)
        if self.extension not in unit.neon:
            return f"the target has no {self.extension}."
        why = super().applies(layer, target)
        call = layer.anchor_call
        if why or call is None:
            return why
        x, w = call.args
        types, factors = (ops.dtype_of(x), weight_type(layer, w)), self.factors(layer, unit)
        types = factors.stored if factors else types
        multiplier = self.family(unit).multipliers.get(types)
        if multiplier is None or ops.dtype_of(call) != "int32":
            return f"no instruction for {types[0]} times {types[1]} in {ops.dtype_of(call)}."
        shape = shape_of(call, LANES)
        if self.extension == "i8mm" and shape.pixels == 1:
            return "a single pixel in a row, of the two of an instruction."
        if factors:
            return factors.too_long()
        if multiplier.offset:
            if not layer.is_constant(w) or (ops.op_name(call) == "relax.matmul" and len(ops.shape_of(w)) > 2):
                return "shifted data with weights whose sums are not known."
            if reach_of(layer.constant(w), _largest(multiplier)) > INT32_MAX:
                return "sums of shifted data that may leave 32 bits."
        return None

    def family(self, unit: VectorUnit) -> Family:
        """The instructions of the extension, with mixed signs where the unit has those."""
        if self.extension == "neon":
            return PAIRS
        if self.extension == "i8mm":
            return MATRICES
        return MIXED_DOTS if "i8mm" in unit.neon else DOTS

    def factors(self, layer: Layer, unit: VectorUnit) -> Factors | None:
        """The factors of a product of bytes computed at run time, turned as an instruction takes them."""
        call = layer.anchor_call
        assert call is not None
        found = Factors.of(layer, call)
        if found is None:
            return None
        known = self.family(unit).multipliers
        right = found.types[1] if found.types in known else "int8"
        return found.turned(known[found.types[0], right].registers, right)

    def products(self, layer: Layer, unit: VectorUnit) -> Products:
        """Steps of a whole register of data, or less where that would be mostly zeros."""
        call = layer.anchor_call
        assert call is not None
        x, w = call.args
        family, factors = self.family(unit), self.factors(layer, unit)
        types = factors.stored if factors else (ops.dtype_of(x), weight_type(layer, w))
        m, inner = family.multipliers[types], family.inner(shape_of(call, LANES).run)
        offset = factors.added[0] if factors else m.offset
        width = _opened(layer, w, inner, _largest(m))

        def intrinsic(data: str, weight: str) -> str:
            return inner_product(
                Inner(m.name, data, "uint8" if width < 8 else weight, family.depth, inner, family.together, width)
            )

        stored = m.registers if offset else types[0]
        step = Step(family.depth, inner, family.together, loaded=True, weights=family.weights)
        return Products(step, stored, intrinsic, offset, True, bits=8 - width, registers=m.registers, factors=factors)


def _opened(layer: Layer, weights: relax.Expr, inner: int, largest: int) -> int:
    """The width of weights that registers are opened from, 8 where none are: `inner` instructions share whole bytes,
    and the sums that are so many times too large fit.
    """
    if ops.dtype_of(weights) != "int8" or layer.width(weights) == 8:
        return 8
    reach = reach_of(layer.constant(weights), largest)
    own = (w for w in wider(layer.width(weights)) if len(PLANES[w]) == 1 and inner * w % 8 == 0)
    return next((w for w in own if reach << 8 - w <= INT32_MAX), 8)


def weight_type(layer: Layer, weights: relax.Expr) -> str:
    """The type of weights as they are multiplied."""
    return "int8" if layer.width(weights) < 8 else ops.dtype_of(weights)


def _largest(m: Multiplier) -> int:
    """The largest magnitude of data in registers."""
    low, high = arith.RANGES[m.registers]
    return max(-low, high)
