"""CUDA packages made without a GPU: kernels, usage, certificate, bytes; and what a machine says that cannot run
them.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

import hawq_tvm as ht
from hawq_tvm import cli
from hawq_tvm.compiler.cuda import nvcc, runtime
from hawq_tvm.core.errors import HawqError, PackageError, UsageError
from hawq_tvm.package import gpu as device
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.targets import target

from ..models import Graph, float_output
from .networks import every_rule

TWO = json.dumps({"kind": "cuda", "architectures": ["sm_75", "sm_90"]})


@pytest.fixture(scope="module")
def package() -> ht.Package:
    try:
        nvcc.find()
    except UsageError as e:
        pytest.skip(f"no nvcc: {e}")
    return ht.compile(every_rule(), TWO)


def test_every_layer_is_on_a_kernel_of_ours(package: ht.Package) -> None:
    rules = {row["layer"]: row["rule"] for row in package.report()}
    assert {"cuda.depthwise", "cuda.window", "cuda.elementwise", "cuda.generic"} <= set(rules.values())
    assert all(rule.startswith("cuda.") for rule in rules.values())


def test_the_report_knows_what_every_kernel_takes(package: ht.Package) -> None:
    for row in package.report():
        assert {u["arch"] for u in row["usage"]} == {"sm_75", "sm_90"}
        assert all(
            u["registers"] > 0 and u["spill_stores"] == u["spill_loads"] == u["stack"] == 0 for u in row["usage"]
        ), row


def test_the_certificate_has_read_the_machine_code(package: ht.Package) -> None:
    certificate = package.certificate()
    assert certificate["ok"], certificate["code_offenders"][:5]
    assert set(certificate["device_instructions"]) == {"sm_75", "sm_90"}
    assert certificate["device_functions"] >= 2 * certificate["kernels"]
    assert json.loads(json.dumps(package.prove().to_dict())) == certificate


def test_the_border_is_float_and_would_be_found(package: ht.Package) -> None:
    from hawq_tvm.verify.sass import inspect_device_code

    report = inspect_device_code(package.library, ["quantize"], ["sm_75", "sm_90"])
    assert any("quantize_kernel" in o.function for o in report.offenders)


def test_the_same_bytes_twice(compiler: Path) -> None:
    g = Graph(7)
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 4, 6, 6]), 0.02, 128), g.weight([8, 4, 3, 3])), 0.05, 100)
    model = g.model([float_output(y)])
    first, second = (ht.compile(model, TWO) for _ in range(2))
    assert first.manifest == second.manifest


def test_targets_come_back_from_their_description() -> None:
    for name, archs in cuda.PRESETS.items():
        made = target.parse(name)
        assert cuda.architectures(made) == archs
        again = target.parse(json.dumps(target.describe(made)))
        assert str(again) == str(made)
        assert (target.architecture(made), "sse4.2" in target.required_features(made)) == ("x86_64", True)


@pytest.mark.parametrize(
    "text",
    [
        "cuda-sm70",
        '{"kind": "cuda"}',
        '{"kind": "cuda", "architectures": ["sm_70"]}',
        '{"kind": "cuda", "architectures": "sm_80"}',
    ],
)
def test_unknown_architectures_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        target.parse(text)


def test_a_machine_without_a_driver_says_so(
    package: ht.Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if runtime.driver() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    package.save(tmp_path / "p.hawq")
    np.savez(tmp_path / "in.npz", x=np.zeros((1, 3, 12, 12), np.float32))
    for command in (
        ["run", "--inputs", str(tmp_path / "in.npz"), "-o", str(tmp_path / "out.npz")],
        ["verify"],
        ["bench"],
    ):
        assert cli.main([command[0], str(tmp_path / "p.hawq"), *command[1:]]) == 3
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "no NVIDIA driver is installed" in lines[0]
    assert not (tmp_path / "out.npz").exists()
    assert cli.main(["info", str(tmp_path / "p.hawq")]) == 0


def test_a_fresh_process_without_a_driver_loads_and_proves(package: ht.Package, tmp_path: Path) -> None:
    package.save(tmp_path / "p.hawq")
    code = "import sys, hawq_tvm as ht; assert ht.load(sys.argv[1]).prove().ok"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.hawq")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_machine_without_nvcc_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cli.main(["compile", "missing.onnx", "--target", "cuda", "-o", str(tmp_path / "p.hawq")]) == 2
    assert "compiling for CUDA needs nvcc" in capsys.readouterr().err


def test_what_is_of_the_cpu_refuses_gpus(package: ht.Package, tmp_path: Path) -> None:
    from hawq_tvm.bench import against
    from hawq_tvm.tuning.tuner import tune

    assert package.on_gpu
    with pytest.raises(UsageError, match="timed on the CPU"):
        against.compare(package, "m.onnx", ["onnxruntime"])
    with pytest.raises(UsageError, match="measured on this machine's CPU"):
        tune("m.onnx", tmp_path / "r.json", "cuda-sm80")


class Driver:
    """A driver as `device.first` sees it."""

    def __init__(
        self, version: int = 13000, count: int = 1, capability: tuple[int, int] = (9, 0), start: int = 0
    ) -> None:
        self.version, self.count, self.capability, self.start = version, count, capability, start

    def cuInit(self, flags: int) -> int:
        return self.start

    def cuDeviceGetCount(self, out: Any) -> int:
        return self._give(out, self.count)

    def cuDriverGetVersion(self, out: Any) -> int:
        return self._give(out, self.version)

    def cuDeviceGet(self, out: Any, index: int) -> int:
        return self._give(out, 0)

    def cuDeviceGetName(self, out: Any, size: int, gpu: Any) -> int:
        out.value = b"NVIDIA Test"
        return 0

    def cuDeviceGetAttribute(self, out: Any, which: int, gpu: Any) -> int:
        return self._give(out, self.capability[which - 75])

    @staticmethod
    def _give(out: Any, value: int) -> int:
        ctypes.cast(out, ctypes.POINTER(ctypes.c_int))[0] = value
        return 0


@pytest.mark.parametrize(
    ("driver", "sentence"),
    [
        (Driver(start=100), "the NVIDIA driver finds none"),
        (Driver(count=0), "the NVIDIA driver finds none"),
        (Driver(start=999), "the NVIDIA driver does not start; found CUDA error 999"),
        (
            Driver(version=12080),
            "needs a newer NVIDIA driver; expected one for CUDA 13.0 or newer; found one for CUDA 12.8",
        ),
        (
            Driver(capability=(7, 0)),
            "the GPU is older than the package's code; expected sm_75, sm_86; found NVIDIA Test, sm_70",
        ),
        (Driver(capability=(9, 0)), "the GPU is of another generation than the package's code"),
        (Driver(capability=(8, 0)), "the GPU is of another generation than the package's code"),
    ],
)
def test_what_cannot_run_is_one_sentence(monkeypatch: pytest.MonkeyPatch, driver: Driver, sentence: str) -> None:
    monkeypatch.setattr(runtime, "driver", lambda: driver)
    with pytest.raises(PackageError, match=sentence) as e:
        device.ready(["sm_75", "sm_86"], "13.0", "p.hawq")
    assert e.value.exit_code == 3 and "\n" not in str(e.value)


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (8, 9)])
def test_machine_code_runs_on_later_gpus_of_its_generation(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(runtime, "driver", lambda: Driver(version=13010, capability=capability))
    device.check(device.first("p"), ["sm_75", "sm_86"], "13.0", "p")


def test_a_full_memory_is_one_sentence() -> None:
    with pytest.raises(PackageError, match="the GPU's memory is full"), device.one_sentence("p"):
        raise tvm.error.InternalError("Check failed: (e == cudaSuccess) is false: CUDA: out of memory")
    with pytest.raises(PackageError, match="the GPU failed; found CUDA: an illegal"), device.one_sentence("p"):
        raise RuntimeError("Traceback\nCUDA: an illegal memory access was encountered\n")
    with pytest.raises(RuntimeError, match="another"), device.one_sentence("p"):
        raise RuntimeError("another thing")


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("channels", [8, 64])
def test_vectors_of_padding_compile(compiler: Path, kind: str, channels: int) -> None:
    """A pooled image with zeros around it, large enough for threads with 8 and 16 channels."""
    g = Graph(2)
    x = g.qdq(g.input("x", [64, channels, 112, 112]), 0.02, 128 if kind == "uint8" else 0, kind)
    y = g.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    package = ht.compile(g.model([float_output(g.qdq(y, 0.02, 128 if kind == "uint8" else 0, kind))]), "cuda-sm75")
    assert any(
        row["rule"] == "cuda.window" and row["tile"].startswith(f"{min(channels, 16)} channels")
        for row in package.report()
    )


def test_a_float_tail_runs_on_the_gpu_too(compiler: Path) -> None:
    g = Graph(2)
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 4, 5, 5]), 0.02, 128), g.weight([8, 4, 1, 1])), 0.05, 100)
    package = ht.compile(g.model([float_output(g.node("Softmax", [y], axis=1))]), "cuda-sm80", allow_float_tail=True)
    assert package.certificate()["ok"] and package.manifest["float_tail"]


def test_refused_source_names_the_error(compiler: Path) -> None:
    with pytest.raises(HawqError, match=r"nvcc refuses the kernels.*identifier") as e:
        nvcc.fatbin("__global__ void f(int* a) { a[0] = b; }", ["sm_80"])
    Path(e.value.where).unlink()
