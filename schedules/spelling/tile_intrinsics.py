"""The tile instructions of AMX, as pairs of meaning and spelling: eight registers of 16 rows of 64 bytes.

A tile has no address: it stands for a buffer in scope "local" that is never touched, and an instruction's immediate
tile number follows from where in that buffer a block lies, once its loops are unrolled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import tvm
from tvm import tirx

from .pair import Operand, prefetch, register

BYTES = 64  # of a row of a tile: the depth of one product
LANES = 16  # int32 of a row, and rows of a tile of weights
TILES = 8
PALETTE = 1
# Of weights that come from beyond the caches: how far before them, in sequence, the second cache is asked for more.
FETCHED = 8 << 10


@dataclass(frozen=True)
class Tiles:
    """A block of sums: `groups` x `vectors` tiles of `pixels` x 16, numbered first; then the groups' data, then the
    weights. Where data have fewer tiles than groups they take turns, each loaded right before its products.

    emulated: every instruction is spelled as a call of a C function hawq_emulated_*, for tests where there is no AMX.
    """

    groups: int
    pixels: int
    vectors: int
    emulated: bool = False

    def __post_init__(self) -> None:
        if min(self.groups, self.pixels, self.vectors) < 1 or self.pixels > LANES or self.turns < 1:
            raise ValueError(f"not a block of tiles: {self}")

    @property
    def data(self) -> int:
        """The number of the first tile of data."""
        return self.groups * self.vectors

    @property
    def turns(self) -> int:
        """The tiles that data have."""
        return min(self.groups, TILES - self.data - self.vectors)

    @property
    def weights(self) -> int:
        """The number of the first tile of weights."""
        return self.data + self.turns

    @property
    def channels(self) -> int:
        """The output channels of a block."""
        return LANES * self.vectors

    def sum_at(self, offset: tirx.Expr) -> tirx.Expr:
        """The tile that begins at an offset of the sums [group, pixel, channel]."""
        return offset // (self.pixels * self.channels) * self.vectors + offset % self.channels // LANES

    def data_at(self, offset: tirx.Expr) -> tirx.Expr:
        """The tile that begins at an offset of the data [group, pixel, 64]."""
        group = offset // (self.pixels * BYTES)
        return self.data + (group if self.turns == self.groups else group % self.groups % self.turns)

    def weights_at(self, offset: tirx.Expr) -> tirx.Expr:
        """The tile that begins at an offset of the weights [16, channel, 4]."""
        return self.weights + offset // BYTES

    def configuration(self) -> bytes:
        """What ldtilecfg reads: the palette, 64 bytes to every row, and the number of rows of every tile."""
        rows = [self.pixels] * self.weights + [LANES] * self.vectors
        config = bytearray(64)
        config[0] = PALETTE
        for tile, count in enumerate(rows):
            config[16 + 2 * tile] = BYTES
            config[48 + tile] = count
        return bytes(config)

    def begin(self) -> tirx.Stmt:
        """The statement that configures the tiles of the thread that executes it."""
        # The bytes are all below 128: a string of them is the same in UTF-8, and a constant of the code.
        config = tvm.ir.StringImm(self.configuration().decode("ascii"))
        return tirx.Evaluate(_call(self, "ldtilecfg", config))

    def end(self) -> tirx.Stmt:
        """The statement that gives the tiles back, so that the system saves them no longer."""
        return tirx.Evaluate(_call(self, "tilerelease"))


def _call(tiles: Tiles, name: str, *args: tirx.Expr) -> tirx.Expr:
    """One instruction: tile numbers are the int32 arguments, which LLVM wants in 8 bits."""
    if tiles.emulated:
        return tirx.call_extern("int32", f"hawq_emulated_{name}", *args)
    return tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *(_immediate(a) for a in args))


def _immediate(arg: tirx.Expr) -> tirx.Expr:
    return arg.astype("int8") if str(getattr(arg, "dtype", arg.ty)) == "int32" else arg


def _name(tiles: Tiles, what: str) -> str:
    return f"hawq.{what}.{tiles.groups}x{tiles.pixels}x{tiles.vectors}{'.emulated' if tiles.emulated else ''}"


def _sums(tiles: Tiles) -> Operand:
    return Operand((tiles.pixels, LANES), "int32", "local", free=1)


def _rows(tiles: Tiles, dtype: str) -> Operand:
    return Operand((tiles.pixels, BYTES), dtype, "local")


def _weights(dtype: str) -> Operand:
    return Operand((LANES, LANES, 4), dtype, "local", free=1)


@cache
def tile_zero(tiles: Tiles) -> str:
    """The name of the tensor intrinsic c[i, o] = 0, i < pixels, o < 16: tilezero."""
    return register(
        _name(tiles, "tile_zero"),
        [_sums(tiles)],
        [(tiles.pixels, "S"), (LANES, "S")],
        lambda i, o: tirx.const(0, "int32"),
        lambda c: _call(tiles, "tilezero", tiles.sum_at(c.elem_offset)),
        adds=False,
    )


@cache
def tile_load_rows(tiles: Tiles, step: int, data: str) -> str:
    """The name of the tensor intrinsic d[i, k] = a[i step + k], i < pixels, k < 64: tileloadd64 from pixels of
    `step` bytes.
    """
    return register(
        _name(tiles, f"tile_load_rows.{step}.{data}"),
        [Operand(((tiles.pixels - 1) * step + BYTES,), data), _rows(tiles, data)],
        [(tiles.pixels, "S"), (BYTES, "S")],
        lambda a, i, k: a[i * step + k],
        lambda a, d: _load(tiles, tiles.data_at(d.elem_offset), a, tirx.const(step, "int64")),
        adds=False,
    )


@cache
def tile_load_pixels(tiles: Tiles, stride: int, data: str) -> str:
    """The name of the tensor intrinsic d[i, k] = a[i stride, k], i < pixels, k < 64: tileloadd64 from a tensor as it
    lies.
    """
    return register(
        _name(tiles, f"tile_load_pixels.{stride}.{data}"),
        [Operand(((tiles.pixels - 1) * stride + 1, BYTES), data, free=1), _rows(tiles, data)],
        [(tiles.pixels, "S"), (BYTES, "S")],
        lambda a, i, k: a[i * stride, k],
        lambda a, d: _load(tiles, tiles.data_at(d.elem_offset), a, (a.strides[0] * stride).astype("int64")),
        adds=False,
    )


@cache
def tile_load_weights(tiles: Tiles, weight: str, far: bool = False) -> str:
    """The name of the tensor intrinsic d[q, o, p] = w[q, 0, o, p], q < 16, o < 16, p < 4: tileloadd64 from packed
    weights.

    far: they are read once and in sequence, a tile's rows 64 bytes apart.
    """

    def hints(w: tirx.Buffer, _: tirx.Buffer) -> list[tirx.Expr]:
        lines = range(FETCHED // BYTES, FETCHED // BYTES + LANES) if far else ()
        return [prefetch(w[line, 0, 0, 0], 0, second=True) for line in lines]

    return register(
        _name(tiles, f"tile_load_weights.{weight}{'.far' if far else ''}"),
        [Operand((LANES, 1, LANES, 4), weight, free=2), _weights(weight)],
        [(LANES, "S"), (LANES, "S"), (4, "S")],
        lambda w, q, o, p: w[q, 0, o, p],
        lambda w, d: _load(tiles, tiles.weights_at(d.elem_offset), w, w.strides[0].astype("int64")),
        adds=False,
        hints=hints,
    )


@cache
def tile_dot(tiles: Tiles, data: str, weight: str) -> str:
    """The name of the tensor intrinsic c[i, o] += sum_q sum_p a[i, 4 q + p] w[q, o, p]: tdpb(s|u)(s|u)d.

    i < pixels, o < 16, q < 16, p < 4; data and weight are "int8" or "uint8".  Exact, and sums wrap around.
    """
    kinds = {"int8": "s", "uint8": "u"}

    def spelled(a: tirx.Buffer, w: tirx.Buffer, c: tirx.Buffer) -> tirx.Expr:
        numbers = tiles.sum_at(c.elem_offset), tiles.data_at(a.elem_offset), tiles.weights_at(w.elem_offset)
        return _call(tiles, f"tdpb{kinds[data]}{kinds[weight]}d", *numbers)

    return register(
        _name(tiles, f"tile_dot.{data}.{weight}"),
        [_rows(tiles, data), _weights(weight), _sums(tiles)],
        [(tiles.pixels, "S"), (LANES, "S"), (LANES, "R"), (4, "R")],
        lambda a, w, i, o, q, p: a[i, q * 4 + p].astype("int32") * w[q, o, p].astype("int32"),
        spelled,
    )


@cache
def tile_store(tiles: Tiles) -> str:
    """The name of the tensor intrinsic d[i, o] = c[i, o], i < pixels, o < 16: tilestored64."""

    def spelled(c: tirx.Buffer, d: tirx.Buffer) -> tirx.Expr:
        stride = (d.strides[0] * 4).astype("int64")
        return _call(tiles, "tilestored64", tiles.sum_at(c.elem_offset), tirx.address_of(d[0, 0]), stride)

    return register(
        _name(tiles, "tile_store"),
        [_sums(tiles), Operand((tiles.pixels, LANES), "int32", free=1)],
        [(tiles.pixels, "S"), (LANES, "S")],
        lambda c, i, o: c[i, o],
        spelled,
        adds=False,
    )


def _load(tiles: Tiles, tile: tirx.Expr, source: tirx.Buffer, stride: tirx.Expr) -> tirx.Expr:
    return _call(tiles, "tileloadd64", tile, tirx.address_of(source[tuple(0 for _ in source.shape)]), stride)
