"""The products of a depthwise convolution's line on a GPU, as a pair of meaning and spelling."""

from __future__ import annotations

from functools import cache

from tvm import tirx

from .pair import Operand, register

CHANNELS = 4  # of a word


@cache
def windows(pixels: int, taps: int, stride: int, data: str, spelled: bool = True) -> str:
    """The name of the tensor intrinsic c[p, i] += sum_t a[p stride + t, i] w[t, i], p < pixels, t < taps, i < 4,
    spelled as dp4a.

    data: "uint8" or "int8", the type of a; w is int8, c int32.  All three lie in registers of one thread.  spelled:
    False is for CPUs: the meaning instead of the spelling.
    """
    call = f"hawq::windows<{pixels}, {taps}, {stride}, {'true' if data == 'int8' else 'false'}>"

    def lines(length: int, dtype: str) -> Operand:
        return Operand((length, CHANNELS), dtype, "local", free=1)

    def spelling(a: tirx.Buffer, w: tirx.Buffer, c: tirx.Buffer) -> tirx.Expr:
        return tirx.call_extern("void", call, c.access_ptr("rw"), a.access_ptr("r"), w.access_ptr("r"))

    return register(
        f"hawq.windows.{pixels}.{taps}.{stride}.{data}{'' if spelled else '.meant'}",
        [lines((pixels - 1) * stride + taps, data), lines(taps, "int8"), lines(pixels, "int32")],
        [(taps, "R"), (pixels, "S"), (CHANNELS, "S")],
        lambda a, w, p, i, t: a[p * stride + t, i].astype("int32") * w[t, i].astype("int32"),
        spelling if spelled else None,
    )
