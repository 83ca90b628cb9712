"""Whole networks compiled for Arm and run by QEMU: every layer equals the reference, and no kernel computes in
floating point.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hawq_tvm as ht

from ..cuda.networks import every_rule
from ..models import needs_time
from .on_arm import mnemonics, needs_emulator

pytestmark = needs_emulator
TARGETS = ["arm-neon", "arm-dotprod", "arm-i8mm"]
# What must and what must not be in the library.
PRODUCTS = {
    "arm-neon": ("smlal", "[su]+dot|[su]+mmla"),
    "arm-dotprod": ("sdot", "[su]+mmla|usdot"),
    "arm-i8mm": ("usmmla|smmla", "nothing"),
}


def check(package: ht.Package, target: str, inputs: int) -> None:
    """Every layer is equal, the certificate holds, products are on the target's instructions and none needs more."""
    package.verify(random=inputs, seed=7).raise_if_mismatch()
    certificate = package.certificate()
    assert certificate["ok"], certificate["code_offenders"][:5]
    rows = package.report()
    assert any(row["rule"] == target.replace("-", ".") for row in rows) and not any(
        row["rule"] == "cpu.contract" for row in rows
    )
    found = mnemonics(package.library)
    wanted, forbidden = PRODUCTS[target]
    assert any(re.fullmatch(wanted, m) for m in found) and not any(re.fullmatch(forbidden, m) for m in found)


@pytest.mark.parametrize("target", TARGETS)
def test_every_rule(target: str) -> None:
    check(ht.compile(every_rule(), target), target, 4)


# Every network, precision and target between them.
USUAL = {
    ("resnet18", 8, 8, "arm-dotprod"),
    ("mobilenetv2", 8, 8, "arm-neon"),
    ("resnet18", 4, 4, "arm-i8mm"),
    ("mobilenetv2", 4, 8, "arm-dotprod"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "weights", "data"), [("resnet18", 8, 8), ("mobilenetv2", 8, 8), ("resnet18", 4, 4), ("mobilenetv2", 4, 8)]
)
def test_networks(name: str, weights: int, data: int, target: str, tmp_path: Path) -> None:
    needs_time((name, weights, data, target) in USUAL)
    pytest.importorskip("torch", reason="the zoo's networks come from PyTorch")
    from hawq_tvm.bench import zoo

    model = tmp_path / f"{name}.onnx"
    zoo.make(name, model, size=64, weight_bits=weights, activation_bits=data)
    check(ht.compile(model, target), target, 1)
