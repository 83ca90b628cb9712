"""Pruning: what hangs together in networks of many kinds, what it costs, what goes, and what the rest makes up for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.quantize.allocate.loss import Loss
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.float_onnx import from_onnx
from hawq_tvm.quantize.network.prepare import constants, prepare
from hawq_tvm.quantize.prune.channels import Channels, find_channels
from hawq_tvm.quantize.prune.choose import Budget, choose, macs_of
from hawq_tvm.quantize.prune.cost import diagonals, group_costs
from hawq_tvm.quantize.prune.cut import without_channels
from hawq_tvm.quantize.prune.pruner import Pruning, prune
from hawq_tvm.quantize.ptq.quantizer import post_training

from .networks import FloatNet, images, residual_net


def mobile() -> onnx.ModelProto:
    """An expansion, a depthwise convolution, a gate by the mean of every channel, a projection onto the shortcut."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Clip", g.norm(g.conv("x", 8, 3, 3, "stem", pads=[1] * 4), 8), g.constant(0), g.constant(6))
    z = g.node("HardSwish", g.conv(y, 12, 8, 1, "up"))
    z = g.node("Relu", g.conv(z, 12, 12, 3, "deep", pads=[1] * 4, group=12))
    s = g.node("Relu", g.conv(g.node("GlobalAveragePool", z), 4, 12, 1, "squeeze"))
    z = g.node("Mul", z, g.node("Sigmoid", g.conv(s, 12, 4, 1, "excite")))
    y = g.node("Add", y, g.conv(z, 8, 12, 1, "down"))
    y = g.node("PRelu", y, g.random(8, 1, 1))
    f = g.node("Reshape", g.node("AveragePool", y, kernel_shape=[4, 4], strides=[4, 4]), g.constant([-1, 32], np.int64))
    return g.model(g.node("Gemm", f, g.random(32, 5), g.random(5), name="fc"))


def dense() -> onnx.ModelProto:
    """Concatenations, a pad, a resize, a deconvolution and per-channel constants."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Relu", g.conv("x", 6, 3, 3, "a", pads=[1] * 4))
    z = g.node("Elu", g.conv(y, 4, 6, 3, "b", pads=[1] * 4, strides=[2, 2]))
    z = g.node("Mul", z, g.random(1, 4, 1, 1))
    z = g.node("ConvTranspose", z, g.random(4, 5, 2, 2), g.random(5), name="c", strides=[2, 2])
    y = g.node("Concat", y, "x", z, axis=1)
    y = g.node("Tanh", g.conv(g.node("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), 6, 14, 1, "d"))
    f = g.node("Flatten", g.node("Concat", y, y, axis=1))
    return g.model(g.node("Gemm", f, g.random(5, 192), name="fc", transB=1))


def shuffled() -> onnx.ModelProto:
    """Grouped convolutions, a shuffle of channels and a normalization of groups: what they read stays."""
    g = FloatNet(["n", 3, 8, 8], opset=21)
    y = g.node("Relu", g.conv("x", 8, 3, 3, "a", pads=[1] * 4))
    y = g.conv(y, 8, 8, 1, "grouped", group=2)
    y = g.node("Transpose", g.node("Reshape", y, g.constant([-1, 2, 4, 64], np.int64)), perm=[0, 2, 1, 3])
    y = g.node("Reshape", y, g.constant([-1, 8, 8, 8], np.int64))
    y = g.node("Relu", g.conv(y, 6, 8, 1, "b"))
    y = g.node("GroupNormalization", g.conv(y, 6, 6, 1, "c"), g.random(6), g.random(6), num_groups=2)
    y = g.node("Flatten", g.node("GlobalAveragePool", y))
    model = g.model(g.node("Gemm", y, g.random(6, 5), name="fc"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(model.graph.output[0].name, 1, ["n", 5]))
    return model


def transformer() -> onnx.ModelProto:
    """A normalization over channels, and two matrix products with GELU between: the inner ones can go."""
    g = FloatNet(["n", 3, 8, 8], opset=20)
    y = g.node("Transpose", g.node("Reshape", "x", g.constant([-1, 12, 16], np.int64)), perm=[0, 2, 1])
    y = g.node("LayerNormalization", y, g.random(12), g.random(12))
    z = g.node("Gelu", g.node("Add", g.node("MatMul", y, g.random(12, 20), name="up"), g.random(20)))
    y = g.node("Add", g.node("Add", g.node("MatMul", z, g.random(20, 12), name="down"), g.random(12)), y)
    y = g.node("ReduceMean", y, g.constant([1], np.int64), keepdims=0)
    return g.model(g.node("Gemm", y, g.random(12, 5), name="fc"))


def signal() -> onnx.ModelProto:
    """A network of one dimension, a part of its channels read by two layers."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Reshape", "x", g.constant([-1, 3, 64], np.int64))
    y = g.node("Relu", g.node("Conv", y, g.random(8, 3, 5), g.random(8), name="a", strides=[2], pads=[2, 2]))
    y = g.node("Relu", g.node("Conv", y, g.random(8, 1, 3), g.random(8), name="deep", group=8, dilations=[2]))
    one, other = (g.node("Conv", y, g.random(6, 8, 1), name=name) for name in "bc")
    y = g.node("ReduceMean", g.node("Mul", one, g.node("Sigmoid", other)), g.constant([2], np.int64), keepdims=0)
    return g.model(g.node("Gemm", y, g.random(6, 5), name="fc"))


def shared() -> onnx.ModelProto:
    """Two layers with one weight: all its channels, read and made, hang together."""
    g = FloatNet(["n", 3, 8, 8])
    y, weight = g.conv("x", 4, 3, 1, "a"), g.random(4, 4, 1, 1)
    y = g.node("Conv", g.node("Relu", g.node("Conv", y, weight, name="b")), weight, name="c")
    y = g.node("Flatten", g.node("GlobalAveragePool", y))
    return g.model(g.node("Gemm", y, g.random(4, 5), name="fc"))


# What of each network can lose output channels.
NETS: dict[Callable[[], onnx.ModelProto], set[str]] = {
    residual_net: {"stem", "a1", "a2", "short", "b1", "b2"},
    mobile: {"stem", "up", "deep", "squeeze", "excite", "down"},
    dense: {"a", "b", "c", "d"},
    shuffled: {"b"},
    transformer: {"up"},
    shared: {"a", "b", "c"},
    signal: {"a", "deep", "b", "c"},
}


def found(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Any, Channels, dict[str, Any]]:
    prepared, graph = prepare(model)
    example = {"x": images(2)}
    return prepared, graph, find_channels(graph, example), example


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_without_any_channels_a_network_is_the_full_one_without_what_reads_them(net: Any) -> None:
    prepared, graph, channels, example = found(net())
    free = {name for name, place in channels.rows.items() if place.groups.any()}
    assert free == NETS[net]
    rng = np.random.default_rng(0)
    for _ in range(4):
        stays = rng.random(channels.count) < 0.6
        stays[0] = True
        for alike in channels.alike():
            stays[alike[0]] = True
        masked = {}
        for columns in channels.columns.values():
            weight = graph.parameters[columns.parameter].numpy()
            dead = np.expand_dims(~stays[columns.groups], tuple(d for d in range(weight.ndim) if d != columns.axis))
            masked[columns.parameter] = torch.from_numpy(np.where(dead, 0, weight).astype(np.float32))
        smaller = without_channels(prepared, channels, stays)
        onnx.checker.check_model(smaller, full_check=True)
        wanted = graph.run(example, parameters=masked)[graph.outputs[0]]
        given = from_onnx(smaller).run(example)[graph.outputs[0]]
        # float32 sums in another order
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_channels_that_hang_together() -> None:
    _, graph, channels, example = found(residual_net())
    rows = {name: place.groups.tolist() for name, place in channels.rows.items()}
    assert rows["a2"] == rows["short"] == rows["b2"] and rows["a1"] != rows["a2"]
    assert rows["fc"] == [0] * 5 and channels.columns["fc"].groups.tolist() == rows["a2"]
    assert sorted(len(alike) for alike in channels.alike()) == [4, 6, 6, 6]
    kept = find_channels(graph, example, ["b2"])
    assert not kept.rows["a2"].groups.any() and kept.rows["b1"].groups.all()
    with pytest.raises(UsageError, match="there is no weighted layer 'b3'"):
        find_channels(graph, example, ["b3"])


def test_costs_are_traces_of_the_exact_hessian(tmp_path: Path) -> None:
    g = FloatNet(["n", 3, 4, 4])
    y = g.node("Sigmoid", g.conv("x", 2, 3, 3, "a"))
    model = g.model(g.node("Gemm", g.node("Flatten", y), g.random(8, 3), name="fc"))
    graph, x, labels = from_onnx(model), images(4, 4), np.array([0, 2, 1, 1])
    np.savez(tmp_path / "in.npz", x=x, labels=labels)
    data = open_data(tmp_path / "in.npz", graph.inputs)
    channels = find_channels(graph, {"x": x})
    diagonal = diagonals(Loss(graph, data), 2000, 4, 0, lambda step: None)
    weight = graph.parameters[graph.layers[0].weight]

    def loss(w: torch.Tensor) -> torch.Tensor:
        scores = graph.run({"x": x}, parameters={graph.layers[0].weight: w})[graph.outputs[0]]
        return torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))

    hessian = torch.autograd.functional.hessian(loss, weight).reshape(2, 27, 2, 27)
    wanted = [float(hessian[i, :, i].trace() / 27 * weight[i].square().sum() / 2) for i in range(2)]
    costs = group_costs(graph, channels, diagonal)[channels.rows["a"].groups]
    assert np.abs(costs / wanted - 1).max() < 0.1  # the standard error of 2,000 sets of signs is below 3 %


def test_the_cheapest_go_until_the_budget_is_met() -> None:
    _, graph, channels, example = found(residual_net())
    macs = macs_of(graph, example)
    assert sum(macs) == sum(graph.products(one, n) for one, n in zip(graph.layers, (256, 96, 96, 96, 96, 96, 5)))
    costs = np.random.default_rng(0).random(channels.count)
    for text, multiple in (("macs=70%", 1), ("weights=50%", 1), ("macs=60%", 2), ("weights=500", 1)):
        budget = Budget.parse(text)
        stays, resources = choose(graph, channels, costs, macs, [budget], multiple)
        before, after = resources[budget.resource]
        assert after <= budget.limit * (before if budget.share else 1) and stays[0]
        for alike in channels.alike():
            assert stays[alike].sum() >= multiple and stays[alike].sum() % multiple == 0
            gone = costs[alike][~stays[alike]]
            assert not gone.size or gone.max() <= costs[alike][stays[alike]].min()
        cut = from_onnx(without_channels(prepare(residual_net())[0], channels, stays))
        assert sum(macs_of(cut, example)) == resources["macs"][1]
        assert sum(cut.parameters[one.weight].numel() for one in cut.layers) == resources["weights"][1]
    with pytest.raises(UsageError, match=r"cannot be met.*expected at least macs=[0-9.]+%"):
        choose(graph, channels, costs, macs, [Budget.parse("macs=1%")], 1)


@pytest.mark.parametrize("text", ["macs", "macs=0%", "macs=101%", "bops=50%", "macs=-1", "macs=50%%", "weights=1T"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="is no budget"):
        Budget.parse(text)


def twins() -> onnx.ModelProto:
    """A residual network whose inner channels come in equal pairs."""
    model = residual_net(size=8)
    for name in ("b1",):
        node = next(n for n in model.graph.node if n.name == name)
        for constant in node.input[1:]:
            tensor = next(t for t in model.graph.initializer if t.name == constant)
            value = np.array(onnx.numpy_helper.to_array(tensor))
            value[3:] = value[:3]
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, constant))
    return model


def test_what_stays_makes_up_for_what_went(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=images(64))
    given = Pruning(("weights=93%",), multiple=1, keep=("stem", "a1", "a2"), batch=16, steps=0)
    full = from_onnx(twins())
    found = prune(twins(), tmp_path / "in.npz", given)
    rows = {row["layer"]: row for row in found.layers}
    assert rows["b1"]["before"] == [6, 6, 3, 3] and rows["b1"]["after"][0] == 5
    assert rows["b2"]["error_after"] < 1e-2 * rows["b2"]["error_before"] and found.distance is None
    held = images(8, seed=1)
    wanted = full.run({"x": held})[full.outputs[0]]
    # the ridge pulls the weights back by about a thousandth
    torch.testing.assert_close(from_onnx(found.model).run({"x": held})[full.outputs[0]], wanted, rtol=1e-2, atol=1e-2)
    left = prune(twins(), tmp_path / "in.npz", Pruning(given.budgets, 1, given.keep, batch=16, images=0))
    assert left.images == 0 and "error_after" not in left.layers[0]


@pytest.mark.parametrize("net", [mobile, transformer, signal], ids=lambda net: net.__name__)
def test_a_pruned_network_is_nearer_after_fit_and_training_and_compiles(net: Any, tmp_path: Path) -> None:
    data = tmp_path / "in.npz"
    np.savez(data, x=images(64))
    pruned = prune(net(), data, Pruning(("weights=80%",), multiple=2, batch=16, probes=4, steps=40))
    assert pruned.distance is not None and pruned.distance[1] <= pruned.distance[0]
    after, before = (sum(row[f"error_{side}"] for row in pruned.layers) for side in ("after", "before"))
    assert after < max(1e-9, before)
    again = prune(net(), data, Pruning(("weights=80%",), multiple=2, batch=16, probes=4, steps=40))
    assert again.model == pruned.model
    package = ht.compile(post_training(pruned.model, data).model, shapes={"x": (1, 3, 8, 8)})
    assert package.verify(random=1, seed=0).ok


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data, out = tmp_path / "float.onnx", tmp_path / "in.npz", tmp_path / "smaller.onnx"
    onnx.save(residual_net(), str(model))
    np.savez(data, x=images(16))
    words = ["prune", str(model), "--calib", str(data), "--batch", "8", "--multiple", "2", "--steps", "2"]
    assert main([*words, "--budget", "macs=70%", "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["resources"]["macs"][1] <= 0.7 * told["resources"]["macs"][0] and told["bytes"] == out.stat().st_size
    shapes = {name: value.shape for name, value in constants(onnx.load(str(out)).graph).items()}
    assert sorted(tuple(row["after"]) for row in told["layers"]) == sorted(s for s in shapes.values() if len(s) > 1)
    out.unlink()
    assert main([*words, "--budget", "macs=1%", "-o", str(out)]) == 2
    assert "cannot be met" in capsys.readouterr().err and not out.exists()


def test_what_cannot_be_pruned(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=images(8))
    g = FloatNet(["n", 3, 8, 8])
    model = g.model(g.conv(g.node("Relu", g.conv("x", 4, 3, 1, "a")), 2, 4, 1, "b"))
    with pytest.raises(ModelError, match="is no classifier's output"):
        prune(model, tmp_path / "in.npz", Pruning(("macs=60%",), multiple=1, batch=8, classes=True))
    found = prune(model, tmp_path / "in.npz", Pruning(("macs=60%",), multiple=1, batch=8))
    assert found.distance is not None and found.distance[1] < found.distance[0] and found.answers.kind == "numbers"
    with pytest.raises(UsageError, match="nothing says how small"):
        Pruning(())
    with pytest.raises(UsageError, match="is no way to rank channels"):
        Pruning(("macs=60%",), by="taste")
    with pytest.raises(UsageError, match="--multiple: is too small"):
        Pruning(("macs=60%",), multiple=0)
