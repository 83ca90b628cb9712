"""Words of other libraries' errors."""

from __future__ import annotations


def last_line(error: BaseException) -> str:
    """The last non-empty line of an exception's text: libraries put the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
