"""Packages for another architecture: compiled by the cross compiler, run under QEMU, every layer equal; and refusals
where either is missing.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm import cli
from hawq_tvm.compiler.native import toolchain
from hawq_tvm.core.errors import PackageError, UsageError
from hawq_tvm.package import emulated

from ..models import residual_net
from .networks import FLOAT, NETWORKS

ARM = "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1"
pytestmark = pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine's own architecture is aarch64")
cross = pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-gcc") is None,
    reason="no cross compiler: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
)
qemu = pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="no emulator: apt-get install qemu-user")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ht.compile(residual_net(), ARM).save(tmp_path_factory.mktemp("arm") / "tiny.hawq")


@cross
@qemu
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_equals_the_reference(name: str) -> None:
    package = ht.compile(NETWORKS[name](), ARM, allow_float_tail=name in FLOAT)
    package.verify(random=2, seed=3).raise_if_mismatch()
    assert package.certificate()["ok"]


@pytest.mark.slow
@cross
@qemu
def test_resnet18(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the zoo's networks come from PyTorch")
    from hawq_tvm.bench import zoo

    package = ht.compile(zoo.make("resnet18", tmp_path / "r.onnx", size=64), ARM)
    report = package.verify(random=1)
    report.raise_if_mismatch()
    assert len(report.rows) > 20


@cross
@qemu
def test_a_foreign_package_is_loaded_and_run(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = ht.load(saved)
    inputs = package.random_inputs(1, 2)[0]
    native = ht.compile(residual_net())
    for name, value in package.run(inputs).items():
        np.testing.assert_array_equal(value, native.run(inputs)[name])
    assert package.prove().ok
    np.savez(tmp_path / "in.npz", **inputs)
    assert cli.main(["run", str(saved), "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")]) == 0
    assert cli.main(["info", str(saved)]) == 0 and "aarch64 neoverse-n1" in capsys.readouterr().out


@cross
@qemu
def test_a_named_processor_is_emulated_and_refuses_what_it_lacks(saved: Path) -> None:
    root = " -L /usr/aarch64-linux-gnu"
    ht.load(saved, emulator="qemu-aarch64 -cpu neoverse-n1" + root).verify().raise_if_mismatch()
    with pytest.raises(
        PackageError, match='needs the instructions "dotprod", which this processor or its operating system lacks'
    ):
        ht.load(saved, emulator="qemu-aarch64 -cpu cortex-a72" + root).verify()
    with pytest.raises(UsageError, match=r"the emulator is no program.*found nonsense"):
        ht.load(saved, emulator="nonsense -cpu max").verify()


@cross
@pytest.mark.parametrize("emulator", ["true", "cat"])
def test_a_program_that_is_no_emulator(saved: Path, emulator: str) -> None:
    with pytest.raises(
        PackageError, match=r"the library could not be run.*check that this runs programs for the package's CPU"
    ):
        ht.load(saved, emulator=emulator).verify()


@cross
def test_quotes_that_are_not_closed_and_a_way_that_there_is_not(saved: Path) -> None:
    with pytest.raises(UsageError, match="the emulator is no program"):
        ht.load(saved, emulator="qemu-aarch64 'x").verify()
    with pytest.raises(UsageError, match="layers cannot be run through this; expected c; found vm"):
        ht.load(saved).verify(through="vm")


@cross
def test_what_only_this_cpu_does_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = ht.load(saved)
    for call in (package.bench, package.profile):
        with pytest.raises(PackageError, match="was built for another architecture; expected x86_64; found aarch64"):
            call()
    assert cli.main(["bench", str(saved)]) == 3 and len(capsys.readouterr().err.strip().splitlines()) == 1


@cross
def test_without_an_emulator_it_is_loaded_and_not_run(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(emulated.shutil, "which", lambda name: None if name.startswith("qemu") else which(name))
    package = ht.load(saved)
    assert package.inputs and package.certificate()["ok"]
    for call in (lambda: package.run(package.random_inputs(1, 0)[0]), package.verify):
        with pytest.raises(
            PackageError,
            match=(
                r"was built for another architecture.*install an emulator \(qemu-aarch64: apt-get install qemu-user\)"
            ),
        ):
            call()


def test_without_a_cross_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None if name.startswith("aarch64") else which(name))
    with pytest.raises(
        UsageError,
        match=r"aarch64: no compiler links libraries.*aarch64-linux-gnu-gcc.*apt-get install gcc-aarch64-linux-gnu",
    ):
        ht.compile("no such model.onnx", ARM)


def test_an_emulator_is_for_what_this_cpu_lacks() -> None:
    package = ht.compile(residual_net())
    package._emulator = "false"
    assert not package.is_foreign
    package._target = {**package._target, "cpu_features": ["made-up"]}
    assert package.is_foreign
    with pytest.raises(PackageError, match="the library could not be run"):
        package.run(package.random_inputs(1, 0)[0])


@cross
def test_compiling_twice_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = ht.compile(residual_net(), ARM).save(tmp_path / "again.hawq")
    for file in sorted(saved.iterdir()):
        assert file.name == "manifest.json" or file.read_bytes() == (again / file.name).read_bytes(), file.name
