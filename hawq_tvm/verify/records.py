"""What one run through the C interface leaves: every kernel's name and buffers, and the outputs; read from
hawq-layers' file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.errors import PackageError

Array = NDArray[Any]


@dataclass(frozen=True)
class Record:
    """A kernel that ran: what it read, constants left out, and what it wrote."""

    kernel: str
    read: tuple[Array, ...]
    written: tuple[Array, ...]


@dataclass(frozen=True)
class Run:
    """kernels: in order; none unless they were asked for.  outputs: in the order of the model."""

    kernels: tuple[Record, ...]
    outputs: tuple[Array, ...]


def read(data: bytes) -> Run:
    """The records of deploy/native/layers.c.

    Raises PackageError when the file ends early.
    """
    stream = _Stream(data)
    records = []
    while stream.at < len(data):
        name, reads, writes = stream.text(), stream.number(), stream.number()
        records.append(
            Record(name, tuple(stream.tensor() for _ in range(reads)), tuple(stream.tensor() for _ in range(writes)))
        )
    if not records or records[-1].kernel:
        raise PackageError("the run of the library ended early", found=f"{len(records)} kernels and no outputs")
    return Run(tuple(records[:-1]), records[-1].written)


def written(arrays: Sequence[Array]) -> bytes:
    """Inputs as deploy/native/layers.c reads them, each as it writes a tensor."""
    return b"".join(_tensor(a) for a in arrays)


def _tensor(a: Array) -> bytes:
    kind = a.dtype.name.encode()
    return (
        struct.pack("<q", len(kind)) + kind + struct.pack(f"<{a.ndim + 2}q", a.ndim, *a.shape, a.nbytes) + a.tobytes()
    )


class _Stream:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if count < 0 or len(taken) != count:
            raise PackageError(
                "the run of the library ended early", expected=f"{count} bytes more", found=str(len(taken))
            )
        self.at += count
        return taken

    def number(self) -> int:
        return int.from_bytes(self.take(8), "little", signed=True)

    def text(self) -> str:
        return self.take(self.number()).decode()

    def tensor(self) -> Array:
        dtype = np.dtype(self.text())
        shape = [self.number() for _ in range(self.number())]
        return np.frombuffer(self.take(self.number()), dtype).reshape(shape)


def inputs_text(count: int) -> str:
    """So many inputs, in words."""
    return f"{count} input{'' if count == 1 else 's'}"
