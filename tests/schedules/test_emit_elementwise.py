"""Every element-wise integer operator and the border operators, against NumPy and arith."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.core.division import divide
from hawq_tvm.core.interpolation import Steps, interpolated
from hawq_tvm.core.threshold_search import round_exactly

from .one_layer import run

R = relax.op
ROUNDINGS = [r for r in arith.ROUNDINGS if r != "double"]
rng = np.random.default_rng(2)


def full(dtype: str, *shape: int) -> np.ndarray:
    """Seeded values of a dtype, its extremes among them."""
    low, high = arith.RANGES[dtype]
    x = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
    x.flat[:2] = low, high
    return x


BINARY = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    **{n: getattr(np, n) for n in ("greater", "greater_equal", "less", "less_equal", "equal", "not_equal")},
}


@pytest.mark.parametrize(("name", "dtype"), list(itertools.product(BINARY, ["int16", "int32", "int64", "uint8"])))
def test_binary_broadcasts_and_wraps(name, dtype):
    a, b = full(dtype, 3, 1, 7, 17), full(dtype, 5, 1, 17)
    (out,) = run(lambda e, x, y: getattr(R, name)(x, y), a, b)
    np.testing.assert_array_equal(out, BINARY[name](a, b), strict=True)


def test_truth_values():
    a, b = (rng.integers(0, 2, shape).astype(np.bool_) for shape in ((3, 1, 7, 17), (5, 1, 17)))
    for name in ("logical_and", "logical_or", "logical_xor"):
        (out,) = run(lambda e, x, y, name=name: getattr(R, name)(x, y), a, b)
        np.testing.assert_array_equal(out, getattr(np, name)(a, b), strict=True)
    (out,) = run(lambda e, x: R.logical_not(x), a)
    np.testing.assert_array_equal(out, ~a, strict=True)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("numbers", [(3, 2), (-1, 1), (2**29 + 7, 2**52 - 5)])
def test_divide(numbers, rounding):
    """(A32) of every pair of 8 bits, ties and zeros among them, and of every channel's own numbers."""
    a, b = np.arange(-128, 128).astype("int8").reshape(256, 1), np.arange(-128, 128).astype("int16")
    m, d = numbers
    multipliers = np.where(np.arange(256) % 2, m, -m)
    attrs = {"qtype": arith.QType(-40, 50, "int8"), "zero_point": 7, "rounding": rounding, "undefined": -128}
    (out,) = run(lambda e, x, y: divide(x, y, multipliers, d, **attrs), a, b)
    exact = [
        [
            round_exactly(Fraction(int(x) * int(k), int(y) * d), rounding) if y else 0
            for y, k in zip(b, multipliers, strict=True)
        ]
        for x in a.ravel()
    ]
    sign = np.sign(a.astype(int) * multipliers)
    wanted = np.where(b == 0, np.select([sign > 0, sign < 0], [50, -40], -128), np.clip(np.array(exact) + 7, -40, 50))
    np.testing.assert_array_equal(out, wanted.astype("int8"), strict=True)


def test_where():
    a, b = full("int8", 3, 7, 17), full("int8", 3, 7, 17)
    (out,) = run(lambda e, x, y: R.where(e(R.greater_equal(x, y)), x, y), a, b)
    np.testing.assert_array_equal(out, np.maximum(a, b), strict=True)


def test_clip():
    a = full("int16", 3, 31)
    (out,) = run(lambda e, x: R.clip(x, -300, 4000), a)
    np.testing.assert_array_equal(out, a.clip(-300, 4000), strict=True)


@pytest.mark.parametrize(
    ("source", "to"), [("int8", "int32"), ("uint8", "int16"), ("int32", "int8"), ("int64", "int32")]
)
def test_astype(source, to):
    a = full(source, 3, 31)
    (out,) = run(lambda e, x: R.astype(x, to), a)
    np.testing.assert_array_equal(out, a.astype(to), strict=True)


@pytest.mark.parametrize(
    ("source", "to"), [("int8", "uint8"), ("uint8", "int8"), ("int16", "int16"), ("uint16", "int8")]
)
def test_lookup(source, to):
    a = np.concatenate([full(source, 3, 31).ravel(), np.arange(arith.RANGES[source][0], arith.RANGES[source][0] + 99)])
    a = a.astype(source)
    table = full(to, 2 ** (8 * a.dtype.itemsize))
    (out,) = run(lambda e, x: ops.lookup(x, table), a)
    np.testing.assert_array_equal(out, table[a.astype(np.int64) - arith.RANGES[source][0]], strict=True)


@pytest.mark.parametrize("steps", [Steps(9, 12, 7, 5), Steps(1, 0, 0, 0), Steps(14, 20, 11, 7)])
def test_interpolate(steps):
    cells = 37
    table = np.stack([rng.integers(-(1 << b), 1 << b, cells) for b in (29, 15, 14)]).astype(np.int32)
    u = rng.integers(0, cells << steps.cell, (3, 7, 17)).astype(np.int32)
    u.flat[:2] = 0, (cells << steps.cell) - 1
    (out,) = run(lambda e, x: ops.interpolate(x, table, steps, bound=0.1, slope=0.1), u)
    np.testing.assert_array_equal(out, interpolated(u, table.astype(np.int64), steps).astype(np.int32), strict=True)


SHIFTS = {"0": 0, "1": 1, "31": 31, "33": 33, "34": 34, "40": 40, "62": 62, "each": np.array([0, 1, 5, 31, 32, 35, 62])}


def ties(shift: int) -> np.ndarray:
    """Operands whose product with a power of two lies on, just above and just below a tie, of both signs."""
    k = np.arange(-9, 10)
    return np.concatenate([k, 2 * k + 1, (2 * k + 1) * 2 ** max(0, min(shift, 24) - 1) + rng.integers(-1, 2, 19)])


@pytest.mark.parametrize(("rounding", "shift"), list(itertools.product(ROUNDINGS, SHIFTS)))
@pytest.mark.parametrize("storage", ["int8", "uint8", "int16", "int32"])
def test_requantize(rounding, shift, storage):
    s = np.asarray(SHIFTS[shift])
    x = np.stack([ties(int(s.max()))] * 7, axis=-1).astype(np.int32)
    m = np.maximum(1, 2 ** np.maximum(s - np.minimum(s, 24), 0)).clip(max=2**30) * np.ones(7, np.int64)
    m[3] = -m[3]
    q, zero = arith.QType.of(storage), 3
    (out,) = run(
        lambda e, v: ops.requantize([v], [m], 0, SHIFTS[shift], qtype=q, zero_point=zero, rounding=rounding), x
    )
    kw = {"rounding": rounding, "zero_point": zero, "qmin": q.qmin, "qmax": q.qmax}
    np.testing.assert_array_equal(out, arith.requantize([x], [m], 0, s, **kw).astype(storage), strict=True)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_requantize_of_three_operands_with_channels_and_offsets(rounding):
    x, y, z = full("int32", 3, 7, 17), full("uint8", 3, 7, 17), full("int16", 3, 1, 17)
    m = [rng.integers(-(2**30), 2**30, 17), np.int64(2**31 - 1), rng.integers(0, 2**30, (3, 1, 1))]
    offset, shift = rng.integers(-(2**61), 2**61, 17), rng.integers(30, 50, (7, 1))
    q = arith.QType(-100, 90, "int8")
    (out,) = run(
        lambda e, a, b, c: ops.requantize([a, b, c], m, offset, shift, qtype=q, zero_point=-5, rounding=rounding),
        x,
        y,
        z,
    )
    expected = arith.requantize(
        [x, y, z], m, offset, shift, rounding=rounding, zero_point=-5, qmin=-100, qmax=90
    ).astype("int8")
    np.testing.assert_array_equal(out, expected, strict=True)


def test_requantize_double():
    x = np.concatenate([full("int32", 40) >> 8, ties(12)]).astype(np.int32)[:, None] * np.ones(5, np.int32)
    m, s = np.array([2**30, 2**31 - 1, -(2**30) - 5, 3, 1 << 30]), np.array([31, 40, 33, 31, 26])
    q = arith.QType.of("int16")
    x[:, 4] >>= 5
    (out,) = run(lambda e, v: ops.requantize([v], [m], 0, s, qtype=q, zero_point=1, rounding="double"), x)
    kw = {"rounding": "double", "zero_point": 1, "qmin": q.qmin, "qmax": q.qmax}
    np.testing.assert_array_equal(out, arith.requantize([x], [m], 0, s, **kw).astype("int16"), strict=True)


def reals(scale: np.ndarray) -> np.ndarray:
    """Real numbers on ties of `scale`, one step of float32 beside them, beyond the range, and seeded ones."""
    k = np.arange(-300, 300, dtype=np.float32)[:, None]
    at = (k + np.float32(0.5)) * scale.astype(np.float32)
    near = [np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))]
    wild = np.broadcast_to(
        np.array([[3e38], [-3e38], [np.inf], [-np.inf], [1e-45], [-0.0]], np.float32), (6, scale.size)
    )
    return np.concatenate([at, *near, wild, rng.normal(0, 50, at.shape).astype(np.float32)]).astype(np.float32)


@pytest.mark.parametrize("form", ["divide", "reciprocal", "affine"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["int4", "int8", "uint8", "int16", "uint16", "int32"])
def test_quantize(form, rounding, name):
    scale = np.array([0.1, 1 / 3, 0.0078125, 1.7], np.float32)
    q = arith.QType.of(name)
    zero = np.array([0, 3, q.qmin // 2, q.qmax // 2], np.int32)
    x = reals(scale)
    (out,) = run(lambda e, v: ops.quantize(v, scale, zero, qtype=q, rounding=rounding, form=form), x)
    expected = arith.quantize(x, scale, zero, qmin=q.qmin, qmax=q.qmax, storage=q.storage, rounding=rounding, form=form)
    np.testing.assert_array_equal(out, expected, strict=True)


def test_quantize_maps_nan_into_the_range():
    x = np.full((31,), np.nan, np.float32)
    (out,) = run(lambda e, v: ops.quantize(v, 0.5, 3, qtype=arith.QType(-8, 7, "int8")), x)
    assert out.min() >= -8 and out.max() <= 7


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_dequantize(dtype, real):
    x, scale, zero = full(dtype, 3, 31, 5), np.array([0.1, 1 / 3, 7.5, 1e-3, 1], real), np.array([0, 3, -7, 9, 1])
    (out,) = run(lambda e, v: ops.dequantize(v, scale, zero, qmin=0, qmax=1), x)
    difference = x.astype(np.int64) - zero
    np.testing.assert_array_equal(out, (difference.astype(real) * scale).astype(np.float32), strict=True)


@pytest.mark.parametrize(
    "x",
    [
        rng.normal(1, 3, (3, 7, 17)),
        np.zeros((1, 5)),
        np.abs(rng.normal(0, 1, (31,))),
        -np.abs(rng.normal(0, 1, (31,))),
        np.array([[0.0, 255.0, 0.5, 1.5, 2.5]]),
    ],
)
def test_dynamic_quantize(x):
    x = x.astype(np.float32)
    out, scale, zero = run(lambda e, v: ops.dynamic_quantize(v), x)
    low, high = np.float32(min(0, x.min())), np.float32(max(0, x.max()))
    step = (high - low) / np.float32(255) if high > low else np.float32(1)
    point = np.uint8(np.clip(np.rint(-low / step), 0, 255))
    np.testing.assert_array_equal(scale, step, strict=True)
    np.testing.assert_array_equal(zero, point, strict=True)
    expected = arith.quantize(x, step, np.asarray(point), qmin=0, qmax=255, storage="uint8")
    np.testing.assert_array_equal(out, expected, strict=True)
