"""What a float network's layers hold and multiply, and the allocation problem that this makes with sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hawq_tvm.core.errors import ModelError
from hawq_tvm.quantize.network.data import Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.ptq.blocks import blocks_of

from .table import BLOCK, Row, Table

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sizes:
    """By layer: weights, activations read and multiplications for one image."""

    weights: Array
    activations: Array
    macs: Array


def sizes_of(graph: FloatGraph, data: Calibration) -> Sizes:
    """The sizes of a network's layers on data of that shape, from one image.

    Raises ModelError when it has no layers, or no output in floating point.
    """
    import torch

    if not graph.layers:
        raise ModelError("has no layers with weights", where=graph.name, expected="convolutions or matrix products")
    counts, wanted = dict[str, int](), {name for one in graph.layers for name in (one.input, one.output)}

    def note(name: str, value: Any) -> None:
        if name in wanted:
            counts[name] = value.numel() // len(value)

    with torch.no_grad():
        outputs = graph.run(next(data.batches(graph.batch or 1, graph.batch is not None)).inputs, note)
    check_outputs(graph, outputs)
    return Sizes(
        np.array([graph.parameters[one.weight].numel() for one in graph.layers]),
        np.array([counts[one.input] for one in graph.layers]),
        np.array([graph.products(one, counts[one.output]) for one in graph.layers]),
    )


def table_of(
    graph: FloatGraph,
    sizes: Sizes,
    choices: Sequence[str],
    sensitivities: Array,
    pairs: Array | None = None,
    *,
    ties: Mapping[str, str] | None = None,
    fixed: Mapping[str, str] | None = None,
    facts: Sequence[Mapping[str, Any]] | None = None,
) -> Table:
    """The allocation problem of a network with sensitivities [layer, choice]; pairs: as `Table` has it; ties, fixed: by
    layer; facts: what a report shows beside each.
    """
    rows = [
        Row(
            layer.name,
            int(sizes.weights[i]),
            int(sizes.macs[i]),
            dict(zip(choices, map(float, sensitivities[i]), strict=True)),
            tie=(ties or {}).get(layer.name, ""),
            fixed=(fixed or {}).get(layer.name, ""),
            facts=facts[i] if facts else {},
        )
        for i, layer in enumerate(graph.layers)
    ]
    return Table(tuple(rows), tuple(choices), pairs)


def read_together(graph: FloatGraph) -> dict[str, str]:
    """The ties of layers that read one tensor: a shortcut and its block's first convolution."""
    readers = dict[str, int]()
    for layer in graph.layers:
        readers[layer.input] = readers.get(layer.input, 0) + 1
    return {layer.name: layer.input for layer in graph.layers if readers[layer.input] > 1}


def blocked(graph: FloatGraph) -> dict[str, str]:
    """The ties of layers of one block: a residual block, a gate, an attention, a feed-forward part, or a few layers of
    a chain.
    """
    blocks = [block.layers for block in blocks_of(graph)]
    return {layer.name: f"{BLOCK}{i}" for i, layers in enumerate(blocks) for layer in layers if len(layers) > 1}


def end_layers(graph: FloatGraph) -> set[str]:
    """The layers with no weighted layer before them, or none after them."""
    before = {i.name: False for i in graph.inputs}
    layers = {one.node: one for one in graph.layers}
    first = set()
    for node in graph.nodes:
        weighted = any(before.get(n, False) for n in node.inputs)
        if node.name in layers and not weighted:
            first.add(layers[node.name].name)
        before |= {o: weighted or node.name in layers for o in node.outputs}
    after, last = dict.fromkeys(graph.outputs, False), set()
    for node in reversed(graph.nodes):
        weighted = any(after.get(o, False) for o in node.outputs)
        reached = any(o in after for o in node.outputs)
        if node.name in layers and reached and not weighted:
            last.add(layers[node.name].name)
        if reached:
            after |= {n: after.get(n, False) or weighted or node.name in layers for n in node.inputs}
    return first | last


def check_outputs(graph: FloatGraph, outputs: Mapping[str, Any]) -> None:
    """Raise ModelError where no output is in floating point, by which rounding errors could be measured."""
    if not any(value.is_floating_point() for value in outputs.values()):
        raise ModelError(
            "has no output that rounding errors move a little",
            where=graph.name,
            expected="an output in floating point",
            found=", ".join(f"{n}: {str(v.dtype).removeprefix('torch.')}" for n, v in outputs.items()),
            remedy="end the model before the ArgMax or the like that makes integers",
        )
