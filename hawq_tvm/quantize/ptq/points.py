"""Where a float graph is quantized: the tensors that become integers, which of them share one grid, and with how
many bits.

Every tensor is quantized, except those that integers do not need: what a layer hands to the ReLU, clip or bias after
it or to the user, and what lies inside a chain of element-wise operators on one tensor (SiLU, hard-swish), which
becomes one table. What only moves values keeps their grid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer, Node
from hawq_tvm.quantize.network.roles import Roles

from .tables import tables_of

CLAMPS = ("Relu", "Clip")
NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Softplus", "Abs", "Sqrt")
KEEP_SIGN = ("AveragePool", "GlobalAveragePool", "Concat", "Add", "Mul", "Max", "ReduceMean", "ReduceSum", "Sum")
# Outputs that are no sums of a layer. 16 bits would be 65,535 thresholds to prove for every channel.
OUTPUT_BITS = 8
# An addend of this or less shuts a score out of every softmax.
MASKED = -1e4
# What a normalization reads, as the sums of a residual stream, and what these are sums of: a few large channels would
# take the steps of all others.
NORMALIZED_BITS = 16


@dataclass(frozen=True)
class Points:
    """The quantized tensors.

    source: for every quantized tensor the one whose grid it has, itself for most.  bits: of each.  narrow: layers
    whose input is read with fewer bits than the tensor has, and so is rounded once more.  positive: tensors that
    cannot be negative.  joined: concatenations that are outputs, whose parts keep the grids that they have, along an
    axis: (tensor, its size there) for each.  tables: constants that rows are chosen from, see `tables.py`.  roles: of
    the graph's nodes.
    """

    source: Mapping[str, str]
    bits: Mapping[str, int]
    narrow: Mapping[str, int]
    positive: Set[str]
    joined: Mapping[str, Sequence[tuple[str, int]]]
    tables: Set[str]
    roles: Roles


class Seen(NamedTuple):
    """What calibration saw of a tensor of floating point type: its shape in one batch, and its least value."""

    shape: Sequence[int]
    low: float


Floats = Mapping[str, Seen]


def find_points(graph: FloatGraph, roles: Roles, floats: Floats, widths: Mapping[str, tuple[int, int]]) -> Points:
    """Where to quantize.

    roles: of its nodes.  floats: the tensors of floating point type.  widths: bits of weights and of the input by
    layer.
    """
    return _Search(graph, roles, floats, widths).run()


class _Search:
    def __init__(self, graph: FloatGraph, roles: Roles, floats: Floats, widths: Mapping[str, tuple[int, int]]) -> None:
        self.graph, self.roles, self.floats, self.widths = graph, roles, floats, widths
        self.layers: dict[str, Layer] = {layer.node: layer for layer in graph.layers}
        self.makers = {name: node for node in graph.nodes for name in node.outputs if name}
        self.readers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for name in dict.fromkeys(node.inputs):
                self.readers[name].append(node)
        self.masks = self._masked()
        self.tables = tables_of(graph, roles, self.readers)
        chosen = (n for node in graph.nodes if not self.tables.isdisjoint(node.inputs) for n in node.outputs)
        self.absorbed = {n for n in chosen if n}
        for node in graph.nodes:
            self.absorbed.update(n for n in node.outputs if n and self._absorbs(n))

    def run(self) -> Points:
        roots = self._roots()
        names = [i.name for i in self.graph.inputs if i.name in self.floats]
        names += [n for node in self.graph.nodes for n in node.outputs if n in self.floats]
        joined, passed = self._joined()
        inside = (n for node in self.graph.nodes if node.name in self.roles.inside for n in node.outputs)
        apart = {*joined, *passed, *inside, *self.masks}
        quantized = [n for n in names if n not in apart and n not in self.absorbed and not self._inner(n, roots)]
        source: dict[str, str] = {}
        for name in quantized:
            moved = self._moved(name)
            source[name] = source.get(moved, name)
        needs: dict[str, set[int]] = {}
        for name in reversed(names):
            needs[name] = self._needs(name, needs)
        together: dict[str, set[int]] = defaultdict(set)
        for name in quantized:
            together[source[name]] |= needs[name]
        bits = {name: self._width(together[source[name]]) for name in quantized}
        narrow = {
            x.name: self.widths[x.name][1]
            for x in self.graph.layers
            if x.input in bits and bits[x.input] != self.widths[x.name][1]
        }
        return Points(source, bits, narrow, self._positive(), joined, self.tables, self.roles)

    def _masked(self) -> set[str]:
        """Masks, which push some scores below all others, what they are made of, and the sums that hold them: no scale
        serves these, and the compiler needs none.
        """
        counted, masks = set[str](), set[str]()
        for node in self.graph.nodes:
            given = [self.graph.parameters[n] for n in node.inputs if n in self.graph.parameters]
            constants = [v for v in given if v.is_floating_point()]
            shut = any(n in masks for n in node.inputs) or any(map(_shuts, constants))
            table = any(v.numel() > 1 and not _shuts(v) for v in constants)
            data = [n for n in self._operands(node) if n in self.floats and n not in counted]
            for name in (n for n in node.outputs if n in self.floats):
                if not data and not table:
                    counted.add(name)  # of whole numbers and plain constants alone
                if self.floats[name].low <= MASKED and (shut or name in counted):
                    masks.add(name)
        for node in reversed(self.graph.nodes):
            for name in node.outputs:
                made = [o for reader in self.readers[name] for o in reader.outputs if o in self.floats]
                if name in counted and made and all(o in masks for o in made):
                    masks.add(name)
        return masks

    def _joined(self) -> tuple[dict[str, list[tuple[str, int]]], set[str]]:
        """Concatenations that nothing but outputs come of, and what is moved on the way: boxes and scores have no
        scale that suits both.
        """
        joined: dict[str, list[tuple[str, int]]] = {}
        passed: set[str] = set()
        for output in self.graph.outputs:
            at, way, alone = output, list[str](), not self.readers[output]
            while alone and self._moved(at):
                way.append(at)
                at = self._moved(at)
                alone = len(self.readers[at]) == 1 and at not in self.graph.outputs
            maker = self.makers.get(at)
            axis = maker.attributes.get("axis", 0) if maker is not None and maker.op == "Concat" else 0
            if alone and axis and maker is not None and all(n in self.floats for n in maker.inputs):
                joined[at] = [(n, self.floats[n].shape[axis]) for n in maker.inputs]
                passed.update(way)
        return joined, passed

    def _constant(self, name: str) -> bool:
        return not name or name in self.graph.parameters

    def _moved(self, name: str) -> str:
        """The tensor that a tensor's elements are taken from, "" where there is none, or where others stand beside
        them.
        """
        maker = self.makers.get(name)
        data = [n for n in self._operands(maker) if n in self.floats] if maker is not None else []
        if maker is None or len(data) != 1 or not self.roles.moves(maker):
            return ""
        added = [self.graph.parameters[n] for n in maker.inputs if n and n not in data and self._constant(n)]
        return (
            "" if any(v.is_floating_point() and bool(v.isfinite().any()) and bool(v.any()) for v in added) else data[0]
        )

    def _operands(self, node: Node) -> list[str]:
        return list(dict.fromkeys(n for n in node.inputs if not self._constant(n)))

    def _absorbs(self, name: str) -> bool:
        """Whether it needs no integer of its own: the one reader clamps it, adds a bias or scales sums, or it is the
        last layer's result.
        """
        maker, readers = self.makers.get(name), self.readers[name]
        if (
            name in self.graph.outputs
            and not readers
            and maker is not None
            and (maker.name in self.layers or self._bias_of(maker) is not None)
        ):
            return True  # the 32-bit sums of the last layer, in which classes do not tie
        if maker is None or len(readers) != 1 or name in self.graph.outputs or self.roles.moves(maker):
            return False
        if self.masks & {*readers[0].outputs} and self._summed(maker):
            return True  # scores
        if self._residual(readers[0]) and (maker.name in self.layers or self._bias_of(maker) is not None):
            return True  # 16 bits of it would be 65,535 thresholds to prove for every channel
        if self._operands(readers[0]) != [name]:
            return False
        if self._bias_of(readers[0]) is not None or (self._scales(readers[0], name) and self._summed(maker)):
            return True
        return readers[0].op in CLAMPS and (
            not self.roles.function(maker) or len(self._operands(maker)) > 1 or self._bias_of(maker) is not None
        )

    def _residual(self, node: Node) -> bool:
        """Whether a node adds two tensors for a normalization to read."""
        readers = (reader for name in node.outputs for reader in self.readers[name])
        return self.roles.adds(node) and len(self._operands(node)) == 2 and any(map(self.roles.normalizes, readers))

    def _spreads(self, node: Node) -> bool:
        """Whether a node multiplies channels by factors of their own for a layer to read."""
        factors = [n for n in node.inputs if self._constant(n) and n and self.graph.parameters[n].numel() > 1]
        read = {layer.input for layer in self.graph.layers}
        return node.op == "Mul" and len(factors) == 1 and not read.isdisjoint(node.outputs)

    def _scales(self, node: Node, name: str) -> bool:
        """Whether a node multiplies a tensor by constants or adds them."""
        divides = node.op == "Div" and node.inputs[0] != name
        return self.roles.scales(node) and node.inputs.count(name) == 1 and not divides

    def _summed(self, node: Node) -> bool:
        """Whether a node gives sums, of a finer grid than eight bits."""
        operands = self._operands(node)
        scaled = len(operands) == 1 and operands[0] in self.absorbed and self._scales(node, operands[0])
        product = self.roles.multiplies(node) and len(operands) == 2
        return node.name in self.layers or scaled or product or self.roles.normalizes(node)

    def _bias_of(self, node: Node) -> Layer | None:
        """The layer without a bias whose result an addition of a constant reads, alone."""
        operands = self._operands(node)
        if node.op != "Add" or len(operands) != 1 or operands[0] not in self.makers or len(node.inputs) != 2:
            return None
        layer = self.layers.get(self.makers[operands[0]].name)
        return layer if layer is not None and not layer.bias and len(self.readers[operands[0]]) == 1 else None

    def _roots(self) -> dict[str, str]:
        """For every tensor the one that it is an element-wise function of."""
        roots = {i.name: i.name for i in self.graph.inputs}
        for node in self.graph.nodes:
            operands = self._operands(node)
            single = all(self.graph.parameters[n].numel() == 1 for n in node.inputs if n and self._constant(n))
            origins = {roots[n] for n in operands}
            chained = (
                self.roles.function(node)
                and single
                and len(origins) == 1
                and not any(n in self.absorbed for n in operands)
            )
            for name in filter(None, node.outputs):
                roots[name] = origins.pop() if chained else name
        return roots

    def _inner(self, name: str, roots: Mapping[str, str]) -> bool:
        """Whether it is inside a chain: neither its beginning nor read outside."""
        if roots[name] == name or name in self.graph.outputs:
            return False
        readers = self.readers[name]
        return bool(readers) and all(roots[o] == roots[name] for reader in readers for o in reader.outputs if o)

    def _needs(self, name: str, later: Mapping[str, set[int]]) -> set[int]:
        """The widths that its readers want; those of what is moved count where it arrives. later: of what is computed
        from it.
        """
        found = {OUTPUT_BITS} if name in self.graph.outputs else set()
        for node in self.readers[name]:
            layer = self.layers.get(node.name)
            if layer is not None and layer.input == name:
                found.add(self.widths[layer.name][1])
            elif not any(self._moved(n) == name for n in node.outputs):
                sums = self.roles.adds(node) and any(NORMALIZED_BITS in later.get(n, ()) for n in node.outputs)
                fine = sums or self.roles.normalizes(node) or self._spreads(node)
                found.add(NORMALIZED_BITS if fine else 8)
        return found

    @staticmethod
    def _width(wanted: set[int]) -> int:
        """The bits that serve all readers, of which layers may read fewer."""
        return next(iter(wanted)) if len(wanted) == 1 else max({8} | wanted)

    def _positive(self) -> set[str]:
        found: set[str] = set()
        for node in self.graph.nodes:
            operands = self._operands(node)
            moved = next((m for m in map(self._moved, node.outputs) if m), "")
            read = [moved] if moved else [n for n in node.inputs if n]
            same = (moved or node.op in KEEP_SIGN) and all(n in found or self._no_less_than_zero(n) for n in read)
            if (
                node.op in NEVER_NEGATIVE
                or self._clips_at_zero(node)
                or same
                or (node.op in CLAMPS and operands and operands[0] in found)
            ):
                found.update(filter(None, node.outputs))
        return found

    def _no_less_than_zero(self, name: str) -> bool:
        return name in self.graph.parameters and bool((self.graph.parameters[name] >= 0).all())

    def _clips_at_zero(self, node: Node) -> bool:
        low, _ = clip_bounds(node, self.graph)
        return low is not None and low >= 0


def _shuts(value: Any) -> bool:
    return bool((value <= MASKED).any())


def clip_bounds(node: Node | None, graph: FloatGraph) -> tuple[float | None, float | None]:
    """The bounds of a ReLU or a Clip, None where it has none, as for any other node."""
    if node is None or node.op not in CLAMPS:
        return None, None
    if node.op == "Relu":
        return 0.0, None
    given = [graph.parameters.get(n) if n else None for n in (*node.inputs[1:3], "", "")[:2]]
    low, high = (None if v is None else float(v) for v in given)
    return low, high
