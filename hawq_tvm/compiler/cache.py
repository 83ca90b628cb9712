"""Compiled kernels kept on disk between compilations: object files by a hash of everything they are made from.

An entry is its own checksum and the object's bytes, written beside and moved into place in one step: several processes
may use a folder, and whatever is in it may be removed at any time. A damaged entry is one that is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path

import tvm

from hawq_tvm.core.version import __version__

LIMIT = 1 << 29  # bytes of all entries
_SUFFIX = ".object"
_CHECKSUM = hashlib.sha256().digest_size
# What turns TIR into objects besides TVM: another text of these is another compiler.
_MAKERS = ("build.py", "tir_pipeline.py")


def folder() -> Path:
    """Where entries are kept: $HAWQ_TVM_CACHE, or hawq_tvm in the user's folder for caches ($XDG_CACHE_HOME)."""
    named = os.environ.get("HAWQ_TVM_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "hawq_tvm"


@lru_cache(maxsize=1)
def _compiler() -> str:
    makers = (Path(__file__).with_name(name).read_bytes() for name in _MAKERS)
    own = hashlib.sha256(b"".join(makers)).hexdigest()
    llvm = tvm.get_global_func("target.llvm_version_major")()
    return f"hawq_tvm {__version__} {own}, tvm {tvm.__version__}, llvm {llvm}"


class Cache:
    """The entries of a folder of this user, at most `limit` bytes of them: none where that is 0, and in a folder that
    cannot be written.
    """

    def __init__(self, path: Path | None = None, limit: int = LIMIT) -> None:
        self.path, self.limit = path or folder(), limit
        self.usable = limit > 0 and self._made()

    def _made(self) -> bool:
        """Whether the folder is there, and its entries are this user's alone: they become code."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.path.stat()
        except OSError:
            return False
        return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    @staticmethod
    def key(source: str, target: tvm.target.Target) -> str:
        """The name of what a compiler of this version makes of a source for a target."""
        return hashlib.sha256("\0".join((_compiler(), str(target), source)).encode()).hexdigest()

    def get(self, key: str) -> bytes | None:
        """The object of a key, None where there is none or it is damaged; what is read counts as new."""
        if not self.usable:
            return None
        path = self.path / f"{key}{_SUFFIX}"
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[_CHECKSUM:]).digest() != data[:_CHECKSUM]:
                path.unlink()
                return None
            os.utime(path)
        except OSError:
            return None
        return data[_CHECKSUM:]

    def put(self, key: str, data: bytes) -> None:
        """Keep an object; where the disk does not let it, nothing is kept."""
        if not self.usable or len(data) > self.limit:
            return
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(dir=self.path, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(data).digest() + data)
                os.replace(name, self.path / f"{key}{_SUFFIX}")
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    def prune(self) -> None:
        """Remove what was not read for the longest time, until the rest is within the limit."""
        if not self.usable:
            return
        found = []
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.path):
                with contextlib.suppress(OSError):
                    if entry.name.endswith((_SUFFIX, ".part")):
                        found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        size = sum(s for _, s, _ in found)
        for _, own, path in sorted(found):
            if size <= self.limit:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
                size -= own
