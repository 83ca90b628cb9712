"""Transformers, quantized: products of two activations, normalizations and residual sums of 16 bits."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hawq_tvm as ht
from hawq_tvm import quantize
from hawq_tvm.core import ops, stages
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.ptq.tables import columns

from .detectors import exported
from .networks import FloatNet, images
from .test_detectors import answers, cosine


class Block(nn.Module):
    """Attention and a feed-forward part, each after its normalization."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.first, self.second = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        query, key, value = (self.split(layer(y)) for layer in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        x = x + self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.norm = nn.Conv2d(3, 16, 8, 8), Block(), nn.LayerNorm(16)
        self.first, self.places = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.places
        return self.last(self.norm(self.block(x))[:, 0])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("transformers") / "in.npz"
    np.savez(place, x=images(16, 32))
    return place


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), ("W4A8", 0.99)])
def test_vision(bits: int | str, least: float, data: Path) -> None:
    torch.manual_seed(0)
    net = Vision().eval()
    found = post_training(exported(net), data, Recipe(bits, effort=20)).model
    kinds = {t.name: t.data_type for t in found.graph.initializer}
    made = {name: n for n in found.graph.node for name in n.output}
    read = [made[n.input[0]] for n in found.graph.node if n.op_type == "LayerNormalization"]
    assert [kinds[n.input[2]] for n in read] == [onnx.TensorProto.UINT16] * 3
    # So are the tensors that they add; a layer's own sums go into them as they are.
    added = [made[x] for n in read[1:] for x in made[made[n.input[0]].input[0]].input]
    assert sorted(n.op_type for n in added) == ["Add", "Add", "DequantizeLinear", "DequantizeLinear"]
    assert {kinds[n.input[2]] for n in added if n.op_type == "DequantizeLinear"} == {onnx.TensorProto.UINT16}
    # Query, key and value read one tensor of 8 bits.
    query, key, value, *_ = (n.input[0] for n in found.graph.node if n.op_type == "MatMul")
    assert query == key == value and kinds[made[query].input[2]] == onnx.TensorProto.UINT8
    # Nothing stands between a product and what scales it before its quantize.
    at, way = next(n.input[0] for n in found.graph.node if n.op_type == "Softmax"), list[str]()
    while made[at].op_type != "MatMul":
        way.append(made[at].op_type)
        at = made[at].input[0]
    assert way == ["DequantizeLinear", "QuantizeLinear", "Div"]
    package = ht.compile(found)
    package.verify(random=1, seed=0).raise_if_mismatch()
    ((real, integer),) = answers(net, package, images(4, 32, seed=2))
    assert cosine(real, integer) > least


def masked(kind: str) -> onnx.ModelProto:
    """Scores under a mask of the kind that a network may have, their softmax, and a product with it."""
    g = FloatNet([1, 3, 6, 6], opset=21)
    y = g.conv("x", 4, 3, 1, "first")
    scores = g.node("Mul", g.node("MatMul", y, g.node("Transpose", y, perm=[0, 1, 3, 2])), g.constant(0.5))
    low = {"infinite": -np.inf, "least": np.finfo(np.float32).min}.get(kind, -1e9)
    later = np.triu(np.ones((6, 6), bool), 1)
    if kind == "where":
        scores = g.node("Where", g.constant(later, bool), g.constant(low), scores)
    else:
        scores = g.node("Add", scores, g.constant(np.where(later, np.float32(low), 0)))
    return g.model(g.node("MatMul", g.node("Softmax", scores), y))


@pytest.mark.parametrize("kind", ["added", "infinite", "least", "where"])
def test_masks_take_no_part_in_calibration(kind: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=images(8, 6))
    net = masked(kind)
    found = post_training(net, tmp_path / "in.npz").model
    package, x = ht.compile(found), images(4, 6, seed=3)
    run = onnxruntime.InferenceSession(net.SerializeToString()).run
    (name,) = (o.name for o in package.outputs)
    for one in x:
        real = run(None, {"x": one[None]})[0]
        assert cosine(real, package.run({"x": one[None]})[name]) > 0.998


def test_bits_by_traces(data: Path) -> None:
    """Derivatives go through attention, normalizations and GELU."""
    torch.manual_seed(0)
    problem = quantize.problem(exported(Vision().eval()), data, quantize.Settings(("trace",), probes=2))
    chosen = problem.allocate(["bops=0.6"]).assignment
    assert len(chosen) == 8 and {"W8A8", "W4A8"} <= {*chosen.values()} <= {"W8A8", "W4A8", "W4A4"}


class Words(nn.Module):
    """Embeddings by ids, attention under a mask of zeros and ones, a class from the first word."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(30, 16), nn.Embedding(8, 16), nn.LayerNorm(16)
        self.query, self.key, self.value, self.last = (nn.Linear(16, n) for n in (16, 16, 16, 5))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        shut = (1.0 - mask[:, None, :].float()) * torch.finfo(torch.float32).min
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / 4 + shut
        return self.last(torch.tanh((scores.softmax(-1) @ self.value(x))[:, 0]))


def words_file(net: Words) -> tuple[bytes, dict[str, np.ndarray]]:
    """Its ONNX file, for one sentence, and sixteen sentences."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 16)
    arrays = {"ids": rng.integers(0, 30, (16, 8)), "mask": (np.arange(8) < lengths[:, None]).astype(np.int64)}
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its own deprecation
        given = tuple(torch.from_numpy(v[:1]) for v in arrays.values())
        torch.onnx.export(net, given, stream, opset_version=17, dynamo=False, input_names=list(arrays))
    return stream.getvalue(), arrays


def test_words_under_a_mask(tmp_path: Path) -> None:
    """Whole numbers are no data: neither ids nor masks have a scale."""
    torch.manual_seed(0)
    net = Words().eval()
    file, arrays = words_file(net)
    np.savez(tmp_path / "in.npz", **arrays)
    found = post_training(file, tmp_path / "in.npz").model
    package = ht.compile(found)
    package.verify(random=1, seed=0).raise_if_mismatch()
    # The table has 8 bits, in the file and in the library, and what is chosen from it is added as it is.
    (row,) = (n for n in found.graph.node if n.op_type == "Gather" and n.input[1] == "ids")
    (table,) = (n for n in found.graph.node if row.input[0] in n.output)
    codes, scale = (next(t for t in found.graph.initializer if t.name == n) for n in table.input)
    assert (list(codes.dims), codes.data_type, list(scale.dims)) == ([30, 16], onnx.TensorProto.INT8, [16])
    assert [n.op_type for n in found.graph.node if row.output[0] in n.input] == ["Add"]
    inside = (b.value for f in stages.private_functions(package.graph).values() for b in stages.bindings(f))
    taken = [value.args[0] for value in inside if ops.op_name(value) == "relax.take"]
    assert [ops.dtype_of(x) for x in taken if ops.shape_of(x) == (30, 16)] == ["int8"]
    (name,) = (o.name for o in package.outputs)
    with torch.no_grad():
        real = net(*(torch.from_numpy(v) for v in arrays.values())).numpy()
    integer = np.concatenate([package.run({k: v[i : i + 1] for k, v in arrays.items()})[name] for i in range(16)])
    assert cosine(real, integer) > 0.999


def test_a_table_is_rounded_once() -> None:
    """Its scale is no less than the greatest magnitude by 127, and integers times it are float32 exactly."""
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((50, 300)) * 10.0 ** rng.integers(-20, 20, 300)).astype(np.float32)
    table[:, 7] = 0
    codes, scale = columns(table)
    assert np.abs(codes.astype(int)).max() == 127 and (codes[:, 7] == 0).all()
    real = codes.astype(np.float64) * scale.astype(np.float64)
    assert (real == (codes * scale)).all() and (np.abs(real - table) <= scale / 2 * (1 + 2.0**-10)).all()
    again, same = columns(codes * scale)
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_array_equal(np.delete(same, 7), np.delete(scale, 7))
