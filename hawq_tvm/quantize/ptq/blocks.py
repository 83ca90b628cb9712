"""A network cut into blocks that are reconstructed one after the other (Li et al., "BRECQ", 2021): by structure, at
the tensors through which everything goes.

A residual block, an attention or a gate is one block; layers in a chain go together, a few at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node

# Layers of a chain that make a block, as the three of an inverted bottleneck; and the most that any block has.
CHAIN, MOST = 3, 8


@dataclass(frozen=True)
class Block:
    """Nodes in the order of computation, their layers, the computed tensors that they read from outside, and those of
    theirs that others read or that are the network's outputs.
    """

    nodes: tuple[Node, ...]
    layers: tuple[Layer, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def blocks_of(graph: FloatGraph) -> list[Block]:
    """The blocks of a network; every node is in one."""
    layers = {layer.node: layer for layer in graph.layers}
    groups: list[list[Node]] = []
    chained = False
    for part in _parts(graph, layers):
        own = sum(node.name in layers for node in part)
        held = sum(node.name in layers for node in groups[-1]) if groups else 0
        joins = (
            bool(groups) and part[0].derivable and (own == 0 or held == 0 or (own == 1 and chained and held < CHAIN))
        )
        if joins:
            groups[-1] += part
        else:
            groups.append(list(part))
        chained = (chained or not joins) and own <= 1
    return [_block(group, graph, layers) for group in groups]


def _parts(graph: FloatGraph, layers: dict[str, Layer]) -> list[list[Node]]:
    """The nodes between tensors through which everything that layers made goes, and no more than MOST layers."""
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    last.update(dict.fromkeys(graph.outputs, len(graph.nodes)))
    made: set[str] = set()  # by layers, and read later
    parts: list[list[Node]] = [[]]
    for i, node in enumerate(graph.nodes):
        full = node.name in layers and sum(n.name in layers for n in parts[-1]) >= MOST
        if parts[-1] and (full or not node.derivable):
            parts.append([])
        parts[-1].append(node)
        if node.name in layers or not made.isdisjoint(node.inputs):
            made.update(filter(None, node.outputs))
        made = {name for name in made if last.get(name, -1) > i}
        if len(made) <= 1:
            parts.append([])
    return [part for part in parts if part]


def _block(nodes: Sequence[Node], graph: FloatGraph, layers: dict[str, Layer]) -> Block:
    own = {name for node in nodes for name in node.outputs if name}
    names = {node.name for node in nodes}
    read = {name for node in graph.nodes if node.name not in names for name in node.inputs} | {*graph.outputs}
    inputs = dict.fromkeys(n for node in nodes for n in node.inputs if n and n not in own and n not in graph.parameters)
    outputs = tuple(n for node in nodes for n in node.outputs if n in read)
    return Block(tuple(nodes), tuple(layers[n.name] for n in nodes if n.name in layers), tuple(inputs), outputs)
