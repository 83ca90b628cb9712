"""Which frontend reads a model: told by what the object is, or by what the file holds, not by what it is called."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.frontend.hawq.source import Checkpoint

Shapes = Mapping[str, Sequence[int]] | None
# How torch.save began its files before PyTorch 1.6: a pickled number.
OLD_CHECKPOINT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


@dataclass(frozen=True)
class Frontend:
    """One format's functions.

    load: what reads a model once, so that the others need not.
    run: model and shapes to an ANNOTATED module.  describe: model to JSON-ready fields.
    run_before_cut: as `run`, with what cannot be imported of the float end cut off (`hawq_tvm.core.cut`), where the
    format has a runtime that takes such an end.
    """

    load: Callable[[Any], Any]
    run: Callable[[Any, Shapes], tvm.IRModule]
    describe: Callable[[Any], dict[str, Any]]
    run_before_cut: Callable[[Any, Shapes], tvm.IRModule] | None = None


def frontend_of(source: Any) -> Frontend:
    """The frontend for a path, bytes, an onnx.ModelProto, a torch ExportedProgram or a HAWQ Checkpoint.

    Raises ModelError for PyTorch's other objects and files; what nobody knows is left to the ONNX reader to refuse.
    """
    content = _content(source.path if isinstance(source, Checkpoint) else source)
    if isinstance(source, Checkpoint) and content != "checkpoint":
        raise UsageError(
            "--network and --bits are for HAWQ checkpoints, which this is not",
            where=source.where,
            expected="a file of torch.save, as HAWQ writes it",
            found=content or "another format, or no file",
            remedy="leave them out, or give the checkpoint",
        )
    if content == "checkpoint":
        from . import hawq

        return Frontend(hawq.read_model, hawq.import_checkpoint, hawq.describe_checkpoint)
    if _is(source, "torch.export", "ExportedProgram") or content == "program":
        from . import torch

        return Frontend(torch.read_program, torch.import_exported, torch.describe_exported)
    module = _is(source, "torch.nn", "Module")
    if module or not isinstance(source, bytes):
        from . import ibert

        if ibert.is_module(source) if module else ibert.is_folder(source):
            return Frontend(ibert.read_model, ibert.import_ibert, ibert.describe_ibert)
    if module:
        raise ModelError(
            "is a module, not an exported program",
            where=type(source).__name__,
            expected="a torch.export.ExportedProgram",
            remedy="pass torch.export.export(module, example_inputs), after convert_pt2e",
        )
    from . import onnx

    return Frontend(onnx.read_model, onnx.import_onnx, onnx.describe_onnx, onnx.import_before_cut)


def _is(source: Any, package: str, name: str) -> bool:
    """Whether an object is of a class of PyTorch, which must not be imported for that."""
    return any(c.__name__ == name and c.__module__.startswith(package) for c in type(source).__mro__)


def _content(source: Any) -> str:
    """What PyTorch wrote into a file or bytes: "program" for an exported program, "checkpoint" for torch.save, else
    nothing.

    Raises ModelError for an archive of PyTorch that holds something else.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not os.path.isfile(path):
            return ""
        file: Any = path
    elif isinstance(source, bytes):
        file = io.BytesIO(source)
    else:
        return ""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [n.rpartition("/")[2] if n.count("/") < 2 else n.partition("/")[2] for n in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "checkpoint" if _start(source) == OLD_CHECKPOINT else ""
    if "serialized_exported_program.json" in names or any(
        n.startswith("models/") and n.endswith(".json") for n in names
    ):
        return "program"
    if "constants.pkl" in names:
        raise ModelError(
            "is a TorchScript archive",
            where=str(source) if isinstance(source, str | os.PathLike) else "model",
            expected="an ONNX model, or a .pt2 file of torch.export.save",
            remedy="quantize the model with prepare_pt2e and convert_pt2e, and save what torch.export.export gives",
        )
    return "checkpoint" if "data.pkl" in names else ""


def _start(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source[: len(OLD_CHECKPOINT)]
    try:
        with Path(source).open("rb") as file:
            return file.read(len(OLD_CHECKPOINT))
    except OSError:
        return b""
