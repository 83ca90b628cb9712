"""Files that users name: arrays by name, and text; written complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import InputError, ModelError, OutputError

DATA, SYNTHETIC = "an .npz file, or a folder of .npy, .npz or image files", "synthetic"
KIND = "an .npz file (numpy.savez) with an array for every input"
# What numpy and zipfile raise for files that are damaged, encrypted, of absurd size, or no arrays at all.
UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def check_model(path: str | os.PathLike[str]) -> None:
    """Raise ModelError where there is nothing at a model's path."""
    if not os.path.exists(path):
        raise ModelError("no such file", where=os.fspath(path), remedy="check the path of the model")


def check_data(path: str | os.PathLike[str]) -> None:
    """Raise InputError where there is nothing at the path of data."""
    if not os.path.exists(path):
        raise InputError("does not exist", where=os.fspath(path), expected=DATA, remedy="check the path")


def load_npz(path: str) -> dict[str, Any]:
    """The arrays of an .npz file by name.

    Raises InputError when it is missing or no such file.
    """
    if not Path(path).is_file():
        raise InputError(
            "is a folder" if Path(path).is_dir() else "does not exist",
            where=path,
            expected=KIND,
            remedy="check the path",
        )
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.ndarray):
            raise InputError(
                "holds one array without a name",
                where=path,
                expected=KIND,
                found="an .npy file",
                remedy="write it again with numpy.savez(PATH, NAME=array)",
            )
        with data:
            arrays = {name: data[name] for name in data.files}
    except UNREADABLE as e:
        # NumPy takes what it does not know for a pickle, and advises to load it.
        said = "another file" if "allow_pickle" in str(e) else (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(
            "cannot be read",
            where=path,
            expected=KIND,
            found=said,
            remedy="write it with numpy.savez(PATH, NAME=array)",
        ) from e
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray):
            raise InputError("holds something that is no array", where=path, expected=KIND, found=name)
    return arrays


def check_output(path: Path) -> None:
    """Whether a file can be written, found out before the work whose result it is for; nothing is left behind.

    Raises OutputError when its folder does not exist or does not take files, or when the path is something else than
    a file.
    """
    _write(path, None)


def save_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays by name to an .npz file, complete or not at all.

    Raises OutputError when it cannot be written.
    """
    _write(path, lambda stream: np.savez(stream, **arrays))


def write_text(path: Path, text: str) -> None:
    """Write a text file as UTF-8, complete or not at all.

    Raises OutputError when it cannot be written.
    """
    _write(path, lambda stream: stream.write(text.encode()))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, complete or not at all.

    Raises OutputError when it cannot be written.
    """
    _write(path, lambda stream: stream.write(data))


def check_folder(path: Path) -> None:
    """Whether the folder that `path` is to be made in exists: none is made on the way, a mistyped path would go
    unnoticed.

    Raises OutputError when it does not.
    """
    if not path.parent.is_dir():
        raise OutputError(
            "cannot be written",
            where=str(path),
            found=f"no folder {path.parent}",
            remedy="make the folder first, or check the path",
        )


def _write(path: Path, fill: Callable[[IO[bytes]], Any] | None) -> None:
    """Write a file by way of a temporary one beside it; without `fill`, only find out whether that is possible."""
    try:
        check_folder(path)
        real = Path(os.path.realpath(path))  # a link stays, and leads to the new contents
        if real.exists() and not real.is_file():
            found = "a folder" if real.is_dir() else "a device or pipe"
            raise OutputError("cannot be written", where=str(path), expected="the path of a file", found=found)
        temporary, descriptor = _fresh(real)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                if fill is not None:
                    if real.exists():
                        os.fchmod(descriptor, stat.S_IMODE(real.stat().st_mode))
                    fill(stream)
                    stream.flush()
                    os.fsync(descriptor)  # else a crash may leave the new name with half of the contents
            if fill is not None:
                os.replace(temporary, real)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise OutputError(
            "cannot be written",
            where=str(path),
            found=e.strerror or str(e),
            remedy="check the path and its permissions",
        ) from e


def _fresh(beside: Path) -> tuple[Path, int]:
    """A new file beside another, open for writing, with a name that nobody knew; it follows no link and has the
    user's usual permissions.
    """
    while True:
        path = beside.with_name(f".{beside.name[:40]}.{secrets.token_hex(8)}.tmp")
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
