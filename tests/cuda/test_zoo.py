"""Whole networks compiled for the oldest and the newest architecture, without a GPU: every layer on a CUDA kernel, none of them float."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hawq_tvm as ht

TWO = json.dumps({"kind": "cuda", "architectures": ["sm_75", "sm_90"]})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2", "inceptionv3"])
def test_networks_compile(name: str, compiler: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the zoo's networks come from PyTorch")
    from hawq_tvm.bench import zoo

    model = tmp_path / f"{name}.onnx"
    zoo.make(name, model, size=139 if name == "inceptionv3" else 64)
    package = ht.compile(model, TWO)
    assert package.certificate()["ok"], package.certificate()["code_offenders"][:5]
    assert all(row["rule"].startswith("cuda.") for row in package.report())
    spilled = [u for row in package.report() for u in row["usage"] if u["spill_stores"] or u["spill_loads"]]
    assert not spilled
