"""An exported PyTorch program as float ONNX, its layers called as `load_float` calls them."""

from __future__ import annotations

import io
import types
import warnings
from typing import Any

import onnx
import torch

from ..errors import ModelError
from ..frontend.torch.reader import load_exported
from .float_onnx import from_onnx
from .float_program import from_program


def onnx_of_program(source: Any) -> onnx.ModelProto:
    """The float ONNX model (opset 18) of an ExportedProgram or a .pt2 file.

    Dimensions that the program leaves open are fixed at what it was exported with.
    Raises ModelError as `from_program` does, and when PyTorch's exporter cannot write it or its layers are not the program's.
    """
    graph = from_program(source)
    program = load_exported(source) if not isinstance(source, torch.export.ExportedProgram) else source
    if program.example_inputs is None:
        raise ModelError("holds no example inputs", where=graph.name, remedy="export it again with torch.export.export(module, example_inputs)")
    arguments, named = program.example_inputs
    stream, module = io.BytesIO(), program.module()
    # The exporter calls train() to restore the mode, which an exported program's module refuses; it has no mode to restore.
    module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter announces its own deprecation
            torch.onnx.export(
                module, tuple(arguments), stream,  # type: ignore[arg-type]  # this exporter also writes to streams
                kwargs=dict(named) or None, opset_version=18, dynamo=False,
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
