"""Copies to shared memory and products of tensor cores, as pairs of meaning and spelling; the spelling is in
cuda_device.py.

They are written for one thread: what it means for its own rows and columns. The 32 threads of a warp together read
the operands of all of them, so a spelling may only stand where a whole warp arrives together.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

from tvm import tirx

from .pair import Operand, register

SHARED = "shared.dyn"


class Form(Enum):
    """The types of data and weights of a product; the value is the name in cuda_device.py.

    U8S4, S8S4: weights are nibbles, opened as 16 times their value, so the sums are 16 times too large.
    U4S4, S4S4: both are nibbles, two to a byte in the same order.
    """

    U8S8 = "U8S8"
    S8S8 = "S8S8"
    U8S4 = "U8S4"
    S8S4 = "S8S4"
    U4S4 = "U4S4"
    S4S4 = "S4S4"

    @property
    def opens_weights(self) -> bool:
        """Whether the weights are nibbles that are opened in registers."""
        return self in (Form.U8S4, Form.S8S4)

    @property
    def is_packed(self) -> bool:
        """Whether data and weights hold two elements to a byte."""
        return self in (Form.U4S4, Form.S4S4)

    @property
    def data(self) -> str:
        """The type of the data in memory."""
        return "uint8" if self in (Form.U8S8, Form.U8S4, Form.U4S4, Form.S4S4) else "int8"

    @property
    def weights(self) -> str:
        """The type of the weights in memory."""
        return "uint8" if self.opens_weights or self.is_packed else "int8"

    @property
    def width(self) -> int:
        """Bytes of weights per lane and 32 bytes of data."""
        return 4 if self.opens_weights else 8

    def product(self, data: tirx.Expr, weights: tirx.Expr, byte: tirx.Expr) -> tirx.Expr:
        """What a byte of data and the weights' byte that stands for it add to the sum; byte: its number, 0 to 31."""
        if self.is_packed:
            return _nibble(data, 0, self is Form.S4S4) * _nibble(weights, 0, True) + _nibble(
                data, 1, self is Form.S4S4
            ) * _nibble(weights, 1, True)
        if self.opens_weights:
            low = tirx.Select(byte < 16, weights << tirx.const(4, "uint8"), weights & tirx.const(0xF0, "uint8"))
            return data.astype("int32") * low.astype("int8").astype("int32")
        return data.astype("int32") * weights.astype("int32")

    def at(self, byte: tirx.Expr) -> tirx.Expr:
        """Which of a lane's `width` bytes of weights goes with byte 0 to 31 of a row of data."""
        return byte % 4 if self.opens_weights else byte // 16 * 4 + byte % 4


def _nibble(byte: tirx.Expr, half: int, signed: bool) -> tirx.Expr:
    value = (byte.astype("int32") >> 4 * half) & 15
    return (value ^ 8) - 8 if signed else value


@cache
def copy_or_zero(dtype: str, count: int) -> str:
    """The name of the tensor intrinsic s[i] = a[i] where p[0] is not 0, else 0, i < count, from global to shared
    memory.

    count: 4, 8 or 16 elements of one byte, aligned so.  Asynchronous on sm_80 and later.
    """
    return register(
        f"hawq.copy_or_zero.{dtype}.{count}",
        [Operand((1,), "int32", "local"), Operand((count,), dtype), Operand((count,), dtype, SHARED)],
        [(count, "S")],
        lambda p, a, i: tirx.if_then_else(p[0] != 0, a[i], tirx.const(0, dtype)),
        lambda p, a, s: _copy(count, a, s, p[0]),
        adds=False,
    )


@cache
def copy_always(dtype: str, count: int) -> str:
    """The name of the tensor intrinsic s[i] = a[i], i < count; otherwise as `copy_or_zero`."""
    return register(
        f"hawq.copy_always.{dtype}.{count}",
        [Operand((count,), dtype), Operand((count,), dtype, SHARED)],
        [(count, "S")],
        lambda a, i: a[i],
        lambda a, s: _copy(count, a, s, 1),
        adds=False,
    )


def _copy(count: int, a: tirx.Buffer, s: tirx.Buffer, condition: tirx.Expr | int) -> tirx.Expr:
    return tirx.call_extern("void", f"hawq::copy<{count}>", s.access_ptr("w"), a.access_ptr("r"), condition)


def parts(length: int, part: int) -> tuple[int, ...]:
    """The dimensions of `length` bytes that are copied `part` at a time, the last of them being copied together."""
    return (length,) if length <= part else (length // part, part)


def part_index(length: int, part: int, i: tirx.Expr) -> tuple[tirx.Expr, ...]:
    """The index into `parts` of a byte."""
    return (i,) if length <= part else (i // part, i % part)


@cache
def multiply_step(rows: int, columns: int, depth: int, form: Form, vector: int) -> str:
    """The name of the tensor intrinsic of one step of a warp's product, as one of its threads sees it:

        c[r, j] += sum over 32 * depth bytes of data of row r times weights of column j

    r < 2 * rows (of fragments), j < 2 * columns.  Data: [chunk of 16 bytes, 1, r, 1, parts(16, vector)].  Weights:
    [fragment j // 2, lane, parts(depth * form.width, 16)]: those of column j and bytes b are with lane 4 (j % 2) + b
    % 16 / 4 (`Form.at`).  depth: even.
    """
    width = form.width
    data, weights = (2 * depth, 1, 2 * rows, 1, *parts(16, vector)), (columns, 8, *parts(depth * width, 16))

    def value(a: tirx.Buffer, b: tirx.Buffer, r: tirx.Expr, j: tirx.Expr, k: tirx.Expr, e: tirx.Expr) -> tirx.Expr:
        in_data = (k * 2 + e // 16, 0, r, 0, *part_index(16, vector, e % 16))
        in_weights = (j // 2, j % 2 * 4 + e % 16 // 4, *part_index(depth * width, 16, k * width + form.at(e)))
        return form.product(a[in_data], b[in_weights], e)

    def spelled(a: tirx.Buffer, b: tirx.Buffer, c: tirx.Buffer) -> tirx.Expr:
        call = f"hawq::step<{rows}, {columns}, {depth}, hawq::{form.value}>"
        chunk, fragment = a.strides[0], b.strides[0]
        return tirx.call_extern("void", call, c.access_ptr("rw"), a.access_ptr("r"), chunk, b.access_ptr("r"), fragment)

    return register(
        f"hawq.multiply_step.{rows}.{columns}.{depth}.{form.value}.{vector}",
        [
            Operand(data, form.data, SHARED, free=len(data)),
            Operand(weights, form.weights, SHARED, free=len(weights)),
            Operand((2 * rows, 2 * columns), "int32", "local"),
        ],
        [(2 * rows, "S"), (2 * columns, "S"), (depth, "R"), (32, "R")],
        value,
        spelled,
    )
