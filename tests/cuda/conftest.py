"""The CUDA tests use the helpers of the schedules' tests, and skip what needs nvcc where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hawq_tvm.compiler.cuda import nvcc
from hawq_tvm.core.errors import UsageError

for folder in (".", "schedules"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))


@pytest.fixture
def compiler() -> Path:
    """nvcc; the test is skipped without it."""
    try:
        return nvcc.find()
    except UsageError as e:
        pytest.skip(f"no nvcc: {e}")
