"""The command line: everything that parses options or prints."""

from __future__ import annotations

from collections.abc import Sequence

from hawq_tvm.core import signals

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""

    def work() -> int:
        from .commands import run  # takes a while, in which a signal may come

        return run(argv)

    return signals.cleanly(work)
