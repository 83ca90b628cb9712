"""What follows sums on x86, many results at once, as pairs of meaning and spelling: bytes out of 16-bit arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.tirx import Buffer

from hawq_tvm.core import arith

from .intrinsics import joined_high_halves, low_halves, odd_lanes
from .pair import Operand, prefetch, register


@cache
def narrow(lanes: int, vectors: int, dtype: str) -> str:
    """The name of the tensor intrinsic c[i] = a[i] clamped to `dtype`, i < lanes vectors: packssdw, then packuswb or
    packsswb.

    dtype: "uint8" or "int8".  lanes: 8 (AVX2) or 16 (AVX512-BW).  vectors: 2 or 4.  a is int32.
    """
    size, (low, high) = lanes * vectors, arith.RANGES[dtype]

    def spelled(a: Buffer, c: Buffer) -> list[tirx.Expr]:
        numbers = [a.vload([k * lanes], f"int32x{lanes}") for k in range(vectors)]
        return [_in_order(_bytes(_words(numbers, lanes), lanes, dtype), lanes, vectors, dtype)]

    return register(
        f"hawq.narrow.{lanes}x{vectors}.{dtype}",
        [Operand((size,), "int32"), Operand((size,), dtype)],
        [(size, "S")],
        lambda a, i: tirx.min(tirx.max(a[i], low), high).astype(dtype),
        spelled,
        adds=False,
    )


def apart(i: Any, lanes: int) -> Any:
    """Where a channel is when of every `lanes` the even ones come first."""
    return i // lanes * lanes + i % 2 * (lanes // 2) + i % lanes // 2


def as_packed(i: Any, lanes: int) -> Any:
    """Where a channel is when every two vectors of `lanes` lie as packssdw joins them."""
    return i // (2 * lanes) * (2 * lanes) + i % lanes // 4 * 8 + i % (2 * lanes) // lanes * 4 + i % 4


@dataclass(frozen=True)
class Order:
    """Where channels are in vectors of sums, and their constants for `requantize`.

    woven: the vectors of a group of channels of which each has four of every few, in turns (`beside`); 0 where
    channels follow each other.  rows: vectors of two pixels become bytes together, so that shifts are held twice,
    at places of which one is 4 from the other.
    """

    lanes: int
    woven: int = 0
    rows: bool = False

    def in_register(self, i: Any) -> tuple[Any, Any]:
        """The vector of a group and its lane, of woven sums."""
        part = 4 * self.woven
        return i % part // 4, i % (self.lanes * self.woven) // part * 4 + i % 4

    def apart(self, i: Any) -> Any:
        """The place of a multiplier."""
        lanes, size, part = self.lanes, self.lanes * self.woven, 4 * self.woven
        if not size:
            return apart(i, lanes)
        within = i % 2 * (lanes // 2) + i % size // part * 2 + i % 4 // 2
        return i // size * size + i % part // 4 * lanes + within

    def flat(self, i: Any) -> Any:
        """The place of a sum."""
        if not self.woven:
            return i
        v, lane = self.in_register(i)
        return i // (self.lanes * self.woven) * (self.lanes * self.woven) + v * self.lanes + lane

    def shift(self, i: Any, short: bool) -> Any:
        """The place of a shift."""
        lanes, size = self.lanes, self.lanes * self.woven
        form, at = shift_form(lanes, short)
        if self.rows:
            return i // lanes * (2 * lanes) + i % lanes // 4 * 8 + i % 8  # one of two, and all of a vector are read
        if not size:
            return at(i, lanes)
        if form == "int16":
            return i if self.woven == 2 else i // size * size + i % 16 // 8 * 2 * lanes + i % size // 16 * 8 + i % 8
        return self.flat(i)


def shift_form(lanes: int, short: bool) -> tuple[str, Any]:
    """The type of the shifts of `requantize`, and where a channel's is.

    short: they are those of (A9c), so that words can be shifted; AVX2 has no shifts of 16 bits by lanes.
    """
    return ("int16", as_packed) if lanes == 16 and short else ("int32", lambda i, _: i)


@cache
def requantize(
    lanes: int, vectors: int, dtype: str, short: bool, stored: bool = False, woven: bool = False, begun: bool = False
) -> str:
    """The name of the tensor intrinsic (A9c), or (A9a) and a clamp, i < lanes vectors:

        c[i] = clamp(((x[i] m[apart(i)] + b[apart(i)]) >> 32) >> t[at(i)])

    or, begun, that of (A9e), where h lies as t does and is of its type:

        c[i] = clamp((((x[i] m[apart(i)]) >> 32) + h[at(i)]) >> t[at(i)])

    x is int32, m and b are int64, m within 32 bits, t and `at` are of `shift_form`, c is of `dtype`, to whose range
    numbers are clamped: constants lie as the instructions take them.
    lanes, vectors: as for `narrow`.  short: 0 <= t <= 7 for "uint8", 8 for "int8", so that what packssdw saturates lies
    beyond the clamp after the shift, too; else t <= 31.  stored: x is in memory, so that odd lanes are loaded for
    themselves, but for those of the last vector, beyond which nothing may be read.  woven: x[i] is x[v, lane] of
    `in_register`, and constants are where they are needed for it; x is then in two dimensions.
    """
    size, (low, high) = lanes * vectors, arith.RANGES[dtype]
    form, order = shift_form(lanes, short)[0], Order(lanes, vectors if woven else 0)

    def value(x: Buffer, m: Buffer, b: Buffer, t: Buffer, i: tirx.Var) -> tirx.Expr:
        sums = x[order.in_register(i)] if woven else x[i]
        place = order.shift(i, short)
        total = sums.astype("int64") * m[order.apart(i)]
        if not begun:
            total = total + b[order.apart(i)]
        number = (total >> tirx.const(32, "int64")).astype("int32")
        if begun:
            number = number + b[place].astype("int32")
        number = number >> t[place].astype("int32")
        return tirx.min(tirx.max(number, low), high).astype(dtype)

    def spelled(x: Buffer, m: Buffer, b: Buffer, t: Buffer, c: Buffer) -> list[tirx.Expr]:
        def loaded(buffer: Buffer, first: int, count: int) -> tirx.Expr:
            return buffer.vload([first], f"{buffer.dtype}x{count}")

        def number(k: int) -> tirx.Expr:
            first, half = k * lanes, lanes // 2
            sums = x.vload([k, 0], f"int32x{lanes}") if woven else loaded(x, first, lanes)
            separate = stored and k < vectors - 1
            odd = low_halves(loaded(x, first + 1, lanes), lanes) if separate else odd_lanes(sums, lanes)
            even, odd = (
                data * low_halves(loaded(m, at, half), lanes)
                for data, at in ((low_halves(sums, lanes), first), (odd, first + half))
            )
            if not begun:
                even, odd = even + loaded(b, first, half), odd + loaded(b, first + half, half)
            return joined_high_halves(even, odd, lanes)

        numbers = [number(k) for k in range(vectors)]
        if form == "int16":
            words = _words(numbers, lanes)
            if begun:
                words = [_added(w, loaded(b, 32 * k, 32)) for k, w in enumerate(words)]
            words = [w >> loaded(t, 32 * k, 32) for k, w in enumerate(words)]
        else:
            if begun:
                numbers = [n + loaded(b, lanes * k, lanes) for k, n in enumerate(numbers)]
            words = _words([n >> loaded(t, lanes * k, lanes) for k, n in enumerate(numbers)], lanes)
        bytes_ = _bytes(words, lanes, dtype)
        return [_once(bytes_, lanes, vectors, dtype) if woven else _in_order(bytes_, lanes, vectors, dtype)]

    return register(
        f"hawq.requantize.{lanes}x{vectors}.{dtype}.{form}{'.stored' if stored else ''}{'.woven' if woven else ''}"
        f"{'.begun' if begun else ''}",
        [
            Operand((vectors, lanes) if woven else (size,), "int32"),
            *(Operand((size,), t) for t in ("int64", form if begun else "int64", form, dtype)),
        ],
        [(size, "S")],
        value,
        spelled,
        adds=False,
    )


@cache
def requantize_rows(lanes: int, dtype: str) -> str:
    """The name of the tensor intrinsic (A9e) of one vector of two pixels, i < lanes:

        c[r, i] = clamp((((x[r, i] m[apart(i)]) >> 32) + h[at(i)]) >> t[at(i)])

    x is int32, m is int64, h and t are int16 and are held twice, once for each pixel.  lanes: 16.
    """
    (low, high), order = arith.RANGES[dtype], Order(lanes, rows=True)

    def value(x: Buffer, m: Buffer, h: Buffer, t: Buffer, r: tirx.Var, i: tirx.Var) -> tirx.Expr:
        place = order.shift(i, True)
        product = x[r, i].astype("int64") * m[order.apart(i)]
        number = (product >> tirx.const(32, "int64")).astype("int32") + h[place].astype("int32")
        return tirx.min(tirx.max(number >> t[place].astype("int32"), low), high).astype(dtype)

    def spelled(x: Buffer, m: Buffer, h: Buffer, t: Buffer, c: Buffer) -> list[tirx.Expr]:
        half = lanes // 2
        even, odd = (low_halves(m.vload([k], f"int64x{half}"), lanes) for k in (0, half))
        rows = [x.vload([r, 0], f"int32x{lanes}") for r in range(2)]
        numbers = [
            joined_high_halves(low_halves(row, lanes) * even, odd_lanes(row, lanes) * odd, lanes) for row in rows
        ]
        (words,) = _words(numbers, lanes)
        words = _added(words, h.vload([0], f"int16x{2 * lanes}")) >> t.vload([0], f"int16x{2 * lanes}")
        quads = tirx.reinterpret(f"int32x{lanes}", _bytes([words], lanes, dtype))
        return [
            tirx.reinterpret(f"{dtype}x{lanes}", _chosen([quads], [4 * part + r for part in range(lanes // 4)]))
            for r in range(2)
        ]

    sums, result = (Operand((2, lanes), d, free=1) for d in ("int32", dtype))
    constants = [Operand((n,), d) for n, d in ((lanes, "int64"), (2 * lanes, "int16"), (2 * lanes, "int16"))]
    return register(
        f"hawq.requantize_rows.{lanes}.{dtype}",
        [sums, *constants, result],
        [(2, "S"), (lanes, "S")],
        value,
        spelled,
        adds=False,
    )


@cache
def pair_sum(
    lanes: int, vectors: int, shift: int, data: tuple[str, str], dtype: str, dot: bool, ahead: tuple[int, ...] = ()
) -> str:
    """The name of the tensor intrinsic (A9d), i < lanes vectors:

        c[i] = clamp(((((a'[i] l[0] + r'[i] l[1] + q[0]) >> 16) + a'[i] h[0] + r'[i] h[1]) >> shift) + z[0])

    a and r are of the types `data`: a' = a of "uint8", a + 128 of "int8".  l, h and z are int16, q is int32, c is of
    `dtype`, to whose range the sum is clamped.  Exact where the sums fit in 32 bits and |z| <= 2^14: a number that
    packssdw saturates is beyond the clamp, z added or not.
    lanes, vectors: as for `narrow`.  dot: the CPU has vpdpwssd, else products and sums are apart.  ahead: how many
    bytes further a, r and c are fetched into the cache, the last to be written; 0 for not at all.
    """
    size, (low, high) = lanes * vectors, arith.RANGES[dtype]

    def value(a: Buffer, lows: Buffer, r: Buffer, q: Buffer, highs: Buffer, z: Buffer, i: tirx.Var) -> tirx.Expr:
        return pair_sum_of(a[i], r[i], (lows, q, highs, z), shift, low, high).astype(dtype)

    def spelled(a: Buffer, lows: Buffer, r: Buffer, q: Buffer, highs: Buffer, z: Buffer, c: Buffer) -> list[tirx.Expr]:
        def two(x: Buffer) -> tirx.Expr:
            both = tirx.Broadcast(tirx.reinterpret("int32", x.vload([0], "int16x2")), lanes)
            return tirx.reinterpret(f"int16x{2 * lanes}", both)

        def one(pair: tirx.Expr) -> tirx.Expr:
            below = _dot_words(tirx.Broadcast(q[0], lanes), pair, two(lows), lanes, dot)
            total = _dot_words(below >> _all_of(16, lanes), pair, two(highs), lanes, dot)
            return total >> _all_of(shift, lanes)

        def unsigned(x: Buffer) -> tirx.Expr:
            """Bytes; signed ones with 128 added, which flips their highest bits."""
            loaded = tirx.reinterpret(f"uint8x{size}", x.vload([0], f"{x.dtype}x{size}"))
            return loaded ^ tirx.Broadcast(tirx.const(128, "uint8"), size) if str(x.dtype) == "int8" else loaded

        words = _words([one(pair) for pair in _pairs(unsigned(a), unsigned(r), lanes, vectors)], lanes)
        zero_point = tirx.Broadcast(z[0], 2 * lanes)
        moved = [_added(w, zero_point) for w in words]
        return [_once(_bytes(moved, lanes, dtype), lanes, vectors, dtype)]

    def hints(*buffers: Buffer) -> list[tirx.Expr]:
        fetched = zip((buffers[0], buffers[2], buffers[-1]), ahead, (0, 0, 1), strict=bool(ahead))
        return [prefetch(buffer[further], writes) for buffer, further, writes in fetched if further]

    types = (data[0], "int16", data[1], "int32", "int16", "int16", dtype)
    sizes = (size, 2, size, 1, 2, 1, size)
    return register(
        f"hawq.pair_sum.{lanes}x{vectors}.{shift}.{'.'.join(data)}.{dtype}{'.dot' if dot else ''}{ahead or ''}",
        [Operand((n,), t) for n, t in zip(sizes, types, strict=True)],
        [(size, "S")],
        value,
        spelled,
        adds=False,
        hints=hints,
    )


def pair_sum_of(a: tirx.Expr, r: tirx.Expr, constants: Sequence[Any], shift: int, low: int, high: int) -> tirx.Expr:
    """(A9d) of two bytes with l, q, h and z, in int32."""
    lows, q, highs, z = constants
    first, second = (x.astype("int32") + (128 if str(x.ty.dtype) == "int8" else 0) for x in (a, r))
    below = first * lows[0].astype("int32") + second * lows[1].astype("int32") + q[0]
    total = (below >> 16) + first * highs[0].astype("int32") + second * highs[1].astype("int32")
    return tirx.min(tirx.max((total >> shift) + z[0].astype("int32"), low), high)


def beside(x: tirx.Expr, y: tirx.Expr, step: int, first: int) -> tirx.Expr:
    """The elements from `first` to step / 2 further of every `step` elements of two vectors, in turns: what punpckl and
    punpckh do.
    """
    lanes = int(x.ty.dtype.lanes)
    places = [part + first + k for part in range(0, lanes, step) for k in range(step // 2)]
    return _chosen([x, y], [place + lanes * side for place in places for side in (0, 1)])


def _pairs(a: tirx.Expr, r: tirx.Expr, lanes: int, vectors: int) -> list[tirx.Expr]:
    """Vectors of a[i] and r[i] side by side in 16 bits each, in the order that packssdw undoes."""
    size = lanes * vectors
    if vectors == 2:
        first, second = (x.astype(f"int16x{size}") for x in (a, r))
        return [beside(first, second, 8, k) for k in (0, 4)]
    zero = tirx.Broadcast(tirx.const(0, "uint8"), size)
    both = [beside(a, r, 16, first) for first in (0, 8)]
    return [tirx.reinterpret(f"int16x{size // 2}", beside(x, zero, 16, first)) for x in both for first in (0, 8)]


def _chosen(vectors: list[tirx.Expr], places: Sequence[int]) -> tirx.Expr:
    """The elements of a vector, or of two, at known places."""
    return tirx.Shuffle(vectors, [tirx.const(i, "int32") for i in places])


def _all_of(value: int, lanes: int) -> tirx.Expr:
    return tirx.Broadcast(tirx.const(value, "int32"), lanes)


def _words(numbers: list[tirx.Expr], lanes: int) -> list[tirx.Expr]:
    """packssdw of every two vectors."""
    return [_pack("packssdw", numbers[k], numbers[k + 1], lanes, 16) for k in range(0, len(numbers), 2)]


def _added(words: tirx.Expr, others: tirx.Expr) -> tirx.Expr:
    """paddsw."""
    return tirx.call_llvm_pure_intrin(str(words.ty.dtype), "llvm.sadd.sat", words, others)


def _bytes(words: list[tirx.Expr], lanes: int, dtype: str) -> tirx.Expr:
    """packuswb or packsswb of two vectors, or of one twice."""
    return _pack("packuswb" if dtype == "uint8" else "packsswb", words[0], words[-1], lanes, 8)


def _pack(name: str, a: tirx.Expr, b: tirx.Expr, lanes: int, bits: int) -> tirx.Expr:
    family, suffix = ("avx512", ".512") if lanes == 16 else ("avx2", "")
    return tirx.call_llvm_pure_intrin(f"int{bits}x{lanes * 32 // bits}", f"llvm.x86.{family}.{name}{suffix}", a, b)


def _dot_words(c: tirx.Expr, a: tirx.Expr, b: tirx.Expr, lanes: int, dot: bool) -> tirx.Expr:
    """c plus, in every lane, the two products of 16 bits."""
    if dot:
        return tirx.call_llvm_pure_intrin(f"int32x{lanes}", f"llvm.x86.avx512.vpdpwssd.{32 * lanes}", c, a, b)
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    return c + tirx.call_llvm_pure_intrin(f"int32x{lanes}", name, a, b)


def _once(bytes_: tirx.Expr, lanes: int, vectors: int, dtype: str) -> tirx.Expr:
    """What `_bytes` made of vectors in the order of `beside`: those of two vectors hold every eight bytes twice."""
    if vectors == 2:
        bytes_ = _chosen([tirx.reinterpret(f"int64x{lanes // 2}", bytes_)], range(0, lanes // 2, 2))
    return tirx.reinterpret(f"{dtype}x{lanes * vectors}", bytes_)


def _in_order(bytes_: tirx.Expr, lanes: int, vectors: int, dtype: str) -> tirx.Expr:
    """What `_bytes` made, where every 128 bits hold four numbers of each vector."""
    order = [4 * part + vector for vector in range(vectors) for part in range(lanes // 4)]
    return tirx.reinterpret(f"{dtype}x{lanes * vectors}", _chosen([tirx.reinterpret(f"int32x{lanes}", bytes_)], order))
