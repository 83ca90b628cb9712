"""How a program ends that is told to: its temporary folders go, and its exit code says which signal it was.

A signal is an exception in the main thread, from wherever that is.  Two things can keep it from getting there.  The
system may hand the signal to a thread that begins another while the main one wakes up; the main one then sleeps on in
its lock.  And what is raised in a finalizer or in a callback of a library's is dropped there, or becomes another
error.  So a thread wakes the main one until it has seen the signal, and an exception that is dropped is raised again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WAKING = signal.SIGURG  # nobody's who does not ask for it
WAKES = 0.05  # seconds between two
TWICE = 1.0  # seconds in which a second signal is the first once more: timeout(1) and an impatient finger send two
ENDED = b"\0"


class Told(BaseException):
    """The program was told to end; code: its exit code, 128 and the signal's number."""

    def __init__(self, number: int, dropped: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.code, self._dropped = 128 + number, dropped

    def __del__(self) -> None:
        self._dropped()


class Interrupted(Told, KeyboardInterrupt):
    """The same by SIGINT, as others know it."""


def cleanly(work: Callable[[], int]) -> int:
    """What `work`, a program's whole, returns; or 130, 143 and the like after a signal, when everything on the way has
    cleaned up.  Of Ctrl-C it says so on standard error, in the words of the KeyboardInterrupt where it has some.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    try:
        with _listening() as listener:
            return _finished(work, listener)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Told as end:
        return end.code


def told() -> bool:
    """Whether this program was told to end: then an error is what somebody made of the exception."""
    return any(listener.number for listener in _listeners)


def _finished(work: Callable[[], int], listener: _Listener) -> int:
    try:
        code = work()
    except Exception:
        if listener.number == 0:
            raise
    if listener.number:
        listener.throw()
    return code


class _Listener:
    """What the handlers know; all of them run in the main thread."""

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0  # of the first signal
        self.over = self.dropped = False
        self.awake = False  # the main thread has run a handler; no Event, as one handler may interrupt another's `set`
        self.reading, self.writing = os.pipe()  # numbers of signals; Python writes them, too
        os.set_blocking(self.writing, False)

    def tell(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.awake = True
        if self.over:
            return
        if self.number == 0:
            self.number, self.since = number, time.monotonic()
            self.throw()
        if time.monotonic() - self.since > TWICE:  # a second one ends the program at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def look(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.awake = True
        if self.dropped and not self.over:
            self.dropped = False
            self.throw()

    def throw(self) -> NoReturn:
        raise (Interrupted if self.number == signal.SIGINT else Told)(self.number, self.drop)

    def drop(self) -> None:
        if not self.over:
            self.dropped = True
            os.write(self.writing, bytes([self.number]))  # not here and now: it would be dropped again

    def wake(self) -> None:
        """Wake the main thread after every signal that is noted, until it has run a handler."""
        while (note := os.read(self.reading, 1)) != ENDED:
            if note[0] in ENDING:
                self.awake = False
                time.sleep(WAKES)
                while not (self.over or self.awake):
                    signal.pthread_kill(threading.main_thread().ident or 0, WAKING)
                    time.sleep(WAKES)

    def quietly(self, before: Callable[[sys.UnraisableHookArgs], object]) -> Callable[[sys.UnraisableHookArgs], None]:
        """A hook for what is dropped: of a signal nothing is said."""

        def hook(dropped: sys.UnraisableHookArgs) -> None:
            if not isinstance(dropped.exc_value, Told):
                before(dropped)

        return hook


_listeners: list[_Listener] = []  # the last one's handlers are at work


@contextmanager
def _listening() -> Iterator[_Listener]:
    # Who started the program with a signal ignored (nohup) means it.
    before = {n: old for n in ENDING if (old := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    urgent = signal.getsignal(WAKING)
    listener, hook = _Listener(), sys.unraisablehook
    waker = threading.Thread(target=listener.wake, name="signals", daemon=True)
    waker.start()
    _listeners.append(listener)
    noted = signal.set_wakeup_fd(listener.writing, warn_on_full_buffer=False)
    try:
        sys.unraisablehook = listener.quietly(hook)
        signal.signal(WAKING, listener.look)
        for number in before:
            signal.signal(number, listener.tell)
        yield listener
    finally:
        listener.over = True
        _listeners.remove(listener)
        signal.set_wakeup_fd(noted)
        os.write(listener.writing, ENDED)
        waker.join()
        os.close(listener.reading)
        os.close(listener.writing)
        sys.unraisablehook = hook
        signal.signal(WAKING, urgent or signal.SIG_DFL)
        for number, old in before.items():
            signal.signal(number, old)
