"""A quantized network as the compiled package computes it, in torch and with gradients: what is trained is what runs.

Weights, biases and scales are real numbers. At every forward pass they are written as `quantize` writes them, and the
compiler makes its integers of that: the value of every quantized tensor and of every output is what these give
(`integers.py`). Beside them runs the float network on the numbers that the integers stand for. It gives nothing but
gradients: those of the real formulas, rounding seen through (`straight.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import tvm

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node, computed
from hawq_tvm.quantize.ptq.observers import Grid
from hawq_tvm.quantize.ptq.quantizer import Draft
from hawq_tvm.quantize.ptq.weights import Rounded, along
from relay_passes.join_tables import join_tables

from . import integers
from .straight import Tensor, nearest, on_grid, straight

LEAST_SCALE = 1e-30
# What gives whole numbers that no small step of a weight moves.
CHOICES = ("ArgMax", "ArgMin")
# Which grid a tensor has: the tensor that it belongs to, and how many bits.
Key = tuple[str, int]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def check_trainable(graph: FloatGraph) -> None:
    """Whether something can be learned through every node, of one output.

    Raises ModelError naming the first node that has no derivative, or the outputs where there are several.
    """
    for node in graph.nodes:
        if node.op in CHOICES or not node.derivable:
            raise ModelError(
                f"{node.op} has no derivative, so that nothing can be learned through it",
                where=node.name,
                expected="operators with derivatives",
                remedy="quantize after training (`hawq-tvm quantize`), or end the network before this node",
            )
    if len(graph.outputs) != 1:
        raise ModelError(
            "has several outputs",
            where=graph.name,
            expected="one output",
            found=", ".join(graph.outputs),
            remedy="keep the one that shall be learned (onnx.utils.extract_model)",
        )


class Deployed:
    """The network of a draft with weights, biases and scales to train.

    parameters: by name. `weight:LAYER`, in steps of the scale that each channel had at the start; `bias:LAYER`, in
    what one such step changes at the largest input; `step:LAYER` and `grid:TENSOR:BITS`, logarithms of the scales of
    weights and of activations, float64. So they are of like size in every layer.
    """

    def __init__(self, draft: Draft, device: str | torch.device = "cpu") -> None:
        check_trainable(draft.graph)
        self.draft, self.graph, self.device = draft, draft.graph, torch.device(device)
        self._layers = {layer.node: layer for layer in self.graph.layers}
        self._constants = {
            n: v.to(self.device) if v.is_floating_point() else v for n, v in self.graph.parameters.items()
        }
        self._grids: dict[Key, Grid] = {self._key(name): grid for name, grid in draft.grids.items()}
        self._grids |= {
            self._narrow_key(layer): draft.narrow[layer.name]
            for layer in self.graph.layers
            if layer.name in draft.narrow
        }
        # What the writer calls the quantizes: their integers have these names in the compiler's module.
        self._kept = {f"{name}_QuantizeLinear" for name in draft.points.source}
        self._kept |= {f"{name}_input_QuantizeLinear" for name in draft.narrow}
        self._lowered: dict[Shapes, tvm.IRModule] = {}
        self._version: tuple[int, ...] = ()
        self.parameters: dict[str, Tensor] = {}
        self._units: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in self.graph.layers:
            self._add_layer(layer, draft.rounded[layer.name])
        for key, grid in self._grids.items():
            self._add(_grid_name(key), torch.tensor(grid.scale, dtype=torch.float64).log())

    def _add(self, name: str, value: Tensor) -> None:
        self.parameters[name] = value.detach().clone().to(self.device).requires_grad_()

    def _add_layer(self, layer: Layer, ours: Rounded) -> None:
        weight, scale = self.graph.parameters[layer.weight], along(ours.scale, layer, ours.codes.ndim)
        read = self.draft.read(layer)
        # A weight stays where its nearest integer is the one that was chosen; others move to it.
        kept = (weight / scale).round() == ours.codes
        largest = read.scale * max(read.high - read.zero, read.zero - read.low)
        self._units[layer.name] = scale.to(self.device), (ours.scale * largest).repeat(layer.repeats).to(self.device)
        self._add(f"weight:{layer.name}", torch.where(kept, weight, ours.weight) / scale)
        self._add(f"step:{layer.name}", ours.scale.double().log())
        if ours.bias is not None:
            self._add(f"bias:{layer.name}", ours.bias.double() / self._units[layer.name][1].double())

    def _bias(self, layer: Layer) -> Tensor | None:
        """Real biases in float32, as they are written from."""
        name = f"bias:{layer.name}"
        return (self.parameters[name] * self._units[layer.name][1]).float() if name in self.parameters else None

    def _key(self, tensor: str) -> Key:
        return self.draft.points.source[tensor], self.draft.points.bits[tensor]

    def _narrow_key(self, layer: Layer) -> Key:
        return self.draft.points.source[layer.input], self.draft.points.narrow[layer.name]

    # -- what is written
    # --------------------------------------------------------------------------------------------------

    def _scale(self, name: str) -> Tensor:
        """Scales in float32, as they are written.

        Raises UsageError when training has made them useless.
        """
        scale = self.parameters[name].exp().float()
        if not bool(((scale.detach() >= LEAST_SCALE) & (scale.detach() <= 1 / LEAST_SCALE)).all()):
            raise UsageError(
                "has a scale that is no number any more: training diverged", where=name, remedy="train at a lower rate"
            )
        return scale

    def _weight(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's weights as real numbers that carry the gradient, their integers, and the scale of each channel."""
        scale, top = self._scale(f"step:{layer.name}"), 2 ** (self.draft.rounded[layer.name].bits - 1) - 1
        weight = self.parameters[f"weight:{layer.name}"] * self._units[layer.name][0]
        steps = along(scale, layer, weight.ndim)
        codes = nearest(weight, steps, (-top - 1, top))
        return on_grid(weight, steps, codes, (-top - 1, top)), codes, scale

    def drafted(self) -> Draft:
        """The draft with what was learned in it."""
        with torch.no_grad():
            steps = {key: float(self._scale(_grid_name(key))) for key in self._grids}
            found = {}
            for layer in self.graph.layers:
                _, codes, scale = self._weight(layer)
                bias = self._bias(layer)
                found[layer.name] = Rounded(
                    layer,
                    self.draft.rounded[layer.name].bits,
                    scale.cpu(),
                    codes.to(torch.int8).cpu(),
                    None if bias is None else bias.cpu(),
                )
        grids = {name: replace(grid, scale=steps[self._key(name)]) for name, grid in self.draft.grids.items()}
        narrow = {
            x.name: replace(self.draft.narrow[x.name], scale=steps[self._narrow_key(x)])
            for x in self.graph.layers
            if x.name in self.draft.narrow
        }
        return replace(self.draft, grids=grids, narrow=narrow, rounded=found)

    def _module(self, shapes: Shapes) -> tvm.IRModule:
        """The compiler's integers of what would be written now; made once until a parameter changes."""
        version = tuple(p._version for p in self.parameters.values())
        if version != self._version:
            self._version, self._lowered = version, {}
        if shapes not in self._lowered:
            annotated = pipeline.import_annotated(self.drafted().model(), shapes=dict(shapes))
            # What comes behind writes the same integers in fewer steps.
            self._lowered[shapes] = pipeline.until(annotated, join_tables, form=False)
        return self._lowered[shapes]

    # -- one inference
    # ----------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """The output, float32, bit for bit what the compiled package returns.

        Raises ModelError as `compile` does where the scales, as they are now, have no integers.
        """
        given = {one.name: torch.as_tensor(inputs[one.name], device=self.device) for one in self.graph.inputs}
        module = self._module(tuple((n, tuple(v.shape)) for n, v in given.items()))
        exact, (output,) = integers.evaluate(module, given, self._kept)
        values: dict[str, Any] = dict(self._constants)
        for name, x in given.items():
            values[name] = self._quantized(name, x, exact)
        for node in self.graph.nodes:
            results = computed(node, self._operands(node, values, exact))
            for name, value in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False):
                if name:
                    values[name] = self._quantized(name, value, exact)
        return straight(values[self.graph.outputs[0]].float(), output)

    def _operands(self, node: Node, values: Mapping[str, Any], exact: Mapping[str, Tensor]) -> list[Any]:
        layer = self._layers.get(node.name)
        if layer is None:
            return [values[n] if n else None for n in node.inputs]
        x, bias = values[layer.input], self._bias(layer)
        if layer.name in self.draft.narrow:
            x = self._rounded(x, self._narrow_key(layer), exact.get(f"{layer.name}_input_QuantizeLinear"))
        return [x, self._weight(layer)[0], *([bias] if bias is not None else [])]

    def _quantized(self, name: str, value: Tensor, exact: Mapping[str, Tensor]) -> Tensor:
        """A tensor as real numbers that its integers stand for; what only moves another's has these already."""
        made = exact.get(f"{name}_QuantizeLinear")
        if self.draft.points.source.get(name) is None or (made is None and self.draft.points.source[name] != name):
            return value
        return self._rounded(value, self._key(name), made)

    def _rounded(self, value: Tensor, key: Key, made: Tensor | None) -> Tensor:
        """Real numbers on a grid; made: their integers, which the compiler leaves out where they are those that the
        value has already.
        """
        grid, scale = self._grids[key], self._scale(_grid_name(key))
        bounds = grid.low - grid.zero, grid.high - grid.zero
        codes = nearest(value, scale, bounds) if made is None else made.to(value.dtype).reshape(value.shape) - grid.zero
        return on_grid(value, scale, codes, bounds)


def _grid_name(key: Key) -> str:
    return f"grid:{key[0]}:{key[1]}"
