"""A library run in a process of its own by hawq-layers, under an emulator where the machine's processor is another."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .. import processes
from ..errors import PackageError, UsageError
from . import records, toolchain
from .records import Run, read

Array = NDArray[Any]
# The emulator of an architecture, and where Debian's cross compiler keeps its libraries.
QEMU = {"aarch64": ("qemu-aarch64", "/usr/aarch64-linux-gnu"), "x86_64": ("qemu-x86_64", "/usr/x86_64-linux-gnu")}


def command(architecture: str, named: str | None, where: str) -> list[str]:
    """The command that runs a program of an architecture: the one that was named, or QEMU's with every extension that it knows.

    Raises UsageError when the named one is no program, PackageError when there is none here for this architecture.
    """
    if named is not None:
        try:
            words = shlex.split(named)
        except ValueError:  # quotes that are not closed
            words = []
        if not words or shutil.which(words[0]) is None:
            raise UsageError("the emulator is no program", where=where, found=named, remedy="give its path, for example --emulator 'qemu-aarch64 -cpu max'")
        return words
    program, root = QEMU[architecture]
    if shutil.which(program) is None:
        raise PackageError(
            "was built for another architecture", where=where, expected=platform.machine(), found=architecture,
            remedy=f"compile it for this machine, or install an emulator ({program}: apt-get install qemu-user)",
        )  # fmt: skip
    return [program, "-cpu", "max", *(["-L", root] if "QEMU_LD_PREFIX" not in os.environ else [])]


def run(library: Path, architecture: str, emulator: Sequence[str], inputs: Sequence[Array], *, layers: bool, threads: int = 1) -> Run:
    """One inference of given inputs, in the order of the model; with what every kernel read and wrote if `layers`.

    Raises PackageError when hawq-layers cannot be built for the architecture, or the run fails.
    """
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        program = Path(folder) / "hawq-layers"
        try:
            program.write_bytes(_program(architecture))
        except UsageError as e:
            raise PackageError("cannot be run here without a C compiler for its architecture", where=str(library), found=str(e)) from e
        program.chmod(0o700)
        given, results = Path(folder) / "inputs", Path(folder) / "results"
        given.write_bytes(records.written(inputs))
        words = [*emulator, str(program), str(library), str(given), str(results), "layers" if layers else "outputs", str(threads)]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not results.exists():
            told = processes.failure(done, "check that this runs programs for the package's CPU")
            raise PackageError("the library could not be run", where=" ".join(words[: len(emulator)]), **told)
        return read(results.read_bytes())


@lru_cache(maxsize=4)
def _program(architecture: str) -> bytes:
    """hawq-layers for an architecture, built once per process."""
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        program = Path(folder) / "hawq-layers"
        words = [*toolchain.compiler(architecture), *toolchain.options(architecture)]
        toolchain.run([*words, str(toolchain.SOURCES / "layers.c"), "-o", str(program), "-ldl"], "hawq-layers")
        return program.read_bytes()
