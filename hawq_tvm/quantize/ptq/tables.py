"""Tables of embeddings in 8 bits, a scale for every column: what a run-time position chooses from one has integers of
its own, and needs no quantize before it is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from numpy.typing import NDArray

from hawq_tvm.quantize.network.float_graph import FloatGraph, Node
from hawq_tvm.quantize.network.roles import Roles

from .observers import LEAST

# Of a scale: an integer of 8 bits times it is a float32 exactly, and so rounding twice is rounding once.
SCALE_BITS = 16
MOST = 127


def tables_of(graph: FloatGraph, roles: Roles, readers: Mapping[str, Sequence[Node]]) -> set[str]:
    """The constant tables whose rows are chosen at run time and only added; readers: the nodes that read a tensor."""
    found: dict[str, bool] = {}
    for node in graph.nodes:
        name = next(iter(node.inputs), "")
        table = graph.parameters.get(name)
        if table is None or not table.is_floating_point() or node.op != "Gather":
            continue
        chosen = node.outputs[0]
        added = bool(readers[chosen]) and chosen not in graph.outputs and all(map(roles.adds, readers[chosen]))
        fits = table.ndim == 2 and node.attributes.get("axis", 0) == 0 and node.inputs[1] not in graph.parameters
        found[name] = found.get(name, True) and added and fits and all(n.op == "Gather" for n in readers[name])
    return {name for name, fits in found.items() if fits}


def columns(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The nearest integers of a table, and the scale of every column; of a table made of these, the same again."""
    least = np.maximum(np.abs(table.astype(np.float64)).max(0, initial=0) / MOST, LEAST)
    _, exponent = np.frexp(least)
    unit = np.ldexp(1.0, exponent - SCALE_BITS)
    scale = np.ceil(least / unit) * unit
    return np.rint(table / scale).astype(np.int8), scale.astype(np.float32)


def round_tables(graph: FloatGraph, tables: Set[str]) -> None:
    """Put what is written of tables into the graph's parameters."""
    for name in tables:
        codes, scale = columns(graph.parameters[name].numpy())
        graph.parameters[name] = torch.from_numpy(codes * scale)
