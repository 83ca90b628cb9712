"""A module as `tvm.ir.save_json` writes it, with the data of its large constants beside the text: TVM spells data
letter by letter, which takes a second for 60 MB.
"""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray

LARGE = 64  # bytes; constants of fewer stay in the text
MAGIC = bytes.fromhex("3fa1b496f0405edd")
WIDTHS = {"int": (8, 16, 32, 64), "uint": (8, 16, 32, 64), "float": (16, 32, 64), "bool": (8,)}
CODES = {"int": 0, "uint": 1, "float": 2, "bool": 6}  # DLPack's
TYPES = {f"{k}{bits if k != 'bool' else ''}": (CODES[k], bits) for k, widths in WIDTHS.items() for bits in widths}


@dataclass(frozen=True)
class Tensor:
    """How TVM serializes a tensor: `header`, which ends with the number of bytes, and `data`, those bytes."""

    header: bytes
    data: NDArray[np.uint8]

    @staticmethod
    def of(array: NDArray[Any]) -> Tensor:
        """An array of one of TYPES."""
        code, bits = TYPES[array.dtype.name]
        numbers = b"".join(n.to_bytes(8, "little") for n in (*array.shape, array.nbytes))
        cpu, rank, lanes = (n.to_bytes(size, "little") for n, size in ((1, 8), (array.ndim, 4), (1, 2)))
        return Tensor(
            MAGIC + bytes(8) + cpu + rank + bytes([code, bits]) + lanes + numbers, array.reshape(-1).view(np.uint8)
        )


@dataclass(frozen=True)
class Serialized:
    """A module's JSON: `text` has a mark in the place of every large constant.

    A mark is a tensor of 24 bytes: 64 letters of its header, 20 that are this module's, `own`, and 12 digits.
    """

    text: str
    tensors: tuple[Tensor, ...]
    own: str

    def tensor(self, spelled: str) -> Tensor | None:
        """The constant of a mark; None of what is no mark."""
        return self.tensors[int(spelled[84:])] if spelled[64:84] == self.own else None

    def whole(self) -> Iterator[bytes]:
        """All that `tvm.ir.save_json` writes, in pieces."""
        for i, part in enumerate(re.split(rf'(?<=")[^"]{{64}}{self.own}(\d{{12}})(?=")', self.text)):
            if i % 2 == 0:
                yield part.encode()
            else:
                one = self.tensors[int(part)]
                yield base64.b64encode(one.header + one.data.tobytes()).replace(b"/", rb"\/")


def serialized(module: tvm.IRModule) -> Serialized:
    """The JSON of a module, its large constants apart."""
    own = secrets.token_hex(10)  # letters of base64, and in no file
    tensors: list[Tensor] = []
    marks: dict[Any, Any] = {}  # by the tensors, of which several constants may share one
    constants: dict[Any, Any] = {}

    def marked(constant: tvm.ir.GenericConst) -> tvm.ir.GenericConst:
        value = constant.value
        if not isinstance(value, tvm.runtime.Tensor) or str(value.dtype) not in TYPES:
            return constant
        if prod(value.shape) * TYPES[str(value.dtype)][1] <= 8 * LARGE:
            return constant
        if value not in marks:
            mark = base64.b64decode(f"{own}{len(tensors):012}")
            marks[value] = tvm.runtime.tensor(np.frombuffer(mark, np.uint8))
            tensors.append(Tensor.of(value.numpy()))
        if constant not in constants:
            constants[constant] = tvm.ir.GenericConst(marks[value], constant.ty, constant.span)
        return constants[constant]

    bare = tvm_ffi.structural_map(module, [(tvm.ir.GenericConst, marked)])
    return Serialized(tvm.ir.save_json(bare), tuple(tensors), own)
