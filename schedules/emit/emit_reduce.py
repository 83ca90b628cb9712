"""TE stages of the operators that reduce: products, pools, sums, extrema, softmax."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from hawq_tvm.core import arith, ops, softmax_wide
from hawq_tvm.core.attributes import Conv2d, Pool2d
from schedules.cpu.loops import ONCE_A_ROW
from schedules.spelling.power_intrinsics import power_of, short_tables

from .emit import Emission, Operand, clamp, emitter, immediate, out_shape

Reduce = Callable[..., tirx.Expr]


@emitter("relax.nn.conv2d")
def _conv2d(e: Emission, call: relax.Call) -> te.Tensor:
    """The plain sum (A10), in any layout; padding is already explicit."""
    a = Conv2d.of(call)
    x, w = e.operand(call.args[0]), e.operand(call.args[1])
    data, kernel, groups = a.data_layout, a.kernel_layout, a.groups
    (sh, sw), (dh, dw) = a.strides, a.dilation
    dims = dict(zip(kernel, w.shape, strict=True))
    dtype, shape = ops.dtype_of(call), out_shape(call)
    per_group = dims["O"] // groups
    c = te.reduce_axis((0, dims["I"]), "c")
    kh, kw = te.reduce_axis((0, dims["H"]), "kh"), te.reduce_axis((0, dims["W"]), "kw")

    def element(*i: Any) -> tirx.Expr:
        at = dict(zip(data, i, strict=True))
        channel = c if groups == 1 else (at["C"] // per_group) * dims["I"] + c
        source = {"N": at["N"], "C": channel, "H": at["H"] * sh + kh * dh, "W": at["W"] * sw + kw * dw}
        weight = {"O": at["C"], "I": c, "H": kh, "W": kw}
        product = x.at([source[k] for k in data]).astype(dtype) * w.at([weight[k] for k in kernel]).astype(dtype)
        return te.sum(product, axis=[kh, kw, c])

    return te.compute(shape, element, name="conv2d")


@emitter("relax.matmul")
def _matmul(e: Emission, call: relax.Call) -> te.Tensor:
    a, b = e.operand(call.args[0]), e.operand(call.args[1])
    dtype, shape = ops.dtype_of(call), out_shape(call)
    k = te.reduce_axis((0, a.shape[-1]), "k")

    def element(*i: Any) -> tirx.Expr:
        outer = list(i)
        column = [outer.pop()] if len(b.shape) > 1 else []
        row = [outer.pop()] if len(a.shape) > 1 else []
        # Operands of fewer dimensions broadcast over the leading ones.
        left = [*outer[len(outer) - max(len(a.shape) - 2, 0) :], *row, k]
        right = [*outer[len(outer) - max(len(b.shape) - 2, 0) :], k, *column]
        return te.sum(a.at(left).astype(dtype) * b.at(right).astype(dtype), axis=k)

    return te.compute(shape, element, name="matmul")


def _pool(x: Operand, call: relax.Call, reduce: Reduce, dtype: str, name: str) -> te.Tensor:
    a = Pool2d.of(call)
    axes = ops.spatial_axes(a.layout)
    window = [te.reduce_axis((0, n), f"k{d}") for n, d in zip(a.size, "hw", strict=True)]

    def element(*i: Any) -> tirx.Expr:
        index = list(i)
        for n, axis in enumerate(axes):
            index[axis] = index[axis] * a.strides[n] + window[n] * a.dilation[n]
        return reduce(x.at(index).astype(dtype), axis=window)

    return te.compute(out_shape(call), element, name=name)


@emitter("relax.nn.max_pool2d")
def _max_pool2d(e: Emission, call: relax.Call) -> te.Tensor:
    x = e.operand(call.args[0])
    return _pool(x, call, te.max, x.dtype, "max_pool2d")


@emitter("hawq.sum_pool2d")
def _sum_pool2d(e: Emission, call: relax.Call) -> Operand:
    """(A15), in 16 bits where the largest window fits."""
    x, dtype = e.operand(call.args[0]), ops.dtype_of(call)
    low, high = arith.RANGES[x.dtype]
    if dtype != "int32" or max(-low, high) * prod(Pool2d.of(call).size) >= 2**15:
        return Operand(e, _pool(x, call, te.sum, dtype, "sum_pool2d"))
    narrow = _pool(x, call, te.sum, "int16", "sum_pool2d")
    return Operand(e, te.compute(narrow.shape, lambda *i: narrow(*i).astype(dtype), name="wide"), narrow=narrow)


def _reduction(
    x: Operand, axes: list[int], keepdims: bool, shape: tuple[int, ...], reduce: Reduce, name: str
) -> te.Tensor:
    """`reduce` of x over `axes`; over no axis, or over axes of length one, it is a copy."""
    long = [a for a in axes if x.shape[a] != 1]
    reducers = {a: te.reduce_axis((0, x.shape[a]), f"k{a}") for a in long}

    def element(*i: Any) -> tirx.Expr:
        kept = iter(i)
        index: list[Any] = []
        for d in range(len(x.shape)):
            own = next(kept) if keepdims or d not in axes else 0
            index.append(reducers.get(d, 0 if d in axes else own))
        value = x.at(index)
        return reduce(value, axis=[reducers[a] for a in long]) if long else value

    return te.compute(shape, element, name=name)


def _axes(call: relax.Call, rank: int) -> list[int]:
    axis = call.attrs.axis
    if axis is None:
        return list(range(rank))
    return sorted(int(a) % rank for a in (axis if hasattr(axis, "__len__") else [axis]))


_REDUCERS: dict[str, Reduce] = {"relax.sum": te.sum, "relax.max": te.max, "relax.min": te.min}


@emitter(*_REDUCERS)
def _reduce(e: Emission, call: relax.Call) -> te.Tensor:
    x, name = e.operand(call.args[0]), ops.op_name(call)
    axes, keepdims = _axes(call, len(x.shape)), bool(call.attrs.keepdims)
    return _reduction(x, axes, keepdims, out_shape(call), _REDUCERS[name], name[6:])


@emitter("relax.argmax", "relax.argmin")
def _arg_extremum(e: Emission, call: relax.Call) -> te.Tensor:
    """The first position of the extremum: the extremum itself, then the least position that holds it."""
    x, shape = e.operand(call.args[0]), out_shape(call)
    reduce = te.max if ops.op_name(call) == "relax.argmax" else te.min
    rank, keepdims = len(x.shape), bool(call.attrs.keepdims)
    axes = _axes(call, rank)
    extremum = _reduction(x, axes, keepdims, shape, reduce, "extremum")
    reducers = {a: te.reduce_axis((0, x.shape[a]), f"p{a}") for a in axes}
    total = int(np.prod([x.shape[a] for a in axes]))

    def element(*i: Any) -> tirx.Expr:
        kept = iter(i)
        index: list[Any] = []
        for d in range(rank):
            own = next(kept) if keepdims or d not in axes else 0
            index.append(reducers[d] if d in axes else own)
        position: Any = 0
        for a in axes:
            position = position * x.shape[a] + reducers[a]
        found = tirx.Select(x.at(index).equal(extremum(*i)), position.astype("int64"), immediate(total, "int64"))
        return te.min(found, axis=[reducers[a] for a in axes])

    return te.compute(shape, element, name="position")


def _power(d: tirx.Expr, tables: list[Operand], fraction: int) -> tirx.Expr:
    """(A24) of a difference of at most 31 bits."""
    part, half = immediate((1 << fraction // 2) - 1, "int32"), immediate(fraction // 2, "int32")
    coarse, fine = (t.at([i & part]).astype("int64") for t, i in zip(tables, (d >> half, d), strict=True))
    product = ((coarse * fine + immediate(1 << 29, "int64")) >> immediate(30, "int64")).astype("int32")
    return product >> tirx.Min(d >> immediate(fraction, "int32"), immediate(31, "int32"))


@emitter("hawq.softmax", "hawq.softmax_wide")
def _softmax(e: Emission, call: relax.Call) -> te.Tensor:
    return softmax(e, call)


def softmax(e: Emission, call: relax.Call, in_registers: bool = False) -> te.Tensor:
    """(A17), (A24): maximum, exponents from the tables, their sum, its bits and reciprocal once a row, one rounded
    product an element.

    in_registers: the stage "exponents" of (A24) from tables of 32 entries, which a schedule may spell (`powers_of`).
    """
    attrs = call.attrs
    x, *tables = (e.operand(a) for a in call.args)
    axis = int(attrs["axis"]) % len(x.shape)
    maximum = row_maximum(x, axis)
    short = e.argument(short_tables(int(attrs["fraction"]))) if in_registers and has_short_tables(call) else None

    def exponent(*i: Any) -> tirx.Expr:
        difference = maximum(*i[:axis], *i[axis + 1 :]).astype("int32") - x.at(i).astype("int32")
        if short is not None:
            return power_of(difference, lambda k: short(k), int(attrs["fraction"]))
        if len(tables) == 1:
            # The last entry stands for every difference beyond the table, which the input's range excludes.
            last = len(ops.const_value(call.args[1])) - 1
            return tables[0].at([tirx.Min(difference, immediate(last, "int32"))])
        return _power(difference, tables, int(attrs["fraction"]))

    return normalized(call, te.compute(x.shape, exponent, name="exponents"))


def has_short_tables(call: relax.Call) -> bool:
    """Whether a softmax reads the tables of (A24) that `short_tables` stands for."""
    return ops.op_name(call) == "hawq.softmax_wide" and all(
        np.array_equal(ops.const_value(held), table)
        for held, table in zip(call.args[1:], softmax_wide.tables(int(call.attrs["fraction"])), strict=True)
    )


def row_maximum(x: Operand, axis: int) -> te.Tensor:
    """The greatest element of every row along `axis`."""
    k = te.reduce_axis((0, x.shape[axis]), "k")
    outer = (*x.shape[:axis], *x.shape[axis + 1 :])
    return te.compute(outer, lambda *i: te.max(x.at([*i[:axis], k, *i[axis:]]), axis=k), name="maximum")


def normalized(call: relax.Call, exponents: te.Tensor, bits_of_one: int = arith.SOFTMAX_BITS) -> te.Tensor:
    """(A17) from the sum on; bits_of_one: no exponent is greater than this power of two, and the greatest of a row is
    at least 2^30.
    """
    attrs, shape = call.attrs, [int(d) for d in exponents.shape]
    axis = int(attrs["axis"]) % len(shape)
    outer = (*shape[:axis], *shape[axis + 1 :])
    k = te.reduce_axis((0, shape[axis]), "k")
    total = te.compute(
        outer, lambda *i: te.sum(exponents(*i[:axis], k, *i[axis:]).astype("int64"), axis=k), name="total"
    )
    # The sum lies in [2^30, count 2^30], so that it has 31 bits and one more for each of these powers that it reaches.
    least, most = arith.SOFTMAX_BITS + 1, (shape[axis] << bits_of_one).bit_length()
    start = immediate(int(attrs["shift"]) + least, "int64")

    def bits(*i: Any) -> tirx.Expr:
        return sum(((total(*i) >= immediate(1 << j, "int64")).astype("int64") for j in range(least, most)), start)

    shift = te.compute(outer, bits, name=f"{ONCE_A_ROW}shift")
    dividend = immediate(int(attrs["multiplier"]) << 31, "int64")
    reciprocal = te.compute(
        outer, lambda *i: tirx.truncdiv(dividend, total(*i) >> (shift(*i) - start)), name=f"{ONCE_A_ROW}reciprocal"
    )
    zero_point, one = immediate(int(attrs["zero_point"]), "int64"), immediate(1, "int64")
    floor = str(attrs["rounding"]) == "floor"

    def element(*i: Any) -> tirx.Expr:
        row = (*i[:axis], *i[axis + 1 :])
        # Neither has more than 32 bits, which LLVM is told: else it makes a product of 64 from three.
        factors = [x.astype("int64") & immediate(0xFFFFFFFF, "int64") for x in (exponents(*i), reciprocal(*row))]
        product, by = factors[0] * factors[1], shift(*row)
        if not floor:
            product = product + ((one << (by - one)) - one) + ((product >> by) & one)
        return clamp((product >> by) + zero_point, int(attrs["qmin"]), int(attrs["qmax"]), "int64").astype(
            str(attrs["out_dtype"])
        )

    return te.compute(shape, element, name="softmax")
