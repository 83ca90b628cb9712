"""Smooth functions behind Conv-BatchNorm, a mean and a Linear: where PT2E's quantizers leave them in float."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.verify.distances import distances
from hawq_tvm.verify.reference import evaluate

from .programs import lively, pt2e, torch
from .test_pt2e import torch_run

SHAPE = (1, 3, 16, 16)


class Net(torch.nn.Module):  # type: ignore[misc]
    """Two convolutions with BatchNorm and a function, a mean over the pixels, a classifier."""

    def __init__(self, function: type[Any]) -> None:
        super().__init__()
        nn = torch.nn
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), function())
        self.second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), function())
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        return self.classifier(self.second(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("function", ["SiLU", "Hardswish", "GELU"])
@pytest.mark.parametrize("quantizer", ["x86 inductor", "xnnpack per channel"])
def test_a_function_behind_a_convolution(function: str, quantizer: str) -> None:
    torch.manual_seed(3)
    program = pt2e(quantizer, lively(Net(getattr(torch.nn, function)), (4, *SHAPE[1:])), SHAPE)
    module = pipeline.import_annotated(program)
    packed = pipeline.to_packed(module)
    assert not stages.float_tail(packed["main"])
    found = distances(packed)
    assert found and max(found.values()) < 0.01
    x = np.random.default_rng(4).standard_normal(SHAPE).astype(np.float32)
    _, wanted = torch_run(program, x)
    (got,) = evaluate(packed, {p.name: x for p in packed["main"].params}).values()
    scale = max(float(np.ptp(wanted)), 1e-6)
    assert got.shape == wanted.shape and np.abs(got - wanted).max() < 0.03 * scale
    names = [ops.op_name(b.value) for f in stages.private_functions(packed).values() for b in stages.bindings(f)]
    assert "hawq.interpolate" in names if quantizer == "x86 inductor" else "hawq.lookup" in names
