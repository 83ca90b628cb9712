"""The reference's i-GELU, i-softmax and i-LayerNorm, line by line as the paper's algorithms have them, in Python's
integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

from .reference_rows import normalized_exponents

Array = NDArray[Any]


def _exact(x: Array) -> Array:
    return np.asarray(x).astype(np.int64).astype(object)


def _i_erf(call: relax.Call, x: Array, corner: Array, constant: Array) -> Array:
    """(A28), Algorithm 2: the polynomial of the clipped magnitude, of the sign of q; the other sign of the paper's."""
    q, b, c = (_exact(a) for a in np.broadcast_arrays(x, corner, constant))
    sign = (q > 0).astype(object) - (q < 0).astype(object)
    return np.asarray(-(sign * ((np.minimum(abs(q), b) - b) ** 2 - c) // 2 ** int(call.attrs["shift"])), object)


def _i_gelu(call: relax.Call, x: Array, corner: Array, constant: Array, one: Array) -> Array:
    """(A28), Algorithm 2: q (erf + 1)."""
    return np.asarray(_exact(x) * (_i_erf(call, x, corner, constant) + _exact(one)), object)


def _i_softmax(call: relax.Call, x: Array) -> Array:
    """(A29), Algorithm 3: whole and rest of -q / q_ln2, the square of the rest, a shift by the whole."""
    attrs, axis = call.attrs, int(call.attrs["axis"])
    ln2, shifted, constant, up = (int(attrs[n]) for n in ("ln2", "shifted", "constant", "up"))
    q = _exact(x)
    q = (q - q.max(axis=axis, keepdims=True)) * 2 ** int(attrs["left"])
    z = -q // ln2
    square = (q + z * ln2 + shifted) ** 2 + constant
    scaled = square * 2**up if up >= 0 else square // 2**-up
    return normalized_exponents(call, (scaled // 2 ** np.minimum(z, 64)).astype(np.int64))


def _i_layer_norm(call: relax.Call, x: Array) -> Array:
    """(A30): the mean to the nearest integer, ties to even, the root of the sum of squares, its reciprocal."""
    axes = tuple(int(a) for a in call.attrs["axes"])
    n = math.prod(x.shape[a] for a in axes)
    q = _exact(x) - int(call.attrs["zero_point"])
    sums = q.sum(axis=axes, keepdims=True)
    whole, rest = sums // n, sums % n
    y = q - (whole + ((2 * rest > n) | ((2 * rest == n) & (whole % 2 == 1))))
    squares = (y * y).sum(axis=axes, keepdims=True)
    factors = np.array([2**31 // max(math.isqrt(v), 1) for v in squares.ravel().tolist()], object)
    return np.asarray(y * factors.reshape(squares.shape) // 2, object)


OPERATORS: dict[str, Callable[..., Any]] = {
    "hawq.i_erf": _i_erf,
    "hawq.i_gelu": _i_gelu,
    "hawq.i_softmax": _i_softmax,
    "hawq.i_layer_norm": _i_layer_norm,
}
