"""Reading the tensors and the configuration of an I-BERT encoder: a folder, or a module of PyTorch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.text import last_line
from hawq_tvm.frontend.common.values import Array
from hawq_tvm.frontend.hawq.reader import load_tensors

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
SAVE = "write the folder with save_pretrained of an IBertModel after training with quant_mode"
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


def is_folder(source: Any) -> bool:
    """Whether a path is a folder whose configuration says that it holds an I-BERT."""
    if not isinstance(source, str | os.PathLike) or not os.path.isdir(source):
        return False
    try:
        return bool(json.loads((Path(source) / CONFIG).read_text())["model_type"] == "ibert")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_module(source: Any) -> bool:
    """Whether a module of PyTorch has quantizers of activations with a range and integer weights, as I-BERT's have, and
    a configuration.
    """
    kinds = {str(name).rpartition(".")[2] for name in source.state_dict()}
    return {"x_min", "x_max", "act_scaling_factor", "fc_scaling_factor"} <= kinds and hasattr(source, "config")


def read(source: Any) -> tuple[dict[str, Array], dict[str, Any], str]:
    """The tensors as float32 arrays, the configuration, and what messages call the model.

    Raises ModelError where a file is missing, damaged, or holds code.
    """
    if not isinstance(source, str | os.PathLike):
        tensors = {str(k): np.asarray(v.detach().cpu().numpy(), np.float32) for k, v in source.state_dict().items()}
        config = source.config.to_dict() if hasattr(source.config, "to_dict") else vars(source.config)
        return tensors, dict(config), type(source).__name__
    folder = Path(source)
    config = json.loads((folder / CONFIG).read_text())
    if (folder / WEIGHTS).is_file():
        return _safetensors(folder / WEIGHTS), config, str(folder)
    if not (folder / PICKLED).is_file():
        expected = f"{WEIGHTS} or {PICKLED} beside {CONFIG}"
        raise ModelError("holds no weights", where=str(folder), expected=expected, remedy=SAVE)
    content = load_tensors(folder / PICKLED, str(folder / PICKLED), SAVE)
    if not isinstance(content, Mapping):
        found = type(content).__name__
        raise ModelError("is no dictionary of tensors", where=str(folder / PICKLED), found=found, remedy=SAVE)
    return {str(k): np.asarray(v.numpy(), np.float32) for k, v in content.items()}, config, str(folder)


def _safetensors(path: Path) -> dict[str, Array]:
    """Eight bytes of a length, JSON that names types, shapes and places, then the numbers."""
    content = path.read_bytes()
    try:
        size = int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            shape, dtype = [int(d) for d in entry["shape"]], np.dtype(_TYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not lie in the file")
            tensors[name] = np.frombuffer(data[begin:end], dtype).reshape(shape).astype(np.float32)
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as e:
        raise ModelError(f"is no file of safetensors: {last_line(e)}", where=str(path), remedy=SAVE) from None
    return tensors
