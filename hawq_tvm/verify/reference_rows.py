"""The reference's softmax and normalizations: operators that read a whole row before they write an element of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

Array = NDArray[Any]


def _i64(x: Any) -> Array:
    return np.asarray(x).astype(np.int64)


def softmax(call: relax.Call, x: Array, table: Array) -> Array:
    """(A17)"""
    x = _i64(x)
    return normalized_exponents(call, _i64(table)[x.max(axis=int(call.attrs["axis"]), keepdims=True) - x])


def softmax_wide(call: relax.Call, x: Array, coarse: Array, fine: Array) -> Array:
    """(A24): powers of two by their whole part and two parts of the fraction."""
    x, whole, part = _i64(x), 2 ** int(call.attrs["fraction"]), 2 ** (int(call.attrs["fraction"]) // 2)
    below = x.max(axis=int(call.attrs["axis"]), keepdims=True) - x
    product = _i64(coarse)[below % whole // part] * _i64(fine)[below % part]
    return normalized_exponents(call, (product + 2**29) // 2**30 // 2 ** np.minimum(below // whole, 31))


def normalized_exponents(call: relax.Call, e: Array) -> Array:
    """(A17) from the sum on, in Python's integers for each row: its length, its leading 31 bits, their reciprocal."""
    attrs = call.attrs
    sums = e.sum(axis=int(attrs["axis"]), keepdims=True)
    lengths = np.array([int(s).bit_length() for s in sums.ravel()], np.int64).reshape(sums.shape)
    leading = sums // 2 ** (lengths - 31)
    scaled = e * (2**31 * int(attrs["multiplier"]) // leading)
    divisor = 2 ** (lengths + int(attrs["shift"]))
    quotient, rest = scaled // divisor, scaled % divisor
    up = (rest > divisor // 2) | ((rest == divisor // 2) & (quotient % 2 == 1))
    rounded = quotient if str(attrs.get("rounding", "")) == "floor" else quotient + up
    return np.minimum(np.maximum(rounded + int(attrs["zero_point"]), int(attrs["qmin"])), int(attrs["qmax"]))


def layer_norm(call: relax.Call, x: Array) -> Array:
    """(A25), in Python's integers: sums, the variance with epsilon, its root of 31 bits, the reciprocal of the root."""
    attrs, axes = call.attrs, tuple(int(a) for a in call.attrs["axes"])
    n, f, fraction = int(np.prod([x.shape[a] for a in axes])), int(attrs["shift"]), int(attrs["fraction"])
    q = _i64(x).astype(object) - int(attrs["zero_point"])
    sums = q.sum(axis=axes, keepdims=True) if int(attrs["centered"]) else 0 * q.sum(axis=axes, keepdims=True)
    variance = n * (q * q).sum(axis=axes, keepdims=True) - sums * sums

    def row(v: int) -> tuple[int, int]:
        """The reciprocal, and the bits by which a product with it is divided."""
        w = max(1, int(v * 2**f if f >= 0 else v // 2**-f) + int(attrs["epsilon"]))
        even = 62 - w.bit_length() - w.bit_length() % 2
        root = math.isqrt(w * 2**even if even >= 0 else w // 2**-even)
        return 2**61 // root, min(max(61 - fraction - (even + f) // 2, 1), 62)

    numbers = [row(v) for v in variance.ravel().tolist()]
    reciprocal, bits = (np.array(column, object).reshape(sums.shape) for column in zip(*numbers, strict=True))
    half = np.array([2 ** (b - 1) for b in bits.ravel().tolist()], object).reshape(bits.shape)
    return np.asarray(((n * q - sums) * reciprocal + half) // (2 * half), object)
