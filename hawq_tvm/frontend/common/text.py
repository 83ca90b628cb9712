"""Words of other libraries' errors."""

from __future__ import annotations

import re

# How TVM begins what it says of its own checks.
CHECK = re.compile(r"^.*Check failed: \(.*\) is false: (?=\S)")


def first_line(error: BaseException) -> str:
    """The last non-empty line of an exception's text: libraries put the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CHECK.sub("", lines[-1])[:300] if lines else type(error).__name__
