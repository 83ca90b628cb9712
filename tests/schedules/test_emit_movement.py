"""Every operator that moves data, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops

from .one_layer import run

R = relax.op
rng = np.random.default_rng(1)


def data(*shape: int, dtype: str = "int8") -> np.ndarray:
    low, high = arith.RANGES[dtype]
    return rng.integers(low, high, shape, dtype=dtype, endpoint=True)


X = data(3, 7, 5, 17)
Y = data(3, 7, 5, 3)
INDICES = np.array([[2, 0], [-1, 4]], np.int64)

MOVES = {
    "reshape": (lambda e, x: R.reshape(x, (7, 3, -1)), [X], X.reshape(7, 3, -1)),
    "reshape_ones": (lambda e, x: R.reshape(x, (3, 1, 7, 5, 1, 17)), [X], X.reshape(3, 1, 7, 5, 1, 17)),
    "flatten": (lambda e, x: R.flatten(x), [X], X.ravel()),
    "squeeze": (lambda e, x: R.squeeze(x, [1]), [X[:, :1]], X[:, 0]),
    "squeeze_all": (lambda e, x: R.squeeze(x), [X[:1, :1, :1, :1]], X[0, 0, 0, 0]),
    "expand_dims": (lambda e, x: R.expand_dims(x, [0, 2]), [X], X[None, :, None]),
    "permute": (lambda e, x: R.permute_dims(x, [0, 3, 1, 2]), [X], X.transpose(0, 3, 1, 2)),
    "permute_all": (lambda e, x: R.permute_dims(x), [X], X.transpose()),
    "broadcast": (
        lambda e, x: R.broadcast_to(x, (2, 3, 7, 5, 17)),
        [X[:, :1]],
        np.broadcast_to(X[:, :1], (2, 3, 7, 5, 17)),
    ),
    "concat": (lambda e, x, y: R.concat([x, y, x], axis=-1), [X, Y], np.concatenate([X, Y, X], -1)),
    "slice": (lambda e, x: R.strided_slice(x, [1, -1], [-6, 1], [100, 16], [2, 3]), [X], X[:, -6:100:2, :, 1:16:3]),
    "slice_back": (lambda e, x: R.strided_slice(x, [2], [4], [-6], [-2]), [X], X[:, :, ::-2]),
    "take": (lambda e, x: R.take(x, relax.const(INDICES), axis=2), [X], X.take(INDICES, axis=2)),
    "take_run_time": (lambda e, x, i: R.take(x, i, axis=1), [X, INDICES], X.take(INDICES, axis=1)),
    "take_from_constant": (lambda e, i: R.take(relax.const(X), i, axis=1), [INDICES], X.take(INDICES, axis=1)),
    "flip": (lambda e, x: R.flip(x, axis=1), [X], X[:, ::-1]),
    "tile": (lambda e, x: R.tile(x, (2, 1, 3, 1, 2)), [X], np.tile(X, (2, 1, 3, 1, 2))),
    "repeat": (lambda e, x: R.repeat(x, 3, axis=2), [X], X.repeat(3, axis=2)),
    "repeat_all": (lambda e, x: R.repeat(x, 2), [X], X.repeat(2)),
    "pad": (
        lambda e, x: R.nn.pad(x, [0, 0, 1, 2, 3, 0, 0, 0], "constant", -7),
        [X],
        np.pad(X, ((0, 0), (1, 2), (3, 0), (0, 0)), constant_values=-7),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_move(name):
    body, inputs, expected = MOVES[name]
    (out,) = run(body, *(np.asarray(i, order="C") for i in inputs))
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("sections", [[2, 3], [1, 4], 5])
def test_split(sections):
    expected = np.split(X, sections, axis=2)
    out = run(lambda e, x: R.split(x, sections, axis=2), X)
    assert len(out) == len(expected)
    for o, x in zip(out, expected, strict=True):
        np.testing.assert_array_equal(o, x, strict=True)


def test_results_that_are_inputs_or_appear_twice_are_copied():
    out = run(lambda e, x: relax.Tuple([x, (v := e(R.flip(x, axis=0))), v]), X)
    for o, x in zip(out, [X, X[::-1], X[::-1]], strict=True):
        np.testing.assert_array_equal(o, x, strict=True)


@pytest.mark.parametrize("strides", [(2, 3), (1, 2), (1, 1)])
def test_dilate2d(strides):
    h, w = (X.shape[1] - 1) * strides[0] + 1, (X.shape[2] - 1) * strides[1] + 1
    expected = np.full((3, h, w, 17), 9, np.int8)
    expected[:, :: strides[0], :: strides[1]] = X
    (out,) = run(lambda e, x: ops.dilate2d(x, strides, 9, layout="NHWC"), X)
    np.testing.assert_array_equal(out, expected, strict=True)


@pytest.mark.parametrize("signed", [True, False])
def test_unpack_int4(signed):
    values = (
        rng.integers(-8, 8, (3, 3, 5)).astype(np.int8) if signed else rng.integers(0, 16, (3, 3, 5)).astype(np.uint8)
    )
    (out,) = run(lambda e, x: R.add(e(ops.unpack_int4(arith.pack_int4(values), values.shape, signed)), x), 0 * values)
    np.testing.assert_array_equal(out, values, strict=True)
