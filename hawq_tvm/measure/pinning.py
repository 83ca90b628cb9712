"""The same few processors for every thread of the process, whoever made it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hawq_tvm.core.errors import UsageError

TASKS = Path("/proc/self/task")


def choose_cores(count: int) -> list[int]:
    """`count` processors that this process may use, of different physical cores as far as there are such.

    Raises UsageError when there are not so many, or when this system cannot pin threads.
    """
    if not hasattr(os, "sched_setaffinity") or not TASKS.is_dir():
        raise UsageError(
            "threads cannot be pinned to processors on this system, so a comparison would not be fair", expected="Linux"
        )
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(allowed):
        raise UsageError(
            "every thread needs a processor of its own in a comparison",
            where="--threads",
            expected=f"1 to {len(allowed)}",
            found=str(count),
        )
    return sorted(sorted(allowed, key=lambda core: (_rank(core, allowed), core))[:count])


def _rank(core: int, allowed: list[int]) -> int:
    """How many allowed processors before this one are threads of the same physical core."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    if not path.exists():
        return 0
    siblings: set[int] = set()
    for part in path.read_text().strip().split(","):
        first, _, last = part.partition("-")
        siblings.update(range(int(first), int(last or first) + 1))
    return sum(s < core for s in siblings & set(allowed))


@contextmanager
def restored_affinity() -> Iterator[None]:
    """Give every thread of the process its processors back at the end, and new threads those of the calling one."""
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    own = os.sched_getaffinity(0)
    try:
        yield
    finally:
        for task in _tasks():
            _pin(task, before.get(task, own))


def pin_all(cores: list[int]) -> None:
    """Every thread that the process has now, and every one that these start, on `cores`."""
    for task in _tasks():
        _pin(task, set(cores))


def pinned(cores: list[int]) -> bool:
    """Whether no thread of the process may run elsewhere."""
    return all(_affinity(task) <= set(cores) for task in _tasks())


@contextmanager
def other_processes(cores: list[int]) -> Iterator[list[float]]:
    """A list that holds, after the block, the share of the processors' time that other processes took during it."""
    found: list[float] = []
    busy, own, wall = _busy(cores), time.process_time(), time.perf_counter()
    yield found
    elapsed = (time.perf_counter() - wall) * len(cores)
    found.append(max(0.0, _busy(cores) - busy - (time.process_time() - own)) / elapsed)


def _busy(cores: list[int]) -> float:
    """Seconds since the start that these processors were not idle, a hypervisor's theft of them included."""
    wanted, ticks = {f"cpu{c}" for c in cores}, 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name in wanted:
            numbers = [int(v) for v in values[:8]]  # user nice system idle iowait irq softirq steal; guest is in user
            ticks += sum(numbers) - numbers[3] - numbers[4]
    return ticks / os.sysconf("SC_CLK_TCK")


def _tasks() -> list[int]:
    return [int(p.name) for p in TASKS.iterdir()]


def _pin(task: int, cores: set[int]) -> None:
    with suppress(ProcessLookupError):  # the thread has ended since it was listed
        os.sched_setaffinity(task, cores)


def _affinity(task: int) -> set[int]:
    try:
        return os.sched_getaffinity(task)
    except ProcessLookupError:
        return set()
