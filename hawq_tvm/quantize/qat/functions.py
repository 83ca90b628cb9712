"""Functions of one quantized tensor while training: the tables that the compiler makes of them (A16)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.intervals import Interval
from hawq_tvm.frontend.onnx.importer import Importer
from hawq_tvm.quantize.ptq.points import clip_bounds
from hawq_tvm.quantize.ptq.qdq import write
from hawq_tvm.quantize.ptq.quantizer import Draft
from relay_passes.integer import values as integer
from relay_passes.integer.curves import table_of
from relay_passes.integer.functions import Clip, Function, Functions, Region, scalar
from relay_passes.integer.rescale import Output
from relay_passes.lower_to_integer import lower_to_integer

from .straight import ROUNDING, Array

# Of these the integers themselves are taken, so that they stand before all others; these bound a sum.
PARTS = frozenset({"relax.nn.relu", "relax.nn.leakyrelu", "relax.abs"})
CLIPS = frozenset({"relax.nn.relu", "relax.clip", "relax.maximum", "relax.minimum"})


class Tables:
    """The functions of a draft's quantized tensors as the compiler finds them in what is written, by the tensor that
    they end in.

    Scales change neither which functions there are nor their constants, so that they are found once.
    """

    def __init__(self, draft: Draft) -> None:
        self._kept: dict[str, tuple[tuple[float, int, int, float, int, int], Array]] = {}
        self._functions = dict(_found(draft)) if _may_have(draft) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._functions

    def integers(self, name: str, where: str, given: tuple[float, int, int], wanted: tuple[float, int, int]) -> Array:
        """The integer for each that the tensor read can have, from the least; zero points are taken away.

        given, wanted: scale, least and greatest integer of the tensor that is read and of the one that is made.
        Raises ModelError naming the node `where` if the function is no number somewhere.
        """
        key = (*given, *wanted)
        if self._kept.get(name, (None,))[0] != key:
            self._kept[name] = key, _table(self._functions[name], where, given, wanted)
        return self._kept[name][1]


def _table(function: Function, where: str, given: tuple[float, int, int], wanted: tuple[float, int, int]) -> Array:
    (scale, low, high), (step, least, most) = given, wanted
    data = relax.Var("x", relax.TensorType((1,), "uint8" if high - low < 1 << 8 else "uint16"))
    ctx = integer.Context(ops.Builder())
    ctx.layer, ctx.intervals[data] = where, Interval.of_range(0, high - low)
    leaf = integer.Real((1,), (integer.Term(data, np.asarray(-low, np.int64), np.asarray(Fraction(scale), object)),))
    out = Output(np.asarray(Fraction(step), object), 0, arith.QType(least, most, "int32"), ROUNDING, "divide")
    return table_of(ctx, integer.Curve((1,), leaf, function), out)[1][: high - low + 1]


def _may_have(draft: Draft) -> bool:
    roles = draft.points.roles
    return any(roles.function(n) and not roles.moves(n) for n in draft.graph.nodes)


def _found(draft: Draft) -> Iterator[tuple[str, Function]]:
    model = write(draft.prepared, draft.graph, draft.points, draft.grids, draft.narrow, draft.rounded)
    shapes = {i.name: tuple(d.dim_value or 1 for d in i.type.tensor_type.shape.dim) for i in model.graph.input}
    main = pipeline.until(Importer(model, shapes).run(), lower_to_integer)["main"]
    functions, nodes = Functions(main), stages.model_nodes(main)
    made = {f"{name}_QuantizeLinear": name for name in draft.points.source}
    makers = {name: node for node in draft.graph.nodes for name in node.outputs}
    for binding in stages.bindings(main):
        name = made.get(stages.model_node(binding.var.name, nodes), "")
        if ops.op_name(binding.value) != "hawq.quantize" or name not in makers:
            continue
        root = binding.value.args[0]
        leaf = functions.leaves.get(root, root)
        region = None if leaf.same_as(root) else Region(functions, root)
        if region is None or not _begins(functions, region) or not (functions.of(root) or _exact(region)):
            continue
        # What a clip says that the quantize after it need not be told may be written at other scales (A12).
        low, high = clip_bounds(makers[name], draft.graph)
        clip = Clip(-np.inf if low is None else Fraction(low), np.inf if high is None else Fraction(high))
        yield name, Function((region, clip))


def _begins(functions: Functions, region: Region) -> bool:
    return bool(ops.op_name(functions.values.get(region.leaf)) == "hawq.dequantize")


def _exact(region: Region) -> bool:
    """Whether the compiler rounds a function of straight pieces once: it takes parts of the integers, then a sum, then
    clips it, or takes the greatest or least of two.
    """
    clipped = joined = False
    for var in region.order:
        call = region.graph.values[var]
        name = ops.op_name(call)
        read = [a for a in ops.variables(call) if a not in region.graph.constants]
        if name in PARTS and all(region.graph.same.get(a, a).same_as(region.leaf) for a in read):
            continue
        if name in CLIPS:
            clipped, joined = True, joined or len(read) > 1
        elif name in PARTS or (clipped and (joined or not _enlarges(region, call, read))):
            return False
    return True


def _enlarges(region: Region, call: relax.Call, read: list[relax.Var]) -> bool:
    """Whether a call multiplies by a positive number."""
    if ops.op_name(call) not in ("relax.multiply", "relax.divide") or len(read) != 1:
        return False
    factors = [a for a in call.args if not (isinstance(a, relax.Var) and a.same_as(read[0]))]
    return all((region.graph.constants[a] if isinstance(a, relax.Var) else scalar(a)) > 0 for a in factors)
