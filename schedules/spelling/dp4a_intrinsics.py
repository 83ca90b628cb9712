"""The products of a depthwise convolution's line on a GPU, as a pair of meaning and spelling."""

# No postponed annotations here: TVMScript reads the buffer types from them, which mypy cannot.
# mypy: disable-error-code="valid-type"
from functools import cache

from tvm import s_tir, tirx
from tvm.script import tirx as T

CHANNELS = 4  # of a word


@cache
def windows(pixels: int, taps: int, stride: int, data: str, spelled: bool = True) -> str:
    """The name of the tensor intrinsic c[p, i] += sum_t a[p stride + t, i] w[t, i], p < pixels, t < taps, i < 4,
    spelled as dp4a.

    data: "uint8" or "int8", the type of a; w is int8, c int32.  All three lie in registers of one thread.  spelled:
    False is for CPUs: the meaning instead of the spelling.
    """
    name, columns = (
        f"hawq.windows.{pixels}.{taps}.{stride}.{data}{'' if spelled else '.meant'}",
        (pixels - 1) * stride + taps,
    )
    call = f"hawq::windows<{pixels}, {taps}, {stride}, {'true' if data == 'int8' else 'false'}>"

    def strides() -> list[tirx.Var | int]:
        return [tirx.Var("stride", "int32"), 1]

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (columns, CHANNELS), data, offset_factor=1, scope="local", strides=strides())
        W = T.match_buffer(w, (taps, CHANNELS), "int8", offset_factor=1, scope="local", strides=strides())
        C = T.match_buffer(c, (pixels, CHANNELS), "int32", offset_factor=1, scope="local", strides=strides())
        with T.sblock("root"):
            T.reads(C[0:pixels, 0:CHANNELS], A[0:columns, 0:CHANNELS], W[0:taps, 0:CHANNELS])
            T.writes(C[0:pixels, 0:CHANNELS])
            for t, p, i in T.grid(taps, pixels, CHANNELS):
                with T.sblock("windows"):
                    vp, vi, vt = T.axis.remap("SSR", [p, i, t])
                    C[vp, vi] = C[vp, vi] + T.cast(A[vp * stride + vt, vi], "int32") * T.cast(W[vt, vi], "int32")

    @T.prim_func(s_tir=True)
    def spelling(a: T.handle, w: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (columns, CHANNELS), data, offset_factor=1, scope="local", strides=strides())
        W = T.match_buffer(w, (taps, CHANNELS), "int8", offset_factor=1, scope="local", strides=strides())
        C = T.match_buffer(c, (pixels, CHANNELS), "int32", offset_factor=1, scope="local", strides=strides())
        with T.sblock("root"):
            T.reads(C[0:pixels, 0:CHANNELS], A[0:columns, 0:CHANNELS], W[0:taps, 0:CHANNELS])
            T.writes(C[0:pixels, 0:CHANNELS])
            T.evaluate(T.call_extern("void", call, C.access_ptr("rw"), A.access_ptr("r"), W.access_ptr("r")))

    s_tir.TensorIntrin.register(name, meaning, spelling if spelled else meaning, override=True)
    return name
