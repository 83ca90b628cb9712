"""Packages in processes that fork: children, and theirs, run what their parent loaded and get the same integers; nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm import forks
from hawq_tvm.errors import PackageError

PROGRAM = Path(__file__).parent / "forking.py"


@pytest.mark.parametrize("reader", ["compiler", "runtime"])
def test_children_run_what_their_parent_loaded(tiny: Path, tmp_path: Path, reader: str) -> None:
    package, arrays = ht.load(tiny), {}
    for number, inputs in enumerate(package.random_inputs(3, 0)):
        arrays |= {f"{number}/in/{name}": v for name, v in inputs.items()} | {f"{number}/out/{name}": v for name, v in package.run(inputs).items()}
    np.savez(tmp_path / "arrays.npz", **arrays)
    # Two threads on any machine: a pool of one would have nobody to lose.
    environment = {**os.environ, "TVM_NUM_THREADS": "2"}
    words = [sys.executable, str(PROGRAM), str(tiny), reader, str(tmp_path / "arrays.npz")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_a_gpu_of_the_parent_is_refused() -> None:
    forks.check_gpu(os.getpid(), "m.hawq")
    with pytest.raises(PackageError, match=r"m\.hawq: was loaded on a GPU before this process was forked.*spawn"):
        forks.check_gpu(os.getppid(), "m.hawq")
