"""Smoothing: which factors go where, and that the network's function stays what it is."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hawq_tvm as ht
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.prepare import prepare
from hawq_tvm.quantize.network.roles import roles_of
from hawq_tvm.quantize.ptq.observers import grid
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.ptq.smooth import smooth

from .networks import FloatNet
from .test_transformers import Block

WIDTH = 16
SPREAD = torch.logspace(-1, 1.2, WIDTH)[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))]


class Attention(nn.Module):
    """Pre-norm attention with wide channels in its normalization and its values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(WIDTH)
        self.block.first.weight.data *= SPREAD
        self.block.value.weight.data *= SPREAD[:, None]
        self.block.second.weight.data *= SPREAD
        self.block.wide.weight.data *= SPREAD.repeat(2)[:, None]

    def forward(self, x: Tensor) -> Any:
        return self.block(x)


class Post(nn.Module):
    """A normalization that a residual sum reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.other = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.norm.weight.data *= SPREAD

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        return self.other(y + self.one(y))


class Gated(nn.Module):
    """RMSNorm written out, and a gate: only the plain side of it takes factors."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH) * SPREAD)
        self.gate, self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.up.weight.data *= SPREAD[:, None]

    def forward(self, x: Tensor) -> Any:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.scale
        return self.down(F.silu(self.gate(y)) * self.up(y))


class Plain(nn.Module):
    """Two layers with a ReLU between, the first token alone going into the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.one.weight.data *= SPREAD[:, None]

    def forward(self, x: Tensor) -> Any:
        return self.two(F.relu(self.one(x))[:, 0] * 0.5)


def written(net: nn.Module, dynamo: bool = False) -> onnx.ModelProto:
    stream: Any = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters announce their deprecations
        x = (torch.zeros(1, 6, WIDTH),)
        if dynamo:
            program = torch.onnx.export(net.eval(), x, dynamo=True, input_names=["x"], verbose=False)
            assert program is not None
            return program.model_proto
        torch.onnx.export(net.eval(), x, stream, opset_version=17, dynamo=False, input_names=["x"])
    return onnx.load_from_string(stream.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("smooth") / "in.npz"
    np.savez(place, x=np.random.default_rng(0).standard_normal((32, 6, WIDTH)).astype(np.float32))
    return place


def smoothed(model: onnx.ModelProto, data: Path, bits: int = 8) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    prepared, graph = prepare(model)
    given = open_data(data, graph.inputs, None)
    rows = smooth(
        prepared,
        graph,
        roles_of(prepared),
        given.batches(1, True),
        given.count,
        {layer.name: (bits, 8) for layer in graph.layers},
        lambda low, high, width: grid(low, high, width, False, False),
        None,
        lambda step: None,
    )
    return prepared, rows


def outputs(model: onnx.ModelProto, data: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    with np.load(data) as arrays:
        return np.concatenate([session.run(None, {"x": x[None]})[0] for x in arrays["x"]])


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("net", "divided", "multiplied"), [(Attention, 6, 1), (Post, 0, 1), (Gated, 2, 0), (Plain, 2, 0)]
)
def test_factors_go_where_they_can(
    net: Callable[[], nn.Module], divided: int, multiplied: int, dynamo: bool, data: Path
) -> None:
    """Scale and bias of two normalizations, weights and bias of the values, of what a gate multiplies and of what a
    ReLU follows are divided; behind GELU, and where a residual sum reads, too, a multiplication is added. The function
    stays.
    """
    torch.manual_seed(0)
    model = written(net(), dynamo)
    before = prepare(model)[0]
    after, rows = smoothed(model, data)
    assert sum(len(row["divided"]) for row in rows) == divided
    assert len(after.graph.node) - len(before.graph.node) == multiplied == sum(not row["divided"] for row in rows)
    assert all(row["error_after"] < 0.8 * row["error_before"] for row in rows)
    wanted = outputs(before, data)
    np.testing.assert_allclose(outputs(after, data), wanted, atol=2e-5 * float(np.abs(wanted).max()))


def test_even_channels_are_left_alone(data: Path) -> None:
    torch.manual_seed(0)
    net = Plain()
    net.one.weight.data /= SPREAD[:, None]
    after, rows = smoothed(written(net), data)
    assert not rows and after == prepare(written(net))[0]


@pytest.mark.parametrize("kind", ["weight", "output"])
def test_what_others_read_is_not_divided(kind: str, data: Path) -> None:
    """A weight that two layers have, or a tensor that is an output, too."""
    g = FloatNet([1, 6, WIDTH])
    weight = g.constant(g.rng.standard_normal((WIDTH, WIDTH)) * SPREAD.numpy())
    y = g.node("Relu", g.node("MatMul", "x", weight))
    if kind == "weight":
        y = g.node("Relu", g.node("MatMul", y, weight))
    last = g.node("MatMul", y, g.random(WIDTH, 5))
    model = g.model(last)
    if kind == "output":
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(y))
    assert smoothed(model, data)[1] == []


def test_smoothed_networks_are_nearer_and_compile(data: Path) -> None:
    torch.manual_seed(0)
    model = written(Attention(), dynamo=True)
    found, plain = (post_training(model, data, Recipe(smooth=how)) for how in (True, False))
    assert found.notes["smoothed"] and not plain.notes["smoothed"]
    real = outputs(model, data)
    off, before = (float(np.square(outputs(q.model, data) - real).mean()) for q in (found, plain))
    assert off < 0.7 * before
    kinds = {t.name: t.data_type for t in found.model.graph.initializer}
    made = {name: n for n in found.model.graph.node for name in n.output}
    (mul,) = (n for n in found.model.graph.node if n.op_type == "Mul" and n.name.endswith("_smoothed"))
    # What the factors multiply has 16 bits, so that only the product is rounded to 8.
    assert kinds[made[mul.input[0]].input[2]] == onnx.TensorProto.UINT16
    package = ht.compile(found.model)
    package.verify(random=1, seed=0).raise_if_mismatch()
    assert package.prove().ok
