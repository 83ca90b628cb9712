"""Layers as they are expected, whole or as hashes, and their exact comparison; the first difference is named.

An expected result is one of
    {"dtype", "shape", "values": base64 of all bytes}
    {"dtype", "shape", "sha256": one per sample, "rows": base64 of a CRC-32 for every row of every sample}
where `shape` is that of one sample and the first axis of a layer counts samples. Sample i of a batch is compared
with expected sample i modulo their number, so larger batches of the same images need nothing more.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SMALL = 4096  # bytes of a sample up to which it is kept whole beside other layers' hashes


def expected(samples: Sequence[Array], whole: bool) -> dict[str, Any]:
    """What is kept of one result of a layer, from its value for every sample (each [1, ...]).

    whole: keep every byte, else those of small results only.
    """
    first = samples[0]
    fields: dict[str, Any] = {"dtype": str(first.dtype), "shape": list(first.shape[1:])}
    if whole or first.nbytes <= SMALL:
        return {**fields, "values": _text(b"".join(np.ascontiguousarray(s).tobytes() for s in samples))}
    rows = np.array([[zlib.crc32(r) for r in _rows(s[0])] for s in samples], "<u4")
    return {
        **fields,
        "sha256": [hashlib.sha256(np.ascontiguousarray(s).tobytes()).hexdigest() for s in samples],
        "rows": _text(rows.tobytes()),
    }


def difference(wanted: dict[str, Any], found: Array, samples: int) -> str | None:
    """The first difference of a layer's result from what is expected, in words; None where every bit is equal.

    samples: how many samples were expected of every layer.
    """
    shape = tuple(wanted["shape"])
    if str(found.dtype) != wanted["dtype"] or found.shape[1:] != shape:
        return f"expected {wanted['dtype']}{list(shape)} for every sample, found {found.dtype}{list(found.shape[1:])}"
    whole = "values" in wanted
    values = (
        np.frombuffer(base64.b64decode(wanted["values"]), wanted["dtype"]).reshape(samples, *shape) if whole else None
    )
    for i, sample in enumerate(found):
        k = i % samples
        text = _first_element(values[k], sample) if values is not None else _first_row(wanted, k, samples, sample)
        if text is not None:
            return f"sample {i}, {text}"
    return None


def _first_element(wanted: Array, found: Array) -> str | None:
    bits = f"u{wanted.dtype.itemsize}"
    unequal = (
        np.ascontiguousarray(wanted).view(bits) != np.ascontiguousarray(found).view(bits)
        if wanted.ndim
        else np.array(wanted != found)
    )
    if wanted.dtype.kind == "f":
        unequal &= ~(np.isnan(wanted) & np.isnan(found))
    if not unequal.any():
        return None
    index = tuple(int(i) for i in np.argwhere(unequal)[0])
    return (
        f"index {list(index)}: expected {wanted[index].item()}, found {found[index].item()} ({int(unequal.sum())} of"
        f" {unequal.size} elements differ)"
    )


def _first_row(wanted: dict[str, Any], k: int, samples: int, found: Array) -> str | None:
    if hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest() == wanted["sha256"][k]:
        return None
    rows = np.frombuffer(base64.b64decode(wanted["rows"]), "<u4").reshape(samples, -1)[k]
    for i, row in enumerate(_rows(found)):
        if zlib.crc32(row) != rows[i]:
            head = found[i].reshape(-1)[:4].tolist() if found.ndim > 1 else found[:4].tolist()
            return f"row {i}: its checksum differs from the expected one; it begins {head}"
    return "its SHA-256 differs from the expected one"


def _rows(sample: Array) -> list[bytes]:
    """A sample cut along its first axis, where it has more than one."""
    return [np.ascontiguousarray(r).tobytes() for r in (sample if sample.ndim > 1 else [sample])]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
