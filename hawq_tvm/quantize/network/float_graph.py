"""A float network as a list of torch operations over named tensors: differentiable, and every tensor can be watched
or replaced.

It is made of an ONNX model (`float_onnx.py`) or an exported program (`float_program.py`); what reads it need not
know which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hawq_tvm.core.arrays import check_range
from hawq_tvm.core.errors import InputError, ModelError, UsageError

if TYPE_CHECKING:
    import torch

    from hawq_tvm.frontend.common.inputs import Declared

    Tensor = torch.Tensor

# Called with a tensor's name and value when it has been computed, or with the reader's name, the operand's number and
# the value when it is read; what it returns replaces the value, None leaves it.
Record = Callable[[str, Any], Any]
Feed = Callable[[str, int, Any], Any]


# What moves integers or gives them another type leaves them what they are.
MOVED = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Node:
    """One operation: compute takes the values of `inputs` (None for one left out, whose name is "") and returns one
    value per output.

    name: the node's own, or its first output's.  attributes: an ONNX node's, by name; of an exported program's "call",
    with what it calls its operation.  derivable: whether gradients go through compute.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    compute: Callable[..., Any]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    derivable: bool = True


@dataclass(frozen=True)
class Layer:
    """A weighted layer: a convolution, a transposed one, or a matrix product whose second operand is constant.

    kind: "conv", "deconv" or "matmul".  name, node: the name in bits.json, and of the Node (they differ in exported
    programs).  input, output: tensor names; weight, bias: names in `FloatGraph.parameters` (bias "" where it has none).
    channel_axis: the axis of the weight that counts output channels.  The window's fields are per spatial axis, before
    and after are its padding, extra that of a transposed one's output; empty for a matmul, whose weight is (in, out),
    or (out, in) with channel_axis 0.
    """

    name: str
    node: str
    kind: str
    input: str
    output: str
    weight: str
    bias: str
    channel_axis: int
    group: int = 1
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()

    @property
    def repeats(self) -> int:
        """How many output channels have one entry of the weight's channel axis in common: one in each group."""
        return self.group if self.kind == "deconv" else 1


@dataclass(frozen=True)
class Input:
    """A graph input; None in shape is a dimension that the model leaves open, dtype is numpy's name."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


def sizes_of(declared: Declared) -> tuple[int | None, ...]:
    """A shape as `Input` has it: None for what stays open."""
    return tuple(d if isinstance(d, int) else None for d in declared.dims or ())


@dataclass
class FloatGraph:
    """A float network.

    parameters: the constant tensors by name (weights, biases, statistics, shapes), not copied by `run`.  layers: in
    the order of computation.
    """

    name: str
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    parameters: dict[str, Tensor]
    _last_use: dict[str, int] = field(init=False, repr=False)
    _positions: dict[str, tuple[int, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._last_use = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        self._positions = self._read_positions()

    def _read_positions(self) -> dict[str, tuple[int, int]]:
        """The least and greatest integer of the inputs that are positions in constant tables."""
        source = {i.name: i.name for i in self.inputs if "int" in i.dtype}
        found: dict[str, tuple[int, int]] = {}
        for node in self.nodes:
            first, *rest = node.inputs or ("",)
            if node.op in MOVED and first in source:
                source[node.outputs[0]] = source[first]
            elif node.op == "Gather" and first in self.parameters and rest[0] in source:
                size, name = self.parameters[first].shape[node.attributes.get("axis", 0)], source[rest[0]]
                found[name] = max(found.get(name, (-size, size - 1)), (-size, size - 1))
        return found

    def told(self) -> str:
        """What is computed, as text, but for the values of parameters: the same for the same network."""
        nodes = [
            (node.name, node.op, node.inputs, node.outputs, sorted((k, _told(v)) for k, v in node.attributes.items()))
            for node in self.nodes
        ]
        return repr((self.inputs, self.outputs, self.layers, nodes))

    def run(
        self,
        inputs: Mapping[str, Any],
        record: Record | None = None,
        *,
        feed: Feed | None = None,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """One inference: outputs by name.

        inputs: arrays or tensors by name.  record: called for every input and every computed tensor.  feed: called
        for every operand of every node with the node's name and the operand's number.  parameters: used instead of
        those of the same name.
        Raises InputError for inputs of other names, and for positions that a table does not have.
        """
        import torch

        values: dict[str, Any] = {**self.parameters, **(parameters or {})}
        wanted = {i.name for i in self.inputs}
        if set(inputs) != wanted:
            raise InputError(
                "the inputs have other names",
                where=self.name,
                expected=", ".join(sorted(wanted)),
                found=", ".join(sorted(inputs)) or "none",
                remedy="rename them",
            )
        keep = set(self.outputs) | set(self.parameters)
        for name, value in inputs.items():
            tensor = torch.as_tensor(value)
            if name in self._positions:
                check_range(name, tensor.numpy(force=True), self._positions[name])
            values[name] = _replaced(record(name, tensor), tensor) if record else tensor
        for i, node in enumerate(self.nodes):
            operands = [values[n] if n else None for n in node.inputs]
            if feed:
                operands = [v if v is None else _replaced(feed(node.name, k, v), v) for k, v in enumerate(operands)]
            results = computed(node, operands)
            for name, value in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False):
                if name:
                    values[name] = _replaced(record(name, value), value) if record else value
            # So that inference alone holds no tensor longer than it is read; autograd keeps what it needs by itself.
            for name in node.inputs:
                if self._last_use.get(name) == i and name not in keep:
                    values.pop(name, None)
        return {name: values[name] for name in self.outputs}

    def rerun(self, values: Mapping[str, Any], node: str, operands: Sequence[Any]) -> dict[str, Tensor]:
        """The outputs where one node reads other operands: only what follows from it is computed anew.

        values: of every input and computed tensor, as `run` gives them to its record.
        """
        known, changed = {**self.parameters, **values}, dict[str, Any]()
        for one in self.nodes:
            if one.name == node:
                given = operands
            elif changed.keys().isdisjoint(one.inputs):
                continue
            else:
                given = [changed.get(n, known[n]) if n else None for n in one.inputs]
            results = computed(one, given)
            changed.update(zip(one.outputs, results if isinstance(results, tuple) else (results,), strict=False))
        return {name: changed.get(name, known[name]) for name in self.outputs}

    def layer(self, name: str) -> Layer:
        """The weighted layer of that name.

        Raises UsageError when there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise unknown_layer(name, [one.name for one in self.layers])

    def products(self, layer: Layer, outputs: int) -> int:
        """The multiplications of a layer with so many output elements: each sums as many products as a channel has
        weights; where strides spread the input, the weights take turns.
        """
        weight = self.parameters[layer.weight]
        spread = math.prod(layer.strides) if layer.kind == "deconv" else 1
        return outputs * weight.numel() // (weight.shape[layer.channel_axis] * layer.repeats * spread)

    @property
    def batch(self) -> int | None:
        """The batch size that the model fixes (the first dimension of its first input), None when it leaves it open."""
        shape = self.inputs[0].shape
        return shape[0] if shape else None


def _told(value: Any) -> str:
    return repr(value.tolist() if hasattr(value, "tolist") else value)


def computed(node: Node, operands: Sequence[Any]) -> Any:
    """A node's results.

    Raises ModelError where the operands do not fit: a dimension that the model leaves open may have any size.
    """
    try:
        return node.compute(*operands)
    except (RuntimeError, ValueError, LookupError, TypeError) as e:
        given = ", ".join("x".join(map(str, v.shape)) or "a scalar" for v in operands if hasattr(v, "shape"))
        raise ModelError(
            f"{node.op} cannot be computed on data of this shape",
            where=node.name,
            found=given,
            expected=(str(e).strip().splitlines() or [type(e).__name__])[0],
            remedy="give data of the size that the network was made for, or fix it with --shape",
        ) from e


def _replaced(new: Any, old: Any) -> Any:
    return old if new is None else new


def unknown_layer(name: str, known: Sequence[str], where: str = "") -> UsageError:
    """The error about a layer that the model does not have; it names the most similar one."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, 1, 0.5)
    return UsageError(
        f"there is no weighted layer {name!r}",
        where=where,
        expected=f"one of {len(known)}: {', '.join(known[:6])}{', ...' if len(known) > 6 else ''}",
        remedy=f"did you mean {near[0]!r}?" if near else "take the names that `hawq-tvm allocate` reports",
    )


def folded(nodes: Sequence[Node], parameters: dict[str, Tensor]) -> tuple[Node, ...]:
    """The nodes that depend on an input; the others are computed into `parameters` under the names of their outputs."""
    import torch

    kept = []
    for node in nodes:
        if all(not n or n in parameters for n in node.inputs):
            with torch.no_grad():
                results = computed(node, [parameters[n] if n else None for n in node.inputs])
            results = results if isinstance(results, tuple) else (results,)
            parameters.update((n, v) for n, v in zip(node.outputs, results, strict=False) if n)
        else:
            kept.append(node)
    return tuple(kept)


def named_once(layers: Sequence[Layer], where: str) -> tuple[Layer, ...]:
    """The layers, when their names differ.

    Raises ModelError naming one that is used twice.
    """
    seen: set[str] = set()
    for layer in layers:
        if layer.name in seen:
            raise ModelError(
                f"has two weighted layers called {layer.name!r}",
                where=where,
                remedy="give every node a name of its own",
            )
        seen.add(layer.name)
    return tuple(layers)
