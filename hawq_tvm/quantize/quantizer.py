"""Post-training quantization: a float network and calibration data to a quantized ONNX model that compiles to integers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ..errors import InputError, ModelError, UsageError
from .data import Calibration, open_data
from .equalize import equalize
from .float_graph import FloatGraph, Layer
from .float_onnx import from_onnx
from .observers import OBSERVERS, Grid, Histogram, grid
from .pictures import Preprocess
from .points import Points, find_points
from .prepare import prepare
from .qdq import kind_of, write
from .reconstruct import Passing, reconstruct
from .sensitivity import Progress, Step
from .table import read_bits, widths
from .weights import Rounded, nearest

SUPPORTED = (4, 8)


@dataclass(frozen=True)
class Recipe:
    """How to quantize.

    bits: 8, 4, a choice such as "W4A8", or the path of a bits.json.  observer: of activations' ranges.  percentile: for that observer.
    keep_ends: the first and the last layer have 8 bits; ignored where a bits.json says what each has.  symmetric: tensors that can be
    negative have the zero point 0.  search: scales of weights of the least error instead of the largest magnitude (None: at 4 bits).
    equalize: "off", "relu" or "relu6" (see `equalize.py`).  correct_bias, adaround (steps, 0 for none): see `reconstruct.py`;
    they use at most `images` images.  batch: images at a time.
    """

    bits: int | str | Path = 8
    observer: str = "mse"
    percentile: float = 99.99
    keep_ends: bool = True
    symmetric: bool = False
    search: bool | None = None
    equalize: str = "off"
    correct_bias: bool = False
    adaround: int = 0
    images: int = 64
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise UsageError("is no observer", where=self.observer, expected=", ".join(OBSERVERS))
        if not 50 < self.percentile <= 100:
            raise UsageError("is no percentile", where=str(self.percentile), expected="more than 50, at most 100")
        if self.equalize not in ("off", "relu", "relu6"):
            raise UsageError("is no way to equalise", where=self.equalize, expected="off, relu or relu6")
        for name, value, least in (("adaround", self.adaround, 0), ("images", self.images, 1), ("batch", self.batch, 1)):
            if value < least:
                raise UsageError("is too small", where=name, expected=f"at least {least}", found=str(value))


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

    given: the float graph as the user knows it.  prepared, graph: the model to write into, BatchNormalization folded and channels equalised, and its
    graph.  grids: of quantized tensors.  narrow: of layers that read fewer bits.  rounded: weights by layer.
    """

    recipe: Recipe
    given: FloatGraph
    prepared: onnx.ModelProto
    graph: FloatGraph
    points: Points
    grids: Mapping[str, Grid]
    narrow: Mapping[str, Grid]
    rounded: Mapping[str, Rounded]
    gained: Mapping[str, Mapping[str, float]]
    notes: Mapping[str, Any]

    def read(self, layer: Layer) -> Grid:
        """The grid of what a layer reads."""
        return self.narrow.get(layer.name) or self.grids[layer.input]

    def written(self) -> Quantized:
        """The quantized model."""
        model = write(self.prepared, self.graph, self.points, self.grids, self.narrow, self.rounded)
        onnx.checker.check_model(model)
        rows = [_row(self.graph, one, self.rounded[one.name], self.read(one), self.recipe, self.gained.get(one.name, {})) for one in self.graph.layers]
        held = self.rounded.values()
        notes = {
            **self.notes, "weight_bytes": sum(-(-r.codes.numel() * r.bits // 8) for r in held), "parameters": sum(r.codes.numel() for r in held),
        }  # fmt: skip
        return Quantized(model, rows, notes)


def post_training(
    model: Any, calibration: str | Path, recipe: Recipe | None = None, *, preprocess: Preprocess | None = None, progress: Progress | None = None
) -> Quantized:  # fmt: skip
    """Quantize a float model: ONNX (path, bytes or ModelProto), a .pt2 file or an ExportedProgram.

    Raises ModelError, InputError and UsageError as `load_float`, `open_data` and `read_bits` do, and UsageError for widths other than 4 and 8.
    """
    return draft(model, calibration, recipe, preprocess=preprocess, progress=progress).written()


def draft(
    model: Any, calibration: str | Path, recipe: Recipe | None = None, *, preprocess: Preprocess | None = None, progress: Progress | None = None
) -> Draft:  # fmt: skip
    """What `post_training` decides, before it is written.

    Raises the same errors.
    """
    chosen, tell = recipe or Recipe(), progress or (lambda step: None)
    prepared, given = prepare(as_onnx(model))
    if not given.layers:
        raise ModelError("has no layers with weights", where=given.name, expected="convolutions or matrix products")
    bits = layer_bits(given, chosen)
    data = open_data(calibration, given.inputs, preprocess)
    scaled, clips = equalize(prepared, given, chosen.equalize == "relu6") if chosen.equalize != "off" else ([], [])
    graph = from_onnx(prepared) if scaled else given
    ranges, floats = _ranges(graph, data, chosen, tell)
    points = find_points(graph, floats, bits)
    seen = _histograms(graph, data, chosen, {s: ranges[s] for s in points.source.values()}, tell)
    grids, narrow = _grids(points, graph, seen, bits, chosen)
    rounded = {}
    for i, layer in enumerate(graph.layers):
        rounded[layer.name] = _rounded(graph, layer, bits[layer.name][0], chosen, (narrow.get(layer.name) or grids[layer.input]).scale)
        tell(Step("rounding weights", i + 1, len(graph.layers)))
    gained: dict[str, dict[str, float]] = {}
    if chosen.adaround or chosen.correct_bias:
        some = _some(data, graph, chosen)
        passing = Passing(points, grids, narrow)
        gained = reconstruct(graph, some, passing, rounded, steps=chosen.adaround, correct_bias=chosen.correct_bias, seed=chosen.seed, progress=tell)
    notes = {"images": data.count, "observer": chosen.observer, "tensors": len(points.source), "equalized": scaled, "relu6_replaced": clips}
    return Draft(chosen, given, prepared, graph, points, grids, narrow, rounded, gained, notes)


def as_onnx(model: Any) -> Any:
    if isinstance(model, FloatGraph):
        raise UsageError("is a float graph, of which no file can be written", where=model.name, expected="the ONNX model or the program that it was made of")
    if type(model).__name__ == "ExportedProgram" or (isinstance(model, str | Path) and Path(model).suffix == ".pt2"):
        from .program_onnx import onnx_of_program

        return onnx_of_program(model)
    return model


def layer_bits(graph: FloatGraph, recipe: Recipe) -> dict[str, tuple[int, int]]:
    """The bits of weights and of the input, by layer.

    Raises UsageError for what is no width that files can hold, InputError and UsageError as `read_bits` does.
    """
    names = [layer.name for layer in graph.layers]
    text = str(recipe.bits)
    if text.isdecimal() or (text.startswith("W") and not Path(text).exists()):
        pair = (int(text), int(text)) if text.isdecimal() else widths(text, "--bits")
        found = dict.fromkeys(names, pair)
        if recipe.keep_ends:
            found[names[0]] = found[names[-1]] = (8, 8)
    else:
        found = read_bits(text, names)
    for name, pair in found.items():
        if any(b not in SUPPORTED for b in pair):
            raise UsageError("is a bit width out of range", where=name, expected="4 or 8 bits, for which ONNX and the kernels have types", found=f"W{pair[0]}A{pair[1]}")
    return found


def _ranges(graph: FloatGraph, data: Calibration, recipe: Recipe, tell: Progress) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """The least and the greatest value of every float tensor.

    Raises InputError naming the tensor that is not finite.
    """
    found: dict[str, tuple[float, float]] = {}

    def record(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            low, high = float(value.min()), float(value.max())
            if not np.isfinite([low, high]).all():
                raise InputError("is not finite on the calibration data", where=name, remedy="look at the data, and how pixels become numbers")
            old = found.get(name, (low, high))
            found[name] = min(low, old[0]), max(high, old[1])

    _each(graph, data, recipe, "ranges of activations", record, tell)
    return found, set(found)


def _histograms(graph: FloatGraph, data: Calibration, recipe: Recipe, ranges: Mapping[str, tuple[float, float]], tell: Progress) -> dict[str, Histogram]:
    seen = {name: Histogram(*pair) for name, pair in ranges.items()}
    if recipe.observer == "minmax":
        return seen

    def record(name: str, value: Any) -> None:
        if name in seen:
            seen[name].add(value.numpy())

    _each(graph, data, recipe, "histograms of activations", record, tell)
    return seen


def _each(graph: FloatGraph, data: Calibration, recipe: Recipe, phase: str, record: Any, tell: Progress) -> None:
    size, done = graph.batch or recipe.batch, 0
    with torch.no_grad():
        for batch in data.batches(size, graph.batch is not None):
            graph.run(batch.inputs, record)
            done += batch.size
            tell(Step(phase, done, data.count))


def _some(data: Calibration, graph: FloatGraph, recipe: Recipe) -> list[dict[str, Any]]:
    batches: list[dict[str, Any]] = []
    held = 0
    for batch in data.batches(graph.batch or recipe.batch, graph.batch is not None):
        batches.append(batch.inputs)
        held += batch.size
        if held >= recipe.images:
            break
    return batches


def _grids(
    points: Points, graph: FloatGraph, seen: Mapping[str, Histogram], bits: Mapping[str, tuple[int, int]], recipe: Recipe
) -> tuple[dict[str, Grid], dict[str, Grid]]:  # fmt: skip
    """The grid of every quantized tensor, and of layers that read fewer bits."""
    known: dict[tuple[str, int], Grid] = {}

    def chosen(source: str, width: int) -> Grid:
        if (source, width) not in known:
            known[source, width] = _grid(seen[source], width, source in points.positive, recipe)
        return known[source, width]

    grids = {name: chosen(source, points.bits[name]) for name, source in points.source.items()}
    inputs = {layer.name: layer.input for layer in graph.layers}
    return grids, {name: chosen(points.source[inputs[name]], width) for name, width in points.narrow.items()}


def _grid(seen: Histogram, width: int, positive: bool, recipe: Recipe) -> Grid:
    """Unsigned with zero point 0 where nothing can be negative, else with both signs: of 4 bits in a signed type, of 8 in an unsigned one."""
    symmetric = positive or recipe.symmetric
    signed = not positive and (symmetric or width == 4)

    def make(low: float, high: float) -> Grid:
        return grid(0.0 if positive else low, high, width, signed, symmetric)

    observer = OBSERVERS[recipe.observer]
    return make(*observer(seen, make, recipe.percentile))


def _rounded(graph: FloatGraph, layer: Layer, bits: int, recipe: Recipe, step: float) -> Rounded:
    weight = graph.parameters[layer.weight]
    channels = weight.shape[layer.channel_axis]
    bias = graph.parameters[layer.bias].reshape(-1) if layer.bias else None
    if bias is not None and bias.numel() not in (1, channels):
        raise ModelError("has a bias that is not one number per output channel", where=layer.name, expected=str(channels), found=str(bias.numel()))
    bias = bias.expand(channels).clone() if bias is not None else None
    return nearest(weight, bias, layer, bits, bits < 8 if recipe.search is None else recipe.search, step)


def _row(graph: FloatGraph, layer: Layer, rounded: Rounded, read: Grid, recipe: Recipe, gained: Mapping[str, float]) -> dict[str, Any]:
    return {
        "layer": layer.name, "weight_bits": rounded.bits, "activation_bits": (read.high - read.low).bit_length(), "activation_type": np.dtype(kind_of(read)).name,
        "activation_scale": read.scale, "activation_zero_point": read.zero, "observer": recipe.observer,
        "weight_scale": [float(rounded.scale.min()), float(rounded.scale.max())], "weight_error": rounded.error(graph.parameters[layer.weight]),
        "parameters": rounded.codes.numel(), **gained,
    }  # fmt: skip
