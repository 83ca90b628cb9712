"""Sums that begin at constants instead of zeros, so that a requantize has nothing to add to its 64-bit products (A9e).

    acc = k                                                     instead of 0: a register is copied
    acc += products
    y = clamp((((acc m) >> 32) + h) >> t)                       h: half of 2^t, and the zero point times 2^t

TE knows sums that begin at 0 alone, so a requantize is written with k added to its sum, and `begun` moves k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx

from hawq_tvm.core import arith, ops
from schedules.layer import reach_of

from .emit import Array, Emission

BEGIN = "begin"  # the name of the argument that sums begin at
# What k does not make up for with one h, it may with another: so many up and down, of which the nearest are tried.
FURTHER, TRIED = 4096, 32
LONGEST = 20  # the most t for which thresholds stay within 64 bits


def begun_at(
    m: Array, b: Array, t: Array, zero_point: int, bounds: tuple[int, int], short: bool
) -> tuple[Array, Array] | None:
    """k and h of (A9e) for clamp((x m + b) >> (32 + t)) of every channel; None where a channel has none.

    m, b, t: int64, of one shape.  zero_point: what h is made of first.  bounds: the clamp's.  short: numbers are
    saturated to 16 bits before h is added, and again then; else they are int32.
    """
    low, high = bounds
    if m.min() <= 0 or t.min() < 1 or t.max() > LONGEST or np.abs(b).max() >= 1 << 61:
        return None
    first = (np.int64(1) << t - 1) + (np.int64(zero_point) << t)
    k, h = _nearest(m, b, first), first
    if not np.all(_fits(h, t, bounds, short)):
        return None
    numbers = np.arange(low + 1, high + 1, dtype=np.int64)[:, None]

    def same(channel: Any, k: Array, h: Array) -> Array:
        """Whether every number has the same least sum."""
        own, ends = m[channel], numbers << 32 + t[channel]
        alike: Array = np.all((b[channel] - ends) // own == (k * own + (h << 32) - ends) // own, axis=0)
        return alike & _fits(h, t[channel], bounds, short)

    # Where the constants are the bias and what h is of, nothing is left that could differ.
    for channel in np.flatnonzero(b - (h << 32) != k * m):
        if same([channel], k[[channel]], h[[channel]])[0]:
            continue
        near = first[channel] + np.arange(-FURTHER, FURTHER + 1)
        added = _nearest(m[channel], b[channel], near)
        rest = np.abs(b[channel] - (near << 32) - added * m[channel])
        best = np.argpartition(rest, TRIED)[:TRIED]
        best = best[np.lexsort((best, rest[best]))]
        found = next((i for i in best if same([channel], added[i : i + 1], near[i : i + 1])[0]), None)
        if found is None:
            return None
        k[channel], h[channel] = added[found], near[found]
    return k, h


def _nearest(m: Array, b: Array, h: Array) -> Array:
    """The k for which k m + 2^32 h comes next to b."""
    k: Array = (b - (h << 32) + (m >> 1)) // m
    return k


def _fits(h: Array, t: Array, bounds: tuple[int, int], short: bool) -> Array:
    """Where adding h cannot leave the type of numbers, or what is saturated is clamped anyway."""
    if not short:
        return np.abs(h) < 1 << 30
    low, high = bounds
    least, most = arith.RANGES["int16"]
    above, below = np.minimum(most, most + h) >> t, np.maximum(least, least + h) >> t
    fits: Array = (h >= least) & (h <= most) & (above >= high) & (below <= low)
    return fits


def reach_of_sums(e: Emission) -> int | None:
    """No sum of a layer's products is larger, data of 8 bits being 0 to 255; None where weights are not known."""
    call = e.layer.anchor_call
    if call is None or not e.layer.is_constant(call.args[1]) or ops.dtype_of(call.args[0]) not in ("uint8", "int8"):
        return None
    return reach_of(e.layer.constant(call.args[1]), 255)


def begun(func: tirx.PrimFunc, place: Callable[[Sequence[tirx.Var]], Any]) -> tirx.PrimFunc:
    """An unscheduled kernel whose sums begin at the argument BEGIN, if it has one.

    place: of a sum in it, by the variables of the block "acc".
    """
    begin = next((p for p in func.params if str(p.name) == BEGIN), None)
    if begin is None:
        return func
    _check_readers(func, begin)

    def without(block: s_tir.SBlock) -> s_tir.SBlock:
        reads, body, init = list(block.reads), block.body, block.init
        if str(block.name_hint) == "acc":
            sums = block.init
            at = place([v.var for v in block.iter_vars])
            init = tirx.BufferStore(sums.buffer, tirx.BufferLoad(begin, [at]), sums.indices)
        elif any(r.source.same_as(begin) for r in reads):
            reads = [r for r in reads if not r.source.same_as(begin)]
            body = tvm_ffi.structural_map(body, [(tirx.Add, lambda x: x.a if _loads(x.b, begin) else x)])
        else:
            return block
        return s_tir.SBlock(
            block.iter_vars,
            reads,
            block.writes,
            block.name_hint,
            body,
            init,
            block.alloc_buffers,
            annotations=block.annotations,
        )

    return tvm_ffi.structural_map(func, [(s_tir.SBlock, without)])


def _check_readers(func: tirx.PrimFunc, begin: Any) -> None:
    """Raise AssertionError where the sums, or a copy of them, are read without what they are to begin at: that reader
    would have k twice, or not want it.
    """
    blocks: list[s_tir.SBlock] = []

    def noted(block: s_tir.SBlock) -> s_tir.SBlock:
        blocks.append(block)
        return block

    tvm_ffi.structural_map(func, [(s_tir.SBlock, noted)])
    sums = [block.writes[0].source for block in blocks if str(block.name_hint) == "acc"]
    for one in sums:
        assert not any(one.same_as(p) for p in func.params), "sums that begin at constants are a result"
        for block in blocks:
            sources = [r.source for r in block.reads]
            if not any(one.same_as(s) for s in sources) or any(begin.same_as(s) for s in sources):
                continue
            copied = isinstance(block.body, tirx.BufferStore) and isinstance(block.body.value, tvm.ir.TensorLoad)
            assert copied, f"{block.name_hint} reads sums that begin at constants, and does not know"
            sums.append(block.writes[0].source)


def _loads(expr: tirx.Expr, buffer: Any) -> bool:
    """Whether an expression is an element of a buffer, perhaps widened."""
    while isinstance(expr, tirx.Cast):
        expr = expr.value
    return isinstance(expr, tvm.ir.TensorLoad) and expr.source.same_as(buffer)
