"""Attention in one kernel: every type, zero point and odd shape, against NumPy's int64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops, softmax_wide
from hawq_tvm.core.attention import Attention
from hawq_tvm.targets import target

from .one_layer import layer_of, packed, run

R = relax.op
U8, WIDE = arith.QType.of("uint8"), arith.QType(-(1 << 30), (1 << 30) - 1, "int32")
TARGETS = [
    p for p in ("x86-vnni", "x86-avx2", "x86-64-v2") if target.runs_here(target.required_features(target.parse(p)))
]
rng = np.random.default_rng(16)
LARGE = {"multipliers": [1178071459], "offset": 0, "shift": 21, "rounding": "half_up", "zero_point": 0}
SMALL = {"multipliers": [1178071459], "offset": 0, "shift": 43, "rounding": "half_even", "zero_point": 100}
LAST = {"multipliers": [1256382662], "offset": 0, "shift": 38, "rounding": "half_up", "zero_point": 156}
Array = np.ndarray


def requantized(x: Array, numbers: dict, qtype: arith.QType) -> Array:
    n = dict(numbers)
    return arith.requantize(
        [x], n.pop("multipliers"), n.pop("offset"), n.pop("shift"), qmin=qtype.qmin, qmax=qtype.qmax, **n
    )


def requantize(x: relax.Expr, numbers: dict, qtype: arith.QType) -> relax.Call:
    n = dict(numbers)
    return ops.requantize([x], n.pop("multipliers"), n.pop("offset"), n.pop("shift"), qtype=qtype, **n)


def centred(e, x, zero):
    return x if zero is None else e(R.subtract(e(R.astype(x, "int16")), ops.const(zero, "int16")))


def heads(e, x, count, axes):
    n, length, width = (int(d) for d in x.ty.shape.values)
    return e(R.permute_dims(e(R.reshape(x, (n, length, count, width // count))), axes))


def body(count, zeros, wide, to=U8, level=0):
    """A block of attention with `count` heads; zeros: of its three inputs; wide: scores in 32 bits, under a mask."""

    def made(e, q, k, v, *mask):
        q, k, v = (heads(e, x, count, a) for x, a in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3])))
        scores = e(R.matmul(centred(e, q, zeros[0]), centred(e, k, zeros[1]), out_dtype="int32"))
        scores = e(requantize(scores, LARGE, WIDE) if wide else requantize(scores, SMALL, U8))
        if mask:
            scores = e(R.where(mask[0], scores, ops.const(-(1 << 30), "int32")))
        n = ops.shape_of(scores)[-1]
        m, s = arith.softmax_dyadic(Fraction(to.qmax - to.qmin), n)
        kept = {"axis": 3, "multiplier": m, "shift": s, "qtype": to, "zero_point": level}
        p = e(
            ops.softmax_wide(scores, softmax_wide.tables(18), fraction=18, **kept)
            if wide
            else ops.softmax(scores, arith.softmax_table(Fraction(1, 20), 256), **kept)
        )
        out = e(R.matmul(centred(e, p, level or None), centred(e, v, zeros[2]), out_dtype="int32"))
        out = e(R.permute_dims(e(requantize(out, LAST, U8)), [0, 2, 1, 3]))
        batch, rows, *rest = ops.shape_of(out)
        return R.reshape(out, (batch, rows, int(np.prod(rest))))

    return made


def expected(count, zeros, wide, to, level, q, k, v, *mask):
    def split(x, zero):
        n, length, width = x.shape
        return x.reshape(n, length, count, width // count).transpose(0, 2, 1, 3).astype(np.int64) - (zero or 0)

    q, k, v = (split(x, z) for x, z in zip((q, k, v), zeros, strict=True))
    scores = q @ k.transpose(0, 1, 3, 2)
    scores = requantized(scores, LARGE, WIDE) if wide else requantized(scores, SMALL, U8)
    if mask:
        scores = np.where(mask[0], scores, -(1 << 30))
    m, s = arith.softmax_dyadic(Fraction(to.qmax - to.qmin), scores.shape[-1])
    kept = {"zero_point": level, "qmin": to.qmin, "qmax": to.qmax}
    if wide:
        p = softmax_wide.softmax(scores, 3, 18, m, s, **kept)
    else:
        p = arith.softmax(scores, arith.softmax_table(Fraction(1, 20), 256), 3, m, s, **kept)
    out = requantized((p.astype(np.int64) - level) @ v, LAST, U8).transpose(0, 2, 1, 3)
    return out.reshape(*out.shape[:2], -1).astype(np.uint8)


def inputs(count, rows, columns, depth, width, kinds):
    shapes = [(1, rows, count * depth), (1, columns, count * depth), (1, columns, count * width)]
    made = [rng.integers(*arith.RANGES[t], s, endpoint=True).astype(t) for s, t in zip(shapes, kinds, strict=True)]
    for x, t in zip(made, kinds, strict=True):  # rows of extremes: the largest sums of either sign
        x[0, : len(x[0]) // 2] = rng.choice(np.array(arith.RANGES[t], t), x[0, : len(x[0]) // 2].shape)
    return made


SHAPES = [
    (2, 17, 17, 5, 7),
    (1, 1, 33, 32, 32),
    (3, 9, 4, 3, 1),
    (2, 50, 50, 32, 20),
    (1, 7, 64, 16, 33),
    (1, 5, 5, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", TARGETS)
def test_shapes(shape, preset):
    arrays = inputs(*shape, ["uint8"] * 3)
    zeros, wide = (117, 130, 146), shape[0] == 2
    mask = [rng.random((1, 1, 1, shape[2])) < 0.7] if wide else []
    (out,) = run(body(shape[0], zeros, wide), *arrays, *mask, target=target.parse(preset), rule="cpu.attention")
    np.testing.assert_array_equal(out, expected(shape[0], zeros, wide, U8, 0, *arrays, *mask), strict=True)


@pytest.mark.parametrize(
    ("kinds", "zeros", "to", "level"),
    [
        (("int8",) * 3, (None, None, None), U8, 0),
        (("int8",) * 3, (-128, 127, 5), U8, 0),
        (("uint8",) * 3, (0, 255, 0), U8, 0),
        (("uint8", "int8", "uint8"), (255, -128, 255), U8, 0),
        (("int8", "uint8", "int8"), (None, 128, -128), arith.QType.of("int8"), -128),
        (("uint8", "uint8", "uint8"), (None, None, None), arith.QType(0, 32767, "int16"), 0),
        (("int16", "int8", "int8"), (None, None, None), U8, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", TARGETS)
def test_types_and_zero_points(kinds, zeros, to, level, preset):
    arrays = inputs(2, 11, 24, 8, 16, kinds)
    if kinds[0] == "int16":
        arrays[0] //= 8
    (out,) = run(body(2, zeros, False, to, level), *arrays, target=target.parse(preset), rule="cpu.attention")
    np.testing.assert_array_equal(out, expected(2, zeros, False, to, level, *arrays), strict=True)


def test_a_mask_of_every_row_and_movements_in_other_orders():
    q, k, v = (rng.integers(0, 256, s, dtype=np.uint8) for s in ((2, 10, 8), (2, 8, 32), (2, 32, 16)))
    mask = rng.random((2, 10, 32)) < 0.5

    def made(e, q, k, v, open_):
        scores = e(requantize(e(R.matmul(q, k, out_dtype="int32")), LARGE, WIDE))
        scores = e(R.where(open_, scores, ops.const(-(1 << 30), "int32")))
        m, s = arith.softmax_dyadic(Fraction(255), 32)
        kept = {"axis": 2, "multiplier": m, "shift": s, "qtype": U8, "zero_point": 0}
        p = e(ops.softmax_wide(scores, softmax_wide.tables(18), fraction=18, **kept))
        out = e(requantize(e(R.matmul(p, v, out_dtype="int32")), LAST, U8))
        return R.permute_dims(e(R.expand_dims(out, [1])), [3, 0, 1, 2])

    (out,) = run(made, q, k, v, mask, target=target.host(), rule="cpu.attention")
    scores = np.where(mask, requantized(q.astype(np.int64) @ k.astype(np.int64), LARGE, WIDE), -(1 << 30))
    m, s = arith.softmax_dyadic(Fraction(255), 32)
    p = softmax_wide.softmax(scores, 2, 18, m, s, zero_point=0, qmin=0, qmax=255)
    want = requantized(p.astype(np.int64) @ v.astype(np.int64), LAST, U8).astype(np.uint8)
    np.testing.assert_array_equal(out, want[:, None].transpose(3, 0, 1, 2), strict=True)


def test_what_is_no_attention_is_said_in_a_sentence():
    def why(made, *shapes):
        return Attention.of(layer_of(packed(made, [(s, "uint8") for s in shapes])).bindings)

    square = (2, 16, 16)
    assert why(lambda e, a, b: R.matmul(a, b, out_dtype="int32"), square, square) == (
        "not a product, its softmax, and the product of that."
    )

    def rows(e, a, b, c, axis=2, turned=False):
        s = e(requantize(e(R.matmul(a, b, out_dtype="int32")), SMALL, U8))
        m, k = arith.softmax_dyadic(Fraction(255), 16)
        table = arith.softmax_table(Fraction(1, 20), 256)
        p = e(ops.softmax(s, table, axis=axis, multiplier=m, shift=k, qtype=U8, zero_point=0))
        return R.matmul(c if turned else p, p if turned else c, out_dtype="int32")

    assert isinstance(why(rows, square, square, square), Attention)
    assert "another axis" in why(lambda e, a, b, c: rows(e, a, b, c, axis=1), square, square, square)
    assert "second product" in why(lambda e, a, b, c: rows(e, a, b, c, turned=True), square, square, square)
    assert "batches" in why(rows, square[1:], square[1:], square[1:])
    assert "batches" in why(rows, square, (1, 16, 16), square)
