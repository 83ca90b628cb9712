"""CUDA source executed on the CPU: what TVM generates for a kernel, compiled by g++ with the instructions of
`emulator/`.

The text is the one that nvcc would get, for one architecture: what is tested are its indices, the fragments that
lanes hold, its copies, waits and barriers, and its stores. `emulator/emulator.cpp` lists what it refuses.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import codegen_build, split_host_device_mods

from hawq_tvm.compiler.cuda import nvcc
from hawq_tvm.targets import gpu as cuda
from schedules.spelling.cuda_prelude import PRELUDE

from .ptx import translate

Array = np.ndarray[Any, Any]
GXX = shutil.which("g++")
needs_gxx = pytest.mark.skipif(GXX is None, reason="g++ is missing: CUDA source is executed on the CPU through it")
ARCHITECTURES = (750, 800, 890, 900)
HERE = Path(__file__).parent / "emulator"
OPTIONS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-w")
# Calls before every load and store, and where a pointer is not aligned.
WATCHED = (
    "-fsanitize=thread",
    "-fsanitize=alignment",
    "--param",
    "tsan-instrument-func-entry-exit=0",
    "-fno-tree-loop-distribute-patterns",
)
GUARD = 1 << 16
BEFORE = -1  # written by an earlier kernel: everybody may read it
BYTES = {
    "signed char": 1,
    "uchar": 1,
    "short": 2,
    "ushort": 2,
    "int": 4,
    "uint": 4,
    "float": 4,
    "int64_t": 8,
    "uint64_t": 8,
}
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?[\w ]+?\s(\w+)\[\];")
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\(\d+\)\s+)?(\w+)\s*\(")
_STATIC = re.compile(r"(?<!extern )__shared__\s+alignas\(\d+\)\s+([\w ]+?)\s+(\w+)\[(\d+)\];")
_folder = tempfile.TemporaryDirectory(prefix="hawq_tvm_emulated_")


class EmulationError(AssertionError):
    """What a GPU would not do, or not reliably; the lines are those of the CUDA source."""


@dataclass(frozen=True)
class Launch:
    """One kernel of a source: its arguments' names, and its launch configuration."""

    name: str
    arguments: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int


@dataclass(frozen=True)
class Counts:
    """products: mma instructions.  conflicts: rows that ldmatrix reads from a bank that it already reads from.
    barriers: passed by a block.
    """

    products: int
    conflicts: int
    barriers: int


class _Array(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("is_result", ctypes.c_int32),
        ("writers", ctypes.c_void_p),
    )


class _Result(ctypes.Structure):
    _fields_ = (("error", ctypes.c_char * 1024), *((n, ctypes.c_int64) for n in ("products", "conflicts", "barriers")))


@cache
def _emulator() -> Path:
    made = Path(_folder.name) / "emulator.o"
    subprocess.run(
        [str(GXX), "-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-c", "-o", made, HERE / "emulator.cpp"],
        check=True,
    )
    return made


@cache
def _library(source: str, arch: int) -> tuple[ctypes.CDLL, Path, int]:
    """A source compiled for an architecture, where it lies, and its bytes of static shared memory."""
    path = Path(_folder.name) / hashlib.sha256(f"{arch} {source}".encode()).hexdigest()[:24]
    cuda_file, cpp, o, so = (path.with_suffix(s) for s in (".cu", ".cpp", ".o", ".so"))
    arrays: list[int] = []

    def behind(m: re.Match[str]) -> str:
        offset = sum(arrays)
        arrays.append(-(-int(m[3]) * BYTES[m[1]] // 64) * 64)
        return f"{m[1]} (&{m[2]})[{m[3]}] = *reinterpret_cast<{m[1]} (*)[{m[3]}]>(hawq_static + {offset});"

    cuda_file.write_text(_STATIC.sub(behind, source))
    # All kernels share the emulator's shared memory.
    defined = {"__CUDA_ARCH__": str(arch), "__CUDACC__": "1", **dict.fromkeys(_DYNAMIC.findall(source), "hawq_shared")}
    command = [
        str(GXX),
        "-x",
        "c++",
        "-E",
        "-std=c++17",
        *(f"-D{k}={v}" for k, v in defined.items()),
        "-I",
        str(HERE),
        "-include",
        "cuda_on_cpu.h",
    ]
    text = translate(_run([*command, cuda_file.name]))
    entries = [
        f'extern "C" void hawq_invoke_{k}(void** args) {{ ::hawq_emulated::invoke({k}, args); }}'
        for k in sorted(set(_KERNEL.findall(source)))
    ]
    cpp.write_text("\n".join([text, *entries, ""]))
    _run([str(GXX), *OPTIONS, *WATCHED, "-fpreprocessed", "-c", "-o", o.name, cpp.name])
    _run([str(GXX), "-shared", "-o", so.name, o.name, str(_emulator()), "-ldl"])
    return ctypes.CDLL(str(so)), so, sum(arrays)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=_folder.name, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError("\n".join([" ".join(command), *errors[:8]]))
    return done.stdout


def launch(
    source: str, launches: Launch | Sequence[Launch], arrays: Mapping[str, Array], results: Sequence[str], arch: int
) -> Counts:
    """Execute kernels one after the other; `arrays` by the names of their arguments, of which `results` are written,
    every byte of them.

    Raises EmulationError.
    """
    library, path, static = _library(source, arch)
    kept = {n: _aligned(a) for n, a in arrays.items()}
    writers = {n: np.zeros(a.nbytes, np.int32) for n, a in kept.items() if n in results}
    counts = np.zeros(3, np.int64)
    for config in [launches] if isinstance(launches, Launch) else launches:
        given = (_Array * len(config.arguments))()
        for slot, n in zip(given, config.arguments, strict=True):
            slot.begin, slot.size, slot.is_result = kept[n].ctypes.data, kept[n].nbytes, n in writers
            slot.writers = writers[n].ctypes.data if n in writers else None
        pointers = (ctypes.c_void_p * len(given))(*(g.begin for g in given))
        dims, result = (ctypes.c_uint * 6)(*config.grid, *config.block), _Result()
        entry = ctypes.cast(getattr(library, f"hawq_invoke_{config.name}"), ctypes.c_void_p)
        if library.hawq_launch(entry, pointers, given, len(given), dims, config.shared, static, ctypes.byref(result)):
            raise EmulationError(_with_lines(result.error.decode(), path))
        for w in writers.values():
            w[w != 0] = BEFORE
        counts += result.products, result.conflicts, result.barriers
    for n, w in writers.items():
        if not w.all():
            raise EmulationError(
                f"nobody writes byte {int(np.argmin(w != 0))} of {n}, nor {int((w == 0).sum()) - 1} others"
            )
        arrays[n][...] = kept[n]
    return Counts(*(int(c) for c in counts))


def _aligned(a: Array) -> Array:
    """A copy that begins where CUDA's allocations do, far from others."""
    memory: Array = np.empty(a.nbytes + 2 * GUARD, np.uint8)
    memory = memory[GUARD - memory.ctypes.data % GUARD :][: a.nbytes]
    memory[:] = np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)
    return memory.view(a.dtype).reshape(a.shape)


def _with_lines(message: str, path: Path) -> str:
    """A message with offsets into a library as lines of its source."""
    tool = shutil.which("addr2line")

    def line(m: re.Match[str]) -> str:
        # Of the innermost function, and of where the kernel calls it.
        found = subprocess.run([str(tool), "-i", "-e", str(path), m[1]], capture_output=True, text=True).stdout.split(
            "\n"
        )[:-1]
        numbers = [f.rpartition(":")[2].split(" ")[0] for f in found]
        return f"(line {' from line '.join(dict.fromkeys([numbers[0], numbers[-1]]))})"

    return re.sub(r"@([0-9a-f]+)", line, message) if tool else message


@dataclass(frozen=True)
class Generated:
    """What TVM makes of a function: CUDA source with the prelude before it, its kernels in the order of their
    launches, and all their arrays.
    """

    source: str
    launches: tuple[Launch, ...]
    arrays: Mapping[str, tuple[tuple[int, ...], str]]


def generate(func: tirx.PrimFunc, target: tvm.target.Target) -> Generated:
    """The source of a scheduled function as our builds make it, without nvcc."""
    return generate_all({"main": func}, target)["main"]


def generate_all(funcs: Mapping[str, tirx.PrimFunc], target: tvm.target.Target) -> dict[str, Generated]:
    """One source of several scheduled functions, by name."""
    nvcc_callback = tvm_ffi.get_global_func("tvm_callback_cuda_compile", allow_missing=True)
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", lambda code: b"not compiled", override=True)
    try:
        with target:
            pipeline, _, finalize = tirx.get_tir_pipeline("s_tir")
            named = {n: f.with_attr("global_symbol", n) for n, f in funcs.items()}
            bound = tirx.transform.BindTarget(target)(tvm.IRModule(named))
            host, device = split_host_device_mods(pipeline(bound))
            ((kind, module),) = device.items()
            code = codegen_build(finalize()(module), kind).inspect_source()
    finally:
        if nvcc_callback is not None:
            tvm_ffi.register_global_func("tvm_callback_cuda_compile", nvcc_callback, override=True)
    source = PRELUDE + nvcc._guarded(code)
    return {gv.name_hint: _generated(f, source) for gv, f in host.functions.items() if gv.name_hint in funcs}


def _generated(func: tirx.PrimFunc, source: str) -> Generated:
    found: list[Launch] = []
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}

    def visit(call: tvm.ir.Call) -> Any:
        if str(getattr(call.op, "name", "")) == "tirx.call_ffi_kernel":
            buffers = [a.args[0] for a in call.args if isinstance(a, tvm.ir.Call)]
            arrays.update({str(b.name): (tuple(int(n) for n in b.ty.shape), str(b.ty.dtype)) for b in buffers})
            found.append(_launch(call, buffers))
        return call

    tvm_ffi.structural_map(func, [(tvm.ir.Call, visit)])
    return Generated(source, tuple(found), arrays)


def _launch(call: tvm.ir.Call, buffers: Sequence[tirx.Var]) -> Launch:
    tags = [str(t) for t in call.attrs.launch_params]
    values = dict(zip(tags, (int(v) for v in call.args[1 + len(buffers) :]), strict=True))
    gx, gy, gz, bx, by, bz = (values.pop(f"{kind}.{d}", 1) for kind in ("blockIdx", "threadIdx") for d in "xyz")
    shared = values.pop("tirx.use_dyn_shared_memory", 0)
    assert not values, f"not understood: {values}"
    return Launch(str(call.args[0].value), tuple(str(b.name) for b in buffers), (gx, gy, gz), (bx, by, bz), shared)


def run(
    func: tirx.PrimFunc,
    inputs: Sequence[Array],
    results: Sequence[Array],
    arch: int,
    target: tvm.target.Target | None = None,
) -> Counts:
    """Execute a function, its parameters being `inputs` and then `results`, which are filled.

    Raises EmulationError.
    """
    return execute(generate(func, target or cuda.make([f"sm_{arch // 10}"])), func, inputs, results, arch)


def execute(
    generated: Generated, func: tirx.PrimFunc, inputs: Sequence[Array], results: Sequence[Array], arch: int
) -> Counts:
    """As `run`, of a function whose source is there."""
    names = [str(p.name) for p in func.params]
    arrays = dict(zip(names, [*inputs, *results], strict=True))
    between = {n: np.zeros(shape, dtype) for n, (shape, dtype) in generated.arrays.items() if n not in arrays}
    return launch(generated.source, generated.launches, {**arrays, **between}, [*names[len(inputs) :], *between], arch)
