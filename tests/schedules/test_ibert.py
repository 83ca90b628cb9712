"""Kernels of I-BERT's arithmetic against the paper's algorithms, at odd shapes and the ends of their operands."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hawq_tvm.core import arith, ibert, ibert_ops
from hawq_tvm.targets import target
from hawq_tvm.verify.reference import evaluate

from .. import paper_ibert
from .one_layer import packed, run

HOST = target.host()
U8 = arith.QType.of("uint8")
rng = np.random.default_rng(28)


def integers(shape, low, high, dtype):
    """Random integers, among them both ends, rows of one value and rows of the two ends."""
    x = rng.integers(low, high, shape, endpoint=True)
    x[0] = high
    x[-1] = np.where(rng.random(shape[1:]) < 0.5, low, high)
    if x.shape[0] > 3:
        x[1] = low
        x[2] = 0
    return x.astype(dtype)


def same_as_reference(body, x, out):
    """The reference of the verification is another transcription."""
    module = packed(body, [(x.shape, str(x.dtype))])
    (expected,) = evaluate(module, {"x0": x}).values()
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("scales", "most", "dtype"),
    [
        ([0.05], 128, "int8"),
        ([3.0], 128, "int8"),
        ([2**-12], 2**15, "int16"),
        ([4e-5, 3e-5, 1e-4, 7e-6, 1e-6], 2**23, "int32"),
        ([1e-6] * 5, 2**31 - 1, "int32"),
    ],
    ids=str,
)
def test_i_gelu(scales, most, dtype):
    numbers = ibert.Polynomial.gelu([Fraction(s) for s in scales], [most] * len(scales))
    low, high = (-most, most - 1) if dtype != "int32" else (-most, most)
    x = integers((9, 5), low, high, dtype)
    if dtype == "int32":
        # The polynomial itself, which most of the range lies beyond.
        x[3:-1] = rng.integers(-max(numbers.corner), max(numbers.corner), (5, 5))
    shape = (len(scales),) if len(scales) > 1 else ()
    body = lambda emit, v: ibert_ops.i_gelu(v, numbers, shape, (low, high))  # noqa: E731
    (out,) = run(body, x, target=HOST, rule="cpu.elementwise")
    for (_, j), q, found in zip(np.ndindex(x.shape), x.ravel().tolist(), out.ravel().tolist(), strict=True):
        scale = Fraction(scales[j % len(scales)])
        expected, unit = paper_ibert.i_gelu(q, scale, numbers.shift)
        # Scale and integer are negative in the paper, and positive here; its root of two has 60 digits.
        assert -found == expected and abs(-numbers.scale[j % len(scales)] / unit - 1) < Fraction(1, 10**55)
    same_as_reference(body, x, out)


@pytest.mark.parametrize(("scale", "dtype"), [(0.05, "int8"), (2**-15, "int16"), (3e-7, "int32")], ids=str)
def test_i_erf(scale, dtype):
    most = int(np.iinfo(dtype).max)
    numbers = ibert.Polynomial.erf([Fraction(scale)], [most])
    x = integers((9, 5), -most, most, dtype)
    x[3:-1] = rng.integers(-numbers.corner[0], numbers.corner[0], (5, 5)).clip(-most, most)
    body = lambda emit, v: ibert_ops.i_gelu(v, numbers, (), (-most, most))  # noqa: E731
    (out,) = run(body, x, target=HOST, rule="cpu.elementwise")
    found = [paper_ibert.i_erf(q, Fraction(scale), numbers.shift) for q in x.ravel().tolist()]
    assert out.ravel().tolist() == [-q for q, _ in found] and {unit for _, unit in found} == {-numbers.scale[0]}
    same_as_reference(body, x, out)


@pytest.mark.parametrize("shape", [(6, 37), (5, 1), (5, 2, 300)], ids=str)
@pytest.mark.parametrize(
    ("scale", "most", "dtype"),
    [
        (0.1, 127, "int8"),
        (2.0, 127, "int8"),
        (1e-3, 32767, "int16"),
        (2.5e-4, 2**22, "int32"),
        (3e-8, 2**30 - 1, "int32"),
    ],
    ids=str,
)
def test_i_softmax(shape, scale, most, dtype):
    rounding = "floor" if shape[-1] == 37 else "half_even"
    x = integers(shape, -most, most, dtype)
    if dtype == "int32":
        x[3:-1] = rng.integers(0, int(8 / scale), x[3:-1].shape)
    numbers = ibert.Softmax.of(Fraction(scale))
    m, k = ibert.softmax_dyadic(Fraction(255), shape[-1])
    finer = Fraction(scale) / (1 << numbers.left)

    def body(emit, v):
        return ibert_ops.i_softmax(
            v,
            numbers,
            axis=len(shape) - 1,
            scale=float(finer),
            multiplier=m,
            shift=k,
            qtype=U8,
            zero_point=0,
            rounding=rounding,
        )

    (out,) = run(body, x, target=HOST, rule="cpu.rows")
    e = ibert.exponents(x, len(shape) - 1, numbers)
    for row, found, exponents in list(
        zip(x.reshape(-1, shape[-1]), out.reshape(-1, shape[-1]), e.reshape(-1, shape[-1]), strict=True)
    )[:8]:
        scores = [q << numbers.left for q in row.tolist()]
        expected = [paper_ibert.i_exp(q - max(scores), finer, numbers.up)[0] for q in scores]
        assert exponents.tolist() == expected and max(expected) >= 2**30
        for y, p in zip(found.tolist(), paper_ibert.i_softmax(scores, finer, numbers.up), strict=True):
            # (A17) from the sum on is within 2^-19 of the quotient, of which it drops bits.
            middle = 255 * p - (Fraction(1, 2) if rounding == "floor" else 0)
            assert abs(y - middle) <= Fraction(1, 2) + Fraction(1, 2**19)
    same_as_reference(body, x, out)


@pytest.mark.parametrize("shape", [(6, 37), (5, 1), (5, 3, 384), (4, 2)], ids=str)
@pytest.mark.parametrize(("most", "dtype", "zero"), [(127, "int8", 3), (32767, "int16", 0), (2**21, "int32", -5)])
def test_i_layer_norm(shape, most, dtype, zero):
    x = integers(shape, -most, most, dtype)
    body = lambda emit, v: ibert_ops.i_layer_norm(v, [len(shape) - 1], zero)  # noqa: E731
    (out,) = run(body, x, target=HOST, rule="cpu.rows")
    for row, found in zip(x.reshape(-1, shape[-1]).tolist(), out.reshape(-1, shape[-1]).tolist(), strict=True):
        assert found == paper_ibert.i_layer_norm([q - zero for q in row])
    np.testing.assert_array_equal(out, ibert.normalized(x, [len(shape) - 1], zero))
    same_as_reference(body, x, out)


def test_newton_gives_the_floor_of_every_root():
    near = [v * v + d for v in [1, 2, 3, 2**15, 2**30 + 1, 2**31 - 1] for d in (-1, 0, 1)]
    values = sorted({0, 1, *near, *(1 << b for b in range(62)), *((1 << b) - 1 for b in range(1, 63))})
    for v in values:
        r = paper_ibert.i_sqrt(v)
        assert r * r <= v < (r + 1) ** 2
    # A row of one element and its mean makes sums of squares of any kind: two elements q and -q give 2 q^2.
    q = np.array([[v, -v] for v in [0, 1, 2, 3, 7, 2**20, 2**29 + 1, 2**30 - 1]], np.int32)
    (out,) = run(lambda emit, v: ibert_ops.i_layer_norm(v, [1], 0), q, target=HOST, rule="cpu.rows")
    assert out.tolist() == [paper_ibert.i_layer_norm(row) for row in q.tolist()]
