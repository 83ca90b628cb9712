"""What libraries in C print on standard output, which is the user's: it goes to standard error."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def printed_elsewhere() -> Iterator[None]:
    """Standard output of this process is standard error meanwhile, for libraries that print lines of their own; not
    for two threads at once.
    """
    c = ctypes.CDLL(None)
    sys.stdout.flush()
    c.fflush(None)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        c.fflush(None)  # what C still holds back is the library's
        os.dup2(kept, 1)
        os.close(kept)
