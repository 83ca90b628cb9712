"""Products, pools, reductions and softmax, against NumPy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops, softmax_wide
from hawq_tvm.core.layer_norm import Norm, normalized

from .one_layer import run

R = relax.op
rng = np.random.default_rng(3)


def full(dtype: str, *shape: int) -> np.ndarray:
    """Seeded values of a dtype; a quarter of them are its extremes."""
    low, high = arith.RANGES[dtype]
    x = rng.integers(low, high, shape, dtype=dtype, endpoint=True)
    return np.where(rng.random(shape) < 0.25, rng.choice(np.array([low, high], dtype), shape), x)


def windows(x: np.ndarray, kernel, strides, dilation) -> np.ndarray:
    """(N, H, W, C, KH, KW) views of an NHWC array."""
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(1, 2))
    return view[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]


WINDOWS = [((3, 3), (2, 2), (1, 1)), ((2, 3), (1, 2), (1, 1)), ((3, 1), (3, 1), (2, 1)), ((7, 7), (1, 1), (1, 1))]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("n", "w", "c"), [(1, 7, 1), (3, 7, 17), (1, 31, 65), (1, 8, 32)])
def test_max_pool2d(window, n, w, c):
    x = full("int8", n, 7, w, c)
    kernel, strides, dilation = window
    (out,) = run(lambda e, v: R.nn.max_pool2d(v, kernel, strides, 0, dilation, layout="NHWC"), x)
    np.testing.assert_array_equal(out, windows(x, *window).max(axis=(-2, -1)), strict=True)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("dtype", "to"), [("uint8", "int32"), ("int16", "int32"), ("int32", "int64")])
def test_sum_pool2d_with_epilogue(window, dtype, to):
    x = full(dtype, 3, 7, 31, 17)
    acc = windows(x.astype(np.int64), *window).sum(axis=(-2, -1))
    m, q = rng.integers(1, 2**20, 17), arith.QType.of("int8")
    kernel, strides, dilation = window

    def body(emit, v):
        a = emit(ops.sum_pool2d(v, kernel, strides, dilation, layout="NHWC", out_dtype=to))
        return ops.requantize([a], [m], -5, 24, qtype=q, zero_point=1, rounding="half_even")

    kw = {"rounding": "half_even", "zero_point": 1, "qmin": -128, "qmax": 127}
    (out,) = run(body, x)
    np.testing.assert_array_equal(out, arith.requantize([acc], [m], -5, 24, **kw).astype("int8"), strict=True)


@pytest.mark.parametrize("axis", [[1, 2], [3], [1], [0, 1, 2, 3], None, [-2]])
@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("name", ["sum", "max", "min"])
def test_reductions(axis, keepdims, name):
    x = full("int16", 3, 7, 5, 17)
    (out,) = run(lambda e, v: getattr(R, name)(e(R.astype(v, "int32")), axis=axis, keepdims=keepdims), x)
    wide = x.astype(np.int32)
    expected = getattr(np, name)(wide, axis=None if axis is None else tuple(axis), keepdims=keepdims)
    np.testing.assert_array_equal(out, np.asarray(expected, np.int32), strict=True)


def test_global_pool():
    x = full("uint8", 1, 7, 7, 64)

    def body(emit, v):
        a = emit(R.sum(emit(R.astype(v, "int32")), axis=[1, 2], keepdims=True))
        return ops.requantize([a], [123456], 0, 24, qtype=arith.QType.of("uint8"), zero_point=0, rounding="half_up")

    kw = {"rounding": "half_up", "zero_point": 0, "qmin": 0, "qmax": 255}
    acc = x.astype(np.int64).sum(axis=(1, 2), keepdims=True)
    (out,) = run(body, x)
    np.testing.assert_array_equal(out, arith.requantize([acc], [123456], 0, 24, **kw).astype("uint8"), strict=True)


@pytest.mark.parametrize("name", ["argmax", "argmin"])
@pytest.mark.parametrize(("axis", "keepdims"), [(-1, False), (1, True), (0, True), (2, False)])
def test_arg_extremum_is_the_first(name, axis, keepdims):
    x = rng.integers(-2, 3, (3, 7, 5, 17)).astype(np.int8)
    (out,) = run(lambda e, v: getattr(R, name)(v, axis=axis, keepdims=keepdims), x)
    np.testing.assert_array_equal(out, getattr(np, name)(x, axis=axis, keepdims=keepdims).astype(np.int64), strict=True)


@pytest.mark.parametrize(
    ("axis", "dtype", "step", "scale"),
    [
        (-1, "int8", 1 / 256, 0.05),
        (1, "uint8", 1 / 200, 1.0),
        (2, "int16", 2.0**-15, 0.001),
        (3, "uint8", 2.0**-17, 0.1),
    ],
)
def test_softmax(axis, dtype, step, scale):
    x = full(dtype, 3, 5, 7, 11)
    table = arith.softmax_table(Fraction(scale), 2 ** (8 * x.dtype.itemsize))
    multiplier, k = arith.softmax_dyadic(1 / Fraction(step), x.shape[axis])
    q = arith.QType.of("uint8" if step > 2**-10 else "uint16")
    (out,) = run(
        lambda e, v: ops.softmax(v, table, axis=axis, multiplier=multiplier, shift=k, qtype=q, zero_point=1), x
    )
    expected = arith.softmax(x, table, axis, multiplier, k, zero_point=1, qmin=q.qmin, qmax=q.qmax)
    np.testing.assert_array_equal(out, expected.astype(q.storage), strict=True)


@pytest.mark.parametrize(("axis", "fraction"), [(-1, 20), (1, 12)])
def test_softmax_wide(axis, fraction):
    x = (rng.integers(-(2**29), 2**29, (3, 5, 7, 11)) >> rng.integers(0, 20, (3, 5, 7, 1))).astype(np.int32)
    x[0, 0, 0, :3] = -(2**30)
    numbers = {"axis": axis, "multiplier": 2**30, "shift": 22}
    q = arith.QType.of("uint8")
    tables = softmax_wide.tables(fraction)
    (out,) = run(lambda e, v: ops.softmax_wide(v, tables, fraction=fraction, qtype=q, zero_point=3, **numbers), x)
    expected = softmax_wide.softmax(x, axis, fraction, 2**30, 22, zero_point=3, qmin=0, qmax=255)
    np.testing.assert_array_equal(out, expected.astype("uint8"), strict=True)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    ("axes", "dtype", "scale", "epsilon"),
    [
        ([3], "int8", 0.05, 1e-5),
        ([1, 2], "uint8", 1.0, 0.0),
        ([0], "int16", 1e-9, 1e-3),
        ([2, 3], "uint16", 0.001, 0.5),
        ([0, 1, 2, 3], "int8", 0.1, 1e-12),
    ],
)
def test_layer_norm(axes, dtype, scale, epsilon, centered):
    x = full(dtype, 3, 5, 7, 11)
    x[:, 1:3] = x[:1, :1, :1, :1]
    low, high = arith.RANGES[dtype]
    count = int(np.prod([x.shape[a] for a in axes]))
    norm = Norm.of(count, (low, high), Fraction(scale), Fraction(epsilon), None if centered else low + 5)
    (out,) = run(lambda e, v: ops.layer_norm(v, axes, norm), x)
    np.testing.assert_array_equal(out, normalized(x, axes, norm).astype(np.int32), strict=True)


MATMULS = {
    "row": ((1, 65), (65, 31), "int8"),
    "rows": ((7, 17), (17, 33), "int8"),
    "batch": ((3, 7, 17), (3, 17, 5), "int8"),
    "broadcast_left": ((7, 17), (2, 3, 17, 5), "int8"),
    "broadcast_right": ((2, 1, 7, 16), (3, 16, 32), "int8"),
    "vector_left": ((17,), (17, 5), "int8"),
    "vector_right": ((3, 7, 17), (17,), "int8"),
    "dot": ((17,), (17,), "int8"),
    "wide": ((7, 17), (17, 33), "int16"),
}


@pytest.mark.parametrize("name", MATMULS)
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
def test_matmul(name, constant, unsigned):
    left, right, kind = MATMULS[name]
    a, b = full("u" + kind if unsigned else kind, *left), full(kind, *right)
    to = "int64" if kind == "int16" else "int32"
    arrays = [a] if constant else [a, b]
    (out,) = run(lambda e, x, y=None: R.matmul(x, relax.const(b) if y is None else y, out_dtype=to), *arrays)
    np.testing.assert_array_equal(out, np.asarray(np.matmul(a.astype(to), b.astype(to))), strict=True)
