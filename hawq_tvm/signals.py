"""How a program ends that is told to: its temporary folders go, and its exit code says which signal it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)  # SIGINT is Python's KeyboardInterrupt already


class Told(BaseException):
    """The program was told to end; code: its exit code, 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


def cleanly(work: Callable[[], int]) -> int:
    """What `work`, a program's whole, returns; or 143 and the like after a signal, when everything on the way has cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    # Who started the program with a signal ignored (nohup) means it.
    before = {number: old for number in ENDING if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, _tell)
        return work()
    except Told as told:
        return told.code
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _tell(number: int, frame: FrameType | None) -> None:
    del frame
    for one in ENDING:  # a second one ends the program at once
        signal.signal(one, signal.SIG_DFL)
    raise Told(number)
