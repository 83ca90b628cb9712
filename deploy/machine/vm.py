"""TVM's virtual machine through tvm-ffi alone: libraries loaded, arrays copied, layers watched."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pages import Main
from .refusal import Refusal, sentence

Array = NDArray[Any]
CPU, CUDA = 1, 2  # DLPack's device types
_POOLED = 2
TOOLKIT = "libcudart.so.13"


def prepare(folder: Path, on_gpu: bool) -> Any:
    """Make tvm-ffi and TVM's runtime usable from a folder that `Bundle.unpack_runtime` filled; returns the module
    tvm_ffi.

    Raises Refusal when this Python or this machine cannot load them.
    """
    if "tvm_ffi" not in sys.modules:
        sys.path.insert(0, str(folder))
    return start(folder, on_gpu)


def start(folder: Path, on_gpu: bool) -> Any:
    """Load TVM's runtime libraries from a folder, and tvm-ffi from where Python finds it; returns the module tvm_ffi.

    Raises Refusal when this Python or this machine cannot load them.
    """
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # else it may start a compiler
    try:
        import tvm_ffi
    except ImportError as e:
        raise Refusal(
            f"tvm-ffi cannot be loaded by Python {sys.version.split()[0]} ({sentence(e)}): it is missing, or for"
            " another Python"
        ) from e
    tvm_ffi.registry._SKIP_UNKNOWN_OBJECTS = True
    tvm_ffi.register_global_func("hawq_tvm.no_instrument", lambda: None, override=True)
    try:
        ctypes.CDLL(str(folder / "libtvm_runtime.so"), ctypes.RTLD_GLOBAL)
        if on_gpu:
            _load_toolkit()
            ctypes.CDLL(str(folder / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / "libtvm_runtime_extra.so"), ctypes.RTLD_GLOBAL)
    except OSError as e:
        raise Refusal(f"TVM's runtime cannot be loaded: {sentence(e)}") from e
    return tvm_ffi


def _load_toolkit() -> None:
    """CUDA's runtime library: loaded already (by PyTorch), the system's, the toolkit's, or of a Python package."""
    packages = [p for root in sys.path for p in sorted(Path(root or ".").glob("nvidia/*/lib"))]
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for name in (
        TOOLKIT,
        *(str(folder / TOOLKIT) for folder in (Path(home) / "lib64", Path("/usr/local/cuda-13/lib64"), *packages)),
    ):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue
    raise Refusal(
        f"CUDA's runtime library {TOOLKIT} is missing: set CUDA_HOME to a CUDA toolkit 13, or pip install"
        " nvidia-cuda-runtime==13.0.96"
    )


class Machine:
    """A library in TVM's virtual machine, on the CPU or the first GPU.

    library: its bytes; they are loaded from a private file, because the dynamic linker knows libraries by their path.
    """

    def __init__(self, tvm_ffi: Any, library: bytes, on_gpu: bool) -> None:
        self.ffi, self.kind = tvm_ffi, CUDA if on_gpu else CPU
        self.device = tvm_ffi.device(f"{'cuda' if on_gpu else 'cpu'}:0")
        self._alloc, self._write, self._read = (
            tvm_ffi.get_global_func(f"runtime.TVMTensor{n}") for n in ("AllocWithScope", "CopyFromBytes", "CopyToBytes")
        )
        with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
            path = Path(folder) / "model.so"
            path.write_bytes(library)
            module = tvm_ffi.load_module(str(path))
        self._module = module["vm_load_executable"]()
        devices = [(self.kind, 0, _POOLED), (CPU, 0, _POOLED)][: 2 if on_gpu else 1]
        self._module["vm_initialization"](*(i for d in devices for i in d))
        self._set_instrument = self._module["set_instrument"]
        self._main = self._module["main"] if on_gpu else Main(self._module["main"], self._set_instrument)

    def tensor(self, array: Array) -> Any:
        """A copy of an array where the library runs."""
        array = np.asarray(array, order="C")
        made = self._alloc(self.ffi.Shape(list(array.shape)), self.ffi.dtype(str(array.dtype)), self.device, None)
        self._write(made, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return made

    def numpy(self, tensor: Any) -> Array:
        """A copy of a tensor for NumPy."""
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._read(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def main(self, *tensors: Any) -> Any:
        """Start one inference; on a GPU it may not have ended when this returns."""
        return self._main(*tensors)

    def finished(self, *tensors: Any) -> None:
        """One inference, ended when this returns: the copy of its first result waits for a GPU."""
        result = self._main(*tensors)
        if self.kind == CUDA:
            self.numpy(result[0])

    def watch(self, observe: Callable[..., Any], *tensors: Any) -> None:
        """One inference, every call of which `observe(function, symbol, before, result, *arguments)` sees."""
        self._set_instrument(observe)
        try:
            self._module["main"](*tensors)
        finally:
            self._set_instrument("hawq_tvm.no_instrument")
