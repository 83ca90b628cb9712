"""Scales that always compile: no tensor is finer than what it is computed from, none is beyond float32.

An integer layer counts in units of its input's scale times its weights'.  Where calibration saw nothing but zeros,
or only the last traces of a ReLU that is hardly ever on, the range that was seen says nothing: a scale made of it
would ask a requantize to multiply by more than its 31 bits hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
import torch

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import InputError, ModelError
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer
from hawq_tvm.quantize.network.roles import Roles

from .observers import LEAST, Histogram

# A grid is at most this much finer than the units that its tensor is counted in: 8 bits of it lie within one unit.
FINER = 2.0**-8
# Magnitudes of weights and activations that a product of two scales can hold in float32.
GREATEST = 2.0**60


class Units:
    """What every tensor is counted in, filled in the order of computation.

    ranges: what calibration saw of every float tensor.  scales: of quantized tensors.  products: of layers' results.
    """

    def __init__(self, graph: FloatGraph, roles: Roles, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.scales: dict[str, float] = {}
        self.products: dict[str, float] = {}
        self._roles = roles
        self._ranges, self._constants = ranges, graph.parameters
        self._makers = {name: node for node in graph.nodes for name in node.outputs if name}

    def least(self, name: str) -> float:
        """The finest scale that a tensor may have; 0 where it is a function of another kind, or an input."""
        return FINER * self._made(name)

    def _unit(self, name: str) -> float:
        return self.scales[name] if name in self.scales else self._made(name)

    def _made(self, name: str) -> float:
        """The units that a tensor's maker counts in."""
        if name in self.products:
            return self.products[name]
        maker = self._makers.get(name)
        if maker is None or name not in self._ranges:
            return 0.0
        operands = [self._unit(n) for n in maker.inputs if n in self._ranges]
        if self._roles.sums(maker):
            return max(operands, default=0.0)
        return operands[0] * operands[1] if len(operands) == 2 and self._roles.multiplies(maker) else 0.0

    def usable(self, name: str, seen: Histogram) -> Histogram:
        """What was seen of a tensor; of one that was always zero, the range of what it is made from, else -1 to 1."""
        at, visited = name, set[str]()
        while self._reach(at) < LEAST and at not in visited:
            visited.add(at)
            maker = self._makers.get(at)
            operands = [n for n in maker.inputs if n in self._ranges] if maker and self._roles.sums(maker) else []
            at = max(operands, key=self._reach, default=at)
        reach = self._reach(at) if self._reach(at) >= LEAST else 1.0
        return seen if at == name and name not in visited else Histogram(-reach, reach)

    def _reach(self, name: str) -> float:
        low, high = self._ranges[name]
        return max(abs(low), abs(high))


def added_bias(graph: FloatGraph, layer: Layer) -> float:
    """The greatest magnitude of a constant that is added to a layer's result, which becomes its bias; 0 without one."""
    readers = [node for node in graph.nodes if layer.output in node.inputs and node.op == "Add"]
    constants = [graph.parameters[n] for node in readers for n in node.inputs if n in graph.parameters]
    return max((float(value.abs().max()) for value in constants if value.numel()), default=0.0)


def check_constants(graph: FloatGraph) -> None:
    """Raise ModelError for a layer whose weights or bias have no scale in float32."""
    for layer in graph.layers:
        for name in filter(None, (layer.weight, layer.bias)):
            value = graph.parameters[name]
            if value.numel() == 0:
                raise ModelError("has no weights", where=layer.name, found=f"{name}: {'x'.join(map(str, value.shape))}")
            most = float(value.abs().max())
            if not most < GREATEST or not torch.isfinite(value).all():
                expected = f"finite numbers below {GREATEST:.3g}"
                raise ModelError(
                    "has constants that no scale holds", where=layer.name, expected=expected, found=f"{name}: {most:g}"
                )


def check_finite(name: str, low: float, high: float) -> None:
    """Raise InputError for a tensor that calibration saw infinite or not a number."""
    if not (math.isfinite(low) and math.isfinite(high)):
        remedy = "look at the data, and how pixels become numbers"
        raise InputError("is not finite on the calibration data", where=name, remedy=remedy)


def check_ranges(seen: Mapping[str, Histogram]) -> None:
    """Raise InputError for a tensor that calibration saw beyond what scales hold."""
    for name, one in seen.items():
        check_finite(name, one.low, one.high)
        most = max(abs(one.low), abs(one.high))
        if most >= GREATEST:
            raise InputError(
                "reaches values on the calibration data that no scale holds",
                where=name,
                expected=f"below {GREATEST:.3g}",
                found=f"{most:g}",
                remedy="look at the data, and how pixels become numbers",
            )


def check_compiles(model: onnx.ModelProto, name: str, tail: bool = False) -> None:
    """Raise ModelError naming every operator of a quantized model that `compile` refuses.

    tail: with --allow-float-tail.
    """
    inputs = {i.name: tuple(d.dim_value or 1 for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
    try:
        pipeline.to_packed(pipeline.import_annotated(model, shapes=inputs, allow_float_tail=tail))
    except ModelError as e:
        found = ", ".join(dict.fromkeys(f"{p['layer']}: {p['reason']}" for p in e.problems()))
        raise ModelError(
            "cannot be quantized to integers alone",
            where=name,
            expected="operators that have an integer form",
            found=found,
            remedy="express them by others, or cut the model before them",
        ) from e
