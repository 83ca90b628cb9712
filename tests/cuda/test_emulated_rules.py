"""The tests of the other CUDA rules once more, with their CUDA source executed."""

from __future__ import annotations

from typing import Any

import emulate
import numpy as np
import pytest
import test_rules_on_cpu
from emulate import Array, needs_gxx
from on_cpu import TARGET
from one_layer import Body, packed
from test_rules_on_cpu import *  # noqa: F403
from tvm import relax

from hawq_tvm import stages
from hawq_tvm.verify.reference import evaluate
from schedules.layer import Layer
from schedules.rule import choose
from schedules.rules import rules_for

pytestmark = [needs_gxx, pytest.mark.slow]


def check(body: Body, *arrays: Array, rule: str = "", **_: Any) -> None:
    """As `on_cpu.check`, for the oldest and the newest architecture."""
    module = packed(body, [(a.shape, str(a.dtype)) for a in arrays])
    wanted = list(evaluate(module, {f"x{i}": a for i, a in enumerate(arrays)}).values())
    ((name, func),) = stages.private_functions(module).items()
    layer = Layer.of(module.get_global_var(name), func)
    chosen = choose(rules_for(TARGET), layer, TARGET).rule
    assert rule in ("", chosen.name)
    kernel = chosen.build(layer, TARGET)
    types = func.ret_ty.fields if isinstance(func.ret_ty, relax.TupleType) else [func.ret_ty]
    for arch in (emulate.ARCHITECTURES[0], emulate.ARCHITECTURES[-1]):
        results = [np.zeros([int(d) for d in t.shape.values], str(t.dtype)) for t in types]
        emulate.run(kernel.func, [*arrays, *kernel.arguments], results, arch, TARGET)
        for found, expected in zip(results, wanted, strict=True):
            np.testing.assert_array_equal(found, expected, strict=True)


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those tests call this module's `check`."""
    monkeypatch.setattr(test_rules_on_cpu, "check", check)
