"""Where everything that a person reads is printed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from hawq_tvm.core.printable import printable

WIDE = 10_000


class Terminal(Console):
    """A console that prints strings as they are: no markup, no emoji codes, control characters spelled out.

    What is no terminal (a file, a pipe) has room for every table, so that no name is cut there.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, markup=False, emoji=False, **options)

    @property
    def size(self) -> ConsoleDimensions:
        """The terminal's columns and lines."""
        return super().size if self.is_terminal and self.file.isatty() else ConsoleDimensions(WIDE, 25)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def render_str(self, text: str, **options: Any) -> Text:  # its options pass through
        """A string as it is printed."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed of anything else: progress bars make their texts themselves."""
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else "\n".join(map(printable, segment.text.split("\n")))
            yield Segment(shown, segment.style, segment.control)


class Grid(Table):
    """A table whose columns are folded where a terminal is narrow, never cut."""

    def __init__(self, *headers: Column | str, **options: Any) -> None:
        super().__init__(*(Column(h, overflow="fold") if isinstance(h, str) else h for h in headers), **options)


OUT, ERR = Terminal(), Terminal(stderr=True)
