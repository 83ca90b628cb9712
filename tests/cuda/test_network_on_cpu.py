"""A whole network with 4-bit weights and activations, its tensor-core kernels with their threads as loops, layer by
layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

import schedules
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.verify.compare import run_with_layers, verify_executable
from schedules import lower
from schedules.cpu.cpu_elementwise import Elementwise
from schedules.cpu.cpu_window import Window
from schedules.cpu.generic import Generic
from schedules.gpu.cuda_mma import Mma

from .on_cpu import CPU


@pytest.mark.slow
def test_resnet18_of_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the zoo's networks come from PyTorch")
    from hawq_tvm.bench import zoo

    zoo.make("resnet18", tmp_path / "r.onnx", size=64, weight_bits=4, activation_bits=4)
    gpu, rule = cuda.make(["sm_80"]), Mma(threads=False)
    packed = pipeline.to_packed(pipeline.import_annotated(tmp_path / "r.onnx"), None, gpu)
    monkeypatch.setattr(rule, "tiles", lambda layer, target: Mma().tiles(layer, gpu))
    monkeypatch.setattr(lower, "rules_for", lambda target: (rule, Window(), Elementwise(), Generic()))
    tir, executable = pipeline.compile_packed(packed, CPU)
    assert [r["rule"] for r in schedules.report(tir)].count("cuda.mma") == 21  # every convolution and the last product
    vm = relax.VirtualMachine(executable, tvm.cpu())
    x = {"input": np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32)}
    report = verify_executable(
        packed, lambda i: run_with_layers(vm, packed, i, set(stages.private_functions(packed))), [x]
    )
    assert report.ok, report.summary()
