"""Convolutions and matrix products of 8-bit data with vpdpbusd: four products per lane and step, summed in 32 bits."""

from __future__ import annotations

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from schedules.factors import Factors
from schedules.layer import Layer, reach_of
from schedules.narrow import wider
from schedules.spelling.intrinsics import depth_of, dot_narrow, dot_u8s8

from .contract_tiles import Step
from .contraction import shape_of
from .cpu_contract import Contract, Products
from .vector_unit import VectorUnit

WASTE = 1.05  # so many more products are worth fewer bytes


class Vnni(Contract):
    """u8 or s8 data and s8 weights on AVX512-VNNI or AVX-VNNI; s8 data is shifted by 128 and the shift taken off
    again.
    """

    name = "x86.vnni"

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """An 8-bit contraction on a CPU with vpdpbusd."""
        unit = self.unit or VectorUnit.of(target)
        if not unit.quads:
            return "the target has no VNNI."
        why = super().applies(layer, target)
        call = layer.anchor_call
        if why or call is None:
            return why
        if factors := Factors.of(layer, call):
            return factors.turned("uint8", "int8").too_long()
        x, w = call.args
        if ops.dtype_of(x) not in ("uint8", "int8") or ops.dtype_of(call) != "int32":
            return "data of more than 8 bits, or sums of more than 32."
        if ops.dtype_of(w) != "int8" and layer.width(w) == 8:
            return "weights that are not int8."
        known = layer.is_constant(w) and (ops.op_name(call) != "relax.matmul" or len(ops.shape_of(w)) == 2)
        if ops.dtype_of(x) == "int8" and not known:
            return "int8 data with weights whose sums are not known."
        return shift_leaves_int32(layer, call)

    def products(self, layer: Layer, unit: VectorUnit) -> Products:
        """Four u8 with four s8, or more with narrow weights opened in registers."""
        call = layer.anchor_call
        assert call is not None

        def dot(data: str, weight: str) -> str:
            return dot_u8s8(unit.lanes, data)

        if factors := Factors.of(layer, call):
            factors = factors.turned("uint8", "int8")
            return Products(Step(4), "uint8", dot, factors.added[0], in_place=True, factors=factors)
        offset, width = 128 if ops.dtype_of(call.args[0]) == "int8" else 0, _opened(layer, call, unit)
        if width == 8:
            return Products(Step(4), "uint8", dot, offset, in_place=True)
        return Products(
            Step(depth_of(width)),
            "uint8",
            lambda data, weight: dot_narrow(unit.lanes, data, width),
            offset,
            in_place=True,
            bits=8 - width,
        )


def _opened(layer: Layer, call: relax.Call, unit: VectorUnit) -> int:
    """The width of weights that registers are opened from, 8 where none are: the sums that are so many times too large
    fit, and longer steps than those of 4 bits add next to no products with zeros.
    """
    if ops.dtype_of(call.args[1]) != "int8" or layer.width(call.args[1]) == 8:
        return 8
    reach, run = reach_of(layer.constant(call.args[1]), 255), shape_of(call, unit.lanes).run

    def padded(width: int) -> int:
        return -(-run // depth_of(width)) * depth_of(width)

    for width in wider(layer.width(call.args[1])):
        if reach << 8 - width <= arith.RANGES["int32"][1] and padded(width) <= WASTE * padded(4):
            return width
    return 8


def shift_leaves_int32(layer: Layer, call: relax.Call) -> str | None:
    """A sentence where int8 data shifted to 0..255 may give sums that int32 does not hold; its weights are constant."""
    if ops.dtype_of(call.args[0]) == "int8" and reach_of(layer.constant(call.args[1]), 255) > arith.RANGES["int32"][1]:
        return "sums of shifted int8 data that may leave 32 bits."
    return None
