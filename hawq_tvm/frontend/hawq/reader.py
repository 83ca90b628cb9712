"""Reading a file of torch.save: the only place that knows PyTorch."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.trust import REMEDY, trusted
from hawq_tvm.frontend.common.text import last_line, stranger
from hawq_tvm.frontend.common.values import Array

LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
# The buffers of HAWQ's modules that say what runs; a file of training holds others too.
KINDS = (
    "weight_integer",
    "bias_integer",
    "convbn_scaling_factor",
    "conv_scaling_factor",
    "fc_scaling_factor",
    "act_scaling_factor",
)
SECTIONS = (
    "weight_integer",
    "bias_integer",
    "convbn_scaling_factor",
    "fc_scaling_factor",
    "act_scaling_factor",
    "state_dict",
)
WRITE = "write quantized_checkpoint.pth.tar with HAWQ's quant_train.py (option -e evaluates and writes it)"


def read_tensors(file: str | Path | bytes, where: str) -> tuple[dict[str, Array], str]:
    """The tensors of a checkpoint by HAWQ's names without "module.", as float32 or float64 arrays, and the network
    that it names, if any.

    Reads quantized_checkpoint.pth.tar, and the state_dict of checkpoint.pth.tar.  Raises ModelError when it cannot
    be read, holds pickled code, or is no checkpoint of HAWQ, and when PyTorch is not installed.
    """
    content = load_tensors(file, where, WRITE)
    if not isinstance(content, Mapping) or not any(isinstance(content.get(s), Mapping) for s in SECTIONS):
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise ModelError(
            "is a PyTorch checkpoint, but none of HAWQ",
            where=where,
            expected=f"a dictionary with {', '.join(SECTIONS[:-1])}",
            found=keys,
            remedy=f"{WRITE}; other models: prepare_pt2e and convert_pt2e, then torch.export.save",
        )
    tensors: dict[str, Array] = {}
    for section in SECTIONS:
        part = content.get(section)
        for key, tensor in part.items() if isinstance(part, Mapping) else ():
            name = str(key).removeprefix("module.")
            if name.rpartition(".")[2] in KINDS:
                tensors[name] = _array(tensor, str(key))
    if not any(name.endswith(".weight_integer") for name in tensors):
        raise ModelError(
            "holds no integer weights",
            where=where,
            expected="tensors called LAYER.weight_integer",
            found=f"{len(tensors)} other tensors of HAWQ",
            remedy=WRITE,
        )
    return tensors, str(content.get("arch") or "")


def load_tensors(file: str | Path | bytes, where: str, write: str) -> Any:
    """What a file of torch.save holds; write: how to write one that can be read.

    Raises ModelError when it cannot be read, or holds code, and when PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise ModelError(
            "is a PyTorch file, which only PyTorch can read",
            where=where,
            found=last_line(e),
            remedy="pip install 'hawq-tvm[torch]'",
        ) from None
    try:
        return torch.load(
            io.BytesIO(file) if isinstance(file, bytes) else Path(file), map_location="cpu", weights_only=not trusted()
        )
    except pickle.UnpicklingError as e:
        raise ModelError(
            "holds pickled code, or is damaged: it is not opened",
            where=where,
            expected="tensors, numbers and strings in dictionaries",
            found=stranger(e),
            remedy=f"save tensors alone (torch.save of dictionaries of tensors); {REMEDY}; or {write}",
        ) from None
    except LOAD_ERRORS as e:
        raise ModelError(
            f"cannot be loaded by torch.load: {last_line(e)}",
            where=where,
            found=f"torch {torch.__version__}",
            remedy=write,
        ) from None


def _array(tensor: Any, key: str) -> Array:
    import torch

    if (
        not isinstance(tensor, torch.Tensor)
        or tensor.layout is not torch.strided
        or tensor.dtype.is_complex
        or tensor.is_quantized
        or tensor.is_meta
    ):
        on = " on the device meta" if getattr(tensor, "is_meta", False) else ""
        found = f"{type(tensor).__name__} {getattr(tensor, 'dtype', '')}{on}".strip()
        raise ModelError(
            "is no plain tensor", where=key, expected="a dense tensor of numbers", found=found, remedy=WRITE
        )
    kept = tensor.detach() if tensor.dtype == torch.float32 else tensor.detach().to(torch.float64)
    return np.asarray(kept.numpy())
