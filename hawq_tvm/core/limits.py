"""What no model of ours is larger than."""

from __future__ import annotations

# Of one tensor, whether an input, a result or what a pass makes on the way: a gigabyte of 32-bit numbers.
MAX_ELEMENTS = 2**28
