"""How far simulated quantization is from the deployed integers, layer by layer: the figure of HAWQ-V3's appendix G
for any model and its package.

    difference = ||simulated - deployed|| / ||deployed||      Euclidean norms over all elements of a tensor, per run

deployed is what the package's kernels wrote, times their scale. Three things are compared with it: the reference's
evaluation of the integer graph ("ours", which must be 0), the quantized model in float32 ("fake"), and its float
network with rounded weights and inputs of layers ("simulated": BatchNormalization unfolded, residual sums in float).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.same_graph import same_graph
from hawq_tvm.package.package import Package, load
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.float_graph import FloatGraph, Input
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.verify.compare import layer_calls
from hawq_tvm.verify.reference import evaluate
from relay_passes.choose_layout import TO_FIRST, choose_layout

from .fake_float import Simulated, run_annotated
from .fake_structure import Array, Structure, Tensor


@dataclass(frozen=True)
class Spread:
    """One number per run: their mean and standard deviation, the least and the greatest."""

    mean: float
    deviation: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(float(np.mean(values)), float(np.std(values)), min(values), max(values))


@dataclass
class Row:
    """One tensor of integers.

    layer: the quantize that makes it, in the model's terms.  kernel: the layer of the package that wrote it, or in
    which it stays, as then `inside` says: "ours" is then that kernel's result, and the deployed integers are the
    reference's.  differing: elements of "ours" that are not equal, over all runs.  curves: by name, one value per
    run; a curve that does not have the tensor is not there.
    """

    layer: str
    kernel: str
    inside: bool
    bits: int
    residual: bool
    elements: int
    differing: int = 0
    curves: dict[str, list[float]] = field(default_factory=dict)

    def spread(self, curve: str) -> Spread | None:
        """A curve's value here, None where it has none."""
        return Spread.of(self.curves[curve]) if curve in self.curves else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; an infinite difference (of a tensor that is zero) is null."""
        spreads = {
            name: {k: v if math.isfinite(v) else None for k, v in vars(Spread.of(values)).items()}
            for name, values in self.curves.items()
        }
        return {
            "layer": self.layer,
            "kernel": self.kernel,
            "inside_kernel": self.inside,
            "activation_bits": self.bits,
            "residual_sum": self.residual,
            "elements": self.elements,
            "differing": self.differing,
            **spreads,
        }


@dataclass
class Comparison:
    """One model and its package.

    precision: weights and inputs of most layers, such as W4A4.  blocks: the residual sums, or every layer where the
    network has none.
    left_out: tensors that are another one's integers, moved or as they are.  not_matched: residual sums that the
    float network has no one sum for.
    """

    model: str
    package: str
    name: str
    precision: str
    runs: int
    images_per_run: int
    rows: list[Row]
    left_out: list[str]
    not_matched: list[str]

    @property
    def blocks(self) -> list[Row]:
        """What the figure shows."""
        return [r for r in self.rows if r.residual] or self.rows

    @property
    def residual(self) -> bool:
        """Whether the network has residual sums."""
        return any(r.residual for r in self.rows)

    @property
    def exact(self) -> bool:
        """Whether the package equals the reference in every element of every layer."""
        return not any(r.differing for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "model": self.model,
            "package": self.package,
            "name": self.name,
            "precision": self.precision,
            "runs": self.runs,
            "images_per_run": self.images_per_run,
            "exact": self.exact,
            "blocks_are": "residual sums" if self.residual else "layers, as there are no residual sums",
            "blocks": [r.to_dict() for r in self.blocks],
            "layers": [r.to_dict() for r in self.rows],
            "left_out": self.left_out,
            "not_matched": self.not_matched,
        }


def compare_fake(
    model: str | Path,
    package: str | Path,
    data: str | Path,
    *,
    real: str | Path | FloatGraph | None = None,
    preprocess: Preprocess | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a quantized model, and perhaps its float network, with the package that was compiled from it.

    real: the float network (ONNX or .pt2).  limit: so many runs of the package at most.
    Raises UsageError when the package is for a GPU or was compiled from another model, ModelError when `real` is
    another network, and ModelError, PackageError and InputError for files that cannot be read or do not fit.
    """
    if limit is not None and limit < 1:
        raise UsageError("is no number of runs", where=f"--limit {limit}", expected="at least 1")
    opened = load(package)
    _check_cpu(opened)
    inputs = tuple(Input(one.name, one.dtype, one.shape) for one in opened.inputs)
    images = open_data(data, inputs, preprocess)
    tell = progress or (lambda step: None)
    graph = load_float(real) if real is not None else None
    if graph is not None:
        _check_inputs(graph, inputs, str(real))
    tell(Step(f"compiling {opened.name} again", 0, 1))
    annotated, logical = _lowered(model, opened)
    compared = _Comparing(annotated, logical, opened, graph, str(real))
    size = inputs[0].shape[0] or 1
    runs = min(images.count // size, limit or images.count)
    for done, batch in enumerate(islice(images.batches(size, True), limit), 1):
        compared.add(opened.prepare(batch.inputs))
        tell(Step(f"comparing {opened.name}", done, runs))
    return Comparison(
        str(model),
        str(package),
        opened.name,
        compared.precision(),
        runs,
        size,
        list(compared.rows.values()),
        compared.left_out,
        compared.not_matched,
    )


def _check_cpu(package: Package) -> None:
    if package.on_gpu:
        raise UsageError(
            "is for a GPU",
            where=package.where,
            expected="a package for a CPU",
            remedy=(
                "compile the model for one: packages for all targets compute the same integers (`hawq-tvm verify A B`)"
            ),
        )


def _check_inputs(graph: FloatGraph, inputs: Sequence[Input], where: str) -> None:
    """Raise ModelError when the float network does not take the package's inputs."""
    mine, theirs = (
        [f"{i.dtype} {'x'.join('any' if d is None else str(d) for d in i.shape)}" for i in given]
        for given in (inputs, graph.inputs)
    )
    fits = len(inputs) == len(graph.inputs) and all(
        a.dtype == b.dtype
        and len(a.shape) == len(b.shape)
        and all(y is None or x == y for x, y in zip(a.shape, b.shape, strict=True))
        for a, b in zip(inputs, graph.inputs, strict=True)
    )
    if not fits:
        raise ModelError(
            "takes other inputs than the package",
            where=where,
            expected=", ".join(mine),
            found=", ".join(theirs),
            remedy="export it for any batch, or compile for its batch",
        )


def _lowered(model: str | Path, package: Package) -> tuple[tvm.IRModule, tvm.IRModule]:
    """The model's ANNOTATED module, and its INTEGER module with tensors as the model lays them out.

    Raises UsageError when what the model compiles to is not the package's integer graph.
    """
    shapes = {i.name: i.shape for i in package.inputs}
    ranges = {i.name: i.saturates for i in package.inputs if i.saturates}
    foreign = UsageError(
        "is not the package of this model",
        where=package.where,
        expected=f"what {model} compiles to",
        found="another integer graph",
        remedy="compile the model again, with this version of hawq-tvm",
    )
    try:
        annotated = pipeline.import_annotated(
            str(model), shapes=shapes, allow_float_tail=bool(package.manifest["float_tail"]), ranges=ranges
        )
    except UsageError as e:  # it has no inputs of these names or shapes
        raise foreign from e
    logical = pipeline.until(annotated, choose_layout)
    if not same_graph(pipeline.until(logical, None, start=choose_layout), package.graph):
        raise foreign
    return annotated, logical


class _Comparing:
    """Adds up the rows of one model, run by run."""

    def __init__(
        self, annotated: tvm.IRModule, logical: tvm.IRModule, package: Package, graph: FloatGraph | None, where: str
    ) -> None:
        self.annotated, self.logical, self.package = annotated, logical, package
        self.structure = Structure(annotated)
        self.simulated = Simulated(graph, self.structure, where) if graph is not None else None
        self.kernels = _kernels(package.graph, {b.var.name for b in stages.bindings(logical["main"])})
        self.tensors = [t for t in self.structure.tensors.values() if t.name in self.kernels]
        self.left_out = [n for n in self.structure.tensors if n not in self.kernels]
        self.not_matched = [
            t.name
            for t in self.tensors
            if t.sum is not None and self.simulated is not None and t.name not in self.simulated.sums
        ]
        self.rows: dict[str, Row] = {}

    def precision(self) -> str:
        """Weights and inputs of most layers."""
        pairs = Counter(
            (w.weight_bits, w.grid.bits)
            for w in self.structure.weighted
            if w.weight_bits is not None and w.grid is not None
        )
        return "W{}A{}".format(*pairs.most_common(1)[0][0]) if pairs else "no weights"

    def add(self, inputs: Mapping[str, Array]) -> None:
        """One run."""
        run = self.package.run_layers(inputs)
        wanted: dict[str, Any] = {}
        evaluate(self.logical, inputs, lambda name, value: wanted.update({name: value}), given=run.head)
        written = {
            b.var.name: v
            for b, v in zip(layer_calls(self.package.graph), run.layers, strict=True)
            if isinstance(v, np.ndarray)
        }
        fake = run_annotated(self.annotated, inputs, run.head)
        read, sums = self.simulated.run(inputs) if self.simulated is not None else ({}, {})
        for tensor in self.tensors:
            kernel, result = self.kernels[tensor.name]
            stays, expected = result != tensor.name, wanted[result]
            found = _as_in_model(written[kernel], expected)
            deployed = wanted[tensor.name] if stays else found
            row = self.rows.setdefault(
                tensor.name,
                Row(tensor.name, kernel, stays, tensor.grid.bits, tensor.sum is not None, int(deployed.size)),
            )
            row.differing += int(np.count_nonzero(found != expected))
            both = [v.astype(np.float64) if stays else tensor.grid.real(v) for v in (expected, found)]
            for name, value in (
                ("ours", _difference(both[0], both[1])),
                *self._curves(tensor, deployed, fake, read, sums),
            ):
                row.curves.setdefault(name, []).append(value)

    def _curves(
        self,
        tensor: Tensor,
        deployed: Array,
        fake: Mapping[str, Array],
        read: Mapping[str, Array],
        sums: Mapping[str, Array],
    ) -> Iterator[tuple[str, float]]:
        real = tensor.grid.real(deployed)
        yield "fake", _difference(tensor.grid.real(fake[tensor.name]), real)
        if tensor.name in sums:
            value = sums[tensor.name]
            yield "simulated", _difference(value, real)
            yield (
                "simulated_rounded",
                _difference(tensor.grid.real(self.structure.applied((tensor.call,), value)), real),
            )
        elif tensor.name in read and read[tensor.name].shape == real.shape:
            yield "simulated", _difference(tensor.grid.real(read[tensor.name]), real)


def _kernels(graph: tvm.IRModule, known: Collection[str]) -> dict[str, tuple[str, str]]:
    """For every `known` variable in a layer of a PACKED module the layer's own variable in main, and the last known
    one in it: the layer's result but for the order of axes.
    """
    found: dict[str, tuple[str, str]] = {}
    for b in layer_calls(graph):
        names = [
            n for n in (*(inner.var.name for inner in stages.bindings(graph[b.value.op])), b.var.name) if n in known
        ]
        if names and not isinstance(b.var.ty, relax.TupleType):
            found.update({n: (b.var.name, names[-1]) for n in names})
    return found


def _as_in_model(written: Array, expected: Array) -> Array:
    """A kernel's result with its axes in the model's order; where both orders have its shape, in the one that equals
    the reference's.
    """
    if written.shape == expected.shape and (written.ndim != 4 or np.array_equal(written, expected)):
        return written
    first = written.transpose(TO_FIRST) if written.ndim == 4 else written
    if first.shape != expected.shape:
        return written.reshape(expected.shape)
    return first if written.shape != expected.shape or np.array_equal(first, expected) else written


def _difference(value: Array, deployed: Array) -> float:
    """||value - deployed|| / ||deployed||, in float64."""
    distance, length = float(np.linalg.norm((value - deployed).ravel())), float(np.linalg.norm(deployed.ravel()))
    return 0.0 if distance == 0 else distance / length if length > 0 else math.inf
