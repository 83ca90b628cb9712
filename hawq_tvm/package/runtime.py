"""Packages without the compiler: load, run and time them with NumPy, tvm-ffi and TVM's runtime libraries alone.

    from hawq_tvm import runtime
    model = runtime.load("model.hawq")
    outputs = model.run({"input": x})

Neither `tvm` nor ONNX is imported; deploy/README.md says how to install what is left.  `verify` and `prove` need the
compiler's `hawq_tvm.load`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core import arrays
from hawq_tvm.core.errors import PackageError
from hawq_tvm.targets import cpu
from hawq_tvm.targets.tvm_files import tvm_folder, tvm_version

from . import forks
from .interface import Interface, one_sentence
from .tail import Tail

if TYPE_CHECKING:
    from hawq_tvm.measure.measure import BenchReport

Array = NDArray[Any]


def load(path: str | Path, *, public_key: str | Path | None = None) -> Model:
    """Open a package, a folder or a single file, stripped or not.

    public_key: a file of minisign's; the package must be signed with its secret key.
    Raises PackageError when it is damaged, of another version, not signed so, or made for another machine; no code
    is loaded before that.
    """
    from deploy import signature
    from deploy.package import TAIL

    manifest, files = signature.read_files(Path(path), public_key)
    return Model(manifest, files["model.so"], str(path), files.get(TAIL))


class Model(Interface):
    """A loaded package; made by `load`.  Thread-safe: one run at a time, others wait.

    manifest: what manifest.json holds.  library: its code.  tail: the float end that was cut off, an ONNX model.
    """

    def __init__(self, manifest: dict[str, Any], library: bytes, where: str, tail: bytes | None = None) -> None:
        self.tail = Tail(tail, where) if tail is not None else None
        self.manifest, self._where, self._lock, self._loaded_by = manifest, where, forks.RunLock(), os.getpid()
        target = manifest["target"]
        cpu.check_host(target["architecture"], target["cpu_features"], where)
        self._on_gpu = target["kind"] == "cuda"
        self._machine = self._start(library, where)

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {self._sides()}>"

    def run(self, inputs: Mapping[str, Array], tail: bool = True) -> dict[str, Array]:
        """One inference: outputs by name, sub-byte outputs as int8 or uint8.

        tail: False for the library's outputs alone, the tensors at the cut among them, where the model's float end
        was cut off; True has ONNX Runtime run that end.
        Raises InputError for inputs of other names, types, shapes, out of range, or NaN, and what `joined` raises.
        """
        ready = arrays.checked(inputs, self.inputs, self.name)
        found = self._lock.run(partial(self._run, ready))
        return self.joined(ready, found) if tail else found

    def _run(self, ready: Mapping[str, Array]) -> dict[str, Array]:
        with one_sentence(self.name):
            return self._named([self._machine.numpy(value) for value in self._machine.main(*self._tensors(ready))])

    def bench(
        self,
        inputs: Mapping[str, Array] | None = None,
        *,
        warmup_ms: float = 200,
        duration: float = 3,
        iterations: int = 10,
        threads: int | None = None,
    ) -> BenchReport:
        """Time inferences of random (or given) inputs; see `BenchReport`."""
        from hawq_tvm.measure.measure import measure

        rng = np.random.default_rng(0)
        specs = self.inputs
        ready = (
            {i.name: arrays.random(rng, i) for i in specs}
            if inputs is None
            else arrays.checked(inputs, specs, self.name)
        )
        with self._lock:
            tensors = self._tensors(ready)
            return measure(
                lambda: self._machine.finished(*tensors),
                self.name,
                warmup_ms=warmup_ms,
                duration=duration,
                iterations=iterations,
                threads=threads,
            )

    def _tensors(self, ready: Mapping[str, Array]) -> list[Any]:
        if self._on_gpu:
            forks.check_gpu(self._loaded_by, self._where)
        return [self._machine.tensor(ready[i.name]) for i in self.inputs]

    def _start(self, library: bytes, where: str) -> Any:
        """The library in TVM's virtual machine.

        Raises PackageError when TVM's runtime is missing or of another version, the GPU does not fit, or the library
        cannot be loaded.
        """
        from deploy.machine import driver, vm
        from deploy.machine.refusal import Refusal
        from hawq_tvm.measure import measure  # first: it tells TVM's thread pool how many processors there are

        del measure
        try:
            if self._on_gpu:
                driver.check(
                    driver.Driver().gpu, self.manifest["target"]["architectures"], self.manifest["producer"]["cuda"]
                )
            tvm_ffi = vm.start(tvm_folder() / "lib", self._on_gpu)
            self.check_tvm(tvm_version(), str(tvm_ffi.__version__), where)
            return vm.Machine(tvm_ffi, library, self._on_gpu)
        except Refusal as e:
            raise PackageError("cannot be run here", where=where, found=str(e)) from e
        except RuntimeError as e:
            raise PackageError(
                "the library cannot be loaded",
                where=where,
                found=str(e).splitlines()[0],
                remedy="set TMPDIR to a folder from which programs may run, or compile again",
            ) from e
