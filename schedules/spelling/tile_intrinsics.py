"""The tile instructions of AMX, as pairs of meaning and spelling: eight registers of 16 rows of 64 bytes.

A tile has no address: it stands for a buffer in scope "local" that is never touched, and an instruction's immediate
tile number follows from where in that buffer a block lies, once its loops are unrolled.
"""

# No postponed annotations here: TVMScript reads the buffer types from them, which mypy cannot.
# mypy: disable-error-code="valid-type"
from dataclasses import dataclass
from functools import cache

import tvm
from tvm import s_tir, tirx
from tvm.script import tirx as T

from .intrinsics import Pair

BYTES = 64  # of a row of a tile: the depth of one product
LANES = 16  # int32 of a row, and rows of a tile of weights
PALETTE = 1


@dataclass(frozen=True)
class Tiles:
    """A block of sums: `groups` x `vectors` tiles of `pixels` x 16, numbered first; then the groups' data, then the
    weights.

    emulated: every instruction is spelled as a call of a C function hawq_emulated_*, for tests where there is no AMX.
    """

    groups: int
    pixels: int
    vectors: int
    emulated: bool = False

    def __post_init__(self) -> None:
        if min(self.groups, self.pixels, self.vectors) < 1 or self.pixels > LANES or self.weights + self.vectors > 8:
            raise ValueError(f"not a block of tiles: {self}")

    @property
    def data(self) -> int:
        """The number of the first tile of data."""
        return self.groups * self.vectors

    @property
    def weights(self) -> int:
        """The number of the first tile of weights."""
        return self.data + self.groups

    @property
    def channels(self) -> int:
        """The output channels of a block."""
        return LANES * self.vectors

    def sum_at(self, offset: tirx.Expr) -> tirx.Expr:
        """The tile that begins at an offset of the sums [group, pixel, channel]."""
        return offset // (self.pixels * self.channels) * self.vectors + offset % self.channels // LANES

    def data_at(self, offset: tirx.Expr) -> tirx.Expr:
        """The tile that begins at an offset of the data [group, pixel, 64]."""
        return self.data + offset // (self.pixels * BYTES)

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
        return T.call_extern("int32", f"hawq_emulated_{name}", *args)
    return T.call_llvm_intrin("void", f"llvm.x86.{name}", *(_immediate(a) for a in args))


def _immediate(arg: tirx.Expr) -> tirx.Expr:
    return arg.astype("int8") if str(getattr(arg, "dtype", arg.ty)) == "int32" else arg


def _registered(tiles: Tiles, what: str, pair: Pair) -> str:
    name = f"hawq.{what}.{tiles.groups}x{tiles.pixels}x{tiles.vectors}{'.emulated' if tiles.emulated else ''}"
    s_tir.TensorIntrin.register(name, *pair, override=True)
    return name


@cache
def tile_zero(tiles: Tiles) -> str:
    """The name of the tensor intrinsic c[i, o] = 0, i < pixels, o < 16: tilezero."""
    pixels = tiles.pixels

    @T.prim_func(s_tir=True)
    def meaning(C: T.Buffer((pixels, 16), "int32", offset_factor=1, scope="local")) -> None:
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:pixels, 0:16])
            for i, o in T.grid(pixels, 16):
                with T.sblock("zero"):
                    vi, vo = T.axis.remap("SS", [i, o])
                    C[vi, vo] = 0

    @T.prim_func(s_tir=True)
    def spelling(c: T.handle) -> None:
        s = T.int32()
        C = T.match_buffer(c, (pixels, 16), "int32", strides=[s, 1], offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:pixels, 0:16])
            T.evaluate(_call(tiles, "tilezero", tiles.sum_at(C.elem_offset)))

    return _registered(tiles, "tile_zero", (meaning, spelling))


@cache
def tile_load_rows(tiles: Tiles, step: int, data: str) -> str:
    """The name of the tensor intrinsic d[i, k] = a[i step + k], i < pixels, k < 64: tileloadd64 from pixels of
    `step` bytes.
    """
    pixels, length = tiles.pixels, (tiles.pixels - 1) * step + 64

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((length,), data, offset_factor=1), D: T.Buffer((pixels, 64), data, offset_factor=1, scope="local")
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:length])
            T.writes(D[0:pixels, 0:64])
            for i, k in T.grid(pixels, 64):
                with T.sblock("load"):
                    vi, vk = T.axis.remap("SS", [i, k])
                    D[vi, vk] = A[vi * step + vk]

    @T.prim_func(s_tir=True)
    def spelling(
        A: T.Buffer((length,), data, offset_factor=1), D: T.Buffer((pixels, 64), data, offset_factor=1, scope="local")
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:length])
            T.writes(D[0:pixels, 0:64])
            T.evaluate(_call(tiles, "tileloadd64", tiles.data_at(D.elem_offset), T.address_of(A[0]), T.int64(step)))

    return _registered(tiles, f"tile_load_rows.{step}.{data}", (meaning, spelling))


@cache
def tile_load_pixels(tiles: Tiles, stride: int, data: str) -> str:
    """The name of the tensor intrinsic d[i, k] = a[i stride, k], i < pixels, k < 64: tileloadd64 from a tensor as it
    lies.
    """
    pixels, length = tiles.pixels, (tiles.pixels - 1) * stride + 1

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((length, 64), data, offset_factor=1),
        D: T.Buffer((pixels, 64), data, offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:length, 0:64])
            T.writes(D[0:pixels, 0:64])
            for i, k in T.grid(pixels, 64):
                with T.sblock("load"):
                    vi, vk = T.axis.remap("SS", [i, k])
                    D[vi, vk] = A[vi * stride, vk]

    @T.prim_func(s_tir=True)
    def spelling(a: T.handle, D: T.Buffer((pixels, 64), data, offset_factor=1, scope="local")) -> None:
        s = T.int32()
        A = T.match_buffer(a, (length, 64), data, strides=[s, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:length, 0:64])
            T.writes(D[0:pixels, 0:64])
            T.evaluate(
                _call(
                    tiles,
                    "tileloadd64",
                    tiles.data_at(D.elem_offset),
                    T.address_of(A[0, 0]),
                    T.cast(s * stride, "int64"),
                )
            )

    return _registered(tiles, f"tile_load_pixels.{stride}.{data}", (meaning, spelling))


@cache
def tile_load_weights(tiles: Tiles, weight: str) -> str:
    """The name of the tensor intrinsic d[q, o, p] = w[q, 0, o, p], q < 16, o < 16, p < 4: tileloadd64 from packed
    weights.
    """

    @T.prim_func(s_tir=True)
    def meaning(
        W: T.Buffer((16, 1, 16, 4), weight, offset_factor=1),
        D: T.Buffer((16, 16, 4), weight, offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(W[0:16, 0, 0:16, 0:4])
            T.writes(D[0:16, 0:16, 0:4])
            for q, o, p in T.grid(16, 16, 4):
                with T.sblock("load"):
                    vq, vo, vp = T.axis.remap("SSS", [q, o, p])
                    D[vq, vo, vp] = W[vq, 0, vo, vp]

    @T.prim_func(s_tir=True)
    def spelling(w: T.handle, d: T.handle) -> None:
        s, t, u = T.int32(), T.int32(), T.int32()
        W = T.match_buffer(w, (16, 1, 16, 4), weight, strides=[s, t, 4, 1], offset_factor=1)
        D = T.match_buffer(d, (16, 16, 4), weight, strides=[u, 4, 1], offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(W[0:16, 0, 0:16, 0:4])
            T.writes(D[0:16, 0:16, 0:4])
            T.evaluate(
                _call(
                    tiles,
                    "tileloadd64",
                    tiles.weights_at(D.elem_offset),
                    T.address_of(W[0, 0, 0, 0]),
                    T.cast(s, "int64"),
                )
            )

    return _registered(tiles, f"tile_load_weights.{weight}", (meaning, spelling))


@cache
def tile_dot(tiles: Tiles, data: str, weight: str) -> str:
    """The name of the tensor intrinsic c[i, o] += sum_q sum_p a[i, 4 q + p] w[q, o, p]: tdpb(s|u)(s|u)d.

    i < pixels, o < 16, q < 16, p < 4; data and weight are "int8" or "uint8".  Exact, and sums wrap around.
    """
    pixels, kinds = tiles.pixels, {"int8": "s", "uint8": "u"}
    instruction = f"tdpb{kinds[data]}{kinds[weight]}d"

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((pixels, 64), data, offset_factor=1, scope="local"),
        W: T.Buffer((16, 16, 4), weight, offset_factor=1, scope="local"),
        C: T.Buffer((pixels, 16), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:pixels, 0:16], A[0:pixels, 0:64], W[0:16, 0:16, 0:4])
            T.writes(C[0:pixels, 0:16])
            for i, o, q, p in T.grid(pixels, 16, 16, 4):
                with T.sblock("update"):
                    vi, vo, vq, vp = T.axis.remap("SSRR", [i, o, q, p])
                    C[vi, vo] = C[vi, vo] + T.cast(A[vi, vq * 4 + vp], "int32") * T.cast(W[vq, vo, vp], "int32")

    @T.prim_func(s_tir=True)
    def spelling(a: T.handle, w: T.handle, c: T.handle) -> None:
        s, u = T.int32(), T.int32()
        A = T.match_buffer(a, (pixels, 64), data, offset_factor=1, scope="local")
        W = T.match_buffer(w, (16, 16, 4), weight, strides=[u, 4, 1], offset_factor=1, scope="local")
        C = T.match_buffer(c, (pixels, 16), "int32", strides=[s, 1], offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:pixels, 0:16], A[0:pixels, 0:64], W[0:16, 0:16, 0:4])
            T.writes(C[0:pixels, 0:16])
            T.evaluate(
                _call(
                    tiles,
                    instruction,
                    tiles.sum_at(C.elem_offset),
                    tiles.data_at(A.elem_offset),
                    tiles.weights_at(W.elem_offset),
                )
            )

    return _registered(tiles, f"tile_dot.{data}.{weight}", (meaning, spelling))


@cache
def tile_store(tiles: Tiles) -> str:
    """The name of the tensor intrinsic d[i, o] = c[i, o], i < pixels, o < 16: tilestored64."""
    pixels = tiles.pixels

    @T.prim_func(s_tir=True)
    def meaning(
        C: T.Buffer((pixels, 16), "int32", offset_factor=1, scope="local"),
        D: T.Buffer((pixels, 16), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:pixels, 0:16])
            T.writes(D[0:pixels, 0:16])
            for i, o in T.grid(pixels, 16):
                with T.sblock("store"):
                    vi, vo = T.axis.remap("SS", [i, o])
                    D[vi, vo] = C[vi, vo]

    @T.prim_func(s_tir=True)
    def spelling(c: T.handle, d: T.handle) -> None:
        s, t = T.int32(), T.int32()
        C = T.match_buffer(c, (pixels, 16), "int32", strides=[s, 1], offset_factor=1, scope="local")
        D = T.match_buffer(d, (pixels, 16), "int32", strides=[t, 1], offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:pixels, 0:16])
            T.writes(D[0:pixels, 0:16])
            T.evaluate(
                _call(tiles, "tilestored64", tiles.sum_at(C.elem_offset), T.address_of(D[0, 0]), T.cast(t * 4, "int64"))
            )

    return _registered(tiles, "tile_store", (meaning, spelling))
