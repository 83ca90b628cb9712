"""forking.py PACKAGE compiler|runtime ARRAYS: runs a package in the children of a process; a program of its own, so that a hang can be ended.

ARRAYS: an .npz file of inputs (NUMBER/in/NAME) and of what a process that does not fork computes of them (NUMBER/out/NAME).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

PATH, READER = sys.argv[1:3]
DEPTH, THREADS, CHILDREN = 2, 2, 4


def load() -> Any:
    if READER == "compiler":
        import hawq_tvm

        return hawq_tvm.load(PATH)
    from hawq_tvm import runtime

    return runtime.load(PATH)


def check(number: int) -> bool:
    found = MODEL.run(GIVEN[number])
    return found.keys() == EXPECTED[number].keys() and all(np.array_equal(value, EXPECTED[number][name]) for name, value in found.items())


def check_all() -> None:
    assert all(map(check, range(COUNT)))


def in_child(work: Callable[[], object], fork: Callable[[], int] = os.fork, end: Callable[[int], NoReturn] = os._exit) -> None:
    """Work in a child and end it; here, wait for it."""
    sys.stdout.flush()
    child = fork()
    if child == 0:
        try:
            work()
        except Exception:
            traceback.print_exc()
            os._exit(1)
        end(0)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0, status


def descend(depth: int) -> None:
    check_all()
    in_threads(check_all)
    if depth:
        in_child(lambda: descend(depth - 1))
        check_all()


def in_threads(work: Callable[[], None], number: int = THREADS) -> None:
    failed = []

    def guarded() -> None:
        try:
            work()
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=guarded) for _ in range(number)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed, failed


def after() -> None:
    check_all()
    in_child(lambda: descend(DEPTH))
    in_child(check_all, end=sys.exit)  # as programs end, with all their handlers
    check_all()


def before() -> None:
    in_child(lambda: descend(1))
    check_all()


def pool() -> None:
    check_all()
    with multiprocessing.get_context("fork").Pool(CHILDREN) as children:
        assert all(children.map(check, list(range(COUNT)) * 4))
        check_all()
        assert all(children.map(check, range(COUNT)))
    check_all()


def during() -> None:
    """Forks while other threads run the package, and one makes packages of its own."""
    over = threading.Event()

    def run_on() -> None:
        while not over.is_set():
            check_all()

    def load_on() -> None:
        while not over.is_set():
            load()

    threads = [threading.Thread(target=f) for f in (run_on, run_on, load_on)]
    for t in threads:
        t.start()
    try:
        for _ in range(2):
            in_child(check_all)
            check_all()
    finally:
        over.set()
        for t in threads:
            t.join()


def elsewhere() -> None:
    """A fork in a thread that is not the first, and another in one that ran the package."""
    check_all()
    in_threads(lambda: in_child(lambda: descend(1)), 1)
    check_all()


def raw() -> None:
    """A fork of which Python is told afterwards only, in the child, as by servers written in C."""
    check_all()
    python = ctypes.PyDLL(None)

    def fork() -> int:
        child = python.fork()
        if child == 0:
            python.PyOS_AfterFork_Child()
        return int(child)

    in_child(check_all, fork)
    check_all()


def layers() -> None:
    """Every layer in the child, through the virtual machine and through C beside it, and a library that outlives the child."""
    check_all()

    def verify() -> None:
        assert MODEL.verify(random=1).ok and MODEL.verify(random=1, through="c").ok
        assert MODEL.bench(duration=0, iterations=2, warmup_ms=0).median_ms > 0 and MODEL.library.is_file()

    in_child(verify)
    assert MODEL.library.is_file()
    verify()


if __name__ == "__main__":
    START = time.monotonic()
    MODEL = load()
    with np.load(sys.argv[3]) as stored:
        arrays = {name: stored[name] for name in stored.files}
    COUNT = 1 + max(int(name.partition("/")[0]) for name in arrays)
    GIVEN, EXPECTED = ([{n.partition(side)[2]: v for n, v in arrays.items() if n.startswith(f"{i}{side}")} for i in range(COUNT)] for side in ("/in/", "/out/"))
    for way in (before, after, elsewhere, raw, pool, during, *([layers] if READER == "compiler" else [])):
        print(f"{time.monotonic() - START:.1f} s: {way.__name__}", flush=True)
        way()
