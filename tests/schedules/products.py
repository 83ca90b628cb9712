"""Products of two tensors of bytes that are computed at run time, of any sign and zero point, for every processor's
rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from hawq_tvm.core import arith, ops

from .one_layer import Array, Body

R = relax.op
SHAPES = [
    ((2, 5, 16), (2, 16, 7)),  # less than a vector
    ((3, 7, 130), (3, 130, 33)),
    ((2, 3, 20, 64), (2, 1, 64, 48)),  # a matrix for several
    ((37, 70), (70, 64)),
    ((5, 20), (1, 20, 9)),  # of fewer dimensions than the other
]
# Types, zero points: none; of 128, which turns a sign; those that need sums of columns, of rows, of both; the ends.
KINDS = [
    (("uint8", "int8"), (0, 0)),
    (("int8", "uint8"), (0, 128)),
    (("uint8", "int8"), (200, 0)),
    (("int8", "int8"), (0, 5)),
    (("uint8", "uint8"), (127, 3)),
    (("int8", "int8"), (-128, 127)),
    (("uint8", "uint8"), (255, 255)),
]


def factors(shapes: tuple[tuple[int, ...], ...], types: tuple[str, ...], seed: int = 0) -> tuple[Array, ...]:
    """Random bytes, a row and a column of which are the ends of their ranges."""
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(*arith.RANGES[t], s, endpoint=True).astype(t) for t, s in zip(types, shapes, strict=True))
    a[..., 0, :], b[..., :, 0] = arith.RANGES[types[0]][1], arith.RANGES[types[1]][0]
    return a, b


def product(zeros: tuple[int, int], requantized: bool) -> Body:
    """A matrix product of two centred tensors; requantized: to bytes, else its sums."""

    def centred(e: Any, x: relax.Expr, zero: int) -> relax.Expr:
        return e(R.subtract(e(R.astype(x, "int16")), ops.const(zero, "int16")))

    def body(e: Any, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        acc = e(R.matmul(centred(e, a, zeros[0]), centred(e, b, zeros[1]), out_dtype="int32"))
        if not requantized:
            return acc
        kind = arith.QType.of("uint8")
        return ops.requantize([acc], [1 << 30], 12345, 44, qtype=kind, zero_point=100, rounding="half_up")

    return body
