"""The C interface under load and under checkers: the same integers every time, no growth, no race, no access out of bounds."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hawq_tvm import manifest, target
from hawq_tvm.native import header, link, plan, toolchain
from hawq_tvm.pipeline import compile_model

from ..models import residual_net
from .networks import FLOAT, NETWORKS

SOURCE = Path(__file__).parent / "load.c"
MACHINE = platform.machine()
# Shadow memory collides with addresses that the kernel draws at random.
FIXED = ["setarch", MACHINE, "-R"] if shutil.which("setarch") else []
# Valgrind knows no AVX-512.
PORTABLE = "x86-avx2" if MACHINE == "x86_64" and {"avx2", "fma"} <= target.host_features() else "host"


def build(
    model: Any, folder: Path, name: str = "host", options: Sequence[str] = (), floats: bool = False, source: Path = SOURCE
) -> Path:  # fmt: skip
    """load.c, or another program, linked with a model's library, both compiled with more options."""
    chosen = target.parse(name)
    compiled = compile_model(model, chosen, allow_float_tail=floats)
    described = manifest.describe(compiled, "loaded")
    calls, features = plan.make(compiled.tir, chosen), target.required_features(chosen)
    link.export(compiled.executable, folder / "model.so", calls, version="loaded", architecture=MACHINE, features=features, options=options)
    (folder / "model.h").write_text(header.text(described, "loaded"))
    words = [*toolchain.compiler(MACHINE), *toolchain.FLAGS, "-D_GNU_SOURCE", "-Werror", *options, "-I", folder, source, folder / "model.so"]
    subprocess.run([*map(str, words), f"-Wl,-rpath,{folder}", "-o", str(folder / "program")], check=True)
    return folder / "program"


def run(program: Path, *numbers: int, under: Sequence[str] = (), environment: dict[str, str] | None = None) -> list[int]:
    done = subprocess.run([*under, str(program), *map(str, numbers)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [int(word) for word in done.stdout.split()]


def works(tmp_path: Path, *options: str) -> bool:
    """Whether a program compiled with a sanitizer starts here."""
    (tmp_path / "try.c").write_text("int main(void) { return 0; }\n")
    words = [*toolchain.compiler(MACHINE), *options, str(tmp_path / "try.c"), "-o", str(tmp_path / "try")]
    return not subprocess.run(words, capture_output=True).returncode and not subprocess.run([*FIXED, str(tmp_path / "try")], capture_output=True).returncode


def test_threads_with_models_of_their_own_and_one_shared(tmp_path: Path) -> None:
    assert run(build(residual_net(), tmp_path), 8, 100, 50, 2)[0] == 1200


@pytest.mark.slow
@pytest.mark.parametrize("pool_threads", [1, 2])
def test_a_hundred_thousand_runs_give_the_same_and_take_no_memory(tmp_path: Path, pool_threads: int) -> None:
    runs, early, late = run(build(residual_net(), tmp_path), 8, 10_000, 2_500, pool_threads)
    assert runs == 100_000
    assert late - early <= 256, (early, late)  # kilobytes: stacks grow into their pages, and a leak of 3 bytes a run would show


@pytest.mark.slow
def test_no_data_race(tmp_path: Path) -> None:
    if not works(tmp_path, "-fsanitize=thread"):
        pytest.skip("no thread sanitizer on this machine")
    program = build(residual_net(), tmp_path, options=("-fsanitize=thread", "-g"))
    for pool_threads in (2, 3):
        run(program, 4, 200, 50, pool_threads, under=FIXED, environment={"TSAN_OPTIONS": "halt_on_error=1"})


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_no_access_out_of_bounds_in_c(tmp_path: Path, name: str) -> None:
    options = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-DHAWQ_SEPARATE_STORAGES")
    if not works(tmp_path, *options):
        pytest.skip("no address sanitizer on this machine")
    program = build(NETWORKS[name](), tmp_path, options=options, floats=name in FLOAT)
    run(program, 2, 10, 5, 2, under=FIXED)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind: apt-get install valgrind")
@pytest.mark.parametrize("name", NETWORKS)
def test_no_access_out_of_bounds_in_kernels(tmp_path: Path, name: str) -> None:
    """Every buffer and storage is a block of its own here, so that memcheck sees what a kernel reads or writes beside it."""
    program = build(NETWORKS[name](), tmp_path, PORTABLE, ("-g", "-DHAWQ_SEPARATE_STORAGES"), name in FLOAT)
    run(program, 1, 2, 1, 2, under=["valgrind", "-q", "--error-exitcode=9", "--leak-check=full"])
