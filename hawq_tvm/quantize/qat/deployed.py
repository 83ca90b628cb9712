"""A quantized network as the compiled package computes it, in torch and with gradients: what is trained is what runs.

Every tensor holds the integers of the deployed arithmetic, zero points taken away, in a floating type that is exact
for them. Weights, biases and scales are real numbers; at every forward pass they become the integers that the
written model would hold, and scales the dyadic numbers that the compiler would make of them. Gradients are those of
the real formula (`straight.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node
from hawq_tvm.quantize.network.float_operators import Attributes, padding_of, per_axis
from hawq_tvm.quantize.network.roles import Roles
from hawq_tvm.quantize.ptq.observers import Grid
from hawq_tvm.quantize.ptq.points import CLAMPS, clip_bounds
from hawq_tvm.quantize.ptq.quantizer import Draft
from hawq_tvm.quantize.ptq.weights import Rounded, along

from .functions import Tables
from .straight import EXACT_FLOAT32, EXACT_FLOAT64, Array, Operand, Tensor, requantized, rounded, straight
from .values import Codes, Curve, Joined, Real, added, product

EXACT_BITS = 53  # of an integer that float64 holds
# Elementwise on exact numbers: quotients of floats, and the nearest integers, ties to even.
_ratios = np.frompyfunc(lambda a, b: Fraction(a) / Fraction(b), 2, 1)
_nearest = np.frompyfunc(round, 1, 1)
INT32 = (-(2**31), 2**31 - 1)
LEAST_SCALE = 1e-30
SHAPES = ("Shape", "Size", "Constant", "ConstantOfShape")
AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
WEIGHTED = ("Conv", "Gemm", "MatMul")
# What only moves integers, or chooses among them.
MOVES = (
    "Flatten",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "MaxPool",
    "GlobalMaxPool",
    "Slice",
    "Split",
    "Gather",
    "Expand",
    "Identity",
    "Dropout",
    "Pad",
)
SCALES, SUMS = ("Mul", "Div", "Neg"), ("Add", "Sub", "Sum")
KNOWN = (*WEIGHTED, *CLAMPS, *MOVES, *AVERAGES, *SUMS, *SCALES, "Concat", *SHAPES)
# Which grid a tensor has: the tensor that it belongs to, and how many bits.
Key = tuple[str, int]


def check_operators(graph: FloatGraph, roles: Roles) -> None:
    """Whether every node's integers can be computed here.

    Raises ModelError naming the first that cannot.
    """
    layers = {layer.node for layer in graph.layers}
    for node in graph.nodes:
        alone = (roles.function(node) or roles.moves(node)) and node.derivable and node.name not in roles.inside
        known = node.op in KNOWN or alone
        if not known or (node.op in WEIGHTED and node.name not in layers):
            product = "of two computed tensors " if node.op in WEIGHTED else ""
            raise _refused(node, f"{product}cannot be fine-tuned in the deployed arithmetic")


def _refused(node: Node, why: str) -> ModelError:
    remedy = "quantize after training (`hawq-tvm quantize`), or end the network before this node"
    return ModelError(
        f"{node.op} {why}",
        where=node.name,
        expected=f"{', '.join(sorted({*KNOWN} - {*SHAPES}))}, or a function of every element of one tensor",
        remedy=remedy,
    )


class Deployed:
    """The network of a draft with weights, biases and scales to train.

    parameters: by name. `weight:LAYER`, in steps of the scale that each channel had at the start; `bias:LAYER`, in
    what one such step changes at the largest input; `step:LAYER` and `grid:TENSOR:BITS`, logarithms of the scales of
    weights and of activations, float64. So they are of like size in every layer.
    """

    def __init__(self, draft: Draft, device: str | torch.device = "cpu") -> None:
        check_operators(draft.graph, draft.points.roles)
        if len(draft.graph.outputs) != 1:
            raise ModelError(
                "has several outputs",
                where=draft.graph.name,
                expected="one output of scores",
                found=", ".join(draft.graph.outputs),
            )
        joined = next((n for n in draft.graph.nodes if {*n.outputs} & {*draft.points.joined}), None)
        if joined is not None:
            raise _refused(joined, "at the output, whose parts keep their scales, cannot be fine-tuned")
        self.draft, self.graph, self.device = draft, draft.graph, torch.device(device)
        self._tables = Tables(draft)
        self._layers = {layer.node: layer for layer in self.graph.layers}
        self._nodes = {node.name: node for node in draft.prepared.graph.node}
        self._constants = {
            n: v.to(self.device) if v.is_floating_point() else v for n, v in self.graph.parameters.items()
        }
        self._grids: dict[Key, Grid] = {self._key(name): grid for name, grid in draft.grids.items()}
        self._grids |= {
            self._narrow_key(layer): draft.narrow[layer.name]
            for layer in self.graph.layers
            if layer.name in draft.narrow
        }
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
        self._units[layer.name] = (
            scale.to(self.device),
            ours.scale.to(self.device) * read.scale * max(read.high - read.zero, read.zero - read.low),
        )
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

    # -- the integers that a written model holds
    # --------------------------------------------------------------------------

    def _scale(self, key: Key) -> tuple[Tensor, float]:
        scale = self._exponential(_grid_name(key))
        return scale, float(scale.detach())

    def _exponential(self, name: str) -> Tensor:
        """Scales in float32, as they are written.

        Raises UsageError when training has made them useless.
        """
        scale = self.parameters[name].exp().float()
        if not bool(((scale.detach() >= LEAST_SCALE) & (scale.detach() <= 1 / LEAST_SCALE)).all()):
            raise UsageError(
                "has a scale that is no number any more: training diverged", where=name, remedy="train at a lower rate"
            )
        return scale

    def _weights(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Codes and scales of a layer's weights."""
        scale, top = self._exponential(f"step:{layer.name}"), 2 ** (self.draft.rounded[layer.name].bits - 1) - 1
        weight = self.parameters[f"weight:{layer.name}"]
        soft = weight * (self._units[layer.name][0] / along(scale, layer, weight.ndim))
        return straight(soft.clamp(-top - 1, top), soft.detach().round().clamp(-top - 1, top)), scale

    def drafted(self) -> Draft:
        """The draft with what was learned in it."""
        steps = {key: self._scale(key)[1] for key in self._grids}
        grids = {name: replace(grid, scale=steps[self._key(name)]) for name, grid in self.draft.grids.items()}
        narrow = {
            x.name: replace(self.draft.narrow[x.name], scale=steps[self._narrow_key(x)])
            for x in self.graph.layers
            if x.name in self.draft.narrow
        }
        found = {}
        for layer in self.graph.layers:
            codes, scale = (v.detach().cpu() for v in self._weights(layer))
            bias = self._bias(layer)
            found[layer.name] = Rounded(
                layer,
                self.draft.rounded[layer.name].bits,
                scale,
                codes.to(torch.int8),
                None if bias is None else bias.detach().cpu(),
            )
        return replace(self.draft, grids=grids, narrow=narrow, rounded=found)

    # -- one inference
    # ----------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Mapping[str, Any]) -> Tensor:
        """The output, float32, bit for bit what the compiled package returns.

        Raises ModelError naming a node whose integers cannot be computed here.
        """
        values: dict[str, Any] = dict(self._constants)
        for one in self.graph.inputs:
            x = torch.as_tensor(inputs[one.name], device=self.device)
            values[one.name] = self._border(x, self._key(one.name)) if one.name in self.draft.points.source else x
        for node in self.graph.nodes:
            results = self._computed(node, [values[n] if n else None for n in node.inputs])
            for name, value in zip(node.outputs, results, strict=False):
                if name:
                    values[name] = self._quantized(node, name, value) if name in self.draft.points.source else value
        return self._output(values[self.graph.outputs[0]])

    def _computed(self, node: Node, operands: list[Any]) -> tuple[Any, ...]:
        if not any(isinstance(v, Codes | Real | Joined | Curve) for v in operands):
            results = node.compute(*operands)
            return results if isinstance(results, tuple) else (results,)
        first = operands[0]
        if node.name in self._layers and isinstance(first, Codes):
            return (self._layer(node, self._layers[node.name], first),)
        function = self._function(node, operands)
        if function is not None:
            return (function,)
        if node.op in CLAMPS and isinstance(first, Codes | Real | Joined):
            bounds = clip_bounds(node, self.graph)
            parts = tuple(
                p.clipped(*bounds) for p in (first.parts if isinstance(first, Joined) else [self._real(node, first)])
            )
            return (replace(first, parts=parts) if isinstance(first, Joined) else parts[0],)
        if node.op in SHAPES and isinstance(first, Codes):
            return (node.compute(first.codes),)
        moved = self._moved(node, operands)
        if moved is not None:
            return moved
        if node.op in AVERAGES and isinstance(first, Codes):
            return (self._average(node, first, operands[1:]),)
        if node.op == "Concat":
            axis = int(Attributes(self._nodes[node.name], 21).get("axis"))
            return (Joined(tuple(self._real(node, v) for v in operands), axis),)
        if node.op in SUMS:
            return (self._sum(node, operands),)
        if node.op == "Mul" and all(isinstance(v, Codes) for v in operands):
            return (product(*operands),)
        if node.op in SCALES:
            return (self._scaled(node, operands),)
        raise _refused(node, "stands where its integers cannot be computed")

    def _moved(self, node: Node, operands: list[Any]) -> tuple[Codes, ...] | None:
        """Results whose elements are all one quantized tensor's, or zeros; None where the node makes others."""
        read = [v for v in operands if isinstance(v, Codes)]
        others = [v for v in operands if v is not None and not isinstance(v, Codes)]
        scales = node.op == "Resize"  # which are no elements
        plain = all(isinstance(v, torch.Tensor) and (scales or not (v.is_floating_point() and v.any())) for v in others)
        if len(read) != 1 or not plain or not self.draft.points.roles.moves(node) or node.op == "Concat":
            return None
        results = node.compute(*(v.codes if isinstance(v, Codes) else v for v in operands))
        results = results if isinstance(results, tuple) else (results,)
        return tuple(read[0] if r is read[0].codes else replace(read[0], codes=r) for r in results)

    def _function(self, node: Node, operands: list[Any]) -> Curve | None:
        """A function of one quantized tensor, None where the node is none, or adds or clips what is quantized next."""
        read = [v for v in operands if isinstance(v, Codes | Curve)]
        leaves = {id(v.leaf if isinstance(v, Curve) else v) for v in read}
        others = [v for v in operands if v is not None and not isinstance(v, Codes | Curve)]
        single = len(leaves) == 1 and all(isinstance(v, torch.Tensor) and v.numel() == 1 for v in others)
        roles, curved = self.draft.points.roles, any(isinstance(v, Curve) for v in read)
        if not single or not roles.function(node) or (roles.moves(node) and not curved):
            return None
        if not curved and node.op in (*CLAMPS, "Add") and node.outputs[0] in self.draft.points.source:
            return None
        leaf = read[0].leaf if isinstance(read[0], Curve) else read[0]
        return Curve(leaf, node.compute(*(v.real if isinstance(v, Codes | Curve) else v for v in operands)))

    def _scaled(self, node: Node, operands: list[Any]) -> Real:
        """A sum times a constant, or divided by one."""
        if node.op == "Mul" and isinstance(operands[0], torch.Tensor):
            operands = operands[::-1]
        value, constant = [*operands, torch.tensor(-1.0)][:2]
        if not isinstance(value, Codes | Real) or not isinstance(constant, torch.Tensor):
            raise _refused(node, "stands where its integers cannot be computed")
        real, numbers = self._real(node, value), constant.detach().cpu().numpy()
        straight_on = not real.clips or (numbers.size == 1 and numbers.flat[0] > 0)
        if not straight_on or not np.isfinite(numbers).all() or (node.op == "Div" and not numbers.all()):
            raise _refused(node, "stands where its integers cannot be computed")
        return real.times(np.asarray(_ratios(1, numbers), object) if node.op == "Div" else numbers)

    def _real(self, node: Node, value: Any) -> Real:
        if isinstance(value, Codes):
            return value.sum()
        if isinstance(value, Curve | Joined):
            raise _refused(node, "stands where its integers cannot be computed")
        if not isinstance(value, Real):
            raise _refused(node, "of a constant and a computed tensor cannot be fine-tuned in the deployed arithmetic")
        return value

    def _sum(self, node: Node, operands: list[Any]) -> Real:
        terms = [
            Real((), v.detach().cpu().double().numpy()) if isinstance(v, torch.Tensor) else self._real(node, v)
            for v in operands
        ]
        if any(t.clips for t in terms):
            raise _refused(node, "stands where its integers cannot be computed")
        if node.op == "Sub":
            terms[1] = terms[1].times(np.asarray(-1.0))
        return added(terms)

    # -- quantizing
    # -------------------------------------------------------------------------------------------------------

    def _border(self, x: Tensor, key: Key) -> Codes:
        """(A2) in float32."""
        grid, (scale, step) = self._grids[key], self._scale(key)
        low, high = grid.low - grid.zero, grid.high - grid.zero
        # A tensor of one element: CUDA multiplies by the reciprocal of a plain number.
        soft = x / scale.reshape([1] * x.ndim)
        return Codes(rounded(soft.clamp(low, high)), scale, step, low, high)

    def _quantized(self, node: Node, name: str, value: Any) -> Codes:
        key = self._key(name)
        if isinstance(value, Codes) and key in (self._key(n) for n in node.inputs if n in self.draft.points.source):
            return value
        if isinstance(value, Curve):
            return self._tabulated(node, name, value)
        return self._on_grid(value.sum() if isinstance(value, Codes) else value, key, node.name)

    def _tabulated(self, node: Node, name: str, value: Curve) -> Codes:
        """(A16)."""
        if name not in self._tables:
            raise _refused(node, "ends a function whose integers cannot be computed")
        key, leaf = self._key(name), value.leaf
        grid, (scale, step) = self._grids[key], self._scale(key)
        low, high = grid.low - grid.zero, grid.high - grid.zero
        found = self._tables.integers(name, node.name, (leaf.step, leaf.low, leaf.high), (step, low, high))
        table = torch.as_tensor(found, dtype=torch.float32, device=self.device)
        exact = table[(leaf.codes.detach() - leaf.low).long()]
        codes = straight((value.real / scale).clamp(low, high), exact)
        return Codes(codes, scale, step, min(0, int(found.min())), max(0, int(found.max())))

    def _on_grid(self, value: Real | Joined, key: Key, where: str) -> Codes:
        grid, (scale, step) = self._grids[key], self._scale(key)
        low, high = grid.low - grid.zero, grid.high - grid.zero
        parts, spans = [], []
        for part in value.parts if isinstance(value, Joined) else (value,):
            spans.append(part.span(step, low, high))
            parts.append(requantized(part.operands, part.constant, scale, step, spans[-1], where))
        codes = torch.cat(parts, value.axis) if isinstance(value, Joined) else parts[0]
        return Codes(codes, scale, step, min(0, *(s[0] for s in spans)), max(0, *(s[1] for s in spans)))

    def _output(self, value: Any) -> Tensor:
        """(A1), and (A1a) for a constant that was added to the last layer's sums and is no whole number of their
        units.
        """
        (one,) = (value.sum() if isinstance(value, Codes) else value).operands
        constant = np.zeros(()) if isinstance(value, Codes) else value.constant
        with torch.no_grad():
            unit = np.asarray(one.exact, np.float64)
            counts = np.asarray(_ratios(constant, one.exact), object)
            if all(c.denominator == 1 for c in counts.flat):
                total, scale = (
                    one.codes.double() + torch.as_tensor(counts.astype(np.float64), device=self.device),
                    torch.as_tensor(unit, device=self.device),
                )
                narrow = scale.float()
                exact = total.float() * narrow if bool((narrow.double() == scale).all()) else (total * scale).float()
            else:
                largest = math.ceil(
                    max(np.max(np.abs(np.asarray(v).astype(object) + counts)) for v in (one.low, one.high))
                )
                finer = 1 << (EXACT_BITS - largest.bit_length())
                added = torch.as_tensor(np.asarray(_nearest(counts * finer), np.float64), device=self.device)
                exact = (
                    (one.codes.double() * finer + added) * torch.as_tensor(unit / finer, device=self.device)
                ).float()
        return straight(
            one.codes * one.scale
            + torch.as_tensor(np.asarray(constant, np.float64), dtype=torch.float32, device=self.device),
            exact,
        ).float()

    # -- operators
    # --------------------------------------------------------------------------------------------------------

    def _layer(self, node: Node, layer: Layer, x: Codes) -> Real:
        """The sums of a convolution or matrix product (A10), with their bias."""
        if layer.name in self.draft.narrow:
            x = self._on_grid(x.sum(), self._narrow_key(layer), node.name)
        codes, scale = self._weights(layer)
        rows = codes.detach().movedim(layer.channel_axis, 0).flatten(1).double()
        positive, negative = rows.clamp(min=0).sum(1), rows.clamp(max=0).sum(1)
        low, high = positive * x.low + negative * x.high, positive * x.high + negative * x.low
        given, bias = [], self._bias(layer)
        if bias is not None:
            unit = (x.scale * scale).detach().double()
            exact = (bias.detach().double() / unit).round().clamp(*INT32)
            low, high = low + exact, high + exact
            given.append(straight((bias / (x.scale * scale)).double(), exact))
        kind = self._exact_type(layer.name, low, high)
        total = node.compute(x.codes.to(kind), codes.to(kind), *(c.to(kind) for c in given))
        shape = [1, -1, *[1] * (total.ndim - 2)] if layer.kind == "conv" else [-1]
        bounds = [v.cpu().numpy().astype(np.int64).reshape(shape) for v in (low, high)]
        factors = scale.detach().cpu().double().numpy().reshape(shape) * x.step
        return Real((Operand(rounded(total), (scale * x.scale).reshape(shape), factors, *bounds),))

    def _exact_type(self, where: str, low: Tensor, high: Tensor) -> torch.dtype:
        """A type that holds the sums exactly. On a GPU always float64: its convolutions in float32 may round
        operands and transform sums.
        """
        worst = max(-float(low.min()), float(high.max()))
        if worst >= EXACT_FLOAT64:
            raise ModelError(
                "has sums that float64 does not hold", where=where, expected="below 2^53", found=f"{worst:g}"
            )
        return torch.float32 if worst < EXACT_FLOAT32 and self.device.type == "cpu" else torch.float64

    def _average(self, node: Node, x: Codes, rest: list[Any]) -> Real:
        """(A15): the sum of each window, the divisor in the scale."""
        if node.op == "AveragePool":
            total, counts, window = self._windows(node, x.codes)
        else:
            mean = node.compute(x.codes.double(), *rest)
            window = x.codes.numel() // mean.numel()
            counts = np.asarray(1.0 if node.op == "ReduceSum" else float(window))
            total = rounded(mean * (1 if node.op == "ReduceSum" else window)).float()
        if window * max(-x.low, x.high) >= EXACT_FLOAT32:
            raise _refused(node, f"over {window} values leaves what is exact in float32")
        exact = np.asarray(Fraction(x.step) / counts.astype(np.int64).astype(object), object)
        scale = x.scale / torch.as_tensor(counts, dtype=torch.float32, device=self.device)
        return Real((Operand(total, scale, exact, np.asarray(window * x.low), np.asarray(window * x.high)),))

    def _windows(self, node: Node, x: Tensor) -> tuple[Tensor, Array, int]:
        a = Attributes(self._nodes[node.name], 21)
        kernel = tuple(int(k) for k in a.get("kernel_shape"))
        if len(kernel) != 2 or a.get("ceil_mode", 0):
            raise _refused(
                node, "with ceil_mode, or over other than two axes, cannot be fine-tuned in the deployed arithmetic"
            )
        (top, left), (bottom, right) = padding_of(a, 2)

        def sums(v: Tensor) -> Tensor:
            padded = F.pad(v, [left, right, top, bottom])
            return F.avg_pool2d(padded, kernel, per_axis(a, "strides", 2), divisor_override=1)

        window = kernel[0] * kernel[1]
        counts = (
            np.asarray(float(window))
            if a.get("count_include_pad", 0)
            else sums(torch.ones(1, 1, *x.shape[2:])).double().numpy()
        )
        return sums(x), counts, window


def _grid_name(key: Key) -> str:
    return f"grid:{key[0]}:{key[1]}"
