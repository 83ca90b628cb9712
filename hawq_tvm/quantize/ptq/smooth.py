"""Smoothing: what matrix products read has channels of like ranges, and the weights take the factors.

x W = (x / s)(s W) for any s > 0 of every summed channel. One scale serves all channels of an activation, so that a few
wide ones take the steps of all others; a weight has a scale per output and bears it (Xiao et al., "SmoothQuant", 2022).
x / s costs nothing where something before x can be divided instead (see `channels.py`). Behind a normalization or a
function that others read too, or that no factor passes, it is a multiplication, which the compiler puts into the
requantize that is there. The factors s = a^p / w^q of a channel's greatest or mean magnitude a and its weights' w are
searched for the least error of what the products give (as in Lin et al., "AWQ", 2023), seen on one half of the
calibration data, judged on the other. What is left is read in its whole range: to clip it costs more than its error
says, because outliers are what a transformer works with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.data import Batch
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer
from hawq_tvm.quantize.network.prepare import names_of, set_constant
from hawq_tvm.quantize.network.roles import Roles

from .channels import Channels, Part
from .observers import Grid
from .simulated import fake
from .weights import nearest

Tensor = torch.Tensor
# The grid of a least and a greatest value, of so many bits.
MakeGrid = Callable[[float, float, int], Grid]
ROWS = 256  # of a tensor that one half of the data gives
ACTIVATION_POWERS, WEIGHT_POWERS = (0.25, 0.5, 0.75, 1.0), (0.0, 0.5)
WORTH = 0.8  # the error that is left, as a share, from which on smoothing is worth it
SPREAD = 1e-5  # the least magnitude of a channel, as a share of the greatest


@dataclass
class Half:
    """What one half of the data showed of a tensor: by channel the least and greatest value and the sum of squares, and
    some rows.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    squares: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)

    def add(self, rows: Tensor, share: int) -> None:
        """Take in rows, and keep so many of them, evenly spaced."""
        low, high, squares = rows.amin(0), rows.amax(0), rows.double().square().mean(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.squares = squares if self.squares is None else self.squares + squares
        self.rows.append(rows[torch.linspace(0, len(rows) - 1, min(share, len(rows))).long()].clone())

    def magnitudes(self) -> dict[str, Tensor]:
        """Of every channel, float64: the greatest one, and the root of the mean square but for a common factor."""
        assert self.low is not None and self.high is not None and self.squares is not None
        return {"largest": torch.maximum(-self.low, self.high).double(), "mean": self.squares.sqrt()}


@dataclass(frozen=True)
class Choice:
    """How factors are made of magnitudes: which ones of activations, and the powers."""

    magnitude: str
    activation: float
    weight: float

    def factors(self, seen: Half, weights: Tensor) -> Tensor:
        """Of every channel, float32, with the geometric mean 1; weights: the greatest magnitude that each meets."""
        values = _above(seen.magnitudes()[self.magnitude]) ** self.activation / _above(weights) ** self.weight
        logs = values.log()
        return (logs - logs.mean()).exp().float()


CHOICES = [Choice(m, a, w) for m in ("largest", "mean") for a in ACTIVATION_POWERS for w in WEIGHT_POWERS]


def _above(values: Tensor) -> Tensor:
    return values.double().clamp_min(max(float(values.max()) * SPREAD, 1e-30))


@dataclass(frozen=True)
class Place:
    """A tensor, the products that read it, and what is divided before it; None where a multiplication is added."""

    tensor: str
    layers: tuple[Layer, ...]
    parts: Sequence[Part] | None


def places(
    graph: FloatGraph,
    roles: Roles,
    shapes: Mapping[str, Sequence[int]],
    others: Mapping[str, Tensor],
) -> list[Place]:
    """Where smoothing can be done; shapes, others: of computed float tensors, and all others, in one run."""
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    reading: dict[str, list[str]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs if node.op != "Shape" else ():
            reading[name].append(node.name)
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in graph.layers:
        plain = layer.kind == "matmul" and graph.parameters[layer.weight].ndim == 2
        if plain and not _node(graph, layer).attributes.get("transA") and len(reading[layer.weight]) == 1:
            groups[layer.input].append(layer)
    channels, found = Channels(graph, roles, shapes, others), []
    for name, layers in groups.items():
        maker = makers.get(name)
        if maker is None or shapes[name][-1] < 2:
            continue
        only = name not in graph.outputs and set(reading[name]) == {layer.node for layer in layers}
        parts = channels.before(name) if only else None
        behind = roles.normalizes(maker) or (roles.function(maker) and not roles.sums(maker))
        if parts is not None or behind:
            found.append(Place(name, tuple(layers), parts))
    return found


def _node(graph: FloatGraph, layer: Layer) -> Any:
    return next(node for node in graph.nodes if node.name == layer.node)


def smooth(
    model: onnx.ModelProto,
    graph: FloatGraph,
    roles: Roles,
    batches: Iterable[Batch],
    count: int,
    bits: Mapping[str, tuple[int, int]],
    make: MakeGrid,
    search: bool | None,
    tell: Progress,
) -> list[dict[str, Any]]:
    """Smooth a prepared model in place; a JSON-ready row for every tensor that was.

    batches: the calibration data, count inputs in all.  bits: of weights and of the input, by layer.  make: grids of
    activations.  search: of weights' scales, None: where they have less than 8 bits.
    """
    where, halves = _seen(graph, roles, batches, count, tell)
    rows = []
    for number, place in enumerate(where):
        row = _smoothed(model, graph, place, halves[place.tensor], bits, make, search)
        rows += [row] if row else []
        tell(Step("smoothing", number + 1, len(where)))
    return rows


def _seen(
    graph: FloatGraph, roles: Roles, batches: Iterable[Batch], count: int, tell: Progress
) -> tuple[list[Place], dict[str, tuple[Half, Half]]]:
    """Places, and what both halves of the data show of each, odd batches and even ones; one batch is both."""
    where: list[Place] | None = None
    halves: dict[str, tuple[Half, Half]] = {}
    number = done = 0

    def record(name: str, value: Any) -> None:
        if where is None and isinstance(value, Tensor):
            if value.is_floating_point():
                shapes[name] = tuple(value.shape)
            else:
                others[name] = value
        if name in halves:
            share = -(-ROWS * 2 * batch.size // count)
            halves[name][number % 2].add(value.reshape(-1, value.shape[-1]), share)

    shapes: dict[str, tuple[int, ...]] = {}
    others: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            if where is None:
                graph.run(batch.inputs, record)
                where = places(graph, roles, shapes, others)
                halves = {place.tensor: (Half(), Half()) for place in where}
            graph.run(batch.inputs, record)
            number, done = number + 1, done + batch.size
            tell(Step("channels of activations", done, count))
    return where or [], {name: (a, b if b.rows else a) for name, (a, b) in halves.items()}


def _smoothed(
    model: onnx.ModelProto,
    graph: FloatGraph,
    place: Place,
    halves: tuple[Half, Half],
    bits: Mapping[str, tuple[int, int]],
    make: MakeGrid,
    search: bool | None,
) -> dict[str, Any] | None:
    weights = [graph.parameters[layer.weight] for layer in place.layers]
    by_input = [w.movedim(layer.channel_axis, 1) for layer, w in zip(place.layers, weights, strict=True)]
    greatest = torch.stack([w.abs().amax(1) for w in by_input]).amax(0)
    seen, other = halves
    judged = torch.cat(other.rows)
    wanted = [judged @ w for w in by_input]
    power = sum(float(y.double().square().sum()) for y in wanted)

    def error(factors: Tensor) -> float:
        rows, total = judged / factors, 0.0
        grids = {width: _grid(seen, factors, width, make) for width in {bits[one.name][1] for one in place.layers}}
        for layer, weight, y in zip(place.layers, weights, wanted, strict=True):
            width, activation = bits[layer.name]
            ours = grids[activation]
            searched = width < 8 if search is None else search
            rounded = nearest(_multiplied(weight, layer, factors), None, layer, width, searched, ours.scale).weight
            found = fake(rows, ours) @ rounded.movedim(layer.channel_axis, 1)
            total += float((found - y).double().square().sum())
        return total / power

    if not power or not float(max(v.max() for v in seen.magnitudes().values())):
        return None
    plain = error(torch.ones(len(greatest)))
    errors = [error(choice.factors(seen, greatest)) for choice in CHOICES]
    best = int(np.argmin(errors))
    if not errors[best] < WORTH * plain:
        return None
    factors = CHOICES[best].factors(_both(*halves), greatest)
    read = _apply(model, graph, place, factors)
    return {
        "tensor": place.tensor,
        "read": read,
        "layers": [layer.name for layer in place.layers],
        "divided": [part.constant for part in place.parts or ()],
        "magnitude": CHOICES[best].magnitude,
        "powers": [CHOICES[best].activation, CHOICES[best].weight],
        "error_before": plain,
        "error_after": errors[best],
    }


def _both(one: Half, other: Half) -> Half:
    if one is other:
        return one
    assert one.low is not None and one.high is not None and one.squares is not None
    assert other.low is not None and other.high is not None and other.squares is not None
    low, high = torch.minimum(one.low, other.low), torch.maximum(one.high, other.high)
    return Half(low, high, one.squares + other.squares)


def _grid(seen: Half, factors: Tensor, width: int, make: MakeGrid) -> Grid:
    assert seen.low is not None and seen.high is not None
    return make(float((seen.low / factors).min()), float((seen.high / factors).max()), width)


def _multiplied(weight: Tensor, layer: Layer, factors: Tensor) -> Tensor:
    return weight * (factors[:, None] if layer.channel_axis == 1 else factors)


def _apply(model: onnx.ModelProto, graph: FloatGraph, place: Place, factors: Tensor) -> str:
    """Take the factors into the weights, and out of what is before them; what the layers read then."""

    def put(name: str, value: Tensor) -> None:
        graph.parameters[name] = value
        set_constant(model.graph, name, value.numpy())

    for layer in place.layers:
        put(layer.weight, _multiplied(graph.parameters[layer.weight], layer, factors))
    for part in place.parts or ():
        value = part.divided(graph.parameters[part.constant], factors)
        if part.shared:
            _own(model.graph, part, value)
        else:
            put(part.constant, value)
    if place.parts is not None:
        return place.tensor
    stem = _fresh(model.graph, f"{place.tensor}_smooth")
    set_constant(model.graph, stem, (1 / factors).numpy())
    at = next(i for i, node in enumerate(model.graph.node) if place.tensor in node.output)
    made = helper.make_node("Mul", [place.tensor, stem], [f"{stem}ed"], name=f"{stem}ed")
    names = {layer.node for layer in place.layers}
    for node in model.graph.node:
        if node.name in names:
            node.input[0] = f"{stem}ed"
    model.graph.node.insert(at + 1, made)
    return made.output[0]


def _own(graph: onnx.GraphProto, part: Part, value: Tensor) -> None:
    """Give the reader of a part a constant of its own."""
    name = _fresh(graph, f"{part.constant}_smooth")
    set_constant(graph, name, value.numpy())
    node = next(node for node in graph.node if node.name == part.reader)
    node.input[:] = [name if n == part.constant else n for n in node.input]


def _fresh(graph: onnx.GraphProto, name: str) -> str:
    """A name, lengthened until neither it nor it in the past tense is taken."""
    taken = names_of(graph)
    while {name, f"{name}ed"} & taken:
        name += "_"
    return name
