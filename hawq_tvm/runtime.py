"""Packages without the compiler: load, run and time them with NumPy, tvm-ffi and TVM's runtime libraries alone.

    from hawq_tvm import runtime
    model = runtime.load("model.hawq")
    outputs = model.run({"input": x})

Neither `tvm` nor ONNX is imported; deploy/README.md says how to install what is left.  `verify` and `prove` need the compiler's `hawq_tvm.load`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import arrays, cpu, forks
from .errors import PackageError
from .interface import Interface, Quantization, TensorSpec, one_sentence

if TYPE_CHECKING:
    from .bench.measure import BenchReport

__all__ = ["Model", "Quantization", "TensorSpec", "load"]
Array = NDArray[Any]
INSTALL = "bash deploy/environment.sh VENV runtime, or pip install hawq-tvm"


def load(path: str | Path, *, public_key: str | Path | None = None) -> Model:
    """Open a package, a folder or a single file, stripped or not.

    public_key: a file of minisign's; the package must be signed with its secret key.
    Raises PackageError when it is damaged, of another version, not signed so, or made for another machine; no code is loaded before that.
    """
    from deploy import signature

    manifest, files = signature.read_files(Path(path), public_key)
    return Model(manifest, files["model.so"], str(path))


class Model(Interface):
    """A loaded package; made by `load`.  Thread-safe: one run at a time, others wait.

    manifest: what manifest.json holds.
    """

    def __init__(self, manifest: dict[str, Any], library: bytes, where: str) -> None:
        self.manifest, self._where, self._lock, self._loaded_by = manifest, where, forks.RunLock(), os.getpid()
        target = manifest["target"]
        cpu.check_host(target["architecture"], target["cpu_features"], where)
        self._on_gpu = target["kind"] == "cuda"
        self._machine = self._start(library, where)

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {self._sides()}>"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One inference: outputs by name, sub-byte outputs as int8 or uint8.

        Raises InputError for inputs of other names, types, shapes, out of range, or NaN.
        """
        ready = arrays.checked(inputs, self.inputs, self.name)
        return self._lock.run(partial(self._run, ready))

    def _run(self, ready: Mapping[str, Array]) -> dict[str, Array]:
        with one_sentence(self.name):
            return self._named([self._machine.numpy(value) for value in self._machine.main(*self._tensors(ready))])

    def bench(
        self, inputs: Mapping[str, Array] | None = None, *, warmup_ms: float = 200, duration: float = 3, iterations: int = 10,
        threads: int | None = None,
    ) -> BenchReport:  # fmt: skip
        """Time inferences of random (or given) inputs; see `BenchReport`."""
        from .bench.measure import measure

        rng = np.random.default_rng(0)
        specs = self.inputs
        ready = {i.name: arrays.random(rng, i) for i in specs} if inputs is None else arrays.checked(inputs, specs, self.name)
        with self._lock:
            tensors = self._tensors(ready)
            return measure(lambda: self._machine.finished(*tensors), self.name, warmup_ms=warmup_ms, duration=duration, iterations=iterations, threads=threads)

    def _tensors(self, ready: Mapping[str, Array]) -> list[Any]:
        if self._on_gpu:
            forks.check_gpu(self._loaded_by, self._where)
        return [self._machine.tensor(ready[i.name]) for i in self.inputs]

    def _start(self, library: bytes, where: str) -> Any:
        """The library in TVM's virtual machine.

        Raises PackageError when TVM's runtime is missing or of another version, the GPU does not fit, or the library cannot be loaded.
        """
        from deploy.gpu_runner import driver, vm
        from deploy.gpu_runner.refusal import Refusal

        from .bench import measure  # first: it tells TVM's thread pool how many processors there are

        del measure
        try:
            if self._on_gpu:
                driver.check(driver.Driver().gpu, self.manifest["target"]["architectures"], self.manifest["producer"]["cuda"])
            tvm_ffi = vm.start(tvm_folder() / "lib", self._on_gpu)
            self.check_tvm(tvm_version(), str(tvm_ffi.__version__), where)
            return vm.Machine(tvm_ffi, library, self._on_gpu)
        except Refusal as e:
            raise PackageError("cannot be run here", where=where, found=str(e)) from e
        except RuntimeError as e:
            raise PackageError(
                "the library cannot be loaded", where=where, found=str(e).splitlines()[0],
                remedy="set TMPDIR to a folder from which programs may run, or compile again",
            ) from e  # fmt: skip


def tvm_folder() -> Path:
    """Where TVM's files are installed, found without importing it.

    Raises PackageError when they are nowhere.
    """
    spec = find_spec("tvm")
    for place in spec.submodule_search_locations or () if spec else ():
        if (Path(place) / "lib" / "libtvm_runtime.so").is_file():
            return Path(place)
    raise PackageError("TVM's runtime libraries are not installed", expected="tvm/lib/libtvm_runtime.so among Python's packages", remedy=INSTALL)


def tvm_version() -> str:
    """The version of TVM that is installed, read without importing it.

    Raises PackageError when there is none.
    """
    path = tvm_folder() / "_version.py"
    found = re.search(r"^__version__ = (?:version = )?'([^']+)'", path.read_text(), re.MULTILINE) if path.is_file() else None
    if found is None:
        raise PackageError("TVM's version is not known", expected=f"a version in {path}", remedy=INSTALL)
    return found.group(1)
