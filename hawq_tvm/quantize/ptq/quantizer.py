"""Post-training quantization: a float network and calibration data to a quantized ONNX model that compiles to
integers alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.files import SYNTHETIC
from hawq_tvm.frontend.onnx.inputs import with_shapes
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.data import Batch, Calibration, open_data
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer
from hawq_tvm.quantize.network.float_onnx import Shapes, from_onnx
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.network.prepare import prepare
from hawq_tvm.quantize.network.roles import Roles, roles_of
from hawq_tvm.quantize.network.tail import Tail, without_tail

from .equalize import equalize
from .kept import Kept
from .observers import Grid, Histogram, fitted
from .points import Points, Seen, find_points
from .qdq import kind_of, write
from .recipe import Recipe
from .reconstruct import Plan, Reconstruction
from .simulated import grids_of
from .smooth import smooth
from .synthetic import distilled
from .tables import round_tables
from .units import Units, added_bias, check_compiles, check_constants, check_finite, check_ranges
from .weights import Rounded, nearest
from .widths import kept_small, layer_bits

# Which results one recipe gives: another number with every change of them, so that no run continues another's.
METHOD = 6
# Unless a recipe says it, what is learned sees so many numbers of the network's inputs, on so few and so many images.
NUMBERS, FEWEST, MOST = 2**24, 128, 1024


@dataclass
class Quantized:
    """The quantized model, and how every layer was quantized (JSON-ready rows)."""

    model: onnx.ModelProto
    layers: list[dict[str, Any]]
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {"layers": self.layers, **self.notes}


@dataclass
class Draft:
    """A network with every decision about its quantization taken: what is written, and what fine-tuning starts from.

    given: the float graph as the user knows it.  prepared, graph: the model to write into, BatchNormalization folded
    and channels equalised, and its graph.  grids: of quantized tensors.  narrow: of layers that read fewer bits.
    rounded: weights by layer.  tail: what stays float behind all that.
    """

    recipe: Recipe
    given: FloatGraph
    prepared: onnx.ModelProto
    graph: FloatGraph
    points: Points
    grids: Mapping[str, Grid]
    narrow: Mapping[str, Grid]
    rounded: Mapping[str, Rounded]
    notes: Mapping[str, Any]
    tail: Tail | None = None

    def read(self, layer: Layer) -> Grid:
        """The grid of what a layer reads."""
        return self.narrow.get(layer.name) or self.grids[layer.input]

    def model(self) -> onnx.ModelProto:
        """The quantized model without what stays float, which nothing has checked."""
        taken = self.tail.names if self.tail else frozenset[str]()
        return write(self.prepared, self.graph, self.points, self.grids, self.narrow, self.rounded, taken)

    def written(self) -> Quantized:
        """The quantized model and what is told of it.

        Raises ModelError naming every operator that `compile` refuses.
        """
        model = self.model()
        onnx.checker.check_model(model)
        check_compiles(model, self.graph.name)
        if self.tail:
            model = self.tail.joined(model)
            check_compiles(model, self.graph.name, tail=True)
        rows = [_row(self.graph, one, self.rounded[one.name], self.read(one), self.recipe) for one in self.graph.layers]
        held = self.rounded.values()
        notes = {
            **self.notes,
            "float_tail": self.tail.cut().fields() if self.tail else None,
            "weight_bytes": sum(-(-r.codes.numel() * r.bits // 8) for r in held),
            "parameters": sum(r.codes.numel() for r in held),
        }
        return Quantized(model, rows, notes)


def post_training(
    model: Any,
    calibration: str | Path,
    recipe: Recipe | None = None,
    *,
    shapes: Shapes | None = None,
    preprocess: Preprocess | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Quantize a float model: ONNX (path, bytes or ModelProto), a .pt2 file or an ExportedProgram.

    shapes: full shapes of inputs by name, which fix what the model leaves open; else all but the first dimension, which
    counts images, is fixed as in the data.
    calibration: as `open_data` takes it, or "synthetic", which is made from BatchNormalization's statistics.
    state: an .npz file that holds the blocks which are done; an interrupted run is continued by the next, to the same
    result.
    Raises ModelError, InputError and UsageError as `load_float`, `open_data` and `read_bits` do, UsageError for widths
    without kernels and for the state of another run, and ModelError naming every operator that has no integer form,
    before calibration.
    """
    return draft(
        model, calibration, recipe, shapes=shapes, preprocess=preprocess, state=state, progress=progress
    ).written()


def draft(
    model: Any,
    calibration: str | Path,
    recipe: Recipe | None = None,
    *,
    shapes: Shapes | None = None,
    preprocess: Preprocess | None = None,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Draft:
    """What `post_training` decides, before it is written.

    Raises the same errors.
    """

    def made(rest: Any, tail: Tail | None) -> Draft:
        return _draft(rest, tail, calibration, recipe or Recipe(), shapes, preprocess, state, progress)

    return without_tail(as_onnx(model, shapes), shapes, made)


def _draft(
    model: Any,
    tail: Tail | None,
    calibration: str | Path,
    chosen: Recipe,
    shapes: Shapes | None,
    preprocess: Preprocess | None,
    state: str | Path | None,
    progress: Progress | None,
) -> Draft:
    tell = progress or (lambda step: None)
    prepared, given = prepare(model, shapes)
    if not given.layers:
        raise ModelError("has no layers with weights", where=given.name, expected="convolutions or matrix products")
    check_constants(given)
    bits = layer_bits(given, chosen)
    if str(calibration) == SYNTHETIC:
        data: Calibration = distilled(load_float(model, shapes), chosen.seed, tell, preprocess)
    else:
        data = open_data(calibration, given.inputs, preprocess)
    prepared = with_shapes(prepared, {one.name: one.shape for one in data.inputs})
    learns = chosen.rounding != "nearest" and any(min(pair) < 8 for pair in bits.values())
    how = chosen.equalize or ("relu" if learns else "off")
    kept = None
    if state is not None and (learns or chosen.correct_bias):
        key = f"{METHOD} {data.fingerprint} {chosen} {sorted(bits.items())}".encode() + prepared.SerializeToString()
        kept = Kept(Path(state), hashlib.sha256(key).hexdigest())
        kept.check()
    scaled, clips = equalize(prepared, given, how == "relu6") if how != "off" else ([], [])
    graph = from_onnx(prepared) if scaled else given
    roles = cache(lambda: roles_of(prepared))  # asked for when the data are known to fit

    even: set[str] = set()

    def grid_of(low: float, high: float, width: int) -> Grid:
        return _grid(Histogram(low, high), width, low >= 0, replace(chosen, observer="minmax"))

    def calibrated(one: Recipe, batches: Callable[[], Iterator[Batch]], said: Progress) -> Draft:
        ranges, points, seen = _observed(graph, roles, batches, data.count, bits, one, said)
        decided = _decided(graph, points, Units(graph, roles(), ranges), seen, bits, one, even, said)
        return Draft(one, given, prepared, graph, points, *decided, {}, tail)

    size = graph.batch or chosen.batch
    fixed, trial = graph.batch is not None, replace(chosen, observer="minmax", search=False)
    first = calibrated(trial, lambda: islice(data.batches(graph.batch or 1, fixed), 1), lambda step: None)
    first.written()  # refuses what has no integer form before the time is spent
    smoothed: list[dict[str, Any]] = []
    if chosen.smooth:
        batches, own = data.batches(size, fixed), from_onnx(prepared)
        smoothed = smooth(prepared, own, roles(), batches, data.count, bits, grid_of, chosen.search, tell)
    if smoothed:
        graph, even = from_onnx(prepared), {row["read"] for row in smoothed}
        roles.cache_clear()
    round_tables(graph, first.points.tables)
    started = calibrated(chosen, lambda: data.batches(size, fixed), tell)
    points, grids, narrow, rounded = started.points, started.grids, started.narrow, started.rounded
    rows: list[dict[str, Any]] = []
    if learns or chosen.correct_bias:
        plan = Plan(learns, chosen.iterations if learns else 0, chosen.seed)
        held = grids_of(graph, points, grids, narrow)
        made = Reconstruction(graph, _some(data, graph, chosen), held, rounded, plan, tell)
        made.run(kept)
        rounded, rows = made.rounded, made.rows
        grids, narrow = made.grids.split()
    notes = {
        "images": data.count,
        "observer": chosen.observer,
        "tensors": len(points.source),
        "small": kept_small(given, chosen),
        "joined": {name: [part for part, _ in parts] for name, parts in points.joined.items()},
        "equalized": scaled,
        "smoothed": smoothed,
        "relu6_replaced": clips,
        "blocks": rows,
    }
    return Draft(chosen, given, prepared, graph, points, grids, narrow, rounded, notes, tail)


def as_onnx(model: Any, shapes: Shapes | None = None) -> Any:
    if isinstance(model, FloatGraph):
        raise UsageError(
            "is a float graph, of which no file can be written",
            where=model.name,
            expected="the ONNX model or the program that it was made of",
        )
    if type(model).__name__ == "ExportedProgram" or (isinstance(model, str | Path) and Path(model).suffix == ".pt2"):
        from hawq_tvm.quantize.network.program_onnx import onnx_of_program

        return onnx_of_program(model, shapes)
    return model


def _observed(
    graph: FloatGraph,
    roles: Callable[[], Roles],
    batches: Callable[[], Iterator[Batch]],
    count: int,
    bits: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    tell: Progress,
) -> tuple[dict[str, tuple[float, float]], Points, dict[str, Histogram]]:
    """The range of every float tensor on the data, which of them are quantized, and what was seen of these.

    Raises InputError naming the tensor that is not finite, or beyond what scales can hold.
    """
    found: dict[str, tuple[float, float]] = {}
    floats: dict[str, Seen] = {}

    def record(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            low, high = float(value.min()), float(value.max())
            check_finite(name, 0.0 if low == -np.inf else low, high)  # a mask may hold that
            old = found.get(name, (low, high))
            found[name] = min(low, old[0]), max(high, old[1])
            floats[name] = Seen(tuple(value.shape), found[name][0])

    _each(graph, batches, count, "ranges of activations", record, tell)
    points = find_points(graph, roles(), floats, bits)
    seen = {name: Histogram(*found[name]) for name in points.source.values()}
    check_ranges(seen)
    if recipe.observer == "minmax":
        return found, points, seen

    def fill(name: str, value: Any) -> None:
        if name in seen:
            seen[name].add(value.numpy())

    _each(graph, batches, count, "histograms of activations", fill, tell)
    return found, points, seen


def _each(
    graph: FloatGraph, batches: Callable[[], Iterator[Batch]], count: int, phase: str, record: Any, tell: Progress
) -> None:
    done = 0
    with torch.no_grad():
        for batch in batches():
            graph.run(batch.inputs, record)
            done += batch.size
            tell(Step(phase, done, count))


def _some(data: Calibration, graph: FloatGraph, recipe: Recipe) -> list[dict[str, Any]]:
    """The images that something is learned from: by default as many as have NUMBERS numbers."""
    batches: list[dict[str, Any]] = []
    held = 0
    for batch in data.batches(graph.batch or recipe.batch, graph.batch is not None):
        batches.append(batch.inputs)
        held += batch.size
        one = sum(value.size for value in batch.inputs.values()) / batch.size
        if held >= (recipe.images or min(max(NUMBERS / one, FEWEST), MOST)):
            break
    return batches


def _decided(
    graph: FloatGraph,
    points: Points,
    units: Units,
    seen: Mapping[str, Histogram],
    bits: Mapping[str, tuple[int, int]],
    recipe: Recipe,
    even: Set[str],
    tell: Progress,
) -> tuple[dict[str, Grid], dict[str, Grid], dict[str, Rounded]]:
    """The grid of every quantized tensor and of layers that read fewer bits, and weights, in the order of computation.

    even: tensors whose channels are alike: every value that was seen is within the range.
    A grid is no finer than what its tensor is computed from can tell apart: see `units.py`.
    """
    known: dict[tuple[str, int], Grid] = {}
    layers = {layer.node: layer for layer in graph.layers}
    rounded: dict[str, Rounded] = {}

    def chosen(source: str, width: int) -> Grid:
        if (source, width) not in known:
            ours = replace(recipe, observer="minmax") if source in even else recipe
            made = _grid(units.usable(source, seen[source]), width, source in points.positive, ours)
            known[source, width] = replace(made, scale=max(made.scale, units.least(source)))
        return known[source, width]

    def settle(names: Iterable[str]) -> None:
        units.scales.update((n, chosen(points.source[n], points.bits[n]).scale) for n in names if n in points.source)

    settle(one.name for one in graph.inputs)
    narrow: dict[str, Grid] = {}
    for node in graph.nodes:
        layer = layers.get(node.name)
        if layer is not None:
            if layer.name in points.narrow:
                narrow[layer.name] = chosen(points.source[layer.input], points.narrow[layer.name])
            step = narrow[layer.name].scale if layer.name in narrow else units.scales[layer.input]
            ours = _rounded(graph, layer, bits[layer.name][0], recipe, step)
            rounded[layer.name] = ours
            units.products[layer.output] = step * float(ours.scale.max())
            tell(Step("rounding weights", len(rounded), len(layers)))
        settle(node.outputs)
    grids = {name: chosen(source, points.bits[name]) for name, source in points.source.items()}
    return grids, narrow, rounded


def _grid(seen: Histogram, width: int, positive: bool, recipe: Recipe) -> Grid:
    return fitted(seen, width, positive, recipe.symmetric, recipe.observer, recipe.percentile)


def _rounded(graph: FloatGraph, layer: Layer, bits: int, recipe: Recipe, step: float) -> Rounded:
    weight = graph.parameters[layer.weight]
    channels = weight.shape[layer.channel_axis] * layer.repeats
    bias = graph.parameters[layer.bias].reshape(-1) if layer.bias else None
    if bias is not None and bias.numel() not in (1, channels):
        found = str(bias.numel())
        raise ModelError(
            "has a bias that is not one number per output channel",
            where=layer.name,
            expected=str(channels),
            found=found,
        )
    bias = bias.expand(channels).clone() if bias is not None else None
    search = bits < 8 if recipe.search is None else recipe.search
    return nearest(weight, bias, layer, bits, search, step, added_bias(graph, layer))


def _row(graph: FloatGraph, layer: Layer, rounded: Rounded, read: Grid, recipe: Recipe) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "weight_bits": rounded.bits,
        "activation_bits": (read.high - read.low).bit_length(),
        "activation_type": np.dtype(kind_of(read)).name,
        "activation_scale": read.scale,
        "activation_zero_point": read.zero,
        "observer": recipe.observer,
        "weight_scale": [float(rounded.scale.min()), float(rounded.scale.max())],
        "weight_error": rounded.error(graph.parameters[layer.weight]),
        "parameters": rounded.codes.numel(),
    }
