"""Programs that are killed: the sentence names the signal, and what can be done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hawq_tvm as ht
from hawq_tvm import processes
from hawq_tvm.bench import table
from hawq_tvm.errors import HawqError, PackageError
from hawq_tvm.native import toolchain

from ..models import residual_net

FOREIGN = "arm-neon"


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", f"import os, signal, sys\n{code}"], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "says", "do"), [
    ("SIGILL", "an instruction that the processor", "--target"), ("SIGKILL", "memory ran out", "free memory"),
    ("SIGSEGV", "a fault of the program", "HAWQ_TVM_DEBUG=1"), ("SIGABRT", "a fault of the program", "report it"),
])  # fmt: skip
def test_a_signal_is_named(name: str, says: str, do: str) -> None:
    told = processes.failure(ended(f"print('fine so far', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.{name})"), "try again")
    assert told["found"].startswith(f"it was killed by {name}: ") and says in told["found"] and do in told["remedy"]
    through_a_shell = subprocess.run(["sh", "-c", f"'{sys.executable}' -c 'import os; os.kill(os.getpid(), {getattr(processes.signal, name).value})'; exit $?"], capture_output=True, text=True)
    assert processes.failure(through_a_shell, "try again") == told


def test_another_end_is_told_by_its_own_words() -> None:
    assert processes.failure(ended("print('a\\nb: error: c\\nd', file=sys.stderr)\nsys.exit(1)"), "try again", ("error",)) == {"found": "b: error: c", "remedy": "try again"}
    assert processes.failure(ended("print('a\\nb', file=sys.stderr)\nsys.exit(1)"), "try again")["found"] == "b"
    for code in (3, 127, 255):
        assert processes.failure(ended(f"sys.exit({code})"), "try again")["found"] == f"it ended with {code} and said nothing"


def killed(folder: Path, number: int) -> Path:
    """A program that a signal kills at once."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\nkill -{number} $$\n")
    program.chmod(0o755)
    return program


def test_an_emulator_that_meets_an_unknown_instruction(tmp_path: Path) -> None:
    package = ht.compile(residual_net(), FOREIGN)
    path = package.save(tmp_path / "m.hawq")
    foreign = ht.load(path, emulator=str(killed(tmp_path, 4)))
    with pytest.raises(PackageError, match=r"the library could not be run; found it was killed by SIGILL.*remedy: .*--target"):
        foreign.verify(random=1)


def test_a_compiler_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"a program could not be made; found it was killed by SIGKILL: .*memory ran out; remedy: free memory"):
        toolchain.run([str(killed(tmp_path, 9))], "a program")


def test_a_command_of_the_table_that_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table.sys, "executable", str(killed(tmp_path, 4)))
    with pytest.raises(HawqError, match=r"hawq-tvm bench x: the command failed; found it was killed by SIGILL"):
        table._command("bench", "x")
