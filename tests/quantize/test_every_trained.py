"""Of every operator that `quantize` knows: fine-tuning computes what the package does, or refuses it by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

import hawq_tvm as ht
from hawq_tvm.core.errors import ModelError
from hawq_tvm.quantize.ptq.quantizer import draft
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.qat.deployed import Deployed
from hawq_tvm.quantize.qat.training import finetune

from .networks import FloatNet, images
from .test_every_operator import BUILDERS, VARIANTS, known, plain

# What no small step of a weight moves, and what has no integers.
REFUSED = {"ArgMax": "has no derivative", "ArgMin": "has no derivative", "LogSoftmax": "no integer arithmetic"}
# The first opset that has an operator.
OPSETS = {"RMSNormalization": 23, "Attention": 23, "Swish": 24}
TRAINED = [op for op in (*known(), *VARIANTS) if op not in REFUSED]
GROUPS = 8


def branch(g: FloatNet, op: str) -> str:
    """An operator behind a convolution of its own."""
    build = VARIANTS.get(op) or BUILDERS.get(op) or plain(op)
    return build(g, g.conv("x", 4, 3, 3, f"before {op}", pads=[1] * 4))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained") / "in.npz"
    np.savez(place, x=images(8, 6))
    return place


class Watched(Deployed):
    """Keeps the numbers of every quantized tensor of the last call."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: dict[str, torch.Tensor] = {}

    def _quantized(self, name: str, value: Any, exact: Any) -> Any:
        found = super()._quantized(name, value, exact)
        if name in self.draft.points.source:
            self.seen[name] = found
        return found


@pytest.mark.parametrize("group", range(GROUPS))
def test_package_computes_what_is_trained(group: int, data: Path) -> None:
    """Every operator's own result, after every weight, bias and scale has moved."""
    chosen = TRAINED[group::GROUPS]
    g = FloatNet([1, 3, 6, 6], seed=group, opset=max(OPSETS.get(op, 21) for op in chosen))
    made = {op: branch(g, op) for op in chosen}
    joined = g.node("Concat", *(g.node("Reshape", y, g.constant([1, -1], np.int64)) for y in made.values()), axis=1)
    net = g.model(g.node("Mul", joined, g.constant(1.5)))
    if "GroupNormalization" in made:  # of which ONNX infers no shape
        net.graph.value_info.append(helper.make_tensor_value_info(made["GroupNormalization"], 1, [1, 4, 6, 6]))
    trained = Watched(draft(net, data, Recipe(8, rounding="nearest")))
    with torch.no_grad():
        torch.manual_seed(group)
        for name, value in trained.parameters.items():
            value += (0.1 if name.startswith(("step:", "grid:")) else 0.7) * torch.randn(value.shape)
    inputs = [{"x": images(1, 6, seed=3)}, {"x": 3 * images(1, 6, seed=4)}]
    trained(inputs[0]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained.parameters.values())
    made = {op: y for op, y in made.items() if y in trained.seen}  # others are what they read
    model = trained.drafted().written().model
    for y in made.values():
        shape = list(trained.seen[y].shape)
        model.graph.output.append(helper.make_tensor_value_info(f"{y}_dequantized", 1, shape))
    package = ht.compile(model)
    for given in inputs:
        ours, theirs = trained(given), package.run(given)
        assert np.array_equal(ours.detach().numpy(), theirs[trained.graph.outputs[0]])
        for op, y in made.items():
            assert np.array_equal(trained.seen[y].detach().numpy(), theirs[f"{y}_dequantized"]), op


@pytest.mark.parametrize("op", REFUSED)
def test_what_is_refused_has_a_name(op: str, data: Path) -> None:
    g = FloatNet([1, 3, 6, 6], seed=1, opset=21)
    net = g.model(branch(g, op))
    with pytest.raises(ModelError, match=REFUSED[op]) as refused:
        finetune(net, data)
    assert any(n.name in str(refused.value) for n in net.graph.node)
