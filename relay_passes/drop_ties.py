"""Round half up wherever that gives the same integers, because it takes fewer instructions (INTEGER -> INTEGER).

1. a rounding to nearest of one operand: x m + b = 2^(s-1) (mod 2^s) is solved for x and looked for in its interval
2. of two operands of at most 8 bits: every pair of values is tried
3. floor and ceil are half_up with another constant (A7b, A7c)
4. where nothing below the zero point is kept (unsigned after ReLU), only what positive numbers do counts: toward_zero
   is floor, away is ceil, half_away is half_up, and half_toward_zero is half_up of one less
Of 1 and 2, ties between two results that are clamped to the same integer do not count. If all others of a channel go
down, half_up of one less takes them there. Whatever has ties in both directions, or too many, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, ops, ranges
from hawq_tvm.core.intervals import Interval
from hawq_tvm.core.rewriter import Rebuild, rewrite_main

Array = np.ndarray[Any, Any]
MOST_PAIRS, MOST_TIES = 1 << 24, 1 << 16

_inverse = np.frompyfunc(lambda m, modulus: pow(m, -1, modulus), 2, 1)


def drop_ties(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with half_up where it equals the rounding asked for, and how many requantize operators changed."""
    known, count = ranges.module_ranges(module), 0

    def interval(operand: relax.Expr) -> Interval:
        if isinstance(operand, relax.Var) and operand.name in known:
            return known[operand.name]
        return Interval.of_range(*arith.RANGES[ops.dtype_of(operand)])

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        if ops.op_name(value) != "hawq.requantize" or str(value.attrs["rounding"]) in ("half_up", "double"):
            return None
        operands = list(binding.value.args[0].fields)
        change = _change(value)
        if change is None and str(value.attrs["rounding"]) not in arith.DIRECTED:
            change = settle_ties(value, [interval(o) for o in operands])
        if change is None:
            return None
        count += 1
        attrs, (data, multipliers, offset, shift) = value.attrs, value.args
        # What was rounded in a direction lies up to a step off, and half_up is taken for half a step.
        lost = 0.5 * (str(attrs["rounding"]) in arith.DIRECTED)
        return ops.requantize(
            list(data.fields),
            [ops.const_value(m) for m in multipliers.fields],
            ops.const_value(offset) + change,
            ops.const_value(shift),
            qtype=arith.QType(int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["out_dtype"])),
            zero_point=int(attrs["zero_point"]),
            rounding="half_up",
            thresholds=int(attrs["thresholds"]),
            differing=int(attrs["differing"]),
            bound=float(attrs["bound"]) + lost if "bound" in attrs else None,
        )

    return rewrite_main(module, visit), count


def _change(call: relax.Call) -> Array | None:
    """Cases 3 and 4: what to add to the offset so that half_up takes the place of a rounding; None where nothing
    does.
    """
    rounding, shift = str(call.attrs["rounding"]), ops.const_value(call.args[3]).astype(np.int64)
    if int(call.attrs["qmin"]) >= int(call.attrs["zero_point"]):
        rounding = {"toward_zero": "floor", "away": "ceil", "half_away": "half_up"}.get(rounding, rounding)
        if rounding == "half_toward_zero":
            return np.where(shift > 0, np.int64(-1), np.int64(0))
    half = np.where(shift > 0, np.int64(1) << np.maximum(shift - 1, 0), np.int64(0))
    changes = {"floor": -half, "ceil": np.maximum(half - 1, 0), "half_up": np.zeros((), np.int64)}
    return changes.get(rounding)


def settle_ties(call: relax.Call, intervals: Sequence[Interval]) -> Array | None:
    """Cases 1 and 2: what to add to the offset, 0 or -1, so that half_up gives what a rounding to nearest does; None
    where neither is known to.
    """
    multipliers = [ops.const_value(m).astype(np.int64) for m in call.args[1].fields]
    offset, shift = (ops.const_value(a).astype(np.int64) for a in call.args[2:4])
    rows = [*multipliers, offset, shift]
    constants = np.broadcast_shapes(*(row.shape for row in rows))
    if len(intervals) == 1:
        rows += [np.asarray(bound) for bound in (intervals[0].low, intervals[0].high)]
        ties: Callable[..., list[int] | None] = partial(_ties_of_one, call)
    elif len(intervals) == 2:
        (low_a, high_a), (low_b, high_b) = (i.scalar for i in intervals)
        if (high_a - low_a + 1) * (high_b - low_b + 1) * prod(constants) > MOST_PAIRS:
            return None
        ties = partial(_ties_of_two, np.arange(low_a, high_a + 1)[:, None], np.arange(low_b, high_b + 1))
    else:
        return None
    every = np.broadcast_arrays(*rows)
    keys = list(zip(*(r.ravel().tolist() for r in every), strict=True))
    settled, left = dict.fromkeys(keys, 0), MOST_TIES
    for key in _with_ties(list(settled)) if len(intervals) == 1 else settled:
        found = ties(*key)
        if found is None or (change := _settled(call, found)) is None or (left := left - len(found)) < 0:
            return None
        settled[key] = change
    changes = np.reshape([settled[key] for key in keys], every[0].shape)
    if not changes.any():
        return np.zeros((), np.int64)
    return changes if every[0].shape == constants or changes.size == max(changes.shape) else None


def _settled(call: relax.Call, ties: list[int]) -> int | None:
    """0 or -1 for ties given as the integers below them, before the zero point; None if they go both ways."""
    zero_point, low, high = (int(call.attrs[name]) for name in ("zero_point", "qmin", "qmax"))
    down = {_goes_down(str(call.attrs["rounding"]), k) for k in ties if low <= k + zero_point < high}
    return None if len(down) > 1 else -1 if True in down else 0


def _goes_down(rounding: str, k: int) -> bool:
    """Whether k + 1/2 is rounded to k."""
    return k % 2 == 0 if rounding == "half_even" else (k < 0) == (rounding == "half_away")


def _ties_of_two(a: Array, b: Array, m: int, n: int, offset: int, shift: int) -> list[int]:
    if shift < 1:
        return []
    totals = a * m + b * n + offset
    ties = totals[totals & ((1 << shift) - 1) == 1 << (shift - 1)]
    return [int(k) for k in np.unique(ties >> shift)]


def _with_ties(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of (m, offset, shift, low, high) for which x m + offset is a tie for an x in low .. high, and perhaps some
    others: all rows at once, in Python's integers.
    """
    m, offset, shift, low, high = np.array(rows, object).T
    one = np.left_shift(1, shift)
    wanted = ((one >> 1) - offset) % one
    # x m = wanted (mod 2^shift): both without the factors of two that m has.
    two = np.where(m == 0, 1, np.minimum(m & -m, one))
    modulus = one // two
    first = low + (wanted // two * _inverse(np.where(m == 0, 1, m // two), modulus) - low) % modulus
    return [rows[i] for i in np.flatnonzero((m == 0) | (wanted % two == 0) & (first <= high)).tolist()]


def _ties_of_one(call: relax.Call, m: int, offset: int, shift: int, low: int, high: int) -> list[int] | None:
    """The integers below the ties of x m + offset for x in low..high, those that matter at least; None if there are
    many.
    """
    if shift < 1:
        return []
    wanted = ((1 << (shift - 1)) - offset) % (1 << shift)
    if m == 0:
        return [offset >> shift] if wanted == 0 else []
    zero_point, least, most = (int(call.attrs[name]) for name in ("zero_point", "qmin", "qmax"))
    ends = sorted(((k << shift) - offset) // m for k in (least - zero_point, most - zero_point))
    low, high = max(low, ends[0]), min(high, ends[1] + 1)
    twos = min((m & -m).bit_length() - 1, shift)
    if wanted % (1 << twos):
        return []
    modulus = 1 << (shift - twos)
    first = low + ((wanted >> twos) * pow(m >> twos, -1, modulus) - low) % modulus
    if (high - first) // modulus > MOST_TIES:
        return None
    return [(x * m + offset) >> shift for x in range(first, high + 1, modulus)]
