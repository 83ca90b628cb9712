"""Round half up wherever that gives the same integers, because it takes fewer instructions (INTEGER -> INTEGER).

1. a rounding to nearest of one operand: x m + b = 2^(s-1) (mod 2^s) is solved for x and looked for in the interval of x
2. of two operands of at most 8 bits: every pair of values is tried
3. floor and ceil are half_up with another constant (A7b, A7c)
4. where nothing below the zero point is kept (unsigned after ReLU), only what positive numbers do counts: toward_zero is
   floor, away is ceil, half_away is half_up, and half_toward_zero is half_up of one less
Whatever else has a tie within reach, or too many pairs, stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm import arith, ops, ranges

from .rewriter import Rebuild, rewrite_main

Array = np.ndarray[Any, Any]
MOST_PAIRS = 1 << 24


def drop_ties(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with half_up where it equals the rounding asked for, and how many requantize operators changed."""
    known, count = ranges.module_ranges(module), 0

    def interval(operand: relax.Expr) -> ranges.Interval:
        if isinstance(operand, relax.Var) and operand.name in known:
            return known[operand.name]
        return ranges.Interval.of_range(*arith.RANGES[ops.dtype_of(operand)])

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        if ops.op_name(value) != "hawq.requantize" or str(value.attrs["rounding"]) in ("half_up", "double"):
            return None
        operands = list(binding.value.args[0].fields)
        change = _change(value)
        if str(value.attrs["rounding"]) not in arith.DIRECTED and not has_tie(value, [interval(o) for o in operands]):
            change = np.zeros((), np.int64)
        if change is None:
            return None
        count += 1
        attrs, (data, multipliers, offset, shift) = value.attrs, value.args
        return ops.requantize(
            list(data.fields), [ops.const_value(m) for m in multipliers.fields], ops.const_value(offset) + change, ops.const_value(shift),
            qtype=arith.QType(int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["out_dtype"])),
            zero_point=int(attrs["zero_point"]), rounding="half_up",
            thresholds=int(attrs["thresholds"]), differing=int(attrs["differing"]),
        )  # fmt: skip

    return rewrite_main(module, visit), count


def _change(call: relax.Call) -> Array | None:
    """Cases 3 and 4: what to add to the offset so that half_up takes the place of a rounding; None where nothing does."""
    rounding, shift = str(call.attrs["rounding"]), ops.const_value(call.args[3]).astype(np.int64)
    if int(call.attrs["qmin"]) >= int(call.attrs["zero_point"]):
        rounding = {"toward_zero": "floor", "away": "ceil", "half_away": "half_up"}.get(rounding, rounding)
        if rounding == "half_toward_zero":
            return np.where(shift > 0, np.int64(-1), np.int64(0))
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), np.int64(0))
    changes = {"floor": -half, "ceil": np.maximum(half - 1, 0), "half_up": np.zeros((), np.int64)}
    return changes.get(rounding)


def has_tie(call: relax.Call, intervals: Sequence[ranges.Interval]) -> bool:
    """Whether some operands within their intervals put a requantize exactly between two integers, as far as can be told."""
    multipliers = [ops.const_value(m).astype(np.int64) for m in call.args[1].fields]
    offset, shift = (ops.const_value(a).astype(np.int64) for a in call.args[2:4])
    if len(intervals) == 1:
        bounds = [np.asarray(b) for b in (intervals[0].low, intervals[0].high)]
        rows = np.broadcast_arrays(multipliers[0], offset, shift, *bounds)
        return any(_reaches_tie(*row) for row in {tuple(int(v) for v in row) for row in zip(*(r.ravel() for r in rows), strict=True)})
    if len(intervals) == 2:
        (low_a, high_a), (low_b, high_b) = (i.scalar for i in intervals)
        arrays = np.broadcast_arrays(*multipliers, offset, shift)
        if (high_a - low_a + 1) * (high_b - low_b + 1) * arrays[0].size <= MOST_PAIRS:
            a, b = np.arange(low_a, high_a + 1)[:, None], np.arange(low_b, high_b + 1)
            return any(_pairs_tie(a * m + b * n, c, s) for m, n, c, s in zip(*(v.ravel() for v in arrays), strict=True))
    return True


def _pairs_tie(products: Array, offset: Any, shift: Any) -> bool:
    if shift < 1:
        return False
    return bool(np.any((products + offset) & ((1 << shift) - 1) == 1 << (shift - 1)))


def _reaches_tie(m: int, offset: int, shift: int, low: int, high: int) -> bool:
    """Whether x m + offset = 2^(shift-1) modulo 2^shift has a solution x in low..high."""
    if shift < 1:
        return False
    wanted = ((1 << (shift - 1)) - offset) % (1 << shift)
    if m == 0:
        return wanted == 0
    twos = min((m & -m).bit_length() - 1, shift)
    if wanted % (1 << twos):
        return False
    modulus = 1 << (shift - twos)
    x = (wanted >> twos) * pow(m >> twos, -1, modulus) % modulus
    return low + (x - low) % modulus <= high
