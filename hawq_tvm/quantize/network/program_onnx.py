"""An exported PyTorch program as float ONNX, its layers called as `load_float` calls them."""

from __future__ import annotations

import io
import types
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.frontend.torch.reader import load_exported

from .float_graph import FloatGraph
from .float_onnx import from_onnx
from .float_program import from_program
from .tail import without_tail


def onnx_of_program(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> onnx.ModelProto:
    """The float ONNX model (opset 18) of an ExportedProgram or a .pt2 file.

    shapes: full shapes by input name; what else the program leaves open is fixed at what it was exported with.
    Raises ModelError as `from_program` does, and when PyTorch's exporter cannot write it or its layers are not the
    program's.
    """
    graph = from_program(source, shapes)
    program = load_exported(source) if not isinstance(source, torch.export.ExportedProgram) else source
    if program.example_inputs is None:
        raise ModelError(
            "holds no example inputs",
            where=graph.name,
            remedy="export it again with torch.export.export(module, example_inputs)",
        )
    _check_writes(program, graph.name)
    positional, keywords = program.example_inputs
    arguments, named = _examples(graph, positional, keywords, shapes or {})
    stream, module = io.BytesIO(), program.module()
    # The exporter calls train() to restore the mode, which an exported program's module refuses; it has no mode to
    # restore.
    module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter announces its own deprecation
            torch.onnx.export(
                module,
                arguments,
                stream,  # type: ignore[arg-type]  # this exporter also writes to streams
                kwargs=named or None,
                opset_version=18,
                dynamo=False,
                input_names=[i.name for i in graph.inputs],
                output_names=list(graph.outputs),
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(
            "cannot be written as ONNX by PyTorch",
            where=graph.name,
            found=first,
            remedy="export the model to ONNX yourself",
        ) from e
    model = onnx.load_from_string(stream.getvalue())
    found = without_tail(model, None, lambda rest, tail: from_onnx(rest).layers)  # a float end has none
    if [one.kind for one in found] != [one.kind for one in graph.layers]:
        raise ModelError(
            "has other layers after its export to ONNX",
            where=graph.name,
            expected=f"{len(graph.layers)} layers",
            found=f"{len(found)} layers",
            remedy="export the model to ONNX yourself",
        )
    wanted = {one.name: own.name for one, own in zip(found, graph.layers, strict=True)}
    taken = set(wanted.values())
    for node in model.graph.node:
        name = node.name or node.output[0]
        node.name = wanted.get(name) or (f"{name}_node" if name in taken else name)
    return model


def _check_writes(program: torch.export.ExportedProgram, where: str) -> None:
    """Raise ModelError for a write into memory that another name reads later: the exporter loses it, in silence."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    names = defaultdict[torch.fx.Node, list[torch.fx.Node]](list)  # of a tensor, by the one that others are views of
    for node in program.graph.nodes:
        names[_viewed(node)].append(node)
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        place: Any = node.args[0] if node.args else None
        if schema is None or not schema.is_mutable or not isinstance(place, torch.fx.Node):
            continue
        others = [one for one in names[_viewed(place)] if one is not place and order[one] < order[node]]
        if any(order[user] > order[node] for one in others for user in one.users):
            raise ModelError(
                "writes into part of a tensor, which PyTorch's exporter to ONNX loses",
                where=f"{where}: {node.name}",
                found=str(node.target),
                remedy="compute another tensor in the module instead of writing into this one, and export that",
            )


def _viewed(node: Any) -> Any:
    """The node whose memory a node's result lies in."""
    while _views(node):
        node = node.args[0]
    return node


def _views(node: Any) -> bool:
    """Whether a node is an operator whose result is part of its first operand, in the same memory."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    if schema is None or schema.is_mutable or not node.args:
        return False
    return isinstance(node.args[0], torch.fx.Node) and any(one.alias_info is not None for one in schema.returns)


def _examples(
    graph: FloatGraph, positional: Sequence[Any], named: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs, those of other shapes than are wanted replaced by zeros."""
    given = [*positional, *named.values()]
    if not all(isinstance(v, torch.Tensor) for v in given) or len(given) != len(graph.inputs):
        if shapes:
            raise UsageError(
                "the program's inputs are no plain tensors", where="--shape", remedy="export it at that shape"
            )
        return tuple(positional), dict(named)
    fitting = [
        torch.zeros(tuple(shapes[one.name]), dtype=value.dtype) if one.name in shapes else value
        for one, value in zip(graph.inputs, given, strict=True)
    ]
    return tuple(fitting[: len(positional)]), dict(zip(named, fitting[len(positional) :], strict=True))
