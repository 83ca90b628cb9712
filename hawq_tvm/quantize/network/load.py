"""Any float model as a float graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hawq_tvm.core.need import need

from .float_graph import FloatGraph


def load_float(model: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> FloatGraph:
    """The graph of a float network: an ONNX model (path, bytes or ModelProto), a .pt2 file, or an ExportedProgram.

    shapes: full shapes of inputs by name, which fix what the model leaves open.
    Raises ModelError naming the node that is not known, quantized already, or in training mode, UsageError for shapes
    that contradict the model.
    """
    need("torch")
    if isinstance(model, FloatGraph):
        return model
    from_file = isinstance(model, str | os.PathLike) and Path(model).suffix == ".pt2"
    if from_file or type(model).__name__ == "ExportedProgram":
        from .float_program import from_program

        return from_program(model, shapes)
    from .float_onnx import from_onnx

    return from_onnx(model, shapes)
