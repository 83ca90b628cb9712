"""A cache of kernels for this run of the tests alone: none depends on what was compiled before it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

if "HAWQ_TVM_CACHE" not in os.environ:
    os.environ["HAWQ_TVM_CACHE"] = tempfile.mkdtemp(prefix="hawq_tvm_cache_")
    # The workers of pytest-xdist inherit the name and are gone before this process is.
    atexit.register(shutil.rmtree, os.environ["HAWQ_TVM_CACHE"], ignore_errors=True)
