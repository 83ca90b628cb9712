"""TVM's CUDA runtime on any machine: where the driver is missing, a library of the same name lets kernels be built,
not run.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile
from tvm.base import _LOADED_LIBS
from tvm_ffi.libinfo import load_lib_ctypes

from hawq_tvm.core.errors import PackageError
from hawq_tvm.targets.gpu import load_backend

DRIVER, TOOLKIT = "libcuda.so.1", "libcudart.so.13"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
MARK = "hawq_tvm_is_no_driver"
_NAME = "tvm_runtime_cuda"


def driver() -> ctypes.CDLL | None:
    """The GPU's driver, or None where there is none; the stub that `load` may have loaded is none."""
    try:
        library = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    return None if hasattr(library, MARK) else library


def load(toolkit: Iterable[Path] = ()) -> None:
    """Make TVM know its CUDA runtime, which `import tvm` left out if a library was missing.

    toolkit: folders in which CUDA's runtime library may lie, beside those of the system and of Python's packages.
    Raises PackageError when CUDA's runtime library is nowhere, or no C compiler makes the stub of a missing driver.
    """
    load_backend()
    if _NAME in _LOADED_LIBS:
        return
    _load_toolkit([*toolkit, *_package_folders()])
    folder = Path(_LOADED_LIBS["tvm_runtime"]._name).resolve().parent
    if driver() is None:
        _load_stub(folder / f"lib{_NAME}.so")
    _LOADED_LIBS[_NAME] = load_lib_ctypes(package="tvm", target_name=_NAME, extra_lib_paths=[folder], mode="RTLD_LOCAL")


def _package_folders() -> list[Path]:
    spec = find_spec("nvidia")
    return [
        p for root in (spec.submodule_search_locations or () if spec else ()) for p in sorted(Path(root).glob("*/lib"))
    ]


def _load_toolkit(folders: Iterable[Path]) -> None:
    for name in (TOOLKIT, *(str(f / TOOLKIT) for f in folders)):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise PackageError(
        "CUDA's runtime library is missing",
        expected=TOOLKIT,
        remedy="pip install nvidia-cuda-runtime==13.0.96, or install the CUDA toolkit 13",
    )


def driver_symbols(library: Path) -> list[str]:
    """The functions of the driver that a library calls."""
    with library.open("rb") as stream:
        symbols: Any = ELFFile(stream).get_section_by_name(".dynsym")
        return sorted(
            s.name
            for s in symbols.iter_symbols()
            if s["st_shndx"] == "SHN_UNDEF" and s.name[:2] == "cu" and s.name[2:3].isupper()
        )


def _load_stub(user: Path) -> None:
    """Load a library called like the driver whose every function reports that there is no GPU."""
    compiler = next((c for c in ("cc", "gcc", "clang", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise PackageError(
            "no C compiler",
            expected="cc, gcc or clang, to build for GPUs without their driver",
            remedy="install a C++ compiler (apt-get install g++)",
        )
    names = dict.fromkeys([MARK, "cuInit", *driver_symbols(user)])
    # Loaded, it needs its file no more.
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        source, library = Path(folder) / "stub.c", Path(folder) / DRIVER
        source.write_text("".join(f"int {name}(void) {{ return {NO_DEVICE}; }}\n" for name in names))
        subprocess.run(
            [compiler, "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(library), str(source)],
            check=True,
            capture_output=True,
        )
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
