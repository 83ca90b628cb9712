"""What needs nvcc is skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from hawq_tvm.compiler.cuda import nvcc
from hawq_tvm.core.errors import UsageError


@pytest.fixture
def compiler() -> Path:
    """nvcc; the test is skipped without it."""
    try:
        return nvcc.find()
    except UsageError as e:
        pytest.skip(f"no nvcc: {e}")
