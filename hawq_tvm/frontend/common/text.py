"""Words of other libraries' errors."""

from __future__ import annotations

import re

# How TVM begins what it says of its own checks.
CHECK = re.compile(r"^.*Check failed: \(.*\) is false: (?=\S)")


def first_line(error: BaseException) -> str:
    """The last non-empty line of an exception's text: libraries put the cause there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CHECK.sub("", lines[-1])[:300] if lines else type(error).__name__


def stranger(error: BaseException) -> str:
    """What of PyTorch's page of advice about a pickle that it does not open names the cause."""
    sentences = [s for line in str(error).splitlines() for s in line.split(". ")]
    return next((s.strip() for s in sentences if "Unsupported" in s or "GLOBAL" in s), first_line(error))[:200]
