"""Work for all processors that leaves the interpreter, as every call into TVM does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of every item, in order, in as many threads as there are processors for this process."""
    with ThreadPoolExecutor(max(1, min(len(items), len(os.sched_getaffinity(0))))) as pool:
        return list(pool.map(function, items))
