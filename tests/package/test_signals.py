"""A program that is told to end, at any moment and wherever it is, removes its folders and says which signal it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest

from deploy import package as files
from hawq_tvm.core import signals

from ..models import residual_net

BEGINNING = """
import ctypes, os, signal, sys, tempfile, threading, time
from hawq_tvm.core import signals
def tell(): signal.raise_signal(signal.SIGINT); time.sleep(1)
def wait():
    end = time.monotonic() + 60
    while time.monotonic() < end: pass
def work():
    with tempfile.TemporaryDirectory() as folder:
        print(folder, flush=True)
        part()
    return 0
"""
END = "\nsys.exit(signals.cleanly(work))"


def begun(words: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """A Python program, which makes its temporary files in a folder, and has written its first line."""

    def heard() -> None:  # a shell's background jobs ignore SIGINT, nohup SIGHUP
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
        preexec_fn=heard,
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit code and standard error."""
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize("number, said", [(signal.SIGTERM, ""), (signal.SIGHUP, ""), (signal.SIGINT, "interrupted\n")])
def test_a_program_that_is_told_to_end_cleans_up(number: signal.Signals, said: str, tmp_path: Path) -> None:
    process = begun(["-c", f"{BEGINNING}def part(): time.sleep(60)\n{END}"], tmp_path)
    process.send_signal(number)
    assert ended(process) == (128 + number, said) and not list(tmp_path.iterdir())


ELSEWHERE = """
def part():
    def other():
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        wait()
    threading.Thread(target=other, daemon=True).start()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""
FINALIZER = """
class Finalized:
    def __del__(self): tell()
def part():
    Finalized()
    wait()
"""
CALLBACK = """
def part():
    ctypes.CFUNCTYPE(None)(tell)()
    wait()
"""
SWALLOWED = """
def part():
    try: tell()
    except: pass
    wait()
"""
TRANSLATED = """
def part():
    try: tell()
    except BaseException as e: raise RuntimeError("what TVM makes of it") from None
"""
KEPT = """
kept = []
def part():
    try: tell()
    except BaseException as e: kept.append(e)
"""
BUILT = """
def part(): exec("tell()")
"""


@pytest.mark.parametrize("part", [ELSEWHERE, FINALIZER, CALLBACK, SWALLOWED, TRANSLATED, KEPT, BUILT])
def test_a_signal_is_not_lost(part: str, tmp_path: Path) -> None:
    """Where another thread gets it, where what is raised is dropped or becomes another error, and where Python
    remembers it (exec does, and ends the process by the signal).
    """
    assert ended(begun(["-c", BEGINNING + part + END], tmp_path)) == (130, "interrupted\n")
    assert not list(tmp_path.iterdir())


TWO = """
def part():
    try:
        print("early", flush=True)
        wait()
    finally:
        print("late", flush=True)
        wait()
"""


def test_a_second_signal_ends_a_program_that_does_not_end(tmp_path: Path) -> None:
    process = begun(["-c", BEGINNING + TWO + END], tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "early\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "late\n"
    time.sleep(1.2 * signals.TWICE)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (-signal.SIGTERM, "")


STARTING = """
def part():
    def other():
        while True:
            one = threading.Thread(target=int)
            one.start()
            one.join()
    threading.Thread(target=other, daemon=True).start()
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


@pytest.mark.parametrize("moment", [0.002 * i for i in range(10)])
def test_a_signal_at_any_moment(moment: float, tmp_path: Path) -> None:
    """While another thread begins threads, which then may get it."""
    process = begun(["-c", BEGINNING + STARTING + END], tmp_path)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, "interrupted\n") and not list(tmp_path.iterdir())


COMMAND = "import sys; from hawq_tvm.cli import main; print(1, flush=True); sys.exit(main())"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_removes_its_folders(tiny: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = begun(["-c", COMMAND, "bench", str(tiny), "--against", "c", "--duration", "60"], tmp_path)
    for _ in range(1200):
        if len(list(tmp_path.glob("hawq_tvm_*"))) >= 2:  # the library that is loaded, and its copy for C
            break
        time.sleep(0.05)
    process.send_signal(number)
    found, errors = ended(process)
    assert found == code and "Traceback" not in errors and not list(tmp_path.iterdir()), errors


@pytest.mark.parametrize("moment", [0.1, 0.3, 0.5, 0.8, 1.1, 1.4])
def test_an_interrupted_command_leaves_all_or_nothing(moment: float, tmp_path: Path) -> None:
    model, out, temporary = tmp_path / "m.onnx", tmp_path / "out", tmp_path / "temporary"
    onnx.save(residual_net(), str(model))
    out.mkdir()
    temporary.mkdir()
    process = begun(["-c", COMMAND, "compile", str(model), "-o", str(out / "m.hawq"), "--no-cache"], temporary)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    code, errors = ended(process)
    left = [p.name for p in out.iterdir()]
    assert not list(temporary.iterdir()) and left in ([], ["m.hawq"])
    if left:  # it had finished before
        files.read_files(out / "m.hawq")
    else:
        assert code == 130 and "Traceback" not in errors and errors.endswith("interrupted\n"), errors


def test_two_signals_at_once_are_one() -> None:
    """As timeout(1) sends them."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background ignore
    done = []

    def told() -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            done.append("cleaned up")
        return 0

    try:
        assert signals.cleanly(told) == 130 and done == ["cleaned up"]
    finally:
        signal.signal(signal.SIGINT, ours)


def test_signals_are_as_before_afterwards() -> None:
    def state() -> list[object]:
        handlers = [signal.getsignal(n) for n in (*signals.ENDING, signals.WAKING)]
        return [*handlers, sys.unraisablehook, signal.set_wakeup_fd(-1), signals.told()]

    before = state()
    assert signals.cleanly(lambda: 5) == 5 and state() == before

    def told() -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    assert signals.cleanly(told) == 143 and state() == before

    def failed() -> int:
        raise ValueError

    with pytest.raises(ValueError):
        signals.cleanly(failed)
    assert state() == before
