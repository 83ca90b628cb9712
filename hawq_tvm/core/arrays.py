"""The arrays that a package takes: checked against its manifest, or made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.tensors import TensorSpec

from .arith import RANGES
from .errors import InputError

Array = NDArray[Any]
# Of positions and masks: no quantize gives them.
COUNTED = frozenset({"bool", "int32", "int64"})


def checked(inputs: Any, specs: Sequence[TensorSpec], where: str) -> dict[str, Array]:
    """The inputs as the library takes them: contiguous, sub-byte types widened to 8 bits.

    specs: a package's inputs.  where: how errors call the package.  Raises InputError naming the input that does not
    fit.
    """
    wanted = {i.name: i for i in specs}
    if not isinstance(inputs, Mapping):
        raise InputError(
            "the inputs have no names",
            where=where,
            expected=f"a dictionary with {', '.join(wanted)}",
            found=type(inputs).__name__,
            remedy=f"give {{{', '.join(f'{name!r}: array' for name in wanted)}}}",
        )
    if set(wanted) < set(inputs):
        raise InputError(
            "there are arrays that are no inputs",
            where=where,
            expected=", ".join(wanted),
            found=", ".join(str(name) for name in inputs if name not in wanted),
            remedy="leave them out",
        )
    if set(inputs) != set(wanted):
        raise InputError(
            "the inputs have other names",
            where=where,
            expected=", ".join(wanted),
            found=", ".join(map(str, inputs)) or "none",
            remedy="rename them",
        )
    return {name: _checked(name, inputs[name], spec) for name, spec in wanted.items()}


def _checked(name: str, given: Any, spec: TensorSpec) -> Array:
    where, shape = f"input {name}", spec.shape
    try:
        array = np.asarray(given)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as e:  # lists of different lengths, tensors of a GPU or with a gradient
        found = str(e).splitlines()[0] if str(e) else type(given).__name__
        raise InputError(
            "is no array", where=where, expected=f"an array of shape {shape}", found=found, remedy="give a NumPy array"
        ) from e
    if array.shape != shape:
        raise InputError("has another shape", where=where, expected=str(shape), found=str(array.shape))
    kind, dtype = spec.type, spec.dtype
    if array.dtype.name == kind and kind != dtype:
        array = array.astype(dtype)  # ml_dtypes' int4 and the like
    if array.dtype.name != dtype:
        raise InputError(
            "has another type", where=where, expected=dtype, found=str(array.dtype), remedy=_conversion(array, dtype)
        )
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise InputError("contains NaN, which no integer stands for", where=where, remedy="clean the input")
    limits = spec.range or (RANGES[kind] if kind in RANGES and kind != dtype else None)
    if limits is not None:
        check_range(name, array, limits, "that the model takes" if spec.range else f"of {kind}")
    return np.ascontiguousarray(array, np.dtype(dtype)).reshape(shape)  # in this machine's order of bytes


def saturated(inputs: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, int]:
    """How many values of each float input with a declared range lie beyond it, where some do."""
    ends = {s.name: s.saturates for s in specs if s.saturates}
    counts = {n: int(np.count_nonzero((inputs[n] < low) | (inputs[n] > high))) for n, (low, high) in ends.items()}
    return {name: count for name, count in counts.items() if count}


def summary(array: Array) -> dict[str, Any]:
    """What an array is like, JSON-ready: its type, shape, least, largest and mean value, and the place of the first
    largest, counted along all dimensions but a first of 1; None of these where there is no finite value.
    """
    fields: dict[str, Any] = {"dtype": str(array.dtype), "shape": list(array.shape)}
    values = array.astype(np.float64)
    if not (values.size and np.isfinite(values).all()):
        return {**fields, "min": None, "max": None, "mean": None, "largest": None}
    ends = {"min": float(values.min()), "max": float(values.max()), "mean": float(values.mean())}
    return {**fields, **ends, "largest": int(values.argmax())}


def check_range(name: str, array: Array, limits: tuple[int, int], what: str = "that the model takes") -> None:
    """Raise InputError where an input's integers leave their range, both ends of which are in it."""
    low, high = limits
    if array.size and (array.min() < low or array.max() > high):
        raise InputError(
            f"leaves the range {what}",
            where=f"input {name}",
            expected=f"{low}..{high}",
            found=f"{array.min()}..{array.max()}",
        )


def _conversion(array: Array, dtype: str) -> str:
    """How an array of another type becomes one of `dtype`."""
    if dtype.startswith("float") and array.dtype.kind in "fiub":
        return f"give array.astype('{dtype}')"
    if array.dtype.kind in "iub" or (array.dtype.kind == "f" and dtype in COUNTED):
        return f"give array.astype('{dtype}') if its values fit"
    return (
        "give the quantized integers: divide by the scale, round, add the zero point and clip"
        if array.dtype.kind == "f"
        else ""
    )


def random(rng: np.random.Generator, spec: TensorSpec) -> Array:
    """Values over the whole quantized range of an input, its ends and values beyond them included."""
    shape, dtype = spec.shape, spec.dtype
    if dtype.startswith("float"):
        q = spec.quantization
        low, high = spec.saturates or (-4.0, 4.0)
        if q and not spec.saturates:
            ends = [(end - z) * s for z, s in zip(q.zero_point, q.scale, strict=False) for end in (q.qmin, q.qmax)]
            low, high = min(ends), max(ends)
        x = rng.uniform(low - 0.02 * (high - low), high + 0.02 * (high - low), shape)
        return x.astype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    low_i, high_i = spec.range or RANGES.get(spec.type, RANGES.get(dtype, (0, 1)))
    return rng.integers(low_i, high_i, size=shape, endpoint=True, dtype=np.int64).astype(dtype)
