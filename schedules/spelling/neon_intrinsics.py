"""Inner products of NEON registers, as pairs of meaning and spelling: one step of loaded data against one vector of
channels.

    c[e] += sum_q sum_p a[pixel(e), q depth + p] w[q, channel(e), p]

Four channels make a vector. For a single pixel e is the channel; for two, e = 4 (channel / 2) + 2 pixel + channel %
2, as smmla has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx

from schedules.narrow import in_high_bits

from .pair import Operand, register

LANES = 4


@dataclass(frozen=True)
class Inner:
    """One kind of inner product: `inner` instructions per register of data, of `depth` products per lane, for
    `together` pixels.

    name: the instruction: smlal, sdot, udot, usdot, smmla, ummla or usmmla.  data: the elements' type.  weight:
    int8, uint8, or uint8 that holds signed values of `width` bits in one plane (see `narrow.py`), which are multiplied
    as 2^(8 - width) times what they are: the first instructions find theirs in the lowest bits of the bytes.
    """

    name: str
    data: str
    weight: str
    depth: int
    inner: int
    together: int = 1
    width: int = 8

    def __post_init__(self) -> None:
        if self.inner * self.width % 8:
            raise ValueError(f"no whole bytes for so many instructions: {self}")

    @property
    def length(self) -> int:
        """The elements of data per pixel."""
        return self.depth * self.inner

    @property
    def stored(self) -> int:
        """The steps that a vector of weights is stored as."""
        return self.inner * self.width // 8

    @property
    def sums(self) -> int:
        """The int32 sums."""
        return LANES * self.together


@cache
def inner_product(form: Inner) -> str:
    """The name of the tensor intrinsic of a form, exact for every operand; sums wrap around."""
    # Dimensions and loops of one step are left out.
    data = (form.together, form.length) if form.together > 1 else (form.length,)
    steps, depth = [form.stored] * (form.inner > 1), [form.depth] * (form.depth > 1)

    def value(a: tirx.Buffer, w: tirx.Buffer, e: tirx.Expr, *summed: tirx.Expr) -> tirx.Expr:
        q, p = summed[: len(steps)], summed[len(steps) :]
        pixel, channel = ([], e) if form.together == 1 else ([e // 2 % 2], e // 4 * 2 + e % 2)
        in_data = (*pixel, (q[0] if q else 0) * form.depth + (p[0] if p else 0))

        def weight_of(*step: Any) -> tirx.Expr:
            return w[tuple([*step, channel, *p])]

        weight = in_high_bits(weight_of, q[0], form.inner, form.width) if form.width < 8 else weight_of(*q)
        return a[in_data].astype("int32") * weight.astype("int32")

    return register(
        f"hawq.neon.{form.name}.{form.data}.{form.weight}.{form.depth}x{form.inner}"
        f"{f'.{form.width}' if form.width < 8 else ''}",
        [
            Operand(data, form.data, "local"),
            Operand((*steps, LANES, *depth), form.weight),
            Operand((form.sums,), "int32", "local"),
        ],
        [(form.sums, "S"), *((form.inner, "R") for _ in steps), *((n, "R") for n in depth)],
        value,
        lambda a, w, c: [_spelled(form, a, w, c, part) for part in range(form.together)],
    )


@cache
def dot_s8s8() -> str:
    """The name of the tensor intrinsic c[i] += sum_k a[k] w[i, k], i and k < 4, of int8, spelled as sdot."""

    def spelled(a: tirx.Buffer, w: tirx.Buffer, c: tirx.Buffer) -> list[tirx.Expr]:
        four = tirx.Broadcast(tirx.reinterpret("int32", a.vload([0], "int8x4")), LANES)
        operands = (c.vload([0], "int32x4"), w.vload([0, 0], "int8x16"), tirx.reinterpret("int8x16", four))
        return [tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", *operands)]

    return register(
        "hawq.neon.dot_s8s8",
        [Operand((4,), "int8"), Operand((LANES, 4), "int8"), Operand((LANES,), "int32", "local")],
        [(LANES, "S"), (4, "R")],
        lambda a, w, i, k: a[k].astype("int32") * w[i, k].astype("int32"),
        spelled,
    )


def _spelled(f: Inner, a: tirx.Buffer, w: tirx.Buffer, c: tirx.Buffer, part: int) -> tirx.Expr:
    """A register of sums after all instructions; part: which one of those for two pixels."""
    total = c.vload([4 * part], "int32x4")
    for q in range(f.inner):
        total = (
            _pairs(f, total, a, w, q)
            if f.name == "smlal"
            else _instruction(f, total, _data(f, a, q), _weights(f, w, q, part))
        )
    return total


def _instruction(f: Inner, c: tirx.Expr, a: tirx.Expr, w: tirx.Expr) -> tirx.Expr:
    # A lane of the last operand is one of the instruction; of usdot, which has the unsigned operand first, it is the
    # first that may be a lane.
    operands = (w, a) if f.name in ("sdot", "udot") else (a, w)
    return tirx.call_llvm_pure_intrin("int32x4", f"llvm.aarch64.neon.{f.name}", c, *operands)


def _data(f: Inner, a: tirx.Buffer, q: int) -> tirx.Expr:
    """The data of one instruction: one pixel's in every lane, or those of two one after the other."""
    if f.together == 2:
        if f.inner == 1:
            return a.vload([0, 0], f"{f.data}x16")
        rows = [tirx.reinterpret(f"int64x{f.inner}", a.vload([i, 0], f"{f.data}x{f.length}")) for i in range(2)]
        return tirx.reinterpret(f"{f.data}x16", tirx.Shuffle(rows, _indices(q, f.inner + q)))
    words = tirx.reinterpret(_vector("int32", f.inner), a.vload([0], f"{f.data}x{f.length}"))
    # One lane of a register in every lane is an operand of its own: nothing is copied.
    word = words if f.inner == 1 else tirx.Shuffle([words], _indices(q))
    return tirx.reinterpret(f"{f.data}x16", tirx.Broadcast(word, LANES))


def _weights(f: Inner, w: tirx.Buffer, q: int, part: int) -> tirx.Expr:
    """The weights of one instruction."""
    start = [*([q % f.stored] if f.inner > 1 else []), 2 * part, 0]
    return _opened(f, w.vload(start, f"{f.weight}x16"), 16, q // f.stored)


def _opened(f: Inner, w: tirx.Expr, lanes: int, field: int) -> tirx.Expr:
    """The values of one field in the high bits of bytes."""
    if f.width == 8:
        return w
    left = 8 - f.width * (field + 1)
    if left:
        w = w << tirx.Broadcast(tirx.const(left, "uint8"), lanes)
    if field:
        w = w & tirx.Broadcast(tirx.const(256 - 2 ** (8 - f.width), "uint8"), lanes)
    return tirx.reinterpret(f"int8x{lanes}", w)


def _pairs(f: Inner, total: tirx.Expr, a: tirx.Buffer, w: tirx.Buffer, q: int) -> tirx.Expr:
    """Two products of 16 bits per lane.

    The weights of two steps are widened in one register, even bytes and odd ones: LLVM would widen each four for
    themselves. And a product of widened lanes is not left to LLVM, which would widen where the data is loaded, and
    multiply in 32 bits.
    """
    both = 2 if f.stored % 2 == 0 else 1
    place, lanes = q % f.stored, LANES * both
    start = [*([place // both * both] if f.inner > 1 else []), 0, 0]
    opened = _opened(f, w.vload(start, f"{f.weight}x{2 * lanes}"), 2 * lanes, q // f.stored)
    wide = "int16" if f.width < 8 or f.weight == "int8" else "uint16"
    pairs, byte = tirx.reinterpret(f"{wide}x{lanes}", opened), tirx.Broadcast(tirx.const(8, wide), lanes)
    data = a.vload([0], f"{f.data}x{f.length}")
    for p, bytes_ in enumerate(((pairs << byte) >> byte, pairs >> byte)):
        own = tirx.reinterpret(f"int16x{lanes}", bytes_)
        own = tirx.Shuffle([own], _indices(*range(place % both * LANES, place % both * LANES + LANES)))
        element = tirx.Broadcast(tirx.Shuffle([data], _indices(2 * q + p)), LANES)
        total = total + tirx.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.smull", own, element)
    return total


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _indices(*lanes: int) -> list[tirx.Expr]:
    return [tirx.const(i, "int32") for i in lanes]
