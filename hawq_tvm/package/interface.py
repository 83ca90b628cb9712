"""What every loaded package tells of itself, with the compiler or without: names, shapes, and the TVM that it needs."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from hawq_tvm.core.errors import HawqError, PackageError
from hawq_tvm.core.printable import printable
from hawq_tvm.core.tensors import TensorSpec

from .tail import Tail

Array = NDArray[Any]
# What TVM raises, by the kind of error that its C++ code names.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, MemoryError)


class Interface:
    """A package's name, inputs and outputs.

    manifest: what manifest.json holds.  tail: the float end that was cut off, where one was.
    """

    manifest: dict[str, Any]
    tail: Tail | None

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.manifest["name"])

    @property
    def inputs(self) -> list[TensorSpec]:
        """Every input's name, type in the model, array dtype, shape, and quantization where it has one."""
        return [TensorSpec.of(e) for e in self.manifest["inputs"]]

    @property
    def outputs(self) -> list[TensorSpec]:
        """Every output of the library, described like the inputs; where the model's float end was cut off, the
        tensors at the cut are among them.
        """
        return [TensorSpec.of(e) for e in self.manifest["outputs"]]

    def joined(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array]:
        """The model's outputs of the library's: the float end that was cut off is run by ONNX Runtime.

        Raises UsageError where that is not installed, PackageError where it fails.
        """
        if self.tail is None:
            return dict(outputs)
        given = {**inputs, **outputs}
        return self.tail.finished(given, self.manifest["cut"]["outputs"])

    def _named(self, values: Sequence[Array]) -> dict[str, Array]:
        """What the library gave, by the outputs' names.

        Raises PackageError when the manifest says something else of them.
        """
        said, found = ([s.text() for s in self.outputs], [f"{v.dtype}{list(v.shape)}" for v in values])
        if said != found:
            raise PackageError(
                "the library gives other outputs than the manifest says",
                where=self.name,
                expected=", ".join(said),
                found=", ".join(found),
                remedy="do not use it; get it again from whom you trust, or compile again",
            )
        return {s.name: v for s, v in zip(self.outputs, values, strict=True)}

    def _sides(self) -> str:
        """Name and type of the inputs and outputs in a few words."""
        sides = (", ".join(f"{s.name}: {s.text()}" for s in side) for side in (self.inputs, self.outputs))
        return printable(" -> ".join(sides))

    def check_tvm(self, tvm: str, tvm_ffi: str, where: str) -> None:
        """Refuse a package that other versions of TVM and tvm-ffi made than those that are here.

        Raises PackageError.
        """
        producer = self.manifest["producer"]
        if (producer["tvm"], producer["tvm_ffi"]) != (tvm, tvm_ffi):
            raise PackageError(
                "was made with another version of TVM",
                where=where,
                expected=f"tvm {tvm}, tvm-ffi {tvm_ffi}",
                found=f"tvm {producer['tvm']}, tvm-ffi {producer['tvm_ffi']}",
                remedy="install that version, or compile again",
            )


@contextmanager
def one_sentence(where: str) -> Iterator[None]:
    """Turn what TVM raises in a run whose inputs were checked, as for a library that takes other ones than its
    manifest says, into a PackageError.
    """
    try:
        yield
    except HawqError:
        raise
    except FAILURES as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise PackageError(
            "the library fails",
            where=where,
            found=lines[0] if lines else type(e).__name__,
            remedy="compile or copy it again",
        ) from e


@contextmanager
def readable(what: str, where: str) -> Iterator[None]:
    """Turn what is raised while a file of a package is read, whose checksum is right, into a PackageError."""
    try:
        yield
    except HawqError:
        raise
    except (*FAILURES, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        found = lines[0] if lines else type(e).__name__
        raise PackageError(
            f"has a {what} that another tool wrote", where=where, found=found, remedy="compile it again"
        ) from e
