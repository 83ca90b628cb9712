"""The tests for Arm use the helpers of the schedules' tests."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (".", "schedules", "cuda"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
