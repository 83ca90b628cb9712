"""The PyTorch frontend: a program exported after PT2E quantization becomes an ANNOTATED module (`hawq_tvm.stages`).

Only `reader.py` imports PyTorch, when a program is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from . import activation, conv, elementwise, masks, matmul, movement, normalization, pool, quant, resize, shape
from .describe import describe_exported
from .importer import Importer, known_operators
from .reader import read_program

# Importing these modules registers their operators.
OPERATORS = (activation, conv, elementwise, masks, matmul, movement, normalization, pool, quant, resize, shape)


def import_exported(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """An exported program (a .pt2 path, bytes or ExportedProgram) as an ANNOTATED module.

    shapes: full shapes by input name, needed where the program leaves a dimension symbolic.  Raises ModelError
    naming the first layer that cannot be imported.
    """
    return Importer(read_program(source), shapes).complete()


__all__ = ["describe_exported", "import_exported", "known_operators", "read_program"]
