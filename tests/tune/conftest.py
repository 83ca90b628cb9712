"""An exported tuning run, and a machine that only pretends to have a GPU to run it on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hawq_tvm.tuning.gpu import export as exporter

from ..models import Graph, float_output

HERE = Path(__file__).parent


def network() -> onnx.ModelProto:
    """A convolution twice, one with 4-bit weights and a residual, and a depthwise one."""
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 16, 9, 7]), 0.5, 128)
    y = g.qdq(g.conv(x, g.weight([16, 16, 3, 3]), pads=[1, 1, 1, 1]), 0.5, 100)
    y = g.qdq(g.conv(y, g.weight([16, 16, 3, 3]), pads=[1, 1, 1, 1]), 0.9, 100)
    d = g.qdq(g.conv(y, g.weight([16, 1, 3, 3]), group=16, pads=[1, 1, 1, 1]), 0.9, 110)
    r = g.qdq(g.node("Add", [g.conv(d, g.weight([16, 16, 1, 1], "int4")), y]), 1.3, 60)
    return g.model([float_output(r)])


@dataclass
class Run:
    """An exported folder, and a machine to run it on."""

    folder: Path
    environment: dict[str, str]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_bytes())

    @property
    def times(self) -> dict[str, Any]:
        return json.loads((self.folder / "times.json").read_bytes())

    @property
    def log(self) -> dict[str, int]:
        return {
            k: int(v) for k, v in (line.split() for line in Path(self.environment["FAKE_LOG"]).read_text().splitlines())
        }

    def configure(
        self, time: Callable[[str], float] = lambda kernel: 10.0, mode: Callable[[str], str] = lambda kernel: "ok"
    ) -> None:
        """What the kernels of the fake driver take and do."""
        lines = []
        for c in (c for w in self.manifest["workloads"] for c in w["candidates"]):
            at = {a["kind"]: (i, _size(a)) for i, a in enumerate(c["arguments"]) if a["kind"] != "constant"}
            weights = at.get("weights", (-1, 0))
            lines.append(
                f"{c['kernel']} {at['output'][0]} {at['output'][1]} {at['input'][0]} {weights[0]} {weights[1]}"
                f" {time(c['kernel'])} {mode(c['kernel'])}\n"
            )
        Path(self.environment["FAKE_CONFIG"]).write_text("".join(lines))

    def __call__(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.folder / "run.py"), *options]
        return subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=120
        )


def _size(spec: dict[str, Any]) -> int:
    return prod(spec["shape"]) * np.dtype(spec["dtype"]).itemsize


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "candidates"
    report = exporter.export(network(), folder, "cuda-sm90", trials=5)
    assert (report.workloads, report.arch, report.candidates) == (
        3,
        "sm_90",
        sum(len(w["candidates"]) for w in json.loads((folder / "manifest.json").read_text())["workloads"]),
    )
    return folder


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver and an nvcc that only pretend."""
    folder = tmp_path_factory.mktemp("machine")
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler for the pretended driver")
    subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(HERE / "fake_driver.c")],
        check=True,
    )
    (folder / "bin").mkdir()
    script = (
        'if [ "$1" = --version ]; then echo "release 13.0, V13.0.88"; exit; fi\nfor a; do case "$p" in -o) o=$a;; esac;'
        " p=$a; done\n"
    )
    script += 'case "$p" in */$FAKE_REFUSED) echo "w.cu(1): error: refused" >&2; exit 2;; esac\ncp "$p" "$o"\n'
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\n{script}")
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


@pytest.fixture
def run(exported: Path, machine: Path, tmp_path: Path) -> Run:
    folder = Path(shutil.copytree(exported, tmp_path / "candidates"))
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "FAKE_"))}
    made = Run(
        folder,
        {
            **keep,
            "LD_LIBRARY_PATH": str(machine),
            "PATH": f"{machine / 'bin'}:{os.environ['PATH']}",
            "FAKE_CONFIG": str(tmp_path / "kernels.txt"),
            "FAKE_LOG": str(tmp_path / "log.txt"),
        },
    )
    made.configure()
    return made
