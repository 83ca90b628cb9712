"""Files that users name: arrays by name, and text; written complete or not at all."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import InputError


def load_npz(path: str) -> dict[str, Any]:
    """The arrays of an .npz file by name.

    Raises InputError when it is missing or no such file.
    """
    if not Path(path).is_file():
        raise InputError("does not exist", where=path, remedy="check the path")
    try:
        with np.load(path, allow_pickle=False) as data:
            if not hasattr(data, "files"):
                raise InputError("holds one array without a name", where=path, expected="an .npz file (numpy.savez)", found="an .npy file")
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as e:
        raise InputError("cannot be read", where=path, expected="an .npz file (numpy.savez)", found=str(e).splitlines()[0] if str(e) else type(e).__name__) from e


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays by name to an .npz file, complete or not at all.

    Raises InputError when it cannot be written.
    """
    _write(path, lambda stream: np.savez(stream, **arrays))


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, complete or not at all.

    Raises InputError when it cannot be written.
    """
    _write(path, lambda stream: stream.write(text.encode()))


def _write(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            fill(stream)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError("cannot be written", where=str(path), found=e.strerror or str(e), remedy="check the path and its permissions") from e
