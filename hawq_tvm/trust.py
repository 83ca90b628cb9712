"""Whether the user vouches for the files that a command reads: pickles of PyTorch can hold code, which runs as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)
REMEDY = "if you know who made the file, read it with --trust (trust=True in Python)"


def trusted() -> bool:
    """Whether files may be read in ways that can run code."""
    return _TRUSTED.get()


@contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Inside, files are trusted where `yes`; what encloses it is not changed otherwise."""
    token = _TRUSTED.set(yes or trusted())
    try:
        yield
    finally:
        _TRUSTED.reset(token)
