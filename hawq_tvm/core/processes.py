"""How a program that was started ended: in words that name the signal which killed it, and what can be done."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

_MEANINGS = {
    "SIGILL": (
        "an instruction that the processor, its emulator or the operating system does not allow",
        "compile for the processor that runs it (--target), or name an emulator that has its instructions",
    ),
    "SIGKILL": (
        "killed from outside, most often because memory ran out",
        "free memory, or give the container more, and repeat the command",
    ),
    "SIGTERM": ("ended from outside", "repeat the command"),
    "SIGXCPU": ("it used more time than its limit", "raise the limit (ulimit -t)"),
    "SIGSYS": ("a system call that a seccomp filter forbids", "allow it in the container's profile"),
}
_FATAL = ("SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGSEGV", "SIGTERM", "SIGSYS", "SIGXCPU")
_BUG = ("a fault of the program", "set HAWQ_TVM_DEBUG=1 and report it")


def failure(done: subprocess.CompletedProcess[str], remedy: str, marks: Sequence[str] = ()) -> dict[str, str]:
    """Why a program failed, as an error's `found` and `remedy`: the signal that killed it, or a line that it wrote
    on standard error.

    remedy: unless a signal has its own.  marks: the first line that holds one of these is the one to tell, else the
    last.
    """
    name = killed_by(done.returncode)
    if name is not None:
        meaning, cure = _MEANINGS.get(name, _BUG)
        return {"found": f"it was killed by {name}: {meaning}", "remedy": cure}
    lines = [line.strip() for line in (done.stderr or done.stdout or "").splitlines() if line.strip()]
    marked = [line for line in lines if any(m in line for m in marks)]
    return {
        "found": (marked or lines[-1:] or [f"it ended with {done.returncode} and said nothing"])[0],
        "remedy": remedy,
    }


def killed_by(code: int) -> str | None:
    """The name of the signal that ended a program, by its exit code: negative, or beyond 128 where a shell ran it;
    None for another end.
    """
    if code < 0:
        return signal.Signals(-code).name
    return next((name for name in _FATAL if getattr(signal, name) == code - 128), None)
