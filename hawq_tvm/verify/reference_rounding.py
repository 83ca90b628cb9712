"""How the reference rounds by a fraction beside its floor, and the quotient of two tensors, which it rounds so."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import relax

Array = NDArray[Any]


def goes_up(rounding: str, rest: Array, above: Array, tie: Array, positive: Array, odd: Array) -> Array:
    """Whether a number is rounded to the integer above its floor: rest, above and tie compare its fraction with 0
    and 1/2.
    """
    rules = {
        "floor": rest & False,
        "ceil": rest,
        "toward_zero": rest & ~positive,
        "away": rest & positive,
        "half_up": above | tie,
        "half_even": above | (tie & odd),
        "half_away": above | (tie & positive),
        "half_toward_zero": above | (tie & ~positive),
    }
    return rules[rounding]


def divide(call: relax.Call, a: Array, b: Array, multiplier: Array, divisor: Array) -> Array:
    """(A32), in Python's integers: the quotient's floor, and twice its rest beside the divisor."""
    n, d = (np.asarray(v).astype(object) * np.asarray(c).astype(object) for v, c in ((a, multiplier), (b, divisor)))
    n, d = np.broadcast_arrays(np.where(d < 0, -n, n), abs(d))
    low, high = int(call.attrs["qmin"]), int(call.attrs["qmax"])
    whole, rest = n // np.maximum(d, 1), n % np.maximum(d, 1)
    up = goes_up(str(call.attrs["rounding"]), rest > 0, 2 * rest > d, 2 * rest == d, n > 0, whole % 2 != 0)
    result = np.minimum(np.maximum(whole + up + int(call.attrs["zero_point"]), low), high)
    beyond = np.where(n > 0, high, np.where(n < 0, low, int(call.attrs["undefined"])))
    return np.where(d == 0, beyond, result).astype(np.int64)
