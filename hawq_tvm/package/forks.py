"""Runs in a process that forks: no fork happens inside a run, and no thread that forks has workers of TVM's.

A child has its parent's memory and one thread.  A lock that another thread held stays locked there, who waits for a
worker of TVM's pool waits for ever, and a pool whose workers are gone ends the process when it is destroyed.  TVM
gives every thread that runs a kernel a pool that lasts as long as the thread; so kernels run in a thread beside the
caller's, which children do without and make anew.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from itertools import count
from types import TracebackType
from typing import Any, Literal, TypeVar

from hawq_tvm.core.errors import PackageError

T = TypeVar("T")
_numbers = count()
_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()
_registry = threading.RLock()  # of _locks, and held while a thread forks: no lock is made then
_held: list[RunLock] = []
_told: list[bool] = []  # not empty while a fork is under way that Python was told of
_caller = threading.local()  # worker: this thread's


class RunLock:
    """One run of a package at a time, and none while a thread forks."""

    def __init__(self) -> None:
        self.number, self._lock = next(_numbers), threading.RLock()
        with _registry:
            _locks.add(self)

    def run(self, work: Callable[[], T]) -> T:
        """What `work`, which runs kernels, returns or raises; it may not take this lock."""
        with self:
            worker = getattr(_caller, "worker", None)
            if worker is None or worker.pid != os.getpid():
                worker = _caller.worker = _Worker()
            return worker.result(work)

    def acquire(self) -> None:
        """Wait for the other threads' runs."""
        self._lock.acquire()

    def release(self) -> None:
        """Let another thread run."""
        self._lock.release()

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = threading.RLock()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def check_gpu(pid: int, where: str) -> None:
    """Refuse a GPU that another process, a parent, began to use: CUDA does not outlive a fork.

    pid: of the process that loaded the package.  Raises PackageError.
    """
    if pid != os.getpid():
        raise PackageError(
            "was loaded on a GPU before this process was forked, and CUDA does not outlive a fork",
            where=where,
            remedy="start children with multiprocessing's method spawn, and load the package in each",
        )


class _Worker:
    """The thread in which a caller's kernels run; it ends with the caller."""

    def __init__(self) -> None:
        self.pid, self._tasks = os.getpid(), queue.SimpleQueue[Any]()
        # A daemon, so that a program's end does not wait for it.
        threading.Thread(target=_work, args=(self._tasks,), name="hawq_tvm", daemon=True).start()
        weakref.finalize(self, self._tasks.put, None).atexit = False

    def result(self, work: Callable[[], T]) -> T:
        task = _Task(work)
        self._tasks.put(task)
        try:
            task.done.acquire()
        except BaseException:
            # A signal's: a kernel cannot be interrupted, and must have ended before the lock is given back.
            task.done.acquire()
            raise
        if task.error is not None:
            try:
                raise task.error
            finally:
                task.error = None  # which knows this frame
        value: T = task.value
        return value


class _Task:
    """Work for a worker; as a context, it keeps what is raised for the caller and tells it that the work ended."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work, self.done = work, threading.Lock()
        self.value: Any = None
        self.error: BaseException | None = None
        self.done.acquire()

    def __enter__(self) -> _Task:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> Literal[True]:
        self.error = value
        self.done.release()
        return True


def _work(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        with task:
            task.value = task.work()
        del task  # with what it returned


def _before_fork() -> None:
    _registry.acquire()
    for lock in sorted(_locks, key=lambda one: one.number):
        lock.acquire()
        _held.append(lock)
    _told.append(True)


def _after_in_parent() -> None:
    _told.clear()
    while _held:
        _held.pop().release()
    _registry.release()


def _after_in_child() -> None:
    global _registry
    if _told:  # the only thread that is left holds all locks
        _after_in_parent()
    else:  # forked by a program that told Python afterwards only, as servers written in C do
        _registry = threading.RLock()
        for lock in _locks:
            lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
