"""The prelude's functions, compiled for the CPU, against what they mean."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from schedules.spelling.cuda_prelude import DIVIDE, MEANINGS, PRELUDE

SHIM = (
    "#include <cstdint>\n#define __device__\n#define __forceinline__ inline\nstatic int __clzll(long long v) { return v"
    " ? __builtin_clzll(v) : 64; }\n"
)
LIMITS = np.array([0, 1, -1, 2, 3, -7, 2**31, 2**62, 2**63 - 1, -(2**63), -(2**63) + 1], np.int64)


def test_division_is_exact(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    entry = (
        'extern "C" void divide(const int64_t* a, const int64_t* b, int64_t* q, int n) { for (int i = 0; i < n; ++i)'
        " q[i] = hawq_divide(a[i], b[i]); }\n"
    )
    (tmp_path / "divide.cpp").write_text(SHIM + DIVIDE + entry)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", "divide.so", "divide.cpp"], cwd=tmp_path, check=True)
    rng = np.random.default_rng(3)
    wide = np.concatenate([LIMITS, rng.integers(-(2**63), 2**63 - 1, 400) >> rng.integers(0, 63, 400)])
    a, b = (v.ravel().copy() for v in np.meshgrid(wide, wide[wide != 0]))
    quotients = np.empty_like(a)
    pointers = [v.ctypes.data_as(ctypes.c_void_p) for v in (a, b, quotients)]
    ctypes.CDLL(str(tmp_path / "divide.so")).divide(*pointers, ctypes.c_int(len(a)))
    wanted = [
        (abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1) + 2**63) % 2**64 - 2**63
        for p, q in zip(a.tolist(), b.tolist())
    ]
    assert quotients.tolist() == wanted


def test_every_function_has_a_meaning() -> None:
    assert "hawq_divide" in PRELUDE
    assert all(f" {name}(" in PRELUDE for name in MEANINGS)
