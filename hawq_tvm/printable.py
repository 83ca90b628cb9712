"""Names come from files that anybody can make: here they lose what a terminal would obey instead of show."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` in one line, with every control character (escapes, newlines, marks of writing direction, halves of pairs) spelled as in Python."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
