"""What an export and the times that come back have in common. Part of an exported run: nothing but Python is
imported.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

FORMAT, TIMES = "hawq_tvm gpu tuning 1", "hawq_tvm gpu times 1"


def identity(plan: Any) -> str:
    """The hash that ties times to a plan."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
