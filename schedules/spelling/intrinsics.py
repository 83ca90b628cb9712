"""Inner products of one vector of accumulators and what follows them, as pairs of meaning and spelling."""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

from tvm import tirx

from schedules.narrow import PLANES, fields, in_high_bits

from .pair import Operand, register


@cache
def multiply_add(lanes: int, depth: int, data: str, weight: str, acc: str) -> str:
    """The name of the tensor intrinsic c[i] += sum_k a[k] w[i, k], i < lanes, k < depth, exact for every operand.

    depth 1 broadcasts one element (and w has one dimension).  depth 2 needs int16 data, weights of at most 16 bits
    and int32 sums, and is written so that LLVM selects a multiply-add of pairs where the CPU has one (pmaddwd).
    """
    product = _sum_of_pairs if depth == 2 else _broadcast_product
    return register(
        f"hawq.multiply_add.{lanes}.{depth}.{data}.{weight}.{acc}",
        [Operand((depth,), data), Operand((lanes, 2) if depth == 2 else (lanes,), weight), _sums(lanes, acc)],
        [(lanes, "S"), (2, "R")] if depth == 2 else [(lanes, "S")],
        lambda a, w, i, *k: a[k or 0].astype(acc) * w[tuple([i, *k])].astype(acc),
        lambda a, w, c: [_all(c) + product(a, w, lanes, acc)],
    )


@cache
def dot_u8s8(lanes: int, data: str) -> str:
    """The name of the tensor intrinsic c[i] += sum_k a'[k] w[i, k], k < 4, spelled as vpdpbusd, exact for every
    operand.

    data: "uint8", where a' = a, or "int8", where a' = a + 128.  lanes: 8 (AVX-VNNI or AVX512-VNNI) or 16 (AVX512-VNNI).
    w is int8, c int32; sums wrap around as vpdpbusd's do.
    """
    return register(
        f"hawq.dot_u8s8.{lanes}.{data}",
        [Operand((4,), data), Operand((lanes, 4), "int8"), _sums(lanes)],
        [(lanes, "S"), (4, "R")],
        lambda a, w, i, k: _unsigned(a[k], data) * w[i, k].astype("int32"),
        lambda a, w, c: [_vpdpbusd(_all(c), _four_bytes(a, lanes), _all(w), lanes)],
    )


@cache
def multiply_high(lanes: int, neon: bool = False) -> str:
    """The name of the tensor intrinsic c[i] = the high 32 bits of a[i] m[i] + b[i], i < lanes.

    a, m and c are int32, b is int64.  Spelled in even and odd lanes, so that LLVM multiplies without widening first
    (pmuldq), or for NEON in pairs of lanes (smull).
    """
    high = _high_of_pairs if neon else high_halves
    return register(
        f"hawq.multiply_high.{lanes}{'.neon' if neon else ''}",
        [Operand((lanes,), dtype) for dtype in ("int32", "int32", "int64", "int32")],
        [(lanes, "S")],
        lambda a, m, b, i: ((a[i].astype("int64") * m[i].astype("int64") + b[i]) >> tirx.const(32, "int64")).astype(
            "int32"
        ),
        lambda a, m, b, c: [high(_all(a), _all(m), _all(b), lanes)],
        adds=False,
    )


def high_halves(a: tirx.Expr, m: tirx.Expr, b: tirx.Expr, lanes: int) -> tirx.Expr:
    """The high 32 bits of a m + b in every lane."""

    def added(parity: int) -> tirx.Expr:
        return tirx.Shuffle([b], [tirx.const(k, "int32") for k in range(parity, lanes, 2)])

    return joined_high_halves(
        low_halves(a, lanes) * low_halves(m, lanes) + added(0),
        odd_lanes(a, lanes) * odd_lanes(m, lanes) + added(1),
        lanes,
    )


def low_halves(x: tirx.Expr, lanes: int) -> tirx.Expr:
    """The even ones of 32-bit lanes in 64 bits, or 64-bit lanes that hold no more than 32."""
    return (tirx.reinterpret(f"int64x{lanes // 2}", x) << _bits(lanes)) >> _bits(lanes)


def odd_lanes(x: tirx.Expr, lanes: int) -> tirx.Expr:
    """The odd ones of 32-bit lanes in 64 bits."""
    return tirx.reinterpret(f"int64x{lanes // 2}", x) >> _bits(lanes)


def joined_high_halves(even: tirx.Expr, odd: tirx.Expr, lanes: int) -> tirx.Expr:
    """The high halves of two vectors of 64-bit lanes, in turns."""
    wide, half = f"uint64x{lanes // 2}", lanes // 2
    low = tirx.reinterpret(wide, even) >> tirx.reinterpret(wide, _bits(lanes))
    high = tirx.reinterpret(wide, odd) & tirx.Broadcast(tirx.const(0xFFFFFFFF00000000, "uint64"), half)
    return tirx.reinterpret(f"int32x{lanes}", low | high)


def _bits(lanes: int) -> tirx.Expr:
    return tirx.Broadcast(tirx.const(32, "int64"), lanes // 2)


def _high_of_pairs(a: tirx.Expr, m: tirx.Expr, b: tirx.Expr, lanes: int) -> tirx.Expr:
    def pair(x: tirx.Expr, i: int) -> tirx.Expr:
        return tirx.Shuffle([x], [tirx.const(i + k, "int32") for k in range(2)])

    # Named: a product of two sign extensions, one of which is the same in every turn of a loop, would be made in
    # general registers.
    def total(i: int) -> tirx.Expr:
        product = tirx.call_llvm_pure_intrin("int64x2", "llvm.aarch64.neon.smull", pair(a, i), pair(m, i))
        return tirx.reinterpret("int32x4", product + pair(b, i))

    pairs = [total(i) for i in range(0, lanes, 2)]
    return tirx.Shuffle(pairs, [tirx.const(4 * i + k, "int32") for i in range(lanes // 2) for k in (1, 3)])


@cache
def dot_narrow(lanes: int, data: str, width: int) -> str:
    """The name of the tensor intrinsic c[i] += 2^(8 - width) sum_k a'[k] w[i, k], vpdpbusd for every four k, exact for
    every operand.

    w holds signed values of `width` bits in planes (see `narrow.py`): the fewest that fill vectors of four bytes in
    each of `lanes` lanes.  data, lanes and a' as for `dot_u8s8`.
    """
    depth = depth_of(width)
    vectors = depth * width // 32

    def weight(w: tirx.Buffer, i: Any, k: Any) -> tirx.Expr:
        def byte(at: Any) -> tirx.Expr:
            return w[at // 4, i, at % 4] if vectors > 1 else w[i, at]

        return in_high_bits(byte, k, depth, width).astype("int32")

    def spelled(a: tirx.Buffer, w: tirx.Buffer, c: tirx.Buffer) -> list[tirx.Expr]:
        total = _all(c)
        for k in range(0, depth, 4):
            total = _vpdpbusd(total, _four_bytes(a, lanes, k), _in_high_bits(w, lanes, k, depth, width), lanes)
        return [total]

    return register(
        f"hawq.dot_u8s{width}.{lanes}.{data}",
        [Operand((depth,), data), Operand((*([vectors] if vectors > 1 else []), lanes, 4), "uint8"), _sums(lanes)],
        [(lanes, "S"), (depth, "R")],
        lambda a, w, i, k: _unsigned(a[k], data) * weight(w, i, k),
        spelled,
    )


def depth_of(width: int) -> int:
    """The products of a step whose weights, in planes of a width, fill vectors of four bytes a lane."""
    return 4 * fields(width)


def _in_high_bits(w: tirx.Buffer, lanes: int, k: int, depth: int, width: int) -> tirx.Expr:
    """The weights of four products from the k-th on, in the high bits of bytes; shifts are of 16 bits, the masks drop
    what crosses bytes.
    """
    total, start, above = None, 0, 0
    for bits in PLANES[width]:
        size = depth * bits // 8
        vector, left = (start + k % size) // 4, 8 - bits - k // size * bits - above
        packed = w.vload([*([vector] if len(w.shape) > 2 else []), 0, 0], f"uint8x{4 * lanes}")
        if left:
            wide = tirx.reinterpret(f"uint16x{2 * lanes}", packed)
            amount = tirx.Broadcast(tirx.const(abs(left), "uint16"), 2 * lanes)
            packed = tirx.reinterpret(f"uint8x{4 * lanes}", wide << amount if left > 0 else wide >> amount)
        mask = (256 - 2 ** (8 - bits)) >> above
        part = packed & tirx.Broadcast(tirx.const(mask, "uint8"), 4 * lanes)
        total, start, above = part if total is None else total | part, start + size, above + bits
    assert total is not None
    return tirx.reinterpret(f"int8x{4 * lanes}", total)


@cache
def dot_quads(lanes: int) -> str:
    """The name of the tensor intrinsic c[i] += sum_k byte_k(q[i]) w[i, k], k < 4, bytes from the lowest, unsigned.

    q and c are int32, w is int8; spelled as vpdpbusd, exact for every operand.  lanes: 8 or 16, as for `dot_u8s8`.
    """
    return register(
        f"hawq.dot_quads.{lanes}",
        [Operand((lanes,), "int32"), Operand((lanes, 4), "int8"), _sums(lanes)],
        [(lanes, "S"), (4, "R")],
        lambda q, w, i, k: ((q[i] >> (k * 8)) & 255) * w[i, k].astype("int32"),
        lambda q, w, c: [_vpdpbusd(_all(c), tirx.reinterpret(f"int8x{4 * lanes}", _all(q)), _all(w), lanes)],
    )


def _sums(lanes: int, dtype: str = "int32") -> Operand:
    return Operand((lanes,), dtype, "local")


def _all(x: tirx.Buffer) -> tirx.Expr:
    """All elements of a buffer as one vector."""
    shape = [int(n) for n in x.shape]
    return x.vload([0] * len(shape), f"{x.dtype}x{prod(shape)}")


def _unsigned(byte: tirx.Expr, dtype: str) -> tirx.Expr:
    """A byte in int32; a signed one with 128 added."""
    return byte.astype("int32") + (128 if dtype == "int8" else 0)


def _vpdpbusd(c: tirx.Expr, a: tirx.Expr, w: tirx.Expr, lanes: int) -> tirx.Expr:
    """c plus, in every lane, the four products of unsigned bytes of a with signed bytes of w."""
    return tirx.call_llvm_pure_intrin(f"int32x{lanes}", f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", c, a, w)


def _four_bytes(a: tirx.Buffer, lanes: int, start: int = 0) -> tirx.Expr:
    """Four elements in every lane; signed ones with 128 added, which flips their highest bits."""
    four = tirx.reinterpret("int32", a.vload([start], f"{a.dtype}x4"))
    if str(a.dtype) == "int8":
        four = four ^ tirx.const(-0x7F7F7F80, "int32")
    return tirx.reinterpret(f"int8x{4 * lanes}", tirx.Broadcast(four, lanes))


def _broadcast_product(a: tirx.Buffer, w: tirx.Buffer, lanes: int, acc: str) -> tirx.Expr:
    weights = _all(w).astype(f"{acc}x{lanes}")
    return tirx.Broadcast(a.vload([0], str(a.dtype)).astype(acc), lanes) * weights


def _sum_of_pairs(a: tirx.Buffer, w: tirx.Buffer, lanes: int, _: str) -> tirx.Expr:
    """a[0] w[i, 0] + a[1] w[i, 1]: products of sign-extended 16-bit lanes, then even plus odd."""
    both = 2 * lanes
    pair = tirx.reinterpret("int32", _all(a))
    data = tirx.reinterpret(f"int16x{both}", tirx.Broadcast(pair, lanes))
    product = data.astype(f"int32x{both}") * _all(w).astype(f"int32x{both}")
    even = tirx.Shuffle([product], [tirx.const(k, "int32") for k in range(0, both, 2)])
    odd = tirx.Shuffle([product], [tirx.const(k, "int32") for k in range(1, both, 2)])
    return even + odd
