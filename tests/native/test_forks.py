"""The C interface in the children of a process: workers are started anew, and what a vanished thread held is free."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ..models import residual_net
from .test_load import FIXED, build, works

SOURCE = Path(__file__).parent / "forks.c"
WAYS = ("before", "after", "during", "inside")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(residual_net(), tmp_path_factory.mktemp("forks"), source=SOURCE)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_children_run_what_their_parent_made(program: Path, way: str, threads: int) -> None:
    done = subprocess.run([str(program), way, str(threads)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.slow
def test_memory_is_used_rightly_on_both_sides(tmp_path: Path) -> None:
    options = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-DHAWQ_SEPARATE_STORAGES")
    if not works(tmp_path, *options):
        pytest.skip("no address sanitizer on this machine")
    program = build(residual_net(), tmp_path, options=options, source=SOURCE)
    for way in WAYS:
        # A child that was cut out of another thread's run cannot free what only that thread knew.
        done = subprocess.run([*FIXED, str(program), way, "3"], capture_output=True, text=True, timeout=300, env={"ASAN_OPTIONS": "detect_leaks=0"})
        assert done.returncode == 0, (way, done.stderr[-2000:])
