"""What a float network's nodes are to the compiler: the operators that its importer makes of each say where integers
begin.

So `quantize` knows no operators of its own: the model goes through the importer that `compile` uses, and what it
refuses is refused in the same words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
import tvm

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import first_of
from hawq_tvm.core.operators import OPERATORS, Kind
from hawq_tvm.frontend.onnx.importer import Importer
from relay_passes.integer.functions import ELEMENTWISE
from relay_passes.lower_to_integer import lower_to_integer

from .float_graph import Node

# What a tensor's elements only change their places in, or are chosen from: the grid stays.
MOVES = frozenset(name for name, row in OPERATORS.items() if row.kind is Kind.MOVEMENT or row.chooses)
FUNCTIONS = frozenset(ELEMENTWISE) | {"relax.nn.prelu"}
# What counts in the units of the operands.
SUMS = MOVES | {
    "relax.add",
    "relax.subtract",
    "relax.negative",
    "relax.maximum",
    "relax.minimum",
    "relax.nn.relu",
    "relax.clip",
    "relax.mean",
    "relax.sum",
    "relax.nn.avg_pool2d",
}
AFFINE = frozenset({"relax.add", "relax.subtract", "relax.negative", "relax.multiply", "relax.divide"})
ADDITIONS = frozenset({"relax.add", "relax.subtract"})
NORMALIZATIONS = frozenset(f"relax.nn.{n}_norm" for n in ("layer", "rms", "instance", "group"))
PRODUCTS = frozenset({"relax.multiply", "relax.matmul", "relax.nn.conv2d", "relax.nn.conv2d_transpose"})


@dataclass(frozen=True)
class Roles:
    """The compiler's operators that stand for a node, by its name; none for one that gives its input on.

    inside: nodes whose results no integers stand for, because the compiler knows them as parts of something greater.
    """

    calls: Mapping[str, frozenset[str]] = field(default_factory=dict)
    inside: frozenset[str] = frozenset()

    def moves(self, node: Node) -> bool:
        """Whether a node's results hold nothing but elements of what it reads."""
        return self._all(node, MOVES)

    def function(self, node: Node) -> bool:
        """Whether every element is a function of the same element of the operands."""
        return self._all(node, FUNCTIONS)

    def sums(self, node: Node) -> bool:
        """Whether a node counts in the units of what it reads."""
        return self._all(node, SUMS)

    def adds(self, node: Node) -> bool:
        """Whether a node adds tensors."""
        return self._all(node, ADDITIONS)

    def multiplies(self, node: Node) -> bool:
        """Whether a node counts in the product of its operands' units."""
        return bool(self.calls.get(node.name, frozenset()) & PRODUCTS)

    def scales(self, node: Node) -> bool:
        """Whether a node multiplies its only computed operand by a constant, or adds one to it."""
        return node.op != "Reciprocal" and self._all(node, AFFINE) and bool(self.calls[node.name])

    def normalizes(self, node: Node) -> bool:
        """Whether a node takes mean and deviation of what it reads, as far as 16 bits tell them."""
        return bool(self.calls.get(node.name, frozenset()) & NORMALIZATIONS)

    def products(self, name: str) -> bool:
        """Whether the node of that name sums products, each of whose factors is quantized."""
        return bool(self.calls.get(name, frozenset()) & (PRODUCTS - {"relax.multiply"}))

    def _all(self, node: Node, kind: frozenset[str]) -> bool:
        return node.name in self.calls and self.calls[node.name] <= kind


def roles_of(model: onnx.ModelProto) -> Roles:
    """The roles of a prepared model's nodes; what it leaves open is 1, as the batch.

    Raises ModelError naming every node that `compile` does not import, in its words.
    """
    shapes = {i.name: tuple(d.dim_value or 1 for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
    importer = Importer(model, shapes)
    module = importer.run()
    if importer.failures:
        raise first_of(importer.failures)
    given, known = _calls(module), _calls(pipeline.until(module, lower_to_integer))
    nodes = stages.model_nodes(module["main"])
    calls = {name: frozenset(known.get(name, ())) for name in nodes}
    return Roles(calls, frozenset(name for name in given if name not in known))


def _calls(module: tvm.IRModule) -> dict[str, set[str]]:
    """The operators that the results of every node of the model are made by."""
    nodes = stages.model_nodes(module["main"])
    calls: dict[str, set[str]] = defaultdict(set)
    for binding in stages.bindings(module["main"]):
        calls[stages.model_node(binding.var.name, nodes)].add(ops.op_name(binding.value))
    return {name: found - {""} for name, found in calls.items()}
