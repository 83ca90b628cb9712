"""Nets quantized by PT2E's own quantizers: every quantize of ours against PyTorch's run of the exported program.

PyTorch computes in float32, so it may land on the other side of a rounding boundary: a difference must be one step,
and lie at one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.bench import zoo
from hawq_tvm.core import ops, stages
from hawq_tvm.frontend.torch import import_exported, read_program
from hawq_tvm.frontend.torch.reader import _functional

from ...oracle import IntegerOracle, Oracle, integer_module
from .programs import QUANTIZERS, Residual, lively, pt2e, torch

SHAPE = (2, 3, 9, 10)
# Quantization-aware training is slow to prepare: PT2E traces two dozen patterns.
STATIC = [
    pytest.param(name, marks=pytest.mark.slow if "qat" in name else ()) for name in QUANTIZERS if "dynamic" not in name
]


class Interpreter(torch.fx.Interpreter):  # type: ignore[misc]
    """Runs a program and keeps what every quantize gives."""

    def __init__(self, graph: Any) -> None:
        super().__init__(graph)
        self.integers: dict[str, np.ndarray] = {}

    def run_node(self, n: Any) -> Any:
        result = super().run_node(n)
        if "quantized_decomposed.quantize_per" in str(n.target):
            self.integers[n.name] = result.numpy()
        return result


def torch_run(program: Any, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The integers of every quantize by layer, and the output, computed by PyTorch."""
    functional = _functional(program)
    stored = {**functional.state_dict, **functional.constants}
    values = [
        torch.tensor(x) if s.kind.name == "USER_INPUT" else stored[s.target]
        for s in functional.graph_signature.input_specs
    ]
    interpreter = Interpreter(functional.graph_module)
    with torch.no_grad():
        (output,) = interpreter.run(*values)
    layers = {c.name: c.layer for c in read_program(program).calls}
    return {layers[name]: value for name, value in interpreter.integers.items()}, output.numpy()


def compare(program: Any, x: np.ndarray, title: str) -> tuple[Oracle, IntegerOracle]:
    """Both modules layer by layer on PyTorch's integers; prints the counts."""
    theirs, _ = torch_run(program, x)
    module = import_exported(program)
    name = module["main"].params[0].name
    real = Oracle(module, theirs)
    real.run({name: x})
    whole = IntegerOracle(integer_module(module), real)
    whole.run({name: x})
    elements, different, unexplained = whole.total()
    print(
        f"\n{title}: {len(whole.rows)} layers, {different} of {elements} elements differ from PyTorch"
        f" ({real.total()[1]} by float32 alone), {unexplained} unexplained"
    )
    assert real.total()[2] == 0, {k: r for k, r in real.rows.items() if r[2]}
    assert unexplained == 0, {k: r for k, r in whole.rows.items() if r[2]}
    return real, whole


@pytest.mark.slow
@pytest.mark.parametrize("name", STATIC)
def test_quantizers(name: str) -> None:
    torch.manual_seed(0)
    program = pt2e(name, lively(Residual(), SHAPE), SHAPE)
    rng = np.random.default_rng(0)
    real, whole = compare(program, rng.standard_normal(SHAPE).astype(np.float32), name)
    assert real.rows["x.quantize"][1] == 0  # at the border equality is exact: the reciprocal is PyTorch's
    assert len(whole.rows) >= 4
    for layer, (elements, different, _) in whole.rows.items():
        assert different <= 0.002 * elements + 2, layer  # what lies at a boundary, give or take a few


def test_names_are_the_users() -> None:
    program = read_program(pt2e("x86 inductor", lively(Residual(), SHAPE), SHAPE))
    layers = [c.layer for c in program.calls]
    assert len(set(layers)) == len(layers)
    assert {
        "first.0",
        "first.0.weight",
        "first.2",
        "first.2.quantize",
        "second.0",
        "act",
        "fc",
        "fc.weight",
        "x.quantize",
        "add",
    } <= set(layers)
    assert [i.name for i in program.inputs] == ["x"] and len(program.outputs) == 1


@pytest.mark.slow
def test_four_bits_stay_four_bits() -> None:
    program = pt2e("xnnpack 4 bits", lively(Residual(), SHAPE), SHAPE)
    main = import_exported(program)["main"]
    ranges = {
        (int(b.value.attrs["qmin"]), int(b.value.attrs["qmax"])) for b in stages.bindings(main) if stages.is_border(b)
    }
    assert ranges == {(-8, 7)}


@pytest.mark.slow
def test_weights_that_are_not_folded_become_the_same_integers() -> None:
    torch.manual_seed(0)
    net = lively(Residual(), SHAPE)
    modules = []
    for fold in (True, False):
        torch.manual_seed(1)
        modules.append(import_exported(pt2e("xnnpack per channel", net, SHAPE, fold=fold)))
    weights = [
        [ops.const_value(b.value.args[0]) for b in stages.bindings(m["main"]) if b.var.name.endswith(".weight")]
        for m in modules
    ]
    assert len(weights[0]) == 4
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_the_whole_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = pt2e("x86 inductor", lively(Residual(), SHAPE), SHAPE)
    package = ht.compile(program)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    package.verify({"x": x}, random=1, seed=1).raise_if_mismatch()
    assert package.prove().ok and package.inputs[0].name == "x"
    (ours,) = package.run({"x": x}).values()
    np.testing.assert_allclose(ours, torch_run(program, x)[1], atol=0.02)  # float32 may move an early layer by a step

    file = tmp_path / "net.pt2"
    torch.export.save(program, file)
    again = ht.compile(file)
    np.testing.assert_array_equal(again.run({"x": x})["linear"], ours)
    assert again.graph.script() == package.graph.script()
    assert import_exported(file.read_bytes()).script() == import_exported(program).script()
    report = ht.inspect(file)
    assert report.compilable and report.model["format"] == "PyTorch exported program"
    roles = {(q["op"], q["role"]) for q in report.model["quantized"]}
    assert ("dequantize_per_channel", "weight") in roles and ("quantize_per_tensor", "output") in roles


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["x86 inductor", "xnnpack per channel"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_every_layer_of_a_network(name: str, quantizer: str) -> None:
    shape = (1, 3, 64, 64)
    program = pt2e(quantizer, zoo.build(name, 64), shape, batches=4)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    real, whole = compare(program, x, f"{name}, {quantizer}")
    assert len(whole.rows) > 20 and real.total()[1] <= 1e-3 * real.total()[0]
    package = ht.compile(program)
    package.verify({package.inputs[0].name: x}).raise_if_mismatch()
    assert package.prove().ok
