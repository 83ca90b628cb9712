"""The TE stage of a table (A16) of 16 or 32 bits behind bytes, for schedules that look up in registers."""

from __future__ import annotations

import numpy as np
from tvm import relax, te

from hawq_tvm.core import ops
from schedules.spelling.lookup_intrinsics import WIDE, joined, planes

from .emit import EMITTERS, Emission, Operand
from .emit_requantize import is_bytes


def lookup(e: Emission, call: relax.Call, permutes: str) -> Operand | te.Tensor | list[te.Tensor]:
    """A stage called WIDE, with the table's parts apart, where entries have 16 or 32 bits and indices are bytes that
    another stage makes; else that of every table.

    permutes: what the CPU looks up in registers; "" for none.
    """
    x, dtype = e.operand(call.args[0]), ops.dtype_of(call)
    made = is_bytes(x, x.shape) and isinstance(x.tensor.op, te.ComputeOp)
    if not permutes or not made or np.dtype(dtype).itemsize not in (2, 4):
        return EMITTERS["hawq.lookup"](e, call)
    parts = planes(ops.const_value(call.args[1]), permutes)
    table, low = e.argument(parts), np.iinfo(x.dtype).min
    return te.compute(
        x.shape,
        lambda *i: joined([table(k, x.at(i).astype("int32") - low) for k in range(len(parts))], dtype),
        name=WIDE,
    )
