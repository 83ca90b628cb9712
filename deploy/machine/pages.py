"""Huge pages for weights and activations in TVM's virtual machine, as the C interface has them.

A network reads its weights and writes its activations from end to end in every run, and with pages of 4 KB the CPU
looks up an address for every few lines of them. TVM's allocator takes memory from the heap and keeps it: the first
run shows where it is, and Linux is asked to back it by pages of 2 MB. That is a wish: without them nothing but the
time changes, and a machine where they are turned off keeps its will.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HUGE = 2 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# madvise: huge pages from now on; and for what is there already, at once (Linux 6.1 and later).
_HUGEPAGE, _COLLAPSE = 14, 25
_NEAR = 4096  # what the allocator leaves between two buffers, at most


class Main:
    """A library's `main` on a CPU, whose first call looks where its kernels' buffers are.

    set_instrument: of the virtual machine.
    """

    def __init__(self, main: Callable[..., Any], set_instrument: Callable[[Any], Any]) -> None:
        self._main, self._set_instrument = main, set_instrument
        self._asked = not allowed()

    def __call__(self, *tensors: Any) -> Any:
        """One inference."""
        if self._asked:
            return self._main(*tensors)
        self._asked = True
        sizes: dict[int, int] = {}

        def observe(function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> None:
            del function, symbol, result
            for a in arguments if before else ():
                if hasattr(a, "data_ptr"):
                    sizes[a.data_ptr()] = max(sizes.get(a.data_ptr(), 0), a.numel() * a.dtype.itemsize)

        self._set_instrument(observe)
        try:
            made = self._main(*tensors)
        finally:
            self._set_instrument("hawq_tvm.no_instrument")
        ask((start, start + size) for start, size in sizes.items())
        return made


def allowed() -> bool:
    """Whether this system lets programs ask for huge pages."""
    try:
        return "[never]" not in SETTING.read_text()
    except OSError:
        return False


def whole_pages(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The huge pages, from first to beyond the last, that lie inside of ranges of addresses taken together."""
    joined: list[list[int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1] + _NEAR:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    pages = [(-(-start // HUGE) * HUGE, end // HUGE * HUGE) for start, end in joined]
    return [(start, end) for start, end in pages if start < end]


def ask(ranges: Iterable[tuple[int, int]]) -> None:
    """Ask for huge pages inside of ranges of addresses; what Linux answers changes nothing else."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in whole_pages(ranges):
        for wish in (_HUGEPAGE, _COLLAPSE):
            madvise(start, end - start, wish)
