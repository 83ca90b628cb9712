"""The compiled model in Python: compile, load, run, verify, prove, bench, save."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm import relax

import schedules
from deploy import contents, signature
from deploy import graph as stored_graph
from deploy import package as files_on_disk
from deploy.machine.pages import Main
from hawq_tvm.compiler import compilers
from hawq_tvm.compiler.cache import Cache
from hawq_tvm.compiler.pipeline import Progress, compile_model
from hawq_tvm.core import arrays, stages
from hawq_tvm.core.collection import uncollected
from hawq_tvm.core.errors import PackageError, UsageError
from hawq_tvm.core.printable import printable
from hawq_tvm.core.trust import trusting
from hawq_tvm.frontend.hawq.source import Checkpoint
from hawq_tvm.measure.measure import BenchReport, measure
from hawq_tvm.measure.profile import ProfileReport, profile
from hawq_tvm.targets import target as targets
from hawq_tvm.verify.certificate import Certificate, certify
from hawq_tvm.verify.compare import LayerRun, VerifyReport, layers_of, run_with_layers, verify_executable
from hawq_tvm.verify.records import Run

from . import direct, emulated, forks, gpu
from . import manifest as manifests
from .interface import Interface, one_sentence, readable
from .made import LIBRARY, files_of
from .tail import Tail

Array = NDArray[Any]


def compile(
    model: Any,
    target: str = "host",
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_float_tail: bool = False,
    nonlinear: str | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    progress: Progress | None = None,
    records: str | Path | None = None,
    trust: bool = False,
    cache: bool = True,
) -> Package:
    """Compile a quantized model into an integer-only package.

    model: ONNX (a path, bytes or ModelProto), PyTorch after PT2E quantization (a .pt2 path, bytes or
    ExportedProgram), a HAWQ checkpoint (a .pth.tar path, bytes, `hawq_checkpoint`'s), or an I-BERT (folder, module).

    target: "host", "x86-64-v3" and the like, an LLVM target, "cuda-sm80" and the like, or "cuda".  shapes: fixes
    symbolic dimensions by input name.  nonlinear: the arithmetic of GELU, softmax, LayerNorm, "real" or "ibert".
    allow_float_tail: keep float operators before the first quantize or after the last dequantize.
    ranges: what float inputs saturate at, (least, greatest) by name, where nothing in the model tells it.
    progress: called with (step, None) when a step starts and (step, StepReport) when it ends.
    records: a file of measured tiles that `tune` wrote; records that fit no layer are not used.
    trust: read a PyTorch file in ways that can run code which it holds.
    cache: take kernels that were compiled before from the folder for caches, and leave new ones there.
    Raises ModelError naming the layer, what was expected and found, and the remedy.
    """
    parsed = targets.parse(target)
    compilers.check_compiler(parsed)
    measured = schedules.read_records(Path(records)) if records is not None else {}
    fixed = {k: tuple(int(d) for d in v) for k, v in (shapes or {}).items()}
    name = (
        Path(model).stem if isinstance(model, str | Path) else model.stem if isinstance(model, Checkpoint) else "model"
    )
    with trusting(trust), uncollected():
        asked: dict[str, Any] = {"shapes": fixed, "allow_float_tail": allow_float_tail, "nonlinear": nonlinear}
        asked |= {"ranges": ranges, "cache": Cache() if cache else Cache(limit=0)}
        compiled = compile_model(model, parsed, **asked, progress=progress, records=measured)
        if progress:
            progress("package", None)
        manifest, files = files_of(compiled, name)
    return Package(manifest, files, name)


def load(
    path: str | Path, *, emulator: str | None = None, public_key: str | Path | None = None, here: bool = True
) -> Package:
    """Open a package written by `save` or `hawq-tvm compile`, or its single file written by `hawq-tvm pack`.

    emulator: a command that runs programs for the package's CPU, used where this CPU cannot: for another
    architecture instead of QEMU, and for instructions that this CPU lacks. Only `run`, `run_layers` and `verify`
    work emulated.
    public_key: a file of minisign's; the package must be signed with its secret key.
    here: False for one that another machine is to run.
    Raises PackageError when it is damaged, of another version, not signed so, or made for another CPU of this
    architecture; no code is loaded before that.
    """
    manifest, files = signature.read_files(Path(path), public_key)
    package = Package(manifest, files, str(path), emulator=emulator)
    if here and not package.is_foreign:
        package.check_host()
    return package


class Package(Interface):
    """A compiled model; made by `compile` or `load`.

    manifest: what manifest.json holds.  files: the package's other files, checked against it; nothing is read again
    from disk.  where: how errors call the package.  emulator: see `load`.  Thread-safe: one run at a time, others wait.
    """

    def __init__(
        self, manifest: dict[str, Any], files: dict[str, bytes], where: str, *, emulator: str | None = None
    ) -> None:
        self.manifest, self._files, self._emulator = manifest, files, emulator
        self.check_tvm(str(tvm.__version__), str(tvm_ffi.__version__), where)
        self._target, self.where = manifest["target"], where
        self.tail = Tail(files[files_on_disk.TAIL], where) if "cut" in manifest else None
        self._lock = forks.RunLock()
        self._library: tuple[int, Path] | None = None  # made by which process
        self._vm: relax.VirtualMachine | None = None
        self._main: Callable[..., Any]
        self._loaded_by = os.getpid()
        self._graph: tvm.IRModule | None = None

    def __repr__(self) -> str:
        target, floats = self.manifest["target"], self.manifest["float_tail"]
        kept = printable(f", float outside the integer region: {', '.join(floats)}") if floats else ""
        return f"<Package {self.name!r}: {self._sides()}; {targets.text(target)}{kept}>"

    @property
    def products(self) -> int:
        """The multiplications of one inference in convolutions and matrix products."""
        return int(self.manifest["products"])

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels run on a GPU."""
        return str(self._target["kind"]) == "cuda"

    @property
    def is_foreign(self) -> bool:
        """Whether a process under an emulator runs the library: this CPU cannot, and there is an emulator, or one
        was named.
        """
        architecture = self._target["architecture"]
        if self.on_gpu:
            return False
        if architecture != platform.machine():
            return self._emulator is not None or architecture in emulated.QEMU
        return self._emulator is not None and not targets.runs_here(self._target["cpu_features"])

    @property
    def graph(self) -> tvm.IRModule:
        """The integer graph (PACKED stage) that the library was made from."""
        if self._graph is None:
            files_on_disk.require_graph(self.manifest, self.where)
            with readable("graph", self.where):
                graph = stored_graph.load_graph(self._files)
                fits = manifests.fits(graph, self.manifest)
            if not fits:
                raise PackageError(
                    "has a graph that is not its manifest's",
                    where=self.where,
                    found="other inputs or outputs, or another hash",
                    remedy="compile it again",
                )
            self._graph = graph
        return self._graph

    @property
    def is_stripped(self) -> bool:
        """Whether the integer graph was left out."""
        return bool(self.manifest.get("stripped"))

    def lend_graph(self, graph: tvm.IRModule) -> None:
        """Verify a stripped package by the graph of a full one with the same `graph_sha256`, for the same kind of
        processor.
        """
        self._graph = graph

    @property
    def library(self) -> Path:
        """The checked library in a file of this process alone, removed with the package.

        The dynamic linker knows libraries by their path: from the package's own folder, a package compiled anew in
        the same place would silently run the old code.
        """
        with self._lock:
            if self._library is None or self._library[0] != os.getpid():
                folder = tempfile.mkdtemp(prefix="hawq_tvm_")
                weakref.finalize(self, _remove, folder, os.getpid())
                path = Path(folder) / LIBRARY
                path.write_bytes(self._files[LIBRARY])
                self._library = os.getpid(), path
            return self._library[1]

    @property
    def vm(self) -> relax.VirtualMachine:
        """TVM's virtual machine with the library loaded."""
        with self._lock:
            if self._vm is not None and self.on_gpu:
                forks.check_gpu(self._loaded_by, self.where)
            if self._vm is None:
                device = self._device()
                try:
                    module = tvm.runtime.load_module(str(self.library))
                except RuntimeError as e:
                    raise PackageError(
                        "the library cannot be loaded",
                        where=self.name,
                        found=str(e).splitlines()[0],
                        remedy="set TMPDIR to a folder from which programs may run, or compile again",
                    ) from e
                with gpu.one_sentence(self.name):
                    self._vm = relax.VirtualMachine(module, device)
                main = self._vm["main"]
                self._main = main if self.on_gpu else Main(main, self._vm.set_instrument)
                self._loaded_by = os.getpid()
            return self._vm

    @property
    def main(self) -> Callable[..., Any]:
        """The library's `main`: tensors of `vm` in, outputs out."""
        with self._lock:
            assert self.vm is not None  # which loads the library
            return self._main

    def _device(self) -> tvm.runtime.Device:
        """Where the library runs: this CPU, or the first GPU.

        Raises PackageError when this machine cannot run it.
        """
        self.check_host()
        if self.on_gpu:
            gpu.ready(self._target["architectures"], self.manifest["producer"]["cuda"], self.where)
        return self._array_device

    def check_host(self) -> None:
        """Refuse a package for another CPU; one that was just compiled may be for any, until it is run.

        A GPU is needed only by what runs the package, and looked for then.

        Raises PackageError naming the features that this machine lacks.
        """
        targets.check_host(self._target["architecture"], self._target["cpu_features"], self.where)

    def prepare(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs as the library takes them: checked, contiguous, sub-byte types widened to 8 bits.

        Raises InputError naming the input that does not fit.
        """
        return arrays.checked(inputs, self.inputs, self.name)

    def run(self, inputs: Mapping[str, Array], tail: bool = True) -> dict[str, Array]:
        """One inference: outputs by name, sub-byte outputs as int8 or uint8.

        tail: False for the library's outputs alone, the tensors at the cut among them, where the model's float end
        was cut off; True has ONNX Runtime run that end.
        Raises InputError for inputs of other names, types, shapes, out of range, or NaN, and what `joined` raises.
        """
        ready = self.prepare(inputs)
        if self.is_foreign:
            found = self._named(self._in_c(ready, layers=False).outputs)
        else:
            found = self._lock.run(partial(self._run, self.main, ready))
        return self.joined(ready, found) if tail else found

    def _run(self, main: Any, ready: Mapping[str, Array]) -> dict[str, Array]:
        with one_sentence(self.name), gpu.one_sentence(self.name):
            return self._named([value.numpy() for value in main(*self._on_device(ready))])

    def _on_device(self, ready: Mapping[str, Array]) -> list[tvm.runtime.Tensor]:
        """Prepared inputs as the arguments of `main`."""
        return [tvm.runtime.tensor(ready[i.name], self._array_device) for i in self.inputs]

    @property
    def _array_device(self) -> tvm.runtime.Device:
        """Where the arrays of a run lie."""
        return tvm.cuda(0) if self.on_gpu else tvm.cpu()

    def random_inputs(self, count: int, seed: int) -> list[dict[str, Array]]:
        """Inputs over the whole quantized range, its ends and values beyond them included.

        Raises UsageError for a negative count or seed.
        """
        for what, value in (("number of random inputs", count), ("seed", seed)):
            if value < 0:
                raise UsageError(f"the {what} must not be negative", found=str(value))
        rng = np.random.default_rng(seed)
        return [{i.name: arrays.random(rng, i) for i in self.inputs} for _ in range(count)]

    def run_layers(self, inputs: Mapping[str, Array], through: str | None = None) -> LayerRun:
        """One inference: outputs by name, and what every kernel wrote, in order.

        through: "vm", TVM's virtual machine, or "c", the library's C interface; None: "c" for a foreign library,
        else "vm".
        Raises UsageError for what there is not: the virtual machine for a foreign library, or a C interface for a
        GPU's.
        """
        kernels = set(stages.private_functions(self.graph))
        ways = ("vm",) if self.on_gpu else ("c",) if self.is_foreign else ("vm", "c")
        if through not in (None, *ways):
            raise UsageError(
                "layers cannot be run through this", where=self.where, found=str(through), expected=" or ".join(ways)
            )
        if (through or ways[0]) == "c":
            return layers_of(self._in_c(inputs, layers=True), self.graph, kernels)
        with one_sentence(self.name), gpu.one_sentence(self.name):
            return self._lock.run(partial(run_with_layers, self.vm, self.graph, inputs, kernels, self._array_device))

    def _in_c(self, ready: Mapping[str, Array], *, layers: bool) -> Run:
        """One inference of prepared inputs through the C interface, under the emulator of a foreign library."""
        arrays_in_order = [np.asarray(ready[i.name], order="C") for i in self.inputs]
        if self.is_foreign:
            architecture = self._target["architecture"]
            words = emulated.command(architecture, self._emulator, self.where)
            return emulated.run(self.library, architecture, words, arrays_in_order, layers=layers)
        self.check_host()
        return self._lock.run(partial(direct.watched, self.library, arrays_in_order))

    def verify(
        self,
        inputs: Mapping[str, Array] | Iterable[Mapping[str, Array]] | None = None,
        *,
        random: int | None = None,
        seed: int = 0,
        through: str | None = None,
    ) -> VerifyReport:
        """Compare every layer of the library with the reference, exactly, on given and on `random` made-up inputs.

        random: None makes up one where none are given.  through: see `run_layers`.  Raises UsageError when there
        would be nothing to compare.
        """
        return verify_executable(
            self.graph, partial(self.run_layers, through=through), self.batches(inputs, random, seed)
        )

    def batches(
        self, inputs: Mapping[str, Array] | Iterable[Mapping[str, Array]] | None, random: int | None, seed: int
    ) -> list[dict[str, Array]]:
        """Inputs to verify with, as `prepare` makes them: those given and `random` made-up ones, see `verify`."""
        several = isinstance(inputs, Iterable) and not isinstance(inputs, Mapping | np.ndarray | str)
        given: list[Any] = [] if inputs is None else list(inputs) if several else [inputs]
        made = self.random_inputs(int(inputs is None) if random is None else random, seed)
        if not given and not made:
            raise UsageError(
                "there is nothing to verify",
                where=self.name,
                found="no inputs, and no random ones",
                remedy="give inputs, or ask for at least 1 random one",
            )
        return [self.prepare(b) for b in given] + made

    def way(self, through: str | None = None) -> str:
        """How `run_layers` runs the library, in words."""
        if self.is_foreign:
            emulator = self._emulator or f"qemu-{self._target['architecture']}"
            return f"its C interface, under {emulator}"
        return "its C interface" if through == "c" and not self.on_gpu else "TVM's virtual machine"

    def prove(self) -> Certificate:
        """Certify again, from the stored graph and the stored library, that between quantize and dequantize all is
        integer.
        """
        target = targets.parse(json.dumps(targets_fields(self.manifest["target"])))
        tir, _ = schedules.lower_to_tir(self.graph, target)
        return certify(self.graph, tir, self.library, targets.gpu_architectures(target))

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
        with self._lock, gpu.one_sentence(self.name):
            main = self.main
            tensors = self._tensors(inputs)
            return measure(
                self._finished(lambda: main(*tensors)),
                self.name,
                warmup_ms=warmup_ms,
                duration=duration,
                iterations=iterations,
                threads=threads,
            )

    def profile(
        self,
        inputs: Mapping[str, Array] | None = None,
        *,
        warmup_ms: float = 200,
        duration: float = 3,
        iterations: int = 10,
        threads: int | None = None,
        limit_tops: float | None = None,
    ) -> ProfileReport:
        """Time every kernel inside inferences of random (or given) inputs; see `ProfileReport`.

        limit_tops: what the machine can reach at most, in trillions of operations per second, to compare with.
        """
        with self._lock, gpu.one_sentence(self.name):
            main, tensors = self.main, self._tensors(inputs)
            with one_sentence(self.name):
                main(*tensors)  # the first call has an instrument of its own
            return profile(
                self.vm,
                self.graph,
                self.report(),
                self._finished(lambda: main(*tensors)),
                self.name,
                warmup_ms=warmup_ms,
                duration=duration,
                iterations=iterations,
                threads=threads,
                limit_tops=limit_tops,
                finish=self._array_device.sync if self.on_gpu else None,
            )

    def _tensors(self, inputs: Mapping[str, Array] | None) -> list[tvm.runtime.Tensor]:
        """The arguments of `main` for given or random inputs."""
        ready = self.prepare(inputs) if inputs is not None else self.random_inputs(1, 0)[0]
        return self._on_device(ready)

    def _finished(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A call that returns when its work is done: a GPU's kernels only start."""

        def finished() -> None:
            call()
            self._array_device.sync()

        return finished if self.on_gpu else call

    def report(self) -> list[dict[str, Any]]:
        """The compile report: for every kernel its layer, rule, tile and where that comes from, and why earlier
        rules refused.
        """
        kernels: list[dict[str, Any]] = contents.checked(self._files["report.json"], "report", self.where)
        return kernels

    def certificate(self) -> dict[str, Any]:
        """The certificate as it was stored when the package was made; `prove` makes it anew."""
        stored: dict[str, Any] = contents.checked(self._files["certificate.json"], "certificate", self.where)
        return stored

    def save(self, path: str | Path) -> Path:
        """Write the package to the folder `path`, in one step.

        Raises OutputError when it exists and is no package, or cannot be written.
        """
        destination = Path(path)
        files_on_disk.install(destination, self.manifest, self._files)
        return destination


def _remove(folder: str, owner: int) -> None:
    """Remove a folder, unless this process is a child of the one that made it: the parent may still use it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def targets_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a manifest's target that `target.parse` reads."""
    return {k: v for k, v in stored.items() if k in ("kind", "architectures", "mcpu", "mtriple", "mattr")}
