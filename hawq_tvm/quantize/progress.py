"""The progress of a measurement in a terminal, or in lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from .allocate.sensitivity import Step

PAUSE = 30.0


@contextmanager
def measuring(console: Console, quiet: bool) -> Iterator[Callable[[Step], None] | None]:
    """The progress of a measurement: a bar in a terminal, else a line where a phase ends or has taken long, or
    nothing.
    """
    if quiet:
        yield None
    elif not console.is_terminal:
        yield _lines(console.print)
    else:
        columns = (
            TextColumn("{task.fields[phase]}"),
            MofNCompleteColumn(),
            BarColumn(20),
            TextColumn("{task.description}"),
        )
        # Twice a second: whoever draws takes time from what is measured.
        with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
            task = bar.add_task("", total=None, phase="")
            yield lambda step: bar.update(
                task, total=step.of, completed=step.done, phase=step.phase, description=_detail(step)
            )


def _lines(print_line: Callable[[str], None]) -> Callable[[Step], None]:
    """Prints a line where a phase ends, and in one that lasts every PAUSE seconds."""
    last = time.monotonic()

    def tell(step: Step) -> None:
        nonlocal last
        now = time.monotonic()
        if step.done >= step.of or now - last >= PAUSE:
            last = now
            print_line(f"  {_told(step)}")

    return tell


def _told(step: Step) -> str:
    detail = _detail(step)
    return f"{step.phase} {step.done} of {step.of}{', ' if detail else ''}{detail}"


def _detail(step: Step) -> str:
    worst = f"worst standard error {step.worst:.0%}" if step.worst is not None else ""
    left = f"at most {step.seconds_left:.0f} s left" if step.seconds_left is not None else ""
    return ", ".join(filter(None, (worst, left)))
