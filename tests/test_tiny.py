"""The whole path on a three-layer residual network: import, compile, run, verify, prove, save, load, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import hawq_tvm as ht

from .models import residual_net


@pytest.mark.parametrize("weights, activations", [("int8", "uint8"), ("int4", "uint4")])
def test_the_whole_path(tmp_path: Path, weights: str, activations: str) -> None:
    package = ht.compile(residual_net(weights, activations))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32) * 2
    outputs = package.run({"x": x})
    assert {v.dtype.name for v in outputs.values()} == {"float32"}

    report = package.verify({"x": x}, random=2, seed=1)
    report.raise_if_mismatch()
    assert report.ok and report.inputs == 3 and "0 different" in report.summary()

    certificate = package.prove()
    assert certificate.ok and certificate.kernels > 3 and certificate.instructions > 100
    assert certificate.thresholds > 0 and certificate.differing == 0

    path = package.save(tmp_path / "tiny.hawq")
    again = ht.load(path)
    for name, value in again.run({"x": x}).items():
        np.testing.assert_array_equal(value, outputs[name])
    assert again.prove().to_dict() == certificate.to_dict()
    assert again.bench(duration=0, iterations=3, warmup_ms=0).median_ms > 0


def test_compiling_twice_gives_the_same_package(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ht.compile(residual_net()).save(tmp_path / name)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
