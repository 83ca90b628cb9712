"""Simulated ("fake") quantization in float32, of two kinds: the quantized model itself, and its float network as
training frameworks simulate it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import ModelError
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer
from hawq_tvm.quantize.ptq.weights import nearest
from hawq_tvm.verify.compare import value_of
from hawq_tvm.verify.reference import evaluate_call

from .fake_structure import Array, Grid, Structure, Sum, Tensor, Weighted

# Below this mean cosine of their output channels two weight tensors are not one network's: rounded to 4 bits they keep
# about 0.99, unrelated ones have about 0.
LEAST_LIKENESS = 0.5
ADDITIONS = ("Add", "Sum", "aten.add.Tensor", "aten.add_.Tensor")


# -- the quantized model in float32
# ---------------------------------------------------------------------------------------


def run_annotated(module: tvm.IRModule, inputs: Mapping[str, Array], head: Mapping[str, Array]) -> dict[str, Array]:
    """The integers of every quantize of an ANNOTATED module by name, with all that is between a dequantize and a
    quantize in float32.

    Convolutions and matrix products are PyTorch's; every other operator is the reference's, rounded to float32.
    head: values that a float head computed, taken as they are.
    """
    main = module["main"]
    known: dict[relax.Var, Any] = {p: inputs[p.name] for p in main.params}
    found = {}
    for b in stages.bindings(main):
        if b.var.name in head:
            known[b.var] = head[b.var.name]
            continue
        known[b.var] = _single(b.value, known)
        if ops.op_name(b.value) == "hawq.quantize":
            found[b.var.name] = known[b.var]
    return found


def _single(expr: relax.Expr, known: Mapping[relax.Var, Any]) -> Any:
    if not isinstance(expr, relax.Call):
        return value_of(expr, known)
    args = [value_of(a, known) for a in expr.args]
    name = ops.op_name(expr) if stages.is_float(expr) else ""
    if name == "relax.matmul":
        return torch.matmul(*(torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in args)).numpy()
    return _conv2d(expr, *args) if name == "relax.nn.conv2d" else _narrow(evaluate_call(expr, args))


def _narrow(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_narrow(v) for v in value)
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float64 else value


def _conv2d(call: relax.Call, x: Array, w: Array) -> Array:
    top, left, bottom, right = (int(p) for p in call.attrs.padding)
    strides, dilation = ([int(v) for v in values] for values in (call.attrs.strides, call.attrs.dilation))
    padded = F.pad(torch.from_numpy(np.ascontiguousarray(x, np.float32)), (left, right, top, bottom))
    return F.conv2d(
        padded,
        torch.from_numpy(np.ascontiguousarray(w, np.float32)),
        None,
        strides,
        0,
        dilation,
        int(call.attrs.groups),
    ).numpy()


# -- the float network, simulated
# -----------------------------------------------------------------------------------------


class Simulated:
    """A float network whose convolutions and matrix products read rounded weights and rounded inputs; all else stays
    float32.

    BatchNormalization is not folded, residual sums are not rounded.  Weights are rounded to the nearest integer per
    output channel, before BatchNormalization, with as many bits and by the same rule as `quantize` has; inputs on
    the grids that the quantized model has there. Which layer is which is found by weights, which tensor is which sum
    by the layers before it; names play no part.
    Raises ModelError when the weights are not those of the quantized model.
    """

    def __init__(self, graph: FloatGraph, structure: Structure, where: str) -> None:
        self.graph, self.structure = graph, structure
        self.layers = _matched(graph, structure.weighted, where)
        self.weights = {
            layer.node: self._weight(ours, layer) for ours, layer in self.layers if ours.weight_bits is not None
        }
        self.inputs = {layer.node: ours for ours, layer in self.layers if ours.grid is not None}
        self.operands = self._operands()
        self.sums = self._sums()

    def _weight(self, ours: Weighted, layer: Layer) -> torch.Tensor:
        assert ours.weight_bits is not None
        return nearest(
            self.graph.parameters[layer.weight], None, layer, ours.weight_bits, ours.weight_bits < 8, 1.0
        ).weight

    def _operands(self) -> dict[tuple[str, int], str]:
        """Which operand of which node is a layer's "input" or its "weight"."""
        layers, found = {layer.node: layer for _, layer in self.layers}, {}
        for node in self.graph.nodes:
            if node.name in layers:
                kinds = {layers[node.name].input: "input", layers[node.name].weight: "weight"}
                found.update({(node.name, i): kinds[name] for i, name in enumerate(node.inputs) if name in kinds})
        return found

    def _sums(self) -> dict[str, str]:
        """The float network's sum (a tensor) of every residual sum of the quantized model (a quantize) that has one
        of the same sources.
        """
        sources: dict[str, frozenset[int]] = {one.name: frozenset([-1 - i]) for i, one in enumerate(self.graph.inputs)}
        numbers = {layer.node: i for i, (_, layer) in enumerate(self.layers)}
        theirs: dict[frozenset[int], list[str]] = {}
        for node in self.graph.nodes:
            read = [sources[n] for n in node.inputs if n in sources]
            joined = frozenset([numbers[node.name]]) if node.name in numbers else frozenset().union(*read)
            if node.op in ADDITIONS and len(read) == 2 and read[0] != read[1]:
                theirs.setdefault(joined, []).append(node.outputs[0])
            sources.update((n, joined) for n in node.outputs if n)
        ours: dict[frozenset[int], list[str]] = {}
        for tensor in self.structure.tensors.values():
            if tensor.sum is not None:
                ours.setdefault(tensor.sum.sources, []).append(tensor.name)
        return {
            name: place
            for key, names in ours.items()
            if len(names) == len(theirs.get(key, []))
            for name, place in zip(names, theirs[key], strict=True)
        }

    def run(self, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        """By quantize of the quantized model: the integers that layers read there, and the residual sums, not
        rounded.
        """
        read: dict[str, Array] = {}
        sums: dict[str, Array] = {}
        wanted = {place: name for name, place in self.sums.items()}

        def feed(node: str, number: int, value: Any) -> Any:
            operand = self.operands.get((node, number))
            if operand == "weight":
                return self.weights.get(node)
            ours = self.inputs.get(node) if operand == "input" else None
            if ours is None or ours.grid is None:
                return None
            steps = _steps(value, ours.grid)
            if ours.reads is not None:
                read.setdefault(ours.reads, steps.numpy().astype(np.int64) + ours.grid.zero)
            return steps * torch.from_numpy(np.asarray(ours.grid.scale, np.float32))

        def record(name: str, value: Any) -> None:
            if name in wanted:
                sums[wanted[name]] = value.numpy().copy()  # an operator after it may write in place

        with torch.no_grad():
            self.graph.run(
                dict(zip((i.name for i in self.graph.inputs), inputs.values(), strict=True)), record, feed=feed
            )
        return read, {name: self._clamped(self.structure.tensors[name], value) for name, value in sums.items()}

    def _clamped(self, tensor: Tensor, value: Array) -> Array:
        """A sum with the clamps of the quantized model behind it; a ReLU may be there as a range that begins at zero
        (A12).
        """
        assert isinstance(tensor.sum, Sum)
        value = self.structure.applied(tensor.sum.clamps, value)
        return np.maximum(value, 0) if tensor.grid.qmin == tensor.grid.zero else value


def _steps(value: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(A2) the nearest numbers of a grid, as steps from zero, in float32."""
    return (
        (value / torch.from_numpy(np.asarray(grid.scale, np.float32)))
        .round()
        .clamp(grid.qmin - grid.zero, grid.qmax - grid.zero)
    )


def _matched(graph: FloatGraph, weighted: list[Weighted], where: str) -> list[tuple[Weighted, Layer]]:
    """The float layer of every layer of the quantized model: of those with weights of its shape the one whose
    channels point the same way.
    """
    rows = {layer.name: graph.parameters[layer.weight].movedim(layer.channel_axis, 0).numpy() for layer in graph.layers}
    left, found = list(graph.layers), []
    for ours in weighted:
        likeness = {
            layer.name: _likeness(ours.weight, rows[layer.name])
            for layer in left
            if rows[layer.name].shape == ours.weight.shape
        }
        best = max(likeness, key=lambda name: likeness[name], default=None)
        if best is None or likeness[best] < LEAST_LIKENESS:
            known = (
                f"at best {likeness[best]:.2f} like it (cosine by output channel), in {best}"
                if best is not None
                else f"none of shape {list(ours.weight.shape)}"
            )
            raise ModelError(
                "is not the float network of the quantized model",
                where=where,
                expected=f"weights of the layer {ours.name}",
                found=known,
                remedy="give the model that was quantized",
            )
        layer = next(one for one in left if one.name == best)
        left.remove(layer)
        found.append((ours, layer))
    if left:
        raise ModelError(
            "is not the float network of the quantized model",
            where=where,
            expected=f"{len(weighted)} layers with weights",
            found=f"{len(graph.layers)}, {left[0].name} among them",
        )
    return found


def _likeness(a: Array, b: Array) -> float:
    """The mean cosine between output channels, whatever their lengths and signs, which BatchNormalization changes."""
    x, y = (v.reshape(len(v), -1).astype(np.float64) for v in (a, b))
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.mean(np.abs((x * y).sum(1))[lengths > 0] / lengths[lengths > 0])) if (lengths > 0).any() else 0.0
