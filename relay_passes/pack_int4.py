"""Pack 4-bit weights two to a byte (A20; INTEGER -> INTEGER).

1. the constant weight of a convolution or matrix product, all values in -8..7 (int8) -> unpack_int4(packed)
2. likewise in 0..15 (uint8)
Tensors of fewer than 64 values stay as they are: there is nothing to gain.
"""

from __future__ import annotations

import tvm
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.rewriter import Rebuild, rewrite_main

SMALLEST = 64
_WEIGHT = {"relax.nn.conv2d": 1, "relax.matmul": 1}


def pack_int4(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with its 4-bit weights packed, and how many there were."""
    count = 0

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        index = _WEIGHT.get(ops.op_name(value))
        if index is None or not ops.is_const(value.args[index]):
            return None
        weight = ops.const_value(value.args[index])
        signed = str(weight.dtype) == "int8"
        low, high = arith.RANGES["int4" if signed else "uint4"]
        if (
            str(weight.dtype) not in ("int8", "uint8")
            or weight.size < SMALLEST
            or weight.min() < low
            or weight.max() > high
        ):
            return None
        count += 1
        unpacked = ops.unpack_int4(arith.pack_int4(weight), weight.shape, signed)
        args = list(value.args)
        args[index] = rebuild.emit(unpacked, f"{binding.var.name}.weight")
        return relax.Call(value.op, args, attrs=value.attrs)

    return rewrite_main(module, visit), count
