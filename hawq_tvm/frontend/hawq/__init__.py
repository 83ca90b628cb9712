"""The HAWQ frontend: a checkpoint of HAWQ's quantized training becomes an ANNOTATED module (`hawq_tvm.stages`).

Only `reader.py` imports PyTorch, when a checkpoint is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from .describe import describe_checkpoint
from .importer import Importer
from .model import read_model
from .source import Checkpoint, hawq_checkpoint


def import_checkpoint(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """A checkpoint (a Checkpoint, a path or bytes) as an ANNOTATED module.

    shapes: the shape of "input", by default one image of the size that HAWQ feeds the network.  Raises ModelError naming the first tensor
    that is missing or wrong, UsageError for an unknown network or a wrong configuration of bits.
    """
    return Importer(read_model(source), shapes).complete()


__all__ = ["Checkpoint", "describe_checkpoint", "hawq_checkpoint", "import_checkpoint", "read_model"]
