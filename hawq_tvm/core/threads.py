"""Work for all processors that leaves the interpreter, as every call into TVM does."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of every item, in order, in as many threads as there are processors for this process."""
    with _pool(len(items)) as pool:
        return list(pool.map(function, items))


def started(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Future[Result]]:
    """The same, begun in order and not waited for."""
    pool = _pool(len(items))
    futures = [pool.submit(function, item) for item in items]
    pool.shutdown(wait=False)
    return futures


def _pool(items: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(items, len(os.sched_getaffinity(0)))))
