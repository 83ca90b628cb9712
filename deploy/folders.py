"""Folders that are written and read as a whole: an exchange of names puts a new one in the place of an old one, and readers keep the one they opened."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from hawq_tvm.errors import PackageError

T = TypeVar("T")
_CURRENT, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
ATTEMPTS = 100  # of a writer or reader whom others overtake


def replace(new: Path, old: Path, destination: Path) -> None:
    """Give a folder the name of another, in one step where Linux exchanges names; what had that name, if anything, ends as `new` or beside `old`.

    Raises OSError when the destination cannot be replaced; it is then as it was.
    """
    for attempt in range(ATTEMPTS):
        if not os.path.lexists(destination):
            try:
                os.rename(new, destination)
                return
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another writer was faster
                    raise
        failed = _exchange(new, destination)
        if failed == 0:
            return
        if failed not in (errno.ENOENT, errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise OSError(failed, os.strerror(failed), str(destination))
        if failed != errno.ENOENT:  # this system or file system exchanges no names: two steps
            aside = old.with_name(f"{old.name}{attempt}")
            with contextlib.suppress(FileNotFoundError):
                os.replace(destination, aside)
            try:
                os.replace(new, destination)
                return
            except OSError as e:
                if aside.exists() and not destination.exists():
                    os.replace(aside, destination)
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    raise OSError(errno.EBUSY, "others write there without a pause", str(destination))


def _exchange(one: Path, other: Path) -> int:
    """Exchange two names in one step: 0, or the number of the error."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return errno.ENOSYS
    return 0 if function(_CURRENT, os.fsencode(one), _CURRENT, os.fsencode(other), _EXCHANGE) == 0 else ctypes.get_errno()


def reading(path: Path, read: Callable[[Folder], T]) -> T:
    """What `read` makes of a folder; it begins again when another folder took the place meanwhile, for then it may have seen parts of one that was removed.

    Raises what `read` raises, and OSError.
    """
    for attempt in range(ATTEMPTS):
        with _opened(path) as folder:
            try:
                return read(folder)
            except (OSError, PackageError):
                if attempt == ATTEMPTS - 1 or folder.is_at(path):
                    raise
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Folder]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Folder(descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """A folder that is open, whatever has its name now."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def is_at(self, path: Path) -> bool:
        """Whether it still has this path."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except OSError:
            return False

    def names(self) -> set[str]:
        """What is in it."""
        return set(os.listdir(self._descriptor))

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None for a link, a folder, a pipe or a device, which are not opened for reading."""
        try:
            if not stat.S_ISREG(os.stat(name, dir_fd=self._descriptor, follow_symlinks=False).st_mode):
                return None
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._descriptor)
        except OSError as e:
            if e.errno == errno.ELOOP:  # it became a link
                return None
            raise
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
