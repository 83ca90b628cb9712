"""The float and the quantized network side by side, node by node: weights are rounded, and biases corrected, where
the quantized one has got to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node

from .adaround import can_learn, learn
from .observers import Grid
from .points import Points, clip_bounds
from .weights import Rounded

Tensor = torch.Tensor


@dataclass(frozen=True)
class Passing:
    """Grids of activations by tensor, and those of layers that read fewer bits by layer name."""

    points: Points
    grids: Mapping[str, Grid]
    narrow: Mapping[str, Grid]


def fake(value: Tensor, grid: Grid) -> Tensor:
    """The nearest numbers that a grid has, in float32 (A2)."""
    return ((value / grid.scale).round().clamp(grid.low - grid.zero, grid.high - grid.zero)) * grid.scale


def reconstruct(
    graph: FloatGraph,
    batches: Sequence[Mapping[str, Any]],
    passing: Passing,
    rounded: Mapping[str, Rounded],
    *,
    steps: int,
    correct_bias: bool,
    seed: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Learn roundings (steps > 0) and correct biases in place, in the order of computation; what was gained, by layer.

    Correcting adds to a bias the mean difference of the float and the quantized layer's outputs (Nagel et al.,
    "Data-Free Quantization", 2019).
    """
    return _Pass(graph, batches, passing, rounded, steps, correct_bias, seed, progress).run()


class _Pass:
    def __init__(
        self,
        graph: FloatGraph,
        batches: Sequence[Mapping[str, Any]],
        passing: Passing,
        rounded: Mapping[str, Rounded],
        steps: int,
        correct_bias: bool,
        seed: int,
        progress: Progress,
    ) -> None:
        self.graph, self.passing, self.rounded, self.progress = graph, passing, rounded, progress
        self.steps, self.correct_bias, self.seed = steps, correct_bias, seed
        self.layers = {layer.node: layer for layer in graph.layers}
        self.readers = Counter(name for node in graph.nodes for name in node.inputs)
        self.real: list[dict[str, Any]] = [{k: torch.as_tensor(v) for k, v in b.items()} for b in batches]
        self.integer: list[dict[str, Any]] = [{k: self._rounded(k, v) for k, v in b.items()} for b in self.real]

    def run(self) -> dict[str, dict[str, float]]:
        gained: dict[str, dict[str, float]] = {}
        last = {name: i for i, node in enumerate(self.graph.nodes) for name in node.inputs}
        with torch.no_grad():
            for i, node in enumerate(self.graph.nodes):
                self._compute(node, self.real, node.compute)
                layer = self.layers.get(node.name)
                if layer is None:
                    self._compute(node, self.integer, node.compute)
                else:
                    gained[layer.name] = self._layer(node, layer)
                    self.progress(Step("reconstructing layers", len(gained), len(self.layers)))
                for values in self.integer:
                    values.update({name: self._rounded(name, values[name]) for name in node.outputs if name})
                for values in (*self.real, *self.integer):
                    for name in node.inputs:
                        if last[name] == i:
                            values.pop(name, None)
        return gained

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        return fake(value, self.passing.grids[name]) if name in self.passing.grids else value

    def _compute(self, node: Node, values: list[dict[str, Any]], compute: Any) -> None:
        for held in values:
            results = compute(
                *(
                    (self.graph.parameters[n] if n in self.graph.parameters else held[n]) if n else None
                    for n in node.inputs
                )
            )
            results = results if isinstance(results, tuple) else (results,)
            held.update((n, v) for n, v in zip(node.outputs, results, strict=False) if n)

    def _layer(self, node: Node, layer: Layer) -> dict[str, float]:
        ours, weight = self.rounded[layer.name], self.graph.parameters[layer.weight]
        read = self.passing.narrow.get(layer.name)
        inputs = [fake(v[layer.input], read) if read else v[layer.input] for v in self.integer]
        wanted = [v[layer.output] for v in self.real]
        report: dict[str, float] = {}
        if self.steps and ours.bits < 8 and can_learn(layer, weight):
            with torch.enable_grad():
                before, after = learn(ours, weight, inputs, wanted, self._clamp(layer), self.steps, self.seed)
            report |= {"nearest_mse": before, "adaround_mse": after}
        found = [node.compute(x, ours.weight, *([ours.bias] if ours.bias is not None else [])) for x in inputs]
        axis = -1 if layer.kind == "matmul" else 1
        if self.correct_bias and node.op in ("Conv", "ConvTranspose", "Gemm"):
            shift = _channel_mean(wanted, axis) - _channel_mean(found, axis)
            ours.bias = shift if ours.bias is None else ours.bias + shift
            found = [y + (shift.reshape(1, -1, *[1] * (y.ndim - 2)) if axis == 1 else shift) for y in found]
            report["bias_shift"] = float(shift.abs().max())
        noise = sum(float((a - b).double().square().sum()) for a, b in zip(wanted, found, strict=True))
        power = sum(float(a.double().square().sum()) for a in wanted)
        for held, y in zip(self.integer, found, strict=True):
            held[layer.output] = y
        return {**report, "output_error": noise / max(power, 1e-30)}

    def _clamp(self, layer: Layer) -> tuple[float | None, float | None]:
        """The bounds of what alone reads the layer's output."""
        reader = next((n for n in self.graph.nodes if layer.output in n.inputs), None)
        return clip_bounds(reader, self.graph) if self.readers[layer.output] == 1 else (None, None)


def _channel_mean(batches: Sequence[Tensor], axis: int) -> Tensor:
    rows = [y.movedim(axis, 0).flatten(1).double() for y in batches]
    total = sum((r.sum(1) for r in rows), torch.zeros(len(rows[0]), dtype=torch.float64))
    return (total / sum(r.shape[1] for r in rows)).float()
