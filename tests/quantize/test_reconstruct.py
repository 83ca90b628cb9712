"""Blocks by structure, what is learned of them, and that an interrupted run ends as one that was not."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hawq_tvm.cli import main
from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.float_graph import Layer
from hawq_tvm.quantize.network.float_onnx import from_onnx
from hawq_tvm.quantize.ptq import learned, quantizer, reconstruct
from hawq_tvm.quantize.ptq.blocks import CHAIN, MOST, blocks_of
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.ptq.weights import nearest, with_room

from .networks import FloatNet, images, residual_net
from .test_quantize import compiled_exactly, mobile, noise


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reconstruct")
    np.savez(folder / "in.npz", x=images(16))
    onnx.save(residual_net(), str(folder / "net.onnx"))
    return folder


# -- blocks
# ---------------------------------------------------------------------------------------------------------------


def layers_of(model: onnx.ModelProto) -> list[list[str]]:
    blocks = blocks_of(from_onnx(model))
    assert [n.name for b in blocks for n in b.nodes] == [n.name for n in from_onnx(model).nodes]
    for before, block in pairwise(blocks):
        assert set(block.inputs) <= {n for b in blocks for n in b.outputs} | {"x"} and before.outputs
    return [[layer.name for layer in block.layers] for block in blocks]


def test_a_residual_block_is_a_block() -> None:
    assert layers_of(residual_net()) == [["stem"], ["a1", "a2", "short"], ["b1", "b2"], ["fc"]]


def test_a_gate_belongs_to_its_block() -> None:
    found = layers_of(mobile("ReLU6"))
    assert found[:3] == [["stem"], ["depth", "project"], ["squeeze", "excite"]] and len(found) == 4


def test_a_chain_is_cut_every_few_layers() -> None:
    g, y = FloatNet([1, 3, 8, 8]), "x"
    for i in range(7):
        y = g.node("Relu", g.conv(y, 3, 3, 1, f"c{i}"))
    assert [len(names) for names in layers_of(g.model(y))] == [CHAIN, CHAIN, 1]


def test_a_block_has_not_too_many_layers() -> None:
    """A shortcut over the whole network leaves no tensor through which everything goes."""
    g = FloatNet([1, 3, 8, 8])
    first = y = g.conv("x", 3, 3, 1, "first")
    for i in range(MOST + 3):
        y = g.node("Relu", g.conv(y, 3, 3, 1, f"c{i}"))
    found = layers_of(g.model(g.node("Add", y, first)))
    assert max(map(len, found)) <= MOST and sum(map(len, found)) == MOST + 4


def test_what_has_no_derivative_begins_a_block(place: Path) -> None:
    """BitShift and its like are computed by ONNX's reference, through which no gradient goes."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("CumSum", g.conv("x", 4, 3, 3, "a"), g.constant(2, np.int64), name="sums")
    blocks = blocks_of(from_onnx(g.model(g.conv(y, 4, 4, 1, "b"))))
    assert [b.nodes[0].name for b in blocks] == ["a", "sums"]


# -- what is learned
# ------------------------------------------------------------------------------------------------------


def test_fitted_layers_are_the_default_and_help(place: Path) -> None:
    net = residual_net(batch=1)
    plain = post_training(net, place / "in.npz", Recipe("W4A8", rounding="nearest"))
    ours = post_training(net, place / "in.npz", Recipe("W4A8"))
    assert not plain.notes["blocks"] and len(ours.notes["blocks"]) == 4
    for row in ours.notes["blocks"]:
        assert row["error_after"] < row["error_before"] and row["iterations"] == 0
    assert noise(net, ours) < 0.5 * noise(net, plain)
    compiled_exactly(ours.model, images(2, seed=5))


def test_products_without_a_bias_are_fitted_with_their_mean(tmp_path: Path) -> None:
    """A bias that an Add adds behind a MatMul is not corrected: what is read has a mean, as behind a GELU."""
    g = FloatNet([1, 20, 16])
    y = g.node("LayerNormalization", "x", g.constant(np.ones(16)), g.constant(np.zeros(16)))
    for name in ("one", "two", "three"):
        z = g.node("Add", g.node("MatMul", y, g.random(16, 64, scale=0.25), name=f"{name} up"), g.random(64))
        z = g.node("MatMul", g.node("Gelu", g.node("Add", z, g.constant(2))), g.random(64, 16, scale=0.12), name=name)
        y = g.node("Add", y, g.node("Add", z, g.random(16)))
    g.opset = 20
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(1).standard_normal((32, 20, 16)).astype(np.float32))
    found = post_training(g.model(y), tmp_path / "in.npz", Recipe("W4A8", keep_ends=False)).notes["blocks"]
    assert all(row["error_after"] < 0.8 * row["error_before"] for row in found), found


def test_only_blocks_of_few_bits_are_learned(place: Path) -> None:
    blocks = post_training(residual_net(batch=1), place / "in.npz", Recipe("W4A8", effort=20)).notes["blocks"]
    assert [row["iterations"] for row in blocks] == [0, 20, 20, 0]  # the ends have 8 bits


def test_steps_of_four_bits_are_learned(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "JUDGING", 1)  # what is learned is judged by what it was learned on
    net = residual_net(batch=1)
    plain, learned = (
        post_training(net, place / "in.npz", recipe)
        for recipe in (
            Recipe(4, rounding="nearest", equalize="relu", keep_small=False),
            Recipe(4, effort=100, keep_small=False),
        )
    )
    pairs = [
        (a["activation_bits"], a["activation_scale"] / b["activation_scale"])
        for a, b in zip(learned.layers, plain.layers, strict=True)
    ]
    assert any(bits == 4 and ratio != 1 for bits, ratio in pairs)
    assert all(bits == 4 or ratio == 1 for bits, ratio in pairs) and all(0.5 <= ratio <= 2 for _, ratio in pairs)
    assert noise(net, learned) < 0.8 * noise(net, plain)  # 0.69 to 0.76 by seed
    compiled_exactly(learned.model, images(2, seed=5))


def test_what_is_learned_is_judged_by_other_images(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits the images that it was learned on, and fits others worse, is not taken."""
    taught, real = list[int](), learned.Learner.run

    def run(self: learned.Learner, cases: Any, *rest: Any) -> None:
        taught.append(sum(case.size for case in cases))
        real(self, cases, *rest)

    def worse(self: learned.Learner) -> Any:
        return {n: replace(one, codes=-one.codes) for n, one in self.rounded.items()}, self.grids

    monkeypatch.setattr(learned.Learner, "run", run)
    fitted = post_training(residual_net(), place / "in.npz", Recipe("W4A8", batch=2)).notes["blocks"]
    monkeypatch.setattr(learned.Learner, "decided", worse)
    ours = post_training(residual_net(), place / "in.npz", Recipe("W4A8", batch=2, effort=1)).notes["blocks"]
    assert taught == [14, 14]
    assert [row["error_after"] for row in ours] == [row["error_after"] for row in fitted]


def test_results_keep_their_mean_and_deviation() -> None:
    layer, generator = from_onnx(residual_net()).layers[0], torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, 3, 3, generator=generator), torch.randn(4, generator=generator)
    ours = nearest(weight, bias, layer, 4, True, 1e-3)
    sums, real = (torch.randn(4, 1000, generator=generator).double() for _ in range(2))
    real = 1.3 * real + torch.arange(4.0)[:, None]

    def results(one: Any) -> torch.Tensor:
        return sums * one.scale[:, None] + one.bias[:, None]

    def moments(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values.mean(1), values.square().mean(1)])[None]

    made = reconstruct._moved(ours, moments(real), moments(results(ours)))
    gain = made.scale / ours.scale
    assert bool((gain <= 2).all()) and bool((gain >= 0.5).all()) and torch.equal(made.codes, ours.codes)
    within = ((gain > 0.5) & (gain < 2)).nonzero().flatten()
    found, wanted = moments(results(made))[0], moments(real)[0]
    assert torch.allclose(found[0], wanted[0], 0, 1e-5)  # float32 holds scales and biases
    assert torch.allclose(found[1][within], wanted[1][within], 1e-5)


def test_channels_that_are_lost_do_not_decide_for_others() -> None:
    """One is hardly there in the quantized network, and in the float one in one image: its gain is as great as any."""
    layer, generator = from_onnx(residual_net()).layers[0], torch.Generator().manual_seed(0)
    ours = nearest(torch.randn(4, 3, 3, 3, generator=generator), torch.zeros(4), layer, 4, True, 1e-3)
    sums = torch.randn(32, 4, 50, generator=generator).double()
    gains = torch.tensor([1.0, 0.7, 0.9, 1.3]).double()
    real = sums * gains[:, None]
    sums[:, 0] *= 1e-3
    real[1:, 0] = 0
    moments = [torch.stack([v.mean(2), v.square().mean(2)], 1) for v in (real, sums)]
    made = reconstruct._moved(ours, *moments)
    # Drawn by the noise of the others' own sums, of which there are 1,600.
    assert torch.allclose(made.scale / ours.scale, torch.tensor([2.0, 0.7, 0.9, 1.3]), 1e-3)


def test_means_are_trusted_as_far_as_images_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 500, generator=generator).double()
    assert torch.equal(reconstruct._agreed(noise[:1]), noise[0])  # one image has none to disagree with
    for size, kept in ((0.0, 0.0), (0.125, 0.5), (2.0, 0.99)):
        samples = noise + size * torch.where(torch.arange(500) % 2 == 0, 1.0, -1.0)
        # The share of a mean's square that is not noise, 1 / 64 here; a standard error of 500 channels is 0.03 of it.
        assert abs(float((reconstruct._agreed(samples) / samples.mean(0)).mean()) - kept) < 0.1


def test_moments_are_counted_by_image() -> None:
    layer, product = (Layer("l", "l", kind, "x", "y", "w", "", 0) for kind in ("conv", "matmul"))
    value = torch.arange(2.0 * 3 * 4).reshape(2, 3, 2, 2)
    found = reconstruct._moments(value, layer, 2)
    flat = value.flatten(2).double()
    assert torch.equal(found, torch.stack([flat.mean(2), flat.square().mean(2)], 1))
    tokens = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(reconstruct._moments(tokens, product, 3)[:, 0], tokens.reshape(3, 2, 2).double().mean(1))
    assert torch.equal(reconstruct._moments(tokens, product, 4)[:, 0], tokens.double().mean(0)[None])
    assert reconstruct._moments(torch.arange(6.0), product, 3).shape == (1, 2, 6)


def test_what_is_dropped_is_a_share() -> None:
    zeros, ones = torch.zeros(1000, 999), torch.ones(1000, 999)
    for share in (0.25, 0.5):
        found = learned._mixed(zeros, ones, torch.Generator().manual_seed(0), share)
        # Three standard errors of so many draws.
        assert abs(float(found.mean()) - share) < 3 * 0.5 / zeros.numel() ** 0.5


def test_small_pictures_are_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as have NUMBERS numbers, at least FEWEST and at most MOST; what the user says goes before."""
    np.savez(tmp_path / "in.npz", x=images(300))
    graph = from_onnx(residual_net())
    data = open_data(tmp_path / "in.npz", graph.inputs)

    def held(recipe: Recipe) -> int:
        return sum(len(batch["x"]) for batch in quantizer._some(data, graph, recipe))

    assert held(Recipe()) == 300 and held(Recipe(images=40)) == 40
    monkeypatch.setattr(quantizer, "NUMBERS", 200 * images(1).size)
    assert held(Recipe()) == 200
    monkeypatch.setattr(quantizer, "NUMBERS", 1)
    assert held(Recipe()) == quantizer.FEWEST
    monkeypatch.setattr(quantizer, "MOST", 16)
    assert held(Recipe()) == 16


def test_eight_bits_learn_nothing(place: Path) -> None:
    assert not post_training(residual_net(), place / "in.npz", Recipe(8)).notes["blocks"]
    corrected = post_training(residual_net(), place / "in.npz", Recipe(8, correct_bias=True)).notes["blocks"]
    assert [row["iterations"] for row in corrected] == [0] * 4


def test_a_fixed_batch_learns_the_same_kind(place: Path) -> None:
    """A network of one image at a time whose block stacks, and one that reshapes to a constant size, which does not."""
    for shape in ([1, 4 * 64], [1, -1]):
        g = FloatNet([1, 3, 8, 8])
        y = g.node("Relu", g.conv("x", 4, 3, 1, "a"))
        y = g.node("Reshape", g.node("Relu", g.conv(y, 4, 4, 1, "b")), g.constant(shape, np.int64))
        y = g.node("Gemm", g.node("Gemm", y, g.random(256, 6, scale=0.1), name="c"), g.random(6, 5), name="d")
        found = post_training(g.model(y), place / "in.npz", Recipe("W4A8", effort=30))
        assert [row["iterations"] for row in found.notes["blocks"]] == [30, 0]
        compiled_exactly(found.model, images(2, seed=5))


def test_a_bias_keeps_its_room() -> None:
    layer = from_onnx(residual_net()).layers[0]
    weight, bias = torch.full((4, 3, 3, 3), 1e-9), torch.tensor([1.0, -2.0, 0.0, 8.0])
    ours = nearest(weight, bias, layer, 4, False, 1e-3)
    grown = with_room(replace(ours, bias=4 * bias), weight, 0.5e-3)
    assert bool((grown.bias.abs() / (0.5e-3 * grown.scale) <= 2**30 * 1.001).all())  # type: ignore[union-attr]
    assert torch.equal(grown.scale[2:3], ours.scale[2:3]) and torch.equal(grown.codes[2], ours.codes[2])


# -- one result
# -----------------------------------------------------------------------------------------------------------


def written(place: Path, state: Path | None = None, **options: Any) -> bytes:
    recipe = Recipe(4, effort=40, **options)
    return bytes(post_training(residual_net(), place / "in.npz", recipe, state=state).model.SerializeToString())


def test_one_seed_one_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "JUDGING", 1)  # what is learned is taken
    assert written(place) == written(place) != written(place, seed=1)


def test_an_interrupted_run_is_continued(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, whole, real, ran = tmp_path / "s.npz", written(place), reconstruct.Reconstruction._block, list[int]()

    def stopped(self: Any, number: int, *rest: Any) -> Any:
        ran.append(number)
        if number == 2 and len(ran) == 3:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    monkeypatch.setattr(reconstruct.Reconstruction, "_block", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(place, state)
    assert written(place, state) == whole and ran == [0, 1, 2, 2, 3]
    with pytest.raises(UsageError, match="another model, other data or other settings"):
        written(place, state, seed=1)


def test_the_command_keeps_a_state_while_it_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, real = tmp_path / "q.onnx", reconstruct.Reconstruction._block
    command = ["quantize", str(place / "net.onnx"), "--calib", str(place / "in.npz"), "-o", str(target), "--quiet"]
    command += ["--bits", "W4A8", "--effort", "5"]

    def stopped(self: Any, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct.Reconstruction, "_block", stopped)
        assert main(command) == 130
    assert not target.exists() and (tmp_path / "q.state.npz").exists()
    assert "the same command continues" in capsys.readouterr().err
    assert main([*command, "--seed", "1"]) == 2 and "q.state.npz" in capsys.readouterr().err
    assert main(command) == 0 and target.exists() and not (tmp_path / "q.state.npz").exists()
    assert "error, nearest" in capsys.readouterr().out
