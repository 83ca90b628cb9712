"""An exported PyTorch program as float ONNX, its layers called as `load_float` calls them."""

from __future__ import annotations

import io
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch

from ..errors import ModelError, UsageError
from ..frontend.torch.reader import load_exported
from .float_graph import FloatGraph
from .float_onnx import from_onnx
from .float_program import from_program


def onnx_of_program(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> onnx.ModelProto:
    """The float ONNX model (opset 18) of an ExportedProgram or a .pt2 file.

    shapes: full shapes by input name; what else the program leaves open is fixed at what it was exported with.
    Raises ModelError as `from_program` does, and when PyTorch's exporter cannot write it or its layers are not the program's.
    """
    graph = from_program(source, shapes)
    program = load_exported(source) if not isinstance(source, torch.export.ExportedProgram) else source
    if program.example_inputs is None:
        raise ModelError("holds no example inputs", where=graph.name, remedy="export it again with torch.export.export(module, example_inputs)")
    positional, keywords = program.example_inputs
    arguments, named = _examples(graph, positional, keywords, shapes or {})
    stream, module = io.BytesIO(), program.module()
    # The exporter calls train() to restore the mode, which an exported program's module refuses; it has no mode to restore.
    module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter announces its own deprecation
            torch.onnx.export(
                module, arguments, stream,  # type: ignore[arg-type]  # this exporter also writes to streams
                kwargs=named or None, opset_version=18, dynamo=False,
                input_names=[i.name for i in graph.inputs], output_names=list(graph.outputs),
            )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError("cannot be written as ONNX by PyTorch", where=graph.name, found=first, remedy="export the model to ONNX yourself") from e
    model = onnx.load_from_string(stream.getvalue())
    found = from_onnx(model).layers
    if [one.kind for one in found] != [one.kind for one in graph.layers]:
        raise ModelError("has other layers after its export to ONNX", where=graph.name, expected=f"{len(graph.layers)} layers", found=f"{len(found)} layers")
    wanted = {one.name: own.name for one, own in zip(found, graph.layers, strict=True)}
    taken = set(wanted.values())
    for node in model.graph.node:
        name = node.name or node.output[0]
        node.name = wanted.get(name) or (f"{name}_node" if name in taken else name)
    return model


def _examples(
    graph: FloatGraph, positional: Sequence[Any], named: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs, those of other shapes than are wanted replaced by zeros."""
    given = [*positional, *named.values()]
    if not all(isinstance(v, torch.Tensor) for v in given) or len(given) != len(graph.inputs):
        if shapes:
            raise UsageError("the program's inputs are no plain tensors", where="--shape", remedy="export it at that shape")
        return tuple(positional), dict(named)
    fitting = [
        torch.zeros(tuple(shapes[one.name]), dtype=value.dtype) if one.name in shapes else value
        for one, value in zip(graph.inputs, given, strict=True)
    ]
    return tuple(fitting[: len(positional)]), dict(zip(named, fitting[len(positional) :], strict=True))
