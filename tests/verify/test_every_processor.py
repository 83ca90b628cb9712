"""A transformer block gives the same integers on every processor: what runs here, Arm under QEMU, AMX where there is
one; `verify` compares them layer by layer with one evaluation of the reference.
"""

from __future__ import annotations

import pytest

import hawq_tvm as ht
from hawq_tvm.package.together import verify_packages
from hawq_tvm.targets import target

from ..arm.on_arm import MISSING
from ..transformers import block

X86 = ("x86-64-v2", "x86-avx2", "x86-vnni", "x86-amx")
HERE = [n for n in X86 if target.runs_here(target.required_features(target.parse(n)))]
ARM = [] if MISSING else ["arm-neon", "arm-dotprod", "arm-i8mm"]


@pytest.mark.parametrize(("wide", "kind", "arm"), [(False, "uint8", ARM[2:]), (True, "int8", ARM[1:2])])
def test_a_transformer_block(wide: bool, kind: str, arm: list[str]) -> None:
    """Attention, LayerNorm, GELU; wide: softmax of scores under a mask, polynomials in cells, a fixed-point stream."""
    packages = [ht.compile(block(wide, kind), name) for name in [*HERE[-2:], *arm]]
    report = verify_packages(packages, random=1, seed=1)
    assert report.ok and report.identical, report.summary()
    assert len(report.verdicts) == len(packages) >= 2
    rules = {r["rule"] for p in packages for r in p.report()}
    assert "cpu.attention" in rules and "cpu.rows" in rules
