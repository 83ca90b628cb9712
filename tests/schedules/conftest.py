"""Where AMX kernels of tests run: emulated on any machine, and natively where there is AMX."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from hawq_tvm.targets import target as targets
from schedules import rules
from schedules.cpu import x86_amx
from schedules.cpu.generic import Generic
from schedules.cpu.x86_amx import Amx

from .test_cpu_contract import HOST

AMX = targets.parse("x86-amx")
LACKS = targets.prepare(platform.machine(), targets.required_features(AMX))  # from here on, this process may use tiles
REFUSED = LACKS.found if LACKS else None


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """The tile instructions as functions that kernels compiled in this process find."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler for the emulator")
    library = tmp_path_factory.mktemp("amx") / "emulator.so"
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", library, Path(__file__).parent / "amx_emulator.cpp"], check=True
    )
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(None)  # as kernels do: where another test loaded an emulator first, it is that one
    loaded.hawq_emulated_failure.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(params=["emulated", "native"])
def amx(request, monkeypatch):
    """Every contraction with tiles, whether that pays or not; the result: the target to compile for."""
    monkeypatch.setattr(x86_amx, "MOST_PADDING", 2**20)
    monkeypatch.setattr(x86_amx, "FEWEST_CHANNELS", 1)
    if request.param == "native":
        if REFUSED is not None:
            pytest.skip(REFUSED)
        monkeypatch.setattr(rules, "CPU_RULES", (Amx(), Generic()))
        yield AMX
        return
    library, made = request.getfixturevalue("emulator"), ctypes.c_int64()
    library.hawq_emulated_failure(ctypes.byref(made))
    monkeypatch.setattr(rules, "CPU_RULES", (Amx(emulated=True), Generic()))
    yield HOST
    assert library.hawq_emulated_failure(ctypes.byref(made)) is None
    assert made.value > 0
