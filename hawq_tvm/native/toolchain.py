"""The C compiler of this machine that makes code for an architecture, and the runtime that it compiles into every library."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import tvm_ffi.libinfo

import deploy

from .. import processes
from ..errors import PackageError, UsageError

SOURCES = Path(deploy.__file__).parent / "native"
ABI_VERSION = 1  # HAWQ_ABI_VERSION of abi.h
RUNTIME = ("model.c", "threads.c", "workspace.c", "cpu.c", "error.c")
FLAGS = ("-std=c11", "-O2", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wpedantic")
# Atomic operations in place: the helpers that GCC calls instead ask, when the library is loaded, which instructions there are.
TUNING = {"aarch64": ("-mno-outline-atomics",)}
CROSS = {
    "aarch64": ("aarch64-linux-gnu-gcc", "apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"),
    "x86_64": ("x86_64-linux-gnu-gcc", "apt-get install gcc-x86-64-linux-gnu libc6-dev-amd64-cross"),
}


def compiler(architecture: str) -> list[str]:
    """The command that compiles and links C for an architecture (as `platform.machine()` names it): $CC, gcc, clang or cc here.

    Raises UsageError where there is none.
    """
    if architecture == platform.machine():
        named = os.environ.get("CC", "").split()
        candidates = [named] if named else [["gcc"], ["clang"], ["cc"]]
        remedy = "install a C compiler (apt-get install g++)"
    else:
        name, install = CROSS.get(architecture, (f"{architecture}-linux-gnu-gcc", "a cross compiler"))
        candidates, remedy = [[name]], f"{install}, or compile on such a machine"
    for command in candidates:
        if shutil.which(command[0]):
            return command
    tried = " or ".join(c[0] for c in candidates)
    raise UsageError("no compiler links libraries for this architecture", where=architecture, expected=tried, found="no such program", remedy=remedy)


def options(architecture: str) -> list[str]:
    """How C is compiled for an architecture: the dialect, its tuning, and where the runtime's and TVM's headers are."""
    ours = [*FLAGS, *TUNING.get(architecture, ()), "-I", str(SOURCES)]
    return ours + [o for path in (tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()) for o in ("-isystem", path)]


def run(command: Sequence[str], what: str) -> None:
    """Run a compiler.

    Raises PackageError with its first error, or the signal that killed it.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})  # errors in English
    if done.returncode:
        told = processes.failure(done, f"check that `{command[0]}` works (apt-get install g++), or set CC", ("error", "undefined"))
        raise PackageError(f"{what} could not be made", **told)


@lru_cache(maxsize=8)
def _objects(command: tuple[str, ...], flags: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        made = []
        for source in RUNTIME:
            path = Path(folder) / f"{Path(source).stem}.o"
            run([*command, *flags, "-fvisibility=hidden", "-c", str(SOURCES / source), "-o", str(path)], "the library's runtime")
            made.append((path.name, path.read_bytes()))
    return tuple(made)


def runtime_objects(architecture: str, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The runtime compiled for an architecture, once per process, as object files in a folder; more: options of the compiler."""
    paths = []
    for name, data in _objects(tuple(compiler(architecture)), (*options(architecture), *more)):
        (folder / f"hawq_{name}").write_bytes(data)
        paths.append(str(folder / f"hawq_{name}"))
    return paths
