"""The I-BERT frontend: an encoder of Hugging Face's `transformers.models.ibert`, trained with quant_mode, becomes an
ANNOTATED module that asks for the paper's arithmetic (A28)-(A30).

Only `reader.py` imports PyTorch, where the weights are in a file of torch.save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from .describe import describe_ibert
from .importer import Importer
from .model import read_model
from .reader import is_folder, is_module


def import_ibert(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """An encoder (a folder of save_pretrained, or the module itself) as an ANNOTATED module.

    shapes: the shape of "input_ids", by default one sentence of 128 tokens.  Raises ModelError naming the first tensor
    that is missing or wrong, UsageError for a sentence longer than the model's positions.
    """
    return Importer(read_model(source), shapes).complete()


__all__ = ["describe_ibert", "import_ibert", "is_folder", "is_module", "read_model"]
