"""NVIDIA's driver by ctypes, as far as timing kernels needs it. Part of an exported tuning run: nothing but Python
is imported.

Names, signatures and numbers are those of cuda.h (CUDA driver API).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

LIBRARY = "libcuda.so.1"
NO_DEVICE, OUT_OF_MEMORY = 100, 2
FOREIGN_CODE = (200, 209, 218, 222)  # invalid image, no binary for this GPU, invalid or unsupported PTX
BROKEN_CONTEXT = (700, 702, 709, 714, 715, 716, 717, 718, 719, 999)  # after these every call fails
_MAJOR, _MINOR, _L2 = 75, 76, 38  # CU_DEVICE_ATTRIBUTE_*
_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_OUT = c_void_p  # a pointer to what the call fills in, passed by byref
SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [_OUT],
    "cuDeviceGetCount": [_OUT],
    "cuDeviceGet": [_OUT, c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceGetAttribute": [_OUT, c_int, c_int],
    "cuGetErrorString": [c_int, _OUT],
    "cuDevicePrimaryCtxRetain": [_OUT, c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuMemGetInfo_v2": [_OUT, _OUT],
    "cuMemAlloc_v2": [_OUT, c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuMemcpyHtoD_v2": [c_uint64, c_void_p, c_size_t],
    "cuMemcpyDtoH_v2": [c_void_p, c_uint64, c_size_t],
    "cuMemcpyDtoD_v2": [c_uint64, c_uint64, c_size_t],
    "cuMemsetD8_v2": [c_uint64, c_ubyte, c_size_t],
    "cuMemsetD8Async": [c_uint64, c_ubyte, c_size_t, c_void_p],
    "cuModuleLoadData": [_OUT, c_char_p],
    "cuModuleUnload": [c_void_p],
    "cuModuleGetFunction": [_OUT, c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p],
    "cuStreamCreate": [_OUT, c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, _OUT],
    "cuGraphInstantiateWithFlags": [_OUT, c_void_p, c_uint64],
    "cuGraphDestroy": [c_void_p],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphExecDestroy": [c_void_p],
    "cuEventCreate": [_OUT, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventElapsedTime": [_OUT, c_void_p, c_void_p],
}


class CannotRun(Exception):
    """This machine cannot do what is asked: one sentence."""


class CudaError(Exception):
    """A call that failed; code: CUDA's number."""

    def __init__(self, call: str, code: int, text: str) -> None:
        self.call, self.code = call, code
        super().__init__(f"{call}: {text} (CUDA error {code})")


class Gpu:
    """The first GPU of this machine, with its primary context and one stream.

    Raises CannotRun when there is no driver or no GPU.
    """

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL(LIBRARY)
        except OSError:
            raise CannotRun(f"no NVIDIA driver is installed here ({LIBRARY} is not found)") from None
        for name, arguments in SIGNATURES.items():
            function = getattr(self.library, name, None)
            if function is None:
                raise CannotRun(f"the NVIDIA driver is too old: it has no {name}")
            function.argtypes, function.restype = arguments, c_int
        try:
            self.call("cuInit", 0)
            count = self.made("cuDeviceGetCount", kind=c_int)
        except CudaError as e:
            if e.code != NO_DEVICE:
                raise CannotRun(f"the NVIDIA driver does not start: {e}; see what nvidia-smi says") from None
            count = 0
        if not count:
            raise CannotRun(
                "the NVIDIA driver finds no GPU; make one visible (nvidia-smi, CUDA_VISIBLE_DEVICES, docker run --gpus"
                " all)"
            )
        self.device = self.made("cuDeviceGet", 0, kind=c_int)
        text = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", text, len(text), self.device)
        self.name = text.value.decode(errors="replace")
        self.driver = self.made("cuDriverGetVersion", kind=c_int)
        self.capability = 10 * self.attribute(_MAJOR) + self.attribute(_MINOR)
        self.l2 = self.attribute(_L2)

    def begin(self) -> None:
        """Make the context and the stream that everything below uses."""
        self.call("cuCtxSetCurrent", self.made("cuDevicePrimaryCtxRetain", self.device))
        self.stream = self.made("cuStreamCreate", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver.

        Raises CudaError.
        """
        code = getattr(self.library, name)(*arguments)
        if code:
            text = c_char_p()
            self.library.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(name, code, (text.value or b"unknown error").decode(errors="replace"))

    def made(self, name: str, *arguments: Any, kind: Any = c_void_p) -> Any:
        """What a call fills its first argument in with."""
        value = kind()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def attribute(self, number: int) -> int:
        """An attribute of the device."""
        value = c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def free_bytes(self) -> int:
        """Memory that is free."""
        free, total = c_size_t(), c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """The address of new memory."""
        return int(self.made("cuMemAlloc_v2", max(1, size), kind=c_uint64))

    def function(self, module: int, name: str, shared: int) -> int:
        """A kernel of a module, allowed so much dynamic shared memory."""
        function = int(self.made("cuModuleGetFunction", module, name.encode()))
        self.call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, shared)
        return function

    def launch(self, function: int, grid: list[int], block: list[int], shared: int, addresses: list[int]) -> None:
        """Launch a kernel whose arguments are addresses."""
        values = [c_uint64(a) for a in addresses]
        pointers = (c_void_p * len(values))(*(ctypes.cast(ctypes.byref(v), c_void_p) for v in values))
        self.call("cuLaunchKernel", function, *grid, *block, shared, self.stream, pointers, None)

    def begin_capture(self) -> None:
        """From now on launches are noted, not done."""
        self.call("cuStreamBeginCapture_v2", self.stream, 0)

    def end_capture(self) -> int:
        """The graph of the noted launches, ready to be launched."""
        graph = c_void_p()
        self.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        try:
            return int(self.made("cuGraphInstantiateWithFlags", graph, 0))
        finally:
            self.call("cuGraphDestroy", graph)

    def seconds(self, graph: int, before: Any, events: tuple[int, int]) -> float:
        """The time of a graph, by two events; before: called first, its work in the stream is not timed."""
        before()
        self.call("cuEventRecord", events[0], self.stream)
        self.call("cuGraphLaunch", graph, self.stream)
        self.call("cuEventRecord", events[1], self.stream)
        self.call("cuEventSynchronize", events[1])
        return float(self.made("cuEventElapsedTime", *events, kind=c_float)) / 1e3
