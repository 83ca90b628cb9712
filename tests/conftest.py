"""A cache of kernels for this run of the tests alone: none depends on what was compiled before it. Properties may take
their time: other programs may keep the machine busy. One thread of PyTorch's for each worker, for the same reason.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings

settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

os.environ.setdefault("OMP_NUM_THREADS", "1")

if "HAWQ_TVM_CACHE" not in os.environ:
    os.environ["HAWQ_TVM_CACHE"] = tempfile.mkdtemp(prefix="hawq_tvm_cache_")
    # The workers of pytest-xdist inherit the name and are gone before this process is.
    atexit.register(shutil.rmtree, os.environ["HAWQ_TVM_CACHE"], ignore_errors=True)
