"""The tests of the other CUDA rules once more, with their CUDA source executed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hawq_tvm.verify.reference import evaluate
from schedules.rule import choose
from schedules.rules import rules_for

from ..schedules.one_layer import Body, layer_of, packed, zeros_for
from . import emulate, test_rules_on_cpu
from .emulate import Array, needs_gxx
from .on_cpu import TARGET
from .test_rules_on_cpu import *  # noqa: F403

pytestmark = [needs_gxx, pytest.mark.slow]


def check(body: Body, *arrays: Array, rule: str = "", **_: Any) -> None:
    """As `on_cpu.check`, for the oldest and the newest architecture."""
    module = packed(body, [(a.shape, str(a.dtype)) for a in arrays])
    wanted = list(evaluate(module, {f"x{i}": a for i, a in enumerate(arrays)}).values())
    layer = layer_of(module)
    chosen = choose(rules_for(TARGET), layer, TARGET).rule
    assert rule in ("", chosen.name)
    kernel = chosen.build(layer, TARGET)
    for arch in (emulate.ARCHITECTURES[0], emulate.ARCHITECTURES[-1]):
        results = zeros_for(layer)
        emulate.run(kernel.func, [*arrays, *kernel.arguments], results, arch, TARGET)
        for found, expected in zip(results, wanted, strict=True):
            np.testing.assert_array_equal(found, expected, strict=True)


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those tests call this module's `check`."""
    monkeypatch.setattr(test_rules_on_cpu, "check", check)
