"""The float end of a network that stays float: what stands behind the last layer with weights and that the compiler
does not know, such as the choice of boxes. `compile --allow-float-tail` cuts it off again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import onnx

from hawq_tvm.core.cut import Cut
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx.cut import End

from .float_onnx import Shapes, quantized_nodes, read_float
from .prepare import converted, names_of

T = TypeVar("T")


class Tail:
    """A float model's end: its nodes, and the tensors that it reads of the rest."""

    def __init__(self, end: End) -> None:
        self.end, self.names = end, names_of(end.graph)

    def cut(self) -> Cut:
        """Where the end begins, and what is in it."""
        return self.end.cut()

    def joined(self, head: onnx.ModelProto) -> onnx.ModelProto:
        """A model of the same tensors, that of the rest, with the end behind it."""
        made = onnx.ModelProto()
        made.CopyFrom(head)
        nodes, initializers = self.end.parts()
        known = {t.name for t in made.graph.initializer} | {n for node in made.graph.node for n in node.output}
        made.graph.node.extend(n for n in nodes if known.isdisjoint(n.output))
        made.graph.initializer.extend(t for t in initializers if t.name not in known)
        del made.graph.output[:]
        made.graph.output.extend(self.end.graph.output)
        return made


def without_tail(model: onnx.ModelProto, shapes: Shapes | None, make: Callable[[onnx.ModelProto, Tail | None], T]) -> T:
    """What `make` gives for a float model, or for what is left of it when its end stays float, and that end.

    Raises the ModelError of `make` that names what is not in a float end, or leaves nothing to quantize.
    """
    rest, end = model, None
    while True:
        try:
            return make(rest, Tail(end) if end is not None else None)
        except ModelError as error:
            cause = error.__cause__
            lowered = isinstance(cause, ModelError)
            if lowered and end is None:  # what has no integer form is refused where nothing else stays float
                raise
            found = end or _end_of(model, shapes)
            if found is None or not found.grows(cause if isinstance(cause, ModelError) else error):
                raise
            end, rest = found, found.head()
            for output in rest.graph.output:
                output.type.tensor_type.SetInParent()  # inference fills in nothing that is not there


def _end_of(model: onnx.ModelProto, shapes: Shapes | None) -> End | None:
    given = read_float(model, shapes)
    return None if quantized_nodes(given) else End(converted(given), weighted=True)
