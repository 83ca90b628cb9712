"""Inner products of one vector of accumulators and what follows them, as pairs of meaning and spelling."""

# No postponed annotations here: TVMScript reads the buffer types from them, which mypy cannot.
# mypy: disable-error-code="valid-type"
from functools import cache

from tvm import s_tir, tirx
from tvm.script import tirx as T

from hawq_tvm.core import arith

Pair = tuple[tirx.PrimFunc, tirx.PrimFunc]


@cache
def multiply_add(lanes: int, depth: int, data: str, weight: str, acc: str) -> str:
    """The name of the tensor intrinsic c[i] += sum_k a[k] w[i, k], i < lanes, k < depth, exact for every operand.

    depth 1 broadcasts one element (and w has one dimension).  depth 2 needs int16 data, weights of at most 16 bits
    and int32 sums, and is written so that LLVM selects a multiply-add of pairs where the CPU has one (pmaddwd).
    """
    name = f"hawq.multiply_add.{lanes}.{depth}.{data}.{weight}.{acc}"
    meaning, spelling = _two(lanes, weight) if depth == 2 else _one(lanes, data, weight, acc)
    s_tir.TensorIntrin.register(name, meaning, spelling, override=True)
    return name


def _one(lanes: int, data: str, weight: str, acc: str) -> Pair:
    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((1,), data, offset_factor=1),
        W: T.Buffer((lanes,), weight, offset_factor=1),
        C: T.Buffer((lanes,), acc, offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:1], W[0:lanes])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                with T.sblock("update"):
                    vi = T.axis.spatial(lanes, i)
                    C[vi] = C[vi] + T.cast(A[0], acc) * T.cast(W[vi], acc)

    @T.prim_func(s_tir=True)
    def spelling(
        A: T.Buffer((1,), data, offset_factor=1),
        W: T.Buffer((lanes,), weight, offset_factor=1),
        C: T.Buffer((lanes,), acc, offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:1], W[0:lanes])
            T.writes(C[0:lanes])
            C[T.ramp(0, 1, lanes)] = C.vload([0], f"{acc}x{lanes}") + _broadcast_product(A, W, lanes, acc)

    return meaning, spelling


def _two(lanes: int, weight: str) -> Pair:
    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((2,), "int16", offset_factor=1),
        W: T.Buffer((lanes, 2), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], W[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 2):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(W[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def spelling(
        A: T.Buffer((2,), "int16", offset_factor=1),
        W: T.Buffer((lanes, 2), weight, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], W[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(0, 1, lanes)] = C.vload([0], f"int32x{lanes}") + _sum_of_pairs(A, W, lanes)

    return meaning, spelling


@cache
def dot_u8s8(lanes: int, data: str) -> str:
    """The name of the tensor intrinsic c[i] += sum_k a'[k] w[i, k], k < 4, spelled as vpdpbusd, exact for every
    operand.

    data: "uint8", where a' = a, or "int8", where a' = a + 128.  lanes: 8 (AVX-VNNI or AVX512-VNNI) or 16 (AVX512-VNNI).
    w is int8, c int32; sums wrap around as vpdpbusd's do.
    """
    name, offset = f"hawq.dot_u8s8.{lanes}.{data}", 128 if data == "int8" else 0

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((4,), data, offset_factor=1),
        W: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], W[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + (T.cast(A[vk], "int32") + offset) * T.cast(W[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def spelling(
        A: T.Buffer((4,), data, offset_factor=1),
        W: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], W[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(0, 1, lanes)] = _vpdpbusd(
                C.vload([0], f"int32x{lanes}"), _four_bytes(A, lanes), W.vload([0, 0], f"int8x{4 * lanes}"), lanes
            )

    s_tir.TensorIntrin.register(name, meaning, spelling, override=True)
    return name


@cache
def multiply_high(lanes: int, neon: bool = False) -> str:
    """The name of the tensor intrinsic c[i] = the high 32 bits of a[i] m[i] + b[i], i < lanes.

    a, m and c are int32, b is int64.  Spelled in even and odd lanes, so that LLVM multiplies without widening first
    (pmuldq), or for NEON in pairs of lanes (smull).
    """
    name, high = f"hawq.multiply_high.{lanes}{'.neon' if neon else ''}", _high_of_pairs if neon else _high_halves

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((lanes,), "int32", offset_factor=1),
        M: T.Buffer((lanes,), "int32", offset_factor=1),
        B: T.Buffer((lanes,), "int64", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:lanes], M[0:lanes], B[0:lanes])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                with T.sblock("high"):
                    vi = T.axis.spatial(lanes, i)
                    C[vi] = T.cast(
                        T.shift_right(T.cast(A[vi], "int64") * T.cast(M[vi], "int64") + B[vi], T.int64(32)), "int32"
                    )

    @T.prim_func(s_tir=True)
    def spelling(
        A: T.Buffer((lanes,), "int32", offset_factor=1),
        M: T.Buffer((lanes,), "int32", offset_factor=1),
        B: T.Buffer((lanes,), "int64", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:lanes], M[0:lanes], B[0:lanes])
            T.writes(C[0:lanes])
            C[T.ramp(0, 1, lanes)] = high(
                A.vload([0], f"int32x{lanes}"), M.vload([0], f"int32x{lanes}"), B.vload([0], f"int64x{lanes}"), lanes
            )

    s_tir.TensorIntrin.register(name, meaning, spelling, override=True)
    return name


def _high_halves(a: tirx.Expr, m: tirx.Expr, b: tirx.Expr, lanes: int) -> tirx.Expr:
    half = lanes // 2
    wide, unsigned, bits = f"int64x{half}", f"uint64x{half}", tirx.Broadcast(tirx.const(32, "int64"), half)

    def total(parity: int) -> tirx.Expr:
        def lanes(x: tirx.Expr) -> tirx.Expr:
            pairs = tirx.reinterpret(wide, x)
            return (pairs << bits if parity == 0 else pairs) >> bits

        added = tirx.Shuffle([b], [tirx.const(k, "int32") for k in range(parity, 2 * half, 2)])
        return lanes(a) * lanes(m) + added

    even = tirx.reinterpret(unsigned, total(0)) >> tirx.reinterpret(unsigned, bits)
    odd = tirx.reinterpret(unsigned, total(1)) & tirx.Broadcast(tirx.const(0xFFFFFFFF00000000, "uint64"), half)
    return tirx.reinterpret(f"int32x{2 * half}", even | odd)


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
def narrow(lanes: int, vectors: int, dtype: str) -> str:
    """The name of the tensor intrinsic c[i] = a[i] clamped to `dtype`, i < lanes vectors: packssdw, then packuswb or
    packsswb.

    dtype: "uint8" or "int8".  lanes: 8 (AVX2) or 16 (AVX512-BW).  vectors: 2 or 4.  a is int32.
    """
    name, size = f"hawq.narrow.{lanes}x{vectors}.{dtype}", lanes * vectors
    low, high = arith.RANGES[dtype]

    @T.prim_func(s_tir=True)
    def meaning(A: T.Buffer((size,), "int32", offset_factor=1), C: T.Buffer((size,), dtype, offset_factor=1)) -> None:
        with T.sblock("root"):
            T.reads(A[0:size])
            T.writes(C[0:size])
            for i in T.serial(0, size):
                with T.sblock("narrow"):
                    vi = T.axis.spatial(size, i)
                    C[vi] = T.cast(T.min(T.max(A[vi], low), high), dtype)

    @T.prim_func(s_tir=True)
    def spelling(A: T.Buffer((size,), "int32", offset_factor=1), C: T.Buffer((size,), dtype, offset_factor=1)) -> None:
        with T.sblock("root"):
            T.reads(A[0:size])
            T.writes(C[0:size])
            C[T.ramp(0, 1, size)] = _packed(
                [A.vload([k * lanes], f"int32x{lanes}") for k in range(vectors)], lanes, dtype
            )

    s_tir.TensorIntrin.register(name, meaning, spelling, override=True)
    return name


def _packed(numbers: list[tirx.Expr], lanes: int, dtype: str) -> tirx.Expr:
    family, suffix = ("avx512", ".512") if lanes == 16 else ("avx2", "")

    def pack(types: str, name: str, a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
        return tirx.call_llvm_pure_intrin(types, f"llvm.x86.{family}.{name}{suffix}", a, b)

    words = [pack(f"int16x{2 * lanes}", "packssdw", *numbers[k : k + 2]) for k in range(0, len(numbers), 2)]
    bytes_ = pack(f"int8x{4 * lanes}", "packuswb" if dtype == "uint8" else "packsswb", words[0], words[-1])
    # Every 128 bits hold four numbers of each vector.
    order = [4 * part + vector for vector in range(len(numbers)) for part in range(lanes // 4)]
    quads = tirx.Shuffle([tirx.reinterpret(f"int32x{lanes}", bytes_)], [tirx.const(i, "int32") for i in order])
    return tirx.reinterpret(f"{dtype}x{lanes * len(numbers)}", quads)


@cache
def dot_u8s4(lanes: int, data: str) -> str:
    """The name of the tensor intrinsic c[i] += 16 sum_k a'[k] w[i, k], k < 8, two vpdpbusd, exact for every operand.

    w holds signed nibbles: k < 4 in the low halves of the bytes [i, k], the others in the high halves of [i, k - 4].
    data, lanes and a' as for `dot_u8s8`.
    """
    name, offset = f"hawq.dot_u8s4.{lanes}.{data}", 128 if data == "int8" else 0

    @T.prim_func(s_tir=True)
    def meaning(
        A: T.Buffer((8,), data, offset_factor=1),
        W: T.Buffer((lanes, 4), "uint8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:8], W[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 8):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + (T.cast(A[vk], "int32") + offset) * T.cast(
                            T.cast(
                                T.Select(
                                    vk < 4,
                                    T.shift_left(W[vi, vk % 4], T.uint8(4)),
                                    T.bitwise_and(W[vi, vk % 4], T.uint8(240)),
                                ),
                                "int8",
                            ),
                            "int32",
                        )

    @T.prim_func(s_tir=True)
    def spelling(
        A: T.Buffer((8,), data, offset_factor=1),
        W: T.Buffer((lanes, 4), "uint8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:8], W[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(0, 1, lanes)] = _vpdpbusd(
                _vpdpbusd(C.vload([0], f"int32x{lanes}"), _four_bytes(A, lanes), _nibbles_times_16(W, lanes, 4), lanes),
                _four_bytes(A, lanes, 4),
                _nibbles_times_16(W, lanes, 0),
                lanes,
            )

    s_tir.TensorIntrin.register(name, meaning, spelling, override=True)
    return name


def _nibbles_times_16(w: tirx.Buffer, lanes: int, left: int) -> tirx.Expr:
    """The high halves of bytes shifted left by 4 or not, as int8; the shift is one of 16 bits, the mask drops what
    crosses bytes.
    """
    packed = w.vload([0, 0], f"uint8x{4 * lanes}")
    if left:
        wide = tirx.reinterpret(f"uint16x{2 * lanes}", packed) << tirx.Broadcast(tirx.const(left, "uint16"), 2 * lanes)
        packed = tirx.reinterpret(f"uint8x{4 * lanes}", wide)
    return tirx.reinterpret(f"int8x{4 * lanes}", packed & tirx.Broadcast(tirx.const(0xF0, "uint8"), 4 * lanes))


@cache
def dot_quads(lanes: int) -> str:
    """The name of the tensor intrinsic c[i] += sum_k byte_k(q[i]) w[i, k], k < 4, bytes from the lowest, unsigned.

    q and c are int32, w is int8; spelled as vpdpbusd, exact for every operand.  lanes: 8 or 16, as for `dot_u8s8`.
    """
    name = f"hawq.dot_quads.{lanes}"

    @T.prim_func(s_tir=True)
    def meaning(
        Q: T.Buffer((lanes,), "int32", offset_factor=1),
        W: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], Q[0:lanes], W[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.bitwise_and(T.shift_right(Q[vi], vk * 8), 255) * T.cast(W[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def spelling(
        Q: T.Buffer((lanes,), "int32", offset_factor=1),
        W: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1, scope="local"),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], Q[0:lanes], W[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(0, 1, lanes)] = _vpdpbusd(
                C.vload([0], f"int32x{lanes}"),
                T.reinterpret(f"int8x{4 * lanes}", Q.vload([0], f"int32x{lanes}")),
                W.vload([0, 0], f"int8x{4 * lanes}"),
                lanes,
            )

    s_tir.TensorIntrin.register(name, meaning, spelling, override=True)
    return name


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
    weights = w.vload([0], f"{w.dtype}x{lanes}").astype(f"{acc}x{lanes}")
    return tirx.Broadcast(a.vload([0], str(a.dtype)).astype(acc), lanes) * weights


def _sum_of_pairs(a: tirx.Buffer, w: tirx.Buffer, lanes: int) -> tirx.Expr:
    """a[0] w[i, 0] + a[1] w[i, 1]: products of sign-extended 16-bit lanes, then even plus odd."""
    both = 2 * lanes
    pair = tirx.reinterpret("int32", a.vload([0], "int16x2"))
    data = tirx.reinterpret(f"int16x{both}", tirx.Broadcast(pair, lanes))
    product = data.astype(f"int32x{both}") * w.vload([0, 0], f"{w.dtype}x{both}").astype(f"int32x{both}")
    even = tirx.Shuffle([product], [tirx.const(k, "int32") for k in range(0, both, 2)])
    odd = tirx.Shuffle([product], [tirx.const(k, "int32") for k in range(1, both, 2)])
    return even + odd
