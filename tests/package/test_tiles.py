"""Packages for AMX: what is compiled for it, whole networks on emulated tiles, and the kernel's permission."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tvm.target import codegen

import hawq_tvm as ht
from hawq_tvm.compiler.native import link
from hawq_tvm.compiler.pipeline import compile_model
from hawq_tvm.core.errors import PackageError
from hawq_tvm.targets import cpu, target
from hawq_tvm.verify.certificate import certify
from schedules import report, rules
from schedules.cpu import x86_amx

from ..models import residual_net

SAPPHIRE_RAPIDS = target.parse("llvm -mcpu=sapphirerapids -mtriple=x86_64-linux-gnu")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles also for layers as small as a test's."""
    monkeypatch.setattr(x86_amx, "MOST_PADDING", 64)
    monkeypatch.setattr(x86_amx, "FEWEST_CHANNELS", 1)


@pytest.mark.parametrize(("weights", "activations"), [("int8", "uint8"), ("int8", "int8"), ("int4", "uint4")])
def test_a_network_of_tiles_is_certified(tmp_path: Path, always: None, weights: str, activations: str) -> None:
    compiled = compile_model(residual_net(weights, activations), target.parse("x86-amx"))
    assert [r["rule"] for r in report(compiled.tir)].count("x86.amx") >= 2
    library = tmp_path / "model.so"
    compiled.executable.export_library(str(library))
    certificate = certify(compiled.packed, compiled.tir, library)
    assert certificate.ok and certificate.tir_offenders == () and certificate.code_offenders == ()


@pytest.mark.parametrize(("weights", "activations"), [("int8", "uint8"), ("int8", "int8"), ("int4", "uint4")])
def test_a_network_of_emulated_tiles_agrees_with_the_reference(
    tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch, weights: str, activations: str
) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler for the emulator")
    source = Path(__file__).parent.parent / "schedules/amx_emulator.cpp"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", tmp_path / "emulator.so", source], check=True)
    ctypes.CDLL(str(tmp_path / "emulator.so"), mode=ctypes.RTLD_GLOBAL)
    # Where another test of this process loaded one first, kernels use that one.
    emulator, made = ctypes.CDLL(None), ctypes.c_int64()
    emulator.hawq_emulated_failure.restype = ctypes.c_char_p
    monkeypatch.setattr(rules, "CPU_RULES", (x86_amx.Amx(emulated=True), *rules.CPU_RULES))
    # The emulator is another library's.
    monkeypatch.setattr(link, "OPTIONS", tuple(o for o in link.OPTIONS if o != "-Wl,-z,defs"))
    package = ht.compile(residual_net(weights, activations, size=20))
    assert [r["rule"] for r in package.report()].count("x86.amx") >= 2
    package.verify(random=3).raise_if_mismatch()
    assert emulator.hawq_emulated_failure(ctypes.byref(made)) is None and made.value > 0


def test_the_host_leaves_tiles_out_that_linux_does_not_grant(monkeypatch: pytest.MonkeyPatch) -> None:
    has = set(target.required_features(SAPPHIRE_RAPIDS))
    assert {"amx-int8", "amx-tile"} <= has
    monkeypatch.setattr(codegen, "llvm_get_system_cpu", lambda: "sapphirerapids")
    monkeypatch.setattr(target, "host_features", lambda: has)
    monkeypatch.setattr(target, "permit_tiles", lambda: None)
    assert set(target.required_features(target.host())) == has
    monkeypatch.setattr(
        target, "permit_tiles", lambda: "Linux does not grant the tile registers (Operation not permitted)"
    )
    assert set(target.required_features(target.host())) == has - target.TILE_FEATURES


def test_a_package_without_permission_is_refused_and_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    features = target.required_features(target.parse("x86-amx"))
    monkeypatch.setattr(cpu, "host_features", lambda: set(features))
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu, "permit_tiles", lambda: None)
    cpu.check_host("x86_64", features, "a package")
    monkeypatch.setattr(
        cpu, "permit_tiles", lambda: "Linux does not grant the tile registers (Operation not permitted)"
    )
    with pytest.raises(
        PackageError, match=r"(?s)a package.*needs the tile registers of AMX.*Operation not permitted"
    ) as caught:
        cpu.check_host("x86_64", features, "a package")
    assert caught.value.exit_code == 3
    cpu.check_host("x86_64", ["avx2"], "a package")


@pytest.mark.skipif(target.host_features() >= target.TILE_FEATURES, reason="this CPU has AMX")
def test_a_package_for_another_cpu_is_made_here_and_refused_when_run(tmp_path: Path) -> None:
    package = ht.compile(residual_net(), "x86-amx")
    path = package.save(tmp_path / "m.hawq")
    for attempt in (lambda: package.run({"x": np.zeros((2, 3, 8, 8), np.float32)}), lambda: ht.load(path)):
        with pytest.raises(PackageError, match=r"needs CPU features that this machine lacks.*amx-int8"):
            attempt()
