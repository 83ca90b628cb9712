"""What every loaded package tells of itself, with the compiler or without: names, shapes, and the TVM that it needs."""

from __future__ import annotations

import copy
from typing import Any

from .errors import PackageError
from .printable import printable


class Interface:
    """A package's name, inputs and outputs.

    manifest: what manifest.json holds.
    """

    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.manifest["name"])

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Every input's name, type in the model, array dtype, shape, and quantization where it has one."""
        return copy.deepcopy(self.manifest["inputs"])

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """Every output, described like the inputs."""
        return copy.deepcopy(self.manifest["outputs"])

    def _sides(self) -> str:
        """Name and type of the inputs and outputs in a few words."""
        sides = (", ".join(f"{e['name']}: {e['dtype']}{e['shape']}" for e in self.manifest[side]) for side in ("inputs", "outputs"))
        return printable(" -> ".join(sides))

    def check_tvm(self, tvm: str, tvm_ffi: str, where: str) -> None:
        """Refuse a package that other versions of TVM and tvm-ffi made than those that are here.

        Raises PackageError.
        """
        producer = self.manifest["producer"]
        if (producer["tvm"], producer["tvm_ffi"]) != (tvm, tvm_ffi):
            raise PackageError(
                "was made with another version of TVM", where=where, expected=f"tvm {tvm}, tvm-ffi {tvm_ffi}",
                found=f"tvm {producer['tvm']}, tvm-ffi {producer['tvm_ffi']}", remedy="install that version, or compile again",
            )  # fmt: skip
