"""Tables of 256 entries (A16) in registers, on AVX-512."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx import Buffer

BYTES, WORDS = "bytes", "words"  # what the CPU looks up anywhere in two registers: with VBMI, with BW
WIDE = "wide_lookup"  # how stages are called that `wide_looked_up` spells
REGISTER, BLOCKS = 512, 4  # bits, and the parts of 128 within which x86 interleaves


def looked_up(x: tirx.Expr, table: Buffer, size: int, permutes: str) -> tirx.Expr:
    """table[x - the least number of x's type] for each of the `size` lanes of x, 8 bits in and out; size divides 64.

    permutes: BYTES (vpermi2b: 128 of the 256 entries) or WORDS (vpermi2w: 128 entries as 64 pairs).
    """
    step = 64 if permutes == BYTES else 32
    index, lanes = _index(x, size, step)
    found = [_bytes_at(_chosen([index], range(k, k + step)), table, 0, permutes) for k in range(0, lanes, step)]
    return tirx.reinterpret(f"{table.dtype}x{size}", _chosen(found, range(size)))


def planes(table: np.ndarray[Any, Any], permutes: str) -> np.ndarray[Any, Any]:
    """A table of 16 or 32 bits as `wide_looked_up` reads it: the lowest parts of all entries, then the next ones.

    Parts have the bits that are looked up at once: 8 (uint8) or 16 (uint16).
    """
    part = "<u1" if permutes == BYTES else "<u2"
    return np.ascontiguousarray(table.astype(table.dtype.newbyteorder("<")).view(part).reshape(table.size, -1).T)


def joined(parts: Sequence[tirx.Expr], dtype: str) -> tirx.Expr:
    """The entry, of type `dtype`, that has these parts."""
    unsigned, bits = f"uint{_bits(dtype)}", _bits(dtype) // len(parts)
    wide = [p.astype(unsigned) << tirx.const(k * bits, unsigned) for k, p in enumerate(parts)]
    return tirx.reinterpret(dtype, sum(wide[1:], wide[0]))


def wide_looked_up(x: tirx.Expr, parts: Buffer, size: int, permutes: str, dtype: str) -> list[tirx.Expr]:
    """As `looked_up`, with entries of 16 or 32 bits, of which `parts` has the `planes`; whole registers, in sequence.

    Parts are joined by interleaving within 128 bits.  Bytes are looked up in the order from which that puts them right.
    """
    count = int(parts.shape[0])
    part = _bits(dtype) // count
    step, each = REGISTER // part, REGISTER // _bits(dtype) // BLOCKS
    index, lanes = _index(x, size, step)
    order = [each * (BLOCKS * k + block) + i for block in range(BLOCKS) for k in range(count) for i in range(each)]
    find = _bytes_at if permutes == BYTES else _words_at
    results: list[tirx.Expr] = []
    for first in range(0, lanes, step):
        some = _chosen([index], [first + i for i in order])
        results += _interleaved([find(some, parts, k, permutes) for k in range(count)], part)
    wide = [tirx.reinterpret(f"{dtype}x{REGISTER // _bits(dtype)}", r) for r in results]
    return wide[: size * _bits(dtype) // REGISTER]


def _interleaved(vectors: list[tirx.Expr], bits: int) -> list[tirx.Expr]:
    """Of vectors with the parts of elements, lowest first, vectors of the elements."""
    if len(vectors) == 1:
        return vectors
    lanes = REGISTER // bits
    block = lanes // BLOCKS

    def half(low: tirx.Expr, high: tirx.Expr, first: int) -> tirx.Expr:
        places = [at + first + i for at in range(0, lanes, block) for i in range(block // 2)]
        both = _chosen([low, high], [place + side for place in places for side in (0, lanes)])
        return tirx.reinterpret(f"uint{2 * bits}x{lanes // 2}", both)

    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    return [v for first in (0, block // 2) for v in _interleaved([half(*pair, first) for pair in pairs], 2 * bits)]


def _index(x: tirx.Expr, size: int, step: int) -> tuple[tirx.Expr, int]:
    """The places of entries as unsigned bytes, in `step` lanes at least, and how many there are."""
    index, lanes = tirx.reinterpret(f"uint8x{size}", x), size
    if str(x.ty.dtype).startswith("int8"):
        index = index ^ _all(128, "uint8", size)
    while lanes < step:
        index, lanes = _chosen([index, index], range(2 * lanes)), 2 * lanes
    return index, lanes


def _bytes_at(index: tirx.Expr, table: Buffer, row: int, permutes: str) -> tirx.Expr:
    """The entries of 8 bits at as many indices as one instruction looks up."""
    lanes, name = (64, "qi") if permutes == BYTES else (32, "hi")
    kind = f"int{512 // lanes}x{lanes}"
    wide = index if permutes == BYTES else index.astype("uint16x32")
    place = tirx.reinterpret(kind, wide if permutes == BYTES else wide >> _all(1, "uint16", 32))
    upper, lower = (_found(table, row, first, 64, place, kind, name) for first in (128, 0))
    entries = tirx.Select(_highest(index, lanes), upper, lower)
    if permutes == BYTES:
        return tirx.reinterpret("uint8x64", entries)
    pairs = tirx.reinterpret("uint16x32", entries)
    return (pairs >> ((wide & _all(1, "uint16", 32)) << _all(3, "uint16", 32))).astype("uint8x32")


def _words_at(index: tirx.Expr, table: Buffer, row: int, _: str) -> tirx.Expr:
    """The entries of 16 bits at 32 indices."""
    place = tirx.reinterpret("int16x32", index.astype("uint16x32"))
    quarters = [_found(table, row, first, 32, place, "int16x32", "hi") for first in (0, 64, 128, 192)]
    second = _highest(index << _all(1, "uint8", 32), 32)
    lower, upper = (tirx.Select(second, quarters[k + 1], quarters[k]) for k in (0, 2))
    return tirx.reinterpret("uint16x32", tirx.Select(_highest(index, 32), upper, lower))


def _found(table: Buffer, row: int, first: int, lanes: int, place: tirx.Expr, kind: str, name: str) -> tirx.Expr:
    """What vpermi2 finds in two registers of `lanes` entries, from `first` on."""
    own = [row] if len(table.shape) > 1 else []
    parts = (tirx.reinterpret(kind, table.vload([*own, at], f"{table.dtype}x{lanes}")) for at in (first, first + lanes))
    return tirx.call_llvm_pure_intrin(kind, f"llvm.x86.avx512.vpermi2var.{name}.512", next(parts), place, next(parts))


def _highest(index: tirx.Expr, lanes: int) -> tirx.Expr:
    """The highest bits of bytes, as truth values."""
    return tirx.reinterpret(f"int8x{lanes}", index) < _all(0, "int8", lanes)


def _bits(dtype: str) -> int:
    return np.dtype(dtype).itemsize * 8


def _all(value: int, dtype: str, lanes: int) -> tirx.Expr:
    return tirx.Broadcast(tirx.const(value, dtype), lanes)


def _chosen(vectors: list[tirx.Expr], places: range | list[int]) -> tirx.Expr:
    """The elements of a vector, or of two, at known places."""
    return tirx.Shuffle(vectors, [tirx.const(i, "int32") for i in places])
