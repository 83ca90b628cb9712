"""CUDA source to machine code for several architectures, by nvcc; and what its assembler says of every kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import tvm
import tvm_ffi

from .. import processes
from ..errors import HawqError, PackageError, UsageError
from . import runtime

# The border computes in float32 and must round every operation, as the CPU does: no fused multiply-add.
OPTIONS = ("--fatbin", "-O3", "-std=c++17", "-fmad=false", "--ptxas-options=-v,--register-usage-level=10", "-w")
# Every GPU of capability 9.0 has the instructions that nvcc only allows in code for "sm_90a" (wgmma, setmaxnreg).
EXACT = {"sm_90": "a"}
_CALLBACK = "tvm_callback_cuda_compile"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture: registers of a thread, bytes spilled, shared memory of a block in bytes.

    stack: bytes of a thread in memory, where nvcc keeps arrays that it cannot keep in registers; not counted as spilled.
    """

    arch: str
    kernel: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    stack: int = 0

    def __str__(self) -> str:
        return f"{self.arch} {self.kernel}: {self.registers} registers, spills {self.spill_stores} + {self.spill_loads} bytes, stack {self.stack} bytes, shared {self.shared} bytes"


@dataclass
class Job:
    """One compilation: for which architectures, what goes before the kernels, and what was found out about them."""

    architectures: Sequence[str]
    prelude: str
    usage: list[Usage] = field(default_factory=list)
    error: HawqError | None = None


_job: ContextVar[Job | None] = ContextVar("job", default=None)


def find() -> Path:
    """nvcc: of CUDA_HOME, of PATH, or in its usual place.

    Raises UsageError when there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places = [Path(home) / "bin" / "nvcc", *(Path(p) for p in [shutil.which("nvcc")] if p)]
    for path in places if "CUDA_HOME" in os.environ else reversed(places):
        if os.access(path, os.X_OK):
            return path
    raise UsageError(
        "compiling for CUDA needs nvcc", where="--target", found="none on PATH, in CUDA_HOME or in /usr/local/cuda",
        remedy="install the CUDA toolkit 13 (a GPU and its driver are not needed), or compile for a CPU",
    )  # fmt: skip


@cache
def release(nvcc: Path) -> str:
    """The toolkit's version as MAJOR.MINOR."""
    text = _run([str(nvcc), "--version"])
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise UsageError("nvcc does not say its version", where=str(nvcc), found=text.strip().splitlines()[-1] if text.strip() else "nothing")
    return found[1]


def check(architectures: Sequence[str]) -> None:
    """Refuse what this machine cannot compile, before the work.

    Raises UsageError when nvcc is missing, or too old or too new for an architecture.
    """
    nvcc = find()
    known = set(_run([str(nvcc), "--list-gpu-code"]).split())
    missing = [a for a in architectures if a not in known]
    if missing:
        raise UsageError(
            f"nvcc {release(nvcc)} does not know this architecture", where=str(nvcc), found=", ".join(missing), remedy="install the CUDA toolkit 13",
        )  # fmt: skip


@contextmanager
def compiling(architectures: Sequence[str], prelude: str = "") -> Iterator[Job]:
    """While this lasts, TVM's CUDA source is compiled for `architectures`, without a GPU and its driver.

    prelude: source that goes before the kernels: functions that they call by name.
    Raises UsageError when nvcc is missing, PackageError when it refuses the source.
    """
    check(architectures)
    runtime.load(_library_folders(find()))
    job = Job(architectures, prelude)
    token = _job.set(job)
    previous = tvm_ffi.get_global_func(_CALLBACK)
    tvm_ffi.register_global_func(_CALLBACK, _callback, override=True)
    try:
        yield job
    except Exception:
        if job.error is not None:
            raise job.error from None
        raise
    finally:
        tvm_ffi.register_global_func(_CALLBACK, previous, override=True)
        _job.reset(token)


def _library_folders(nvcc: Path) -> list[Path]:
    """Where the toolkit of an nvcc, perhaps a script that calls another, keeps its libraries."""
    found = re.search(r"^#\$ TOP=(.*)$", _run([str(nvcc), "--dryrun", "-x", "cu", "/dev/null"]), re.MULTILINE)
    top = Path(found[1]) if found else nvcc.resolve().parent.parent
    return [top / "lib64", top / "lib", top / "targets" / "x86_64-linux" / "lib"]


def _callback(code: str) -> bytes:
    job = _job.get()
    assert job is not None
    try:
        binary, log = fatbin(job.prelude + _guarded(code), job.architectures)
    except HawqError as e:  # TVM makes another error of it
        job.error = e
        raise
    job.usage += parse_usage(log)
    return binary


def source(module: tvm.IRModule, target: tvm.target.Target) -> str:
    """The CUDA source that TVM writes for a module of device functions; nothing is compiled."""
    previous = tvm_ffi.get_global_func(_CALLBACK)
    tvm_ffi.register_global_func(_CALLBACK, lambda code: b"", override=True)
    try:
        return _guarded(str(tvm.get_global_func("target.build.cuda")(module, target).inspect_source()))
    finally:
        tvm_ffi.register_global_func(_CALLBACK, previous, override=True)


def cubin_options(arch: str) -> list[str]:
    """nvcc's options that make machine code for one architecture as `fatbin` makes it for several."""
    return ["--cubin", *OPTIONS[1:], f"-arch={arch}{EXACT.get(arch, '')}"]


# What TVM writes around asynchronous copies; sm_75, whose copies are not, refuses it.
_ASYNCHRONOUS = re.compile(r'asm volatile\("cp\.async\.(?:commit_group|wait_group \d+);"[^;]*\);')


def _guarded(code: str) -> str:
    return _ASYNCHRONOUS.sub(lambda m: f"\n#if __CUDA_ARCH__ >= 800\n{m[0]}\n#endif\n", code)


def fatbin(code: str, architectures: Sequence[str]) -> tuple[bytes, str]:
    """Machine code of CUDA source for every architecture, and what the assembler said.

    Raises PackageError with nvcc's first error.
    """
    exact = [a + EXACT.get(a, "") for a in architectures]
    codes = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in exact]
    with tempfile.TemporaryDirectory(prefix="hawq_tvm_") as folder:
        # Bare names in a folder of our own: nvcc writes what it is given into its output.
        (Path(folder) / "kernels.cu").write_text(code)
        command = [str(find()), *OPTIONS, "--threads=0", *codes, "-o", "kernels.fatbin", "kernels.cu"]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            keep = _keep(code)
            raise PackageError("nvcc refuses the kernels", where=keep, **processes.failure(done, "report it with this file", ("error",)))
        return (Path(folder) / "kernels.fatbin").read_bytes(), done.stdout


def _keep(code: str) -> str:
    """Where the refused source is kept, for whoever looks into it."""
    descriptor, name = tempfile.mkstemp(prefix="hawq_tvm_refused_", suffix=".cu")
    with os.fdopen(descriptor, "w") as stream:
        stream.write(code)
    return name


_ENTRY = re.compile(r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>sm_\d+)a?'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def parse_usage(log: str) -> list[Usage]:
    """The usage of every kernel that the assembler reported, by kernel and architecture."""
    found: list[Usage] = []
    kernel = arch = ""
    stack = stores = loads = 0
    for line in log.splitlines():
        if m := _ENTRY.search(line):
            kernel, arch = m["kernel"], m["arch"]
        elif m := _SPILLS.search(line):
            stack, stores, loads = (int(n) for n in m.groups())
        elif m := _REGISTERS.search(line):
            found.append(Usage(arch, kernel, int(m[1]), stores, loads, int(m[2] or 0), stack))
    return sorted(found, key=lambda u: (u.kernel, u.arch))


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True)
    except OSError as e:
        raise UsageError("cannot be run", where=command[0], found=e.strerror or str(e)) from e
    return done.stdout + done.stderr
