"""Tables of 256 entries of 8 bits (A16) in registers, on AVX-512."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import Buffer

BYTES, WORDS = "bytes", "words"  # what the CPU looks up anywhere in two registers: with VBMI, with BW


def looked_up(x: tirx.Expr, table: Buffer, size: int, permutes: str) -> tirx.Expr:
    """table[x - the least number of x's type] for each of the `size` lanes of x, 8 bits in and out; size divides 64.

    permutes: BYTES (vpermi2b: 128 of the 256 entries) or WORDS (vpermi2w: 128 entries as 64 pairs).
    """
    signed = str(x.ty.dtype).startswith("int8")
    index = tirx.reinterpret(f"uint8x{size}", x)
    if signed:
        index = index ^ _all(128, "uint8", size)
    step, lanes = 64 if permutes == BYTES else 32, size
    while lanes < step:
        index, lanes = _chosen([index, index], range(2 * lanes)), 2 * lanes
    found = [_found(_chosen([index], range(k, k + step)), table, permutes) for k in range(0, lanes, step)]
    return tirx.reinterpret(f"{table.dtype}x{size}", _chosen(found, range(size)))


def _found(index: tirx.Expr, table: Buffer, permutes: str) -> tirx.Expr:
    """The entries at as many indices as one instruction looks up."""
    lanes, name = (64, "qi") if permutes == BYTES else (32, "hi")
    kind = f"int{512 // lanes}x{lanes}"
    wide = index if permutes == BYTES else index.astype("uint16x32")
    place = tirx.reinterpret(kind, wide if permutes == BYTES else wide >> _all(1, "uint16", 32))

    def half(first: int) -> tirx.Expr:
        parts = (tirx.reinterpret(kind, table.vload([first + k], f"{table.dtype}x64")) for k in (0, 64))
        return tirx.call_llvm_pure_intrin(
            kind, f"llvm.x86.avx512.vpermi2var.{name}.512", next(parts), place, next(parts)
        )

    upper = tirx.reinterpret(f"int8x{lanes}", index) < _all(0, "int8", lanes)
    entries = tirx.Select(upper, half(128), half(0))
    if permutes == BYTES:
        return tirx.reinterpret("uint8x64", entries)
    pairs = tirx.reinterpret("uint16x32", entries)
    return (pairs >> ((wide & _all(1, "uint16", 32)) << _all(3, "uint16", 32))).astype("uint8x32")


def _all(value: int, dtype: str, lanes: int) -> tirx.Expr:
    return tirx.Broadcast(tirx.const(value, dtype), lanes)


def _chosen(vectors: list[tirx.Expr], places: range | list[int]) -> tirx.Expr:
    """The elements of a vector, or of two, at known places."""
    return tirx.Shuffle(vectors, [tirx.const(i, "int32") for i in places])
