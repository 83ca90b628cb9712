"""Packages and the C++ runner, made once for the tests of this folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import hawq_tvm as ht
from hawq_tvm.core.errors import PackageError
from hawq_tvm.package import runtime

from ..models import residual_net

RUNNER = Path(__file__).parents[2] / "deploy" / "runner"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package folder; tests copy it before they change it."""
    return ht.compile(residual_net()).save(tmp_path_factory.mktemp("tiny") / "tiny.hawq")


@pytest.fixture(scope="session")
def hawq_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ runner, built with this machine's CMake and compiler; once for all test processes."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    base = tmp_path_factory.getbasetemp()
    build = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hawq_run_build"
    with open(f"{build}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (build / "hawq-run").exists():
            command = ["bash", str(RUNNER / "build.sh"), sys.executable, str(build), "-DCMAKE_CXX_FLAGS=-Werror"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return build / "hawq-run"


def run_it(hawq_run: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """One call of the runner; whatever happens it ends by itself, and says at most one line of error."""
    done = subprocess.run(
        [str(hawq_run), *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode in (0, 2, 3), (done.returncode, done.stderr)
    assert len(done.stderr.splitlines()) == (done.returncode != 0), done.stderr
    return done


@pytest.fixture(params=["compiler", "runtime", "hawq-run"])
def refused(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """What a reader of packages says about one that it must refuse: the compiler's loader, the runtime's, the C++
    runner.
    """
    if request.param == "hawq-run":
        program = request.getfixturevalue("hawq_run")

        def call(path: Path) -> str:
            done = run_it(program, path, "--bench", "--duration", "0", "--iterations", "1", "--warmup-ms", "0")
            assert done.returncode == 3 and done.stderr.startswith("hawq-run: ") and done.stdout == "", (path, done)
            return done.stderr

        return call
    load = ht.load if request.param == "compiler" else runtime.load

    def fail(path: Path) -> str:
        with pytest.raises(PackageError) as caught:
            load(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return fail
