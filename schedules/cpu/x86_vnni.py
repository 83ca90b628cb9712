"""Convolutions and matrix products of 8-bit data with vpdpbusd: four products per lane and step, summed in 32 bits."""

from __future__ import annotations

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from schedules.factors import Factors
from schedules.layer import Layer
from schedules.spelling.intrinsics import dot_u8s4, dot_u8s8

from .contract_tiles import Step
from .contraction import reach_of
from .cpu_contract import Contract, Products
from .vector_unit import VectorUnit


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
        if ops.dtype_of(w) != "int8" and not layer.is_four_bits(w):
            return "weights that are not int8."
        known = layer.is_constant(w) and (ops.op_name(call) != "relax.matmul" or len(ops.shape_of(w)) == 2)
        if ops.dtype_of(x) == "int8" and not known:
            return "int8 data with weights whose sums are not known."
        return shift_leaves_int32(layer, call)

    def products(self, layer: Layer, unit: VectorUnit) -> Products:
        """Four u8 with four s8, or eight with nibbles opened in registers where 16 times the sums fit."""
        call = layer.anchor_call
        assert call is not None

        def dot(data: str, weight: str) -> str:
            return dot_u8s8(unit.lanes, data)

        if factors := Factors.of(layer, call):
            factors = factors.turned("uint8", "int8")
            return Products(Step(4), "uint8", dot, factors.added[0], in_place=True, factors=factors)
        w, offset = call.args[1], 128 if ops.dtype_of(call.args[0]) == "int8" else 0
        if (
            layer.is_four_bits(w)
            and ops.dtype_of(w) == "int8"
            and 16 * reach_of(layer.constant(w), 255) <= arith.RANGES["int32"][1]
        ):
            return Products(
                Step(8), "uint8", lambda data, weight: dot_u8s4(unit.lanes, data), offset, in_place=True, bits=4
            )
        return Products(Step(4), "uint8", dot, offset, in_place=True)


def shift_leaves_int32(layer: Layer, call: relax.Call) -> str | None:
    """A sentence where int8 data shifted to 0..255 may give sums that int32 does not hold; its weights are constant."""
    if ops.dtype_of(call.args[0]) == "int8" and reach_of(layer.constant(call.args[1]), 255) > arith.RANGES["int32"][1]:
        return "sums of shifted int8 data that may leave 32 bits."
    return None
