"""The NVIDIA driver through ctypes: which GPU is there, and streams, events and graphs to time with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .refusal import Refusal

LIBRARY = "libcuda.so.1"
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
STUB = "hawq_tvm_is_no_driver"  # of the library that stands for the driver where kernels are only compiled
_L2, _MAJOR, _MINOR, _PROCESSORS = 38, 75, 76, 16  # CU_DEVICE_ATTRIBUTE_*
_NON_BLOCKING, _RELAXED = 1, 2  # CU_STREAM_NON_BLOCKING, CU_STREAM_CAPTURE_MODE_RELAXED


@dataclass(frozen=True)
class Gpu:
    """The first GPU; driver: the CUDA version that it supports, 13010 is 13.1.  l2: bytes of its second-level cache."""

    name: str
    capability: int
    driver: int
    l2: int
    processors: int


def library() -> Any:
    """The driver's library.

    Raises Refusal when there is none.
    """
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError:
        found = None
    if found is None or hasattr(found, STUB):
        raise Refusal("no NVIDIA driver is installed here: run it on a machine with an NVIDIA GPU")
    return found


class Driver:
    """The driver with the first GPU's context current in this thread.

    Raises Refusal when the driver finds no GPU or does not start.
    """

    def __init__(self, functions: Any = None) -> None:
        self._functions = library() if functions is None else functions
        code = int(self._functions.cuInit(0))
        count = ctypes.c_int(0)
        if code == 0:
            code = int(self._functions.cuDeviceGetCount(ctypes.byref(count)))
        if code == NO_DEVICE or (code == 0 and count.value == 0):
            raise Refusal(
                "the NVIDIA driver finds no GPU: make one visible (nvidia-smi, CUDA_VISIBLE_DEVICES, docker run --gpus"
                " all)"
            )
        if code:
            raise Refusal(f"the NVIDIA driver does not start (CUDA error {code}): see what nvidia-smi says")
        device = ctypes.c_int(0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self._device = device
        self.gpu = self._describe()
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises Refusal with the function's name when it fails.
        """
        code = int(getattr(self._functions, name)(*arguments))
        if code:
            raise Refusal(
                "the GPU's memory is full" if code == 2 else f"the driver's {name} fails with CUDA error {code}"
            )

    def _describe(self) -> Gpu:
        version, name = ctypes.c_int(0), ctypes.create_string_buffer(128)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.call("cuDeviceGetName", name, len(name), self._device)
        values = [ctypes.c_int(0) for _ in range(4)]
        for value, which in zip(values, (_MAJOR, _MINOR, _L2, _PROCESSORS)):
            self.call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        major, minor, l2, processors = (v.value for v in values)
        return Gpu(name.value.decode(errors="replace"), 10 * major + minor, version.value, l2, processors)

    def stream(self) -> Stream:
        """A new stream, which waits for no other."""
        return Stream(self)


class Stream:
    """A stream of the first GPU; `handle` is its cudaStream_t as a number."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        made = ctypes.c_void_p()
        driver.call("cuStreamCreate", ctypes.byref(made), _NON_BLOCKING)
        self.handle = int(made.value or 0)

    @property
    def _own(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.handle)

    def wait(self) -> None:
        """Return when everything in the stream is done."""
        self.driver.call("cuStreamSynchronize", self._own)

    def captured(self, work: Callable[[], Any]) -> Graph:
        """What `work` starts in this stream, as a graph; it does not run.

        Raises Refusal, or what `work` raises, when it cannot be captured.
        """
        self.driver.call("cuStreamBeginCapture_v2", self._own, _RELAXED)
        graph = ctypes.c_void_p()
        try:
            kept = work()
        except Exception:
            # A capture that was left open would make every later call fail; its own error says nothing new.
            self.driver._functions.cuStreamEndCapture(self._own, ctypes.byref(graph))
            raise
        self.driver.call("cuStreamEndCapture", self._own, ctypes.byref(graph))
        return Graph(self, graph, kept)

    def milliseconds(self, launches: list[Callable[[], Any]]) -> list[float]:
        """The GPU's time for each of several launches into this stream, all of them queued before any is waited for."""
        events = [self._event() for _ in range(len(launches) + 1)]
        try:
            for event, launch in zip(events, launches):
                self.driver.call("cuEventRecord", event, self._own)
                launch()
            self.driver.call("cuEventRecord", events[-1], self._own)
            self.driver.call("cuEventSynchronize", events[-1])
            return [self._between(a, b) for a, b in pairwise(events)]
        finally:
            for event in events:
                self.driver.call("cuEventDestroy_v2", event)

    def _event(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.driver.call("cuEventCreate", ctypes.byref(made), 0)
        return made

    def _between(self, first: ctypes.c_void_p, second: ctypes.c_void_p) -> float:
        value = ctypes.c_float(0)
        self.driver.call("cuEventElapsedTime", ctypes.byref(value), first, second)
        return float(value.value)


class Graph:
    """A captured graph, ready to be launched; kept: what its work returned and it needs."""

    def __init__(self, stream: Stream, graph: ctypes.c_void_p, kept: Any) -> None:
        self.stream, self._kept = stream, kept
        self._executable = ctypes.c_void_p()
        stream.driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        stream.driver.call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Start it in its stream."""
        self.stream.driver.call("cuGraphLaunch", self._executable, self.stream._own)

    @property
    def kept(self) -> Any:
        """What the captured work returned: after a launch, its results."""
        return self._kept

    def close(self) -> None:
        """Give it back."""
        self.stream.driver.call("cuGraphExecDestroy", self._executable)


@contextmanager
def closing(graphs: list[Graph]) -> Iterator[None]:
    """Give graphs back at the end."""
    try:
        yield
    finally:
        for graph in graphs:
            graph.close()


def check(gpu: Gpu, architectures: list[str], toolkit: str) -> None:
    """Refuse a GPU that the libraries were not made for, or a driver older than their toolkit (MAJOR.MINOR).

    Raises Refusal.
    """
    major = int(toolkit.split(".")[0])
    if gpu.driver // 1000 < major:
        raise Refusal(
            f"the NVIDIA driver is too old: expected one for CUDA {major}.0 or newer, found one for CUDA"
            f" {gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
        )
    numbers = [int(a.removeprefix("sm_")) for a in architectures]
    if not any(n // 10 == gpu.capability // 10 and n <= gpu.capability for n in numbers):
        older = all(n > gpu.capability for n in numbers)
        kind = "older than" if older else "of another generation than"
        raise Refusal(
            f"the GPU is {kind} the libraries' code: expected {', '.join(architectures)}, found {gpu.name},"
            f" sm_{gpu.capability}"
        )


def describe(gpu: Gpu) -> Mapping[str, Any]:
    """JSON-ready fields."""
    return {
        "gpu": gpu.name,
        "capability": gpu.capability,
        "driver_cuda": f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}",
        "l2_bytes": gpu.l2,
        "multiprocessors": gpu.processors,
    }
