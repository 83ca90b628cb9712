"""Whatever runs kernels prepares its process first: Linux is asked for the tile registers before the first tile instruction."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm import cpu, target, tuner
from hawq_tvm.bench import limits
from hawq_tvm.errors import PackageError, UsageError
from hawq_tvm.native import link
from schedules import rules, x86_amx

from ..models import residual_net

VECTORS = set(target.required_features(target.parse("x86-amx"))) - cpu.TILE_FEATURES
needs_vectors = pytest.mark.skipif(not target.host_features() >= VECTORS, reason="the kernels around the tiles take AVX-512 VNNI")


class Machine:
    """This machine with the tiles of another: an emulator of their instructions, and a Linux that is asked for them.

    asked: for every time that Linux was asked, how many tiles had been made before.
    """

    def __init__(self, emulator: ctypes.CDLL) -> None:
        self._emulator, self.asked = emulator, list[int]()
        self._refusal: str | None = None
        self._before = self._all()

    def _all(self) -> int:
        made = ctypes.c_int64()
        assert self._emulator.hawq_emulated_failure(ctypes.byref(made)) is None
        return made.value

    @property
    def tiles(self) -> int:
        """How many tiles were made."""
        return self._all() - self._before

    def permit(self) -> str | None:
        self.asked.append(self.tiles)
        return self._refusal

    def refuse(self) -> None:
        """From now on, Linux grants nothing."""
        self._refusal = "Linux does not grant the tile registers (Operation not permitted)"

    def grant(self) -> None:
        """From now on, it does."""
        self._refusal = None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler for the emulator")
    source = Path(__file__).parent.parent / "schedules/amx_emulator.cpp"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", tmp_path / "emulator.so", source], check=True)
    ctypes.CDLL(str(tmp_path / "emulator.so"), mode=ctypes.RTLD_GLOBAL)
    emulator = ctypes.CDLL(None)  # where another test of this process loaded one first, kernels use that one
    emulator.hawq_emulated_failure.restype = ctypes.c_char_p
    found, real = Machine(emulator), cpu.host_features()
    monkeypatch.setattr(x86_amx, "MOST_PADDING", 64)
    monkeypatch.setattr(x86_amx, "FEWEST_CHANNELS", 1)
    monkeypatch.setattr(rules, "CPU_RULES", (x86_amx.Amx(emulated=True), *rules.CPU_RULES))
    monkeypatch.setattr(link, "OPTIONS", tuple(o for o in link.OPTIONS if o != "-Wl,-z,defs"))
    for module in (cpu, target):
        monkeypatch.setattr(module, "permit_tiles", found.permit)
        monkeypatch.setattr(module, "host_features", lambda: real | {"amx-tile", "amx-int8"})
    return found


def float_net() -> onnx.ModelProto:
    """One float convolution."""
    w = numpy_helper.from_array(np.random.default_rng(0).normal(size=[32, 32, 3, 3]).astype(np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 32, 20, 20]), ("y", [1, 32, 18, 18]))]
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "one", ends[:1], ends[1:], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tune(folder: Path) -> None:
    ht.tune(residual_net(size=20), folder / "r.json", "x86-amx", trials=4, threads=1)


def latency(folder: Path) -> None:
    from hawq_tvm.quantize.float_graph import load_float
    from hawq_tvm.quantize.latency import measure_latencies

    onnx.save(float_net(), str(folder / "f.onnx"))
    report = measure_latencies(load_float(str(folder / "f.onnx")), "x86-amx", threads=1, choices=("W8A8",))
    assert list(report.rules.values()) == [{"W8A8": "x86.amx"}]


QUICK = {"duration": 0.01, "warmup_ms": 0, "iterations": 1, "threads": 1}
WAYS: dict[str, Callable[[ht.Package], Any]] = {
    "run": lambda p: p.run(p.random_inputs(1, 0)[0]),
    "verify": lambda p: p.verify(random=1).raise_if_mismatch(),
    "bench": lambda p: p.bench(**QUICK),
    "profile": lambda p: p.profile(**QUICK),
}


@needs_vectors
@pytest.mark.parametrize("action", [tune, latency], ids=lambda f: f.__name__)
def test_kernels_alone_ask_before_the_first_tile(machine: Machine, tmp_path: Path, action: Callable[[Path], None]) -> None:
    machine.refuse()
    with pytest.raises(UsageError, match=r"--target x86-amx: .*Operation not permitted.*remedy: allow them \(Linux 5\.16 or newer"):
        action(tmp_path)
    assert machine.tiles == 0 and machine.asked
    machine.grant()
    action(tmp_path)
    assert machine.tiles > 0 and set(machine.asked[:2]) == {0}


@needs_vectors
def test_packages_ask_before_the_first_tile(machine: Machine, tmp_path: Path) -> None:
    made = ht.compile(residual_net(size=20), "x86-amx")
    assert "x86.amx" in [r["rule"] for r in made.report()] and not machine.asked
    path = made.save(tmp_path / "m.hawq")
    for way in WAYS.values():
        before, asked = machine.tiles, len(machine.asked)
        way(ht.Package(made.manifest, made._files, "m"))  # as a new process would
        assert machine.tiles > before and machine.asked[asked] == before
    asked = len(machine.asked)
    ht.load(path)
    assert len(machine.asked) == asked + 1
    machine.refuse()
    before = machine.tiles
    for refused in (*(lambda way=way: way(ht.Package(made.manifest, made._files, "m")) for way in WAYS.values()), lambda: ht.load(path)):
        with pytest.raises(PackageError, match=r"m.*: needs the tile registers of AMX; found .*Operation not permitted.*remedy: allow them \(Linux 5\.16 or newer"):
            refused()
    assert machine.tiles == before


@needs_vectors
def test_the_limits_ask_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.instructions()["tdpbusd tiles"] is None and machine.asked == [0]
    machine.refuse()
    assert "Operation not permitted" in str(limits.instructions()["tdpbusd tiles"])
    with pytest.raises(UsageError, match=r"tdpbusd tiles: cannot be measured; found .*Operation not permitted"):
        limits.peak("tdpbusd tiles")


def test_what_is_asked_of_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    """arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA); its answer is errno."""
    calls: list[tuple[int, ...]] = []
    answer = 0

    class Library:
        def __init__(self, name: None, use_errno: bool) -> None:
            assert name is None and use_errno

        @staticmethod
        def syscall(*numbers: int) -> int:
            calls.append(numbers)
            ctypes.set_errno(answer and 1)
            return answer

    monkeypatch.setattr(cpu.ctypes, "CDLL", Library)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "host_features", lambda: {"avx2", "amx-tile", "amx-int8"})
    assert cpu.prepare("x86_64", ["amx-int8", "amx-tile", "avx2"]) is None and calls == [(158, 0x1023, 18)]
    answer = -1
    refused = cpu.prepare("x86_64", ["amx-int8"])
    assert refused is not None and refused.found == "Linux does not grant the tile registers (Operation not permitted)" and "Linux 5.16" in refused.remedy
    assert cpu.prepare("x86_64", ["avx2"]) is None and len(calls) == 2
    monkeypatch.setattr(cpu.platform, "machine", lambda: "aarch64")
    assert cpu.permit_tiles() == "only Linux on x86-64 grants the tile registers" and len(calls) == 2


def test_tune_refuses_what_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_features", lambda: VECTORS)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    with pytest.raises(UsageError, match=r"--target x86-amx: this machine cannot run what it should measure; found missing amx-int8, amx-tile; remedy: measure on such a machine"):
        tuner.runnable("x86-amx")
    with pytest.raises(UsageError, match=r"--target arm-neon: .*expected x86_64; found aarch64"):
        tuner.runnable("arm-neon")
