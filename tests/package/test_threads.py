"""Threads: a measurement has as many as it says, and nothing of it stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hawq_tvm as ht
from hawq_tvm.core.errors import UsageError

from ..models import residual_net

SCRIPT = """
import os, time, hawq_tvm as ht
package = ht.load({path!r})
(x,) = package.random_inputs(1, 0)
allowed = os.sched_getaffinity(0)
tasks = lambda: len(os.listdir("/proc/self/task"))
during = []
package.run(x)
before = tasks()
from hawq_tvm.measure import measure
report = measure.measure(lambda: during.append(tasks()), "tasks", warmup_ms=0, duration=0, iterations=1, threads=5)
# The measuring thread itself is the first of the five.
assert report.threads == 5 and during[-1] - before == 5, (before, during)
for _ in range(600):  # the pool ends a moment after its thread; seconds on a busy machine
    if tasks() == before:
        break
    time.sleep(0.05)
assert tasks() == before, tasks()
package.bench(warmup_ms=0, duration=0, iterations=2, threads=3)
package.run(x)
assert os.sched_getaffinity(0) == allowed, os.sched_getaffinity(0)
assert os.environ["TVM_NUM_THREADS"] == str(len(allowed))
"""


@pytest.fixture(scope="module")
def package() -> ht.Package:
    return ht.compile(residual_net())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no processor affinity")
def test_threads_are_as_said_and_processors_as_allowed(package: ht.Package, tmp_path: Path) -> None:
    path = package.save(tmp_path / "m.hawq")
    last = max(os.sched_getaffinity(0))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")}
    code = f"import os; os.sched_setaffinity(0, {{{last}}})\n" + SCRIPT.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"threads": 0},
        {"threads": -1},
        {"iterations": 0},
        {"duration": -1},
        {"duration": float("nan")},
        {"duration": float("inf")},
        {"warmup_ms": -1},
        {"warmup_ms": float("nan")},
        {"warmup_ms": float("inf")},
    ],
)
def test_numbers_that_make_no_sense(package: ht.Package, wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        package.bench(**wrong)  # type: ignore[arg-type]
