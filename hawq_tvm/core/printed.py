"""What libraries in C print on standard output, which is the user's: lines of theirs for their authors go nowhere."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def printed_nowhere() -> Iterator[None]:
    """Standard output of this process is nowhere meanwhile, for libraries that print lines of their own; not for two
    threads at once.
    """
    c = ctypes.CDLL(None)
    sys.stdout.flush()
    c.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        c.fflush(None)  # what C still holds back is the library's
        os.dup2(kept, 1)
        os.close(kept)
