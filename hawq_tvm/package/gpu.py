"""What a machine must have to run a CUDA package: a driver, a GPU of a fitting architecture, enough of its memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm

from hawq_tvm.compiler.cuda import runtime
from hawq_tvm.core.errors import PackageError
from hawq_tvm.targets.gpu import number, runs_on

NO_DEVICE = runtime.NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """The first GPU: its name, its compute capability times ten, and the CUDA version of its driver (13010 is 13.1)."""

    name: str
    capability: int
    driver: int


def first(where: str) -> Gpu:
    """The first GPU of this machine.

    Raises PackageError when there is no driver, no GPU, or the driver fails.
    """
    driver = runtime.driver()
    if driver is None:
        raise PackageError(
            "needs a GPU, and no NVIDIA driver is installed here",
            where=where,
            expected=runtime.DRIVER,
            remedy="run it on a machine with an NVIDIA GPU, or compile for this one with --target host",
        )
    code = int(driver.cuInit(0))
    count = ctypes.c_int(0)
    if code == 0:
        code = int(driver.cuDeviceGetCount(ctypes.byref(count)))
    if code == NO_DEVICE or (code == 0 and count.value == 0):
        raise PackageError(
            "needs a GPU, and the NVIDIA driver finds none",
            where=where,
            remedy="make one visible (nvidia-smi, CUDA_VISIBLE_DEVICES, docker run --gpus all)",
        )
    if code:
        raise PackageError(
            "the NVIDIA driver does not start",
            where=where,
            found=f"CUDA error {code}",
            remedy="see what nvidia-smi says",
        )
    version, device = ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(128)
    values = [ctypes.c_int(0), ctypes.c_int(0)]
    codes = [
        driver.cuDriverGetVersion(ctypes.byref(version)),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, len(name), device),
        *(driver.cuDeviceGetAttribute(ctypes.byref(v), which, device) for v, which in zip(values, (_MAJOR, _MINOR))),
    ]
    if any(codes):
        raise PackageError(
            "the NVIDIA driver does not answer",
            where=where,
            found=f"CUDA error {max(codes)}",
            remedy="see what nvidia-smi says",
        )
    return Gpu(name.value.decode(errors="replace"), 10 * values[0].value + values[1].value, version.value)


def check(gpu: Gpu, architectures: Sequence[str], toolkit: str, where: str) -> None:
    """Refuse a GPU that the code was not made for, or a driver older than the code's toolkit.

    toolkit: MAJOR.MINOR.  Machine code runs with any driver of its toolkit's major version or a later one.
    Raises PackageError.
    """
    if gpu.driver // 1000 < int(toolkit.split(".")[0]):
        raise PackageError(
            "needs a newer NVIDIA driver",
            where=where,
            expected=f"one for CUDA {toolkit.split('.')[0]}.0 or newer",
            found=f"one for CUDA {gpu.driver // 1000}.{gpu.driver % 1000 // 10}",
            remedy="update the driver, or compile with an older CUDA toolkit",
        )
    if any(runs_on(a, gpu.capability) for a in architectures):
        return
    older = all(number(a) > gpu.capability for a in architectures)
    raise PackageError(
        f"the GPU is {'older' if older else 'of another generation'} than the package's code",
        where=where,
        expected=", ".join(architectures),
        found=f"{gpu.name}, sm_{gpu.capability}",
        remedy="compile with --target cuda, or with the target of this GPU if there is one",
    )


def ready(architectures: Sequence[str], toolkit: str, where: str) -> None:
    """Check the first GPU for a package, and load TVM's CUDA runtime.

    Raises PackageError as `first` and `check` do.
    """
    check(first(where), architectures, toolkit, where)
    runtime.load()


@contextmanager
def one_sentence(where: str) -> Iterator[None]:
    """Turn what TVM says about the GPU's memory or a failing kernel into a PackageError; anything else passes."""
    try:
        yield
    except PackageError:
        raise
    except (RuntimeError, tvm.error.InternalError) as e:
        text = str(e)
        if "out of memory" in text.lower():
            raise PackageError(
                "the GPU's memory is full",
                where=where,
                remedy="use a smaller batch, or end other programs that use this GPU (nvidia-smi)",
            ) from e
        if "CUDA" in text:
            lines: list[Any] = [line.strip() for line in text.splitlines() if "CUDA" in line]
            raise PackageError(
                "the GPU failed", where=where, found=lines[-1], remedy="see what nvidia-smi says, and run it again"
            ) from e
        raise
