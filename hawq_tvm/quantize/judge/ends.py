"""What computes the first output of an ONNX model, float or quantized, and of a package's graph of integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.quantize.network.answers import End, end_of


@dataclass(frozen=True)
class Step:
    """One operation of a graph."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def end_of_onnx(graph: onnx.GraphProto) -> End:
    """What computes the first output of an ONNX graph."""
    steps = [Step(node.op_type, tuple(node.input), tuple(node.output)) for node in graph.node]
    return end_of(steps, {tensor.name for tensor in graph.initializer}, graph.output[0].name)


def end_of_integers(module: tvm.IRModule) -> End:
    """What computes the first output of a PACKED module, whose layers are functions of their own."""
    main = module["main"]
    names = {param: param.name for param in main.params}
    steps = list(_steps(module, main, names, ""))
    returned, _ = stages.outputs(main)
    first = returned.fields[0] if isinstance(returned, relax.Tuple) else returned
    return end_of(steps, (), names[first]) if first in names else End.OTHER


def _steps(module: tvm.IRModule, function: relax.Function, names: dict[relax.Var, str], where: str) -> Iterator[Step]:
    """The operations of a function and of those that it calls; names: of its variables, which are added."""
    for one in stages.bindings(function):
        value, name = one.value, f"{where}{one.var.name}"
        names[one.var] = name
        read = tuple(names[v] for v in ops.variables(value) if v in names)
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            called = module[value.op]
            own = {p: names[a] for p, a in zip(called.params, value.args, strict=True) if a in names}
            yield from _steps(module, called, own, f"{name}/")
            made, _ = stages.outputs(called)
            yield Step("identity" if made in own else "tuple", (own.get(made, ""),), (name,))
        else:
            yield Step(ops.op_name(value) or "identity", read, (name,))
