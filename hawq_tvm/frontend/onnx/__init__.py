"""The ONNX frontend: a quantized ONNX model becomes an ANNOTATED module (`hawq_tvm.stages`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm

from . import (
    activation,
    attention,
    conv,
    einsum,
    elementwise,
    matmul,
    microsoft,
    movement,
    normalization,
    packed_matmul,
    pool,
    qonnx,
    qoperator,
    quant,
    reduction,
    resize,
    shape,
)
from .cut import import_before_cut
from .describe import describe_onnx
from .importer import Importer, known_operators
from .reader import Source, read_model

# Importing these modules registers their operators.
OPERATORS = (
    activation,
    attention,
    conv,
    einsum,
    elementwise,
    matmul,
    microsoft,
    movement,
    normalization,
    packed_matmul,
    pool,
    qonnx,
    qoperator,
    quant,
    reduction,
    resize,
    shape,
)


def import_onnx(source: Source, shapes: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """An ONNX model (path, bytes or ModelProto) as an ANNOTATED module.

    shapes: full shapes by input name, needed where the model leaves a dimension symbolic.  Raises ModelError
    naming the first node that cannot be imported.
    """
    return Importer(read_model(source), shapes).complete()


__all__ = ["Source", "describe_onnx", "import_before_cut", "import_onnx", "known_operators", "read_model"]
