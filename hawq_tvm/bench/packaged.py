"""Our packages as engines: the one that is measured, and others of ours beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from numpy.typing import NDArray

from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.version import __version__
from hawq_tvm.measure.measure import make_pool
from hawq_tvm.package import direct
from hawq_tvm.package.package import Package, load
from schedules.layer import Layer

Array = NDArray[Any]
SUFFIX = ".hawq"
C = "c"  # how `--against` calls the C interface


class Packaged:
    """A package, as its virtual machine runs it."""

    what = "the package"

    def __init__(self, package: Package, name: str = "hawq-tvm") -> None:
        self.package, self.name = package, name

    @property
    def version(self) -> str:
        """This project's version that made it."""
        return str(self.package.manifest["producer"].get("hawq_tvm", __version__))

    @property
    def products(self) -> int:
        """The multiplications of one inference."""
        return self.package.products

    def prepare(self, model: Path | None, inputs: Mapping[str, Array], threads: int) -> None:
        """See engine.Engine; `model` is not read."""
        make_pool(threads)
        ready = self.package.prepare(inputs)
        self._main = self.package.main
        self._tensors = [tvm.runtime.tensor(ready[i.name]) for i in self.package.inputs]

    def call(self) -> None:
        """One inference."""
        self._result = self._main(*self._tensors)

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name."""
        return {o.name: self._result[i].numpy() for i, o in enumerate(self.package.outputs)}

    def close(self) -> None:
        """Nothing: the pool ends with its thread."""


class InC(Packaged):
    """The same library as C runs it, with threads of its own."""

    what = "the same library through its C interface"

    def __init__(self, package: Package) -> None:
        super().__init__(package, C)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def prepare(self, model: Path | None, inputs: Mapping[str, Array], threads: int) -> None:
        """See engine.Engine; `model` is not read."""
        # A copy: in the file that TVM has loaded, kernels use TVM's threads.
        self._folder = tempfile.TemporaryDirectory(prefix="hawq_tvm_")
        library = Path(self._folder.name) / self.package.library.name
        shutil.copy(self.package.library, library)
        self._model = direct.Model(library, threads)
        ready = self.package.prepare(inputs)
        self._model.set_inputs([ready[i.name] for i in self.package.inputs])

    def call(self) -> None:
        """One inference."""
        self._model.run()

    def outputs(self) -> dict[str, Array]:
        """The outputs of the last `call` by name."""
        return dict(zip((o.name for o in self.package.outputs), self._model.outputs(), strict=True))

    def close(self) -> None:
        """The model, its threads and the library's copy."""
        if self._folder is not None:
            self._model.close()
            self._folder.cleanup()


class Rival(Packaged):
    """Another package of ours for the same inputs.

    same: whether its integer graph is the measured package's, so that every output must be equal; else it is timed
    without comparing.
    Raises ModelError when it takes other inputs.
    """

    def __init__(self, path: str, beside: Package) -> None:
        super().__init__(load(path), path)
        check_inputs(self.package, beside, path)
        stripped = self.package.is_stripped or beside.is_stripped
        self.same = self.package.manifest["graph_sha256"] == beside.manifest["graph_sha256"]
        if self.same:
            self.what = f"another package of the same integer graph, for {cpu(self.package)}"
        elif stripped:
            self.what = (
                f"another integer graph, for {cpu(self.package)}: a different network, timed without comparing outputs"
            )
        else:
            mine, theirs = weights(self.package.graph), weights(beside.graph)
            difference = f"{mine}, beside {theirs} of ours" if mine != theirs else f"{mine} as ours has"
            self.what = (
                f"another integer graph ({difference}), for {cpu(self.package)}: a different network, timed without"
                " comparing outputs"
            )


def is_package(name: str) -> bool:
    """Whether a name after --against means a package: what ends as packages do, or a folder with a manifest."""
    return name.endswith(SUFFIX) or (Path(name) / "manifest.json").is_file()


def check_inputs(package: Package, beside: Package, where: str) -> None:
    """Refuse a package whose inputs differ in name, type or shape.

    Raises ModelError saying both.
    """
    expected, found = (
        ", ".join(f"{i.name} {i.type} {'x'.join(map(str, i.shape))}" for i in p.inputs) for p in (beside, package)
    )
    if expected != found:
        raise ModelError(
            "takes other inputs than the package that is measured",
            where=where,
            expected=expected,
            found=found,
            remedy="compile both for the same inputs",
        )


def weights(graph: tvm.IRModule) -> str:
    """How many convolutions and matrix products of an integer graph have weights of which type, in words."""
    found: Counter[str] = Counter()
    for name, function in stages.private_functions(graph).items():
        layer = Layer(name, function)
        for b in layer.anchors:
            if ops.op_name(b.value) in ("relax.nn.conv2d", "relax.matmul"):
                width = layer.width(b.value.args[1])
                found[f"{width}-bit" if width < 8 else ops.dtype_of(b.value.args[1])] += 1
    return " and ".join(f"{n} layers of {kind} weights" for kind, n in sorted(found.items())) or "no weights"


def cpu(package: Package) -> str:
    """The processor that a package was compiled for."""
    return str(package.manifest["target"].get("mcpu", package.manifest["target"]["architecture"]))
