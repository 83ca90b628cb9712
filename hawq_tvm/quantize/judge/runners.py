"""What answers: a package, or an ONNX model in ONNX Runtime."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.frontend.common.inputs import Declared, bound_inputs
from hawq_tvm.package.tail import errors_of_onnxruntime
from hawq_tvm.quantize.network.answers import End, no_classifier
from hawq_tvm.quantize.network.float_graph import Input, sizes_of

from .ends import end_of_integers, end_of_onnx

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, Sequence[int]]


class Runner(Protocol):
    """A model that answers.

    name: as the user gave it.  inputs: as `Input`, None in the first dimension where the batch is open.  end: what its
    first output is computed by.
    """

    name: str
    inputs: tuple[Input, ...]

    @property
    def end(self) -> End | None:
        """What its first output is computed by; None where nothing tells it."""

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The outputs of a whole batch by name, in order."""


class PackageRunner:
    """A package that `hawq-tvm compile` wrote, or `pack`."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        from hawq_tvm.package.package import load

        self.name, self._package = str(path), load(path)
        self.inputs = _bound([(one.name, one.dtype, one.shape) for one in self._package.inputs], shapes)

    @property
    def end(self) -> End | None:
        """What computes the first output; None where that was cut off or stripped."""
        package = self._package
        return None if package.is_stripped or package.tail is not None else end_of_integers(package.graph)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return self._package.run(inputs)


class OnnxRunner:
    """An ONNX model, float or quantized, in ONNX Runtime."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise UsageError(
                "needs ONNX Runtime to run an ONNX model",
                where=str(path),
                found=str(e),
                remedy="pip install 'hawq-tvm[bench]', or compile the model and give the package",
            ) from e
        from hawq_tvm.frontend.onnx.reader import read_model

        self._graph = read_model(path).graph
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except errors_of_onnxruntime() as e:
            raise ModelError(
                "is not accepted by ONNX Runtime", where=str(path), found=str(e).strip().splitlines()[-1]
            ) from e
        self.name = str(path)
        self.inputs = _bound([(one.name, _dtype(one.type), one.shape) for one in self._session.get_inputs()], shapes)

    @property
    def end(self) -> End | None:
        """What computes the first output."""
        return end_of_onnx(self._graph)

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        names = [one.name for one in self._session.get_outputs()]
        try:
            values = self._session.run(None, inputs)
        except errors_of_onnxruntime() as e:
            given = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in inputs.items())
            raise InputError(
                "cannot be run by ONNX Runtime on these data",
                where=self.name,
                expected=str(e).strip().splitlines()[-1],
                found=given,
            ) from e
        return dict(zip(names, values, strict=True))


def _bound(inputs: Sequence[tuple[str, str, Sequence[Any]]], shapes: Shapes) -> tuple[Input, ...]:
    """Inputs (name, type, sizes or names of what is open), with what `shapes` fixes.

    Raises UsageError for shapes that contradict them.
    """
    given = [
        Declared(
            name, dtype, [d if isinstance(d, int) and d >= 0 else (d if isinstance(d, str) else "?") for d in dims]
        )
        for name, dtype, dims in inputs
    ]
    return tuple(Input(d.name, d.kind, sizes_of(d)) for d in bound_inputs(given, shapes))


def _dtype(text: str) -> str:
    name = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


def scores_of(outputs: Mapping[str, Array], where: str) -> Array:
    """The scores (images, classes) of a classifier's first output.

    Raises ModelError where it holds none.
    """
    name, value = next(iter(outputs.items()))
    if value.ndim < 2 or value.size < 2 * len(value):
        raise no_classifier(f"{where}: {name}", value.shape, len(value) if value.ndim else 1)
    return value.reshape(len(value), -1)


def open_runner(path: str | Path, shapes: Shapes | None = None) -> Runner:
    """A package (a folder or a single file), or an ONNX file; shapes: full shapes of inputs by name, which fix what it
    leaves open.

    Raises PackageError, ModelError or UsageError when it is neither, or cannot be run.
    """
    place = Path(path)
    if place.suffix in (".pt2", ".pt", ".pth"):
        raise UsageError(
            "is a PyTorch file",
            where=str(place),
            expected="an ONNX model or a package",
            remedy="compile it, and evaluate the package",
        )
    packed = place.is_dir() or zipfile.is_zipfile(place)
    return PackageRunner(place, shapes or {}) if packed else OnnxRunner(place, shapes or {})
