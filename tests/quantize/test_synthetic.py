"""Calibration data made from BatchNormalization's statistics, of pictures and of signals."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hawq_tvm.cli import main
from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.ptq import synthetic
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.ptq.synthetic import distilled

from .networks import FloatNet, images

Array = np.ndarray[Any, Any]


def data(rank: int, count: int, seed: int) -> torch.Tensor:
    """Inputs far from standard normal ones: another mean and deviation for each channel."""
    draws = torch.Generator().manual_seed(seed)
    shape = (1, 3, *[1] * rank)
    mean, deviation = torch.tensor([1.0, -0.7, 0.3]).reshape(shape), torch.tensor([0.5, 2.0, 0.8]).reshape(shape)
    return mean + deviation * torch.randn(count, 3, *[8] * rank, generator=draws)


def network(rank: int) -> nn.Module:
    """Two convolutions, each with a BatchNormalization that has seen data, and a linear layer."""
    torch.manual_seed(0)
    conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[rank - 1]
    net = nn.Sequential(
        conv(3, 8, 3, padding=1, bias=False),
        norm(8, momentum=None),
        nn.ReLU(),
        conv(8, 8, 3, 2),
        norm(8, momentum=None, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3**rank, 4),
    )
    with torch.no_grad():
        net(data(rank, 256, 0))
    return net.eval()


def exported(net: nn.Module, rank: int, training: Any = torch.onnx.TrainingMode.PRESERVE) -> onnx.ModelProto:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its own deprecation
        torch.onnx.export(
            net,
            (data(rank, 1, 0),),
            stream,  # type: ignore[arg-type]
            opset_version=17,
            dynamo=False,
            training=training,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )
    return onnx.load_from_string(stream.getvalue())


def statistics(net: nn.Module, x: torch.Tensor) -> float:
    """The furthest that means and deviations before a BatchNormalization are from those kept, in kept deviations."""
    furthest = 0.0
    with torch.no_grad():
        for part in net:  # type: ignore[attr-defined]
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                rows, kept = x.movedim(1, 0).flatten(1), part.running_var.sqrt()
                mean = (rows.mean(1) - part.running_mean).abs() / kept
                furthest = max(furthest, float(mean.max()), float((rows.std(1) / kept - 1).abs().max()))
            x = part(x)
    return furthest


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("kind", ["onnx", "program"])
def test_data_have_the_statistics(rank: int, kind: str) -> None:
    net = network(rank)
    model = exported(net, rank) if kind == "onnx" else torch.export.export(net, (data(rank, 8, 0),))
    made = distilled(load_float(model), 0, lambda step: None)
    (x,) = next(made.batches(100)).inputs.values()
    assert made.count == len(x) == 64 and x.shape[1:] == (3, *[8] * rank)
    near, noise = statistics(net, torch.from_numpy(x)), statistics(net, torch.randn(x.shape))
    assert near < 0.1 and noise > 1
    again = distilled(load_float(model), 0, lambda step: None)
    assert again.fingerprint == made.fingerprint != distilled(load_float(model), 1, lambda step: None).fingerprint


@pytest.mark.parametrize("rank", [1, 2])
def test_quantizing_with_them(rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nearer than calibration with noise."""
    net, x = network(rank), data(rank, 64, 1)
    model = exported(net, rank)
    onnx.save(model, str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "real.npz", x=data(rank, 32, 2).numpy())
    np.savez(tmp_path / "noise.npz", x=torch.randn(32, 3, *[8] * rank).numpy())
    with torch.no_grad():
        wanted = net(x).numpy()

    def error(calibration: str | Path) -> float:
        found = post_training(model, calibration, Recipe()).model.SerializeToString()
        session = onnxruntime.InferenceSession(found, providers=["CPUExecutionProvider"])
        return float(((session.run(None, {"x": x.numpy()})[0] - wanted) ** 2).sum() / (wanted**2).sum())

    real, made, noise = error(tmp_path / "real.npz"), error("synthetic"), error(tmp_path / "noise.npz")
    assert made < 0.75 * noise and made < 16 * real
    options = ["--calib", "synthetic", "-o", str(tmp_path / "q.onnx"), "--quiet"]
    assert main(["quantize", str(tmp_path / "net.onnx"), *options]) == 0
    assert "64 images" in capsys.readouterr().out


def test_inputs_that_are_far_from_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels from 0 to 255 that the network itself scales: their mean and deviation are found."""
    monkeypatch.setattr(synthetic, "ITERATIONS", 20)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.net((x - 100) / 60)
            return found

    made = distilled(load_float(exported(Scaled().eval(), 2)), 0, lambda step: None, images=16)
    (x,) = next(made.batches(100)).inputs.values()
    assert 70 < x.mean() < 150 and 45 < x.std() < 150


def test_pixels_that_nothing_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where activations hardly differ, squares less a square leave nothing in float32: such inputs are never chosen."""
    monkeypatch.setattr(synthetic, "ITERATIONS", 20)
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 36, 4))
    with torch.no_grad():
        net(60 * torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 120)
    made = distilled(load_float(exported(net.eval(), 2)), 0, lambda step: None, images=16)
    (x,) = next(made.batches(100)).inputs.values()
    assert np.isfinite(x).all() and 30 < x.std() < 250


def test_a_distance_is_a_number() -> None:
    """Of a channel that is constant, and far away."""
    sums = torch.tensor([[7.3], [7.3 * 7.3 * (1 - 1e-7)]], requires_grad=True)
    apart = synthetic._apart(sums, torch.tensor([1.0]))
    apart.backward()
    assert torch.isfinite(apart) and sums.grad is not None and torch.isfinite(sums.grad).all()


def test_two_normalizations_of_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.first, self.second = network(2), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.net(self.first(x) + self.second(x))
            return found

    batch = synthetic._Batch
    graph = load_float(exported(Two().eval(), 2))
    norms = [(n.inputs[0], *(graph.parameters[p] for p in n.inputs[-2:])) for n in graph.nodes if "BatchN" in n.op]
    span = {"x": synthetic._Span(None)}
    seen = batch(graph, norms, 4, torch.Generator().manual_seed(0), span).measured()  # type: ignore[arg-type]
    assert [name for name, *_ in norms][:2] == ["x", "x"] and torch.equal(seen[0], seen[1]) and len(seen) == 4


def test_pixels_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "ITERATIONS", 10)
    graph = load_float(exported(network(2), 2))
    shades = Preprocess((127.0, 100.0, 80.0), (128.0, 50.0, 64.0))
    made = distilled(graph, 0, lambda step: None, shades, images=16)
    (x,) = next(made.batches(100)).inputs.values()
    low, high = (np.array(v).reshape(3, 1, 1) for v in ((-127 / 128, -2, -1.25), (1, 3.1, 175 / 64)))
    assert (x >= low - 1e-6).all() and (x <= high + 1e-6).all() and x.std() > 0.5
    with pytest.raises(UsageError, match=r"--mean.*2 for 3 channels"):
        distilled(graph, 0, lambda step: None, Preprocess((1.0, 2.0), (1.0,)))
    with pytest.raises(InputError, match="synthetic: is a picture, which this model does not take"):
        distilled(load_float(exported(network(1), 1)), 0, lambda step: None, shades)


@pytest.mark.parametrize("shape", [(4, 64, 50), (2, 1, 64, 64), (2, 3, 32, 32), (2, 32, 32, 3), (3, 7)])
def test_octaves_have_like_power(shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    waves = synthetic._waves(noise)
    assert waves.shape == noise.shape and 0.3 < float(waves.std()) < 3
    if len(shape) < 3:
        assert waves is noise
    if max(shape) < 64:
        return
    axes = tuple(range(1, waves.ndim))
    length = torch.stack(torch.meshgrid(*map(torch.fft.fftfreq, shape[1:]), indexing="ij")).square().sum(0).sqrt()
    power = torch.fft.fftn(waves, dim=axes).abs().square()
    octaves = [float((power * ((length >= least) & (length < 2 * least))).sum()) for least in (0.06, 0.12)]
    assert 1 / 2 < octaves[0] / octaves[1] < 2


def test_batches_of_one_count_together() -> None:
    """A model of one input at a time is not asked for inputs that are all alike."""
    g = FloatNet([1, 3, 8, 8])
    y = g.node("GlobalAveragePool", g.norm(g.conv("x", 4, 3, 3, "a"), 4))
    made = distilled(load_float(g.model(y)), 0, lambda step: None, images=8)
    assert made.count == 8
    means = np.stack([batch.inputs["x"].mean((0, 2, 3)) for batch in made.batches(1)])
    assert means.std(0).min() > 0.1


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folded = exported(network(2), 2, torch.onnx.TrainingMode.EVAL)
    assert not any(n.op_type == "BatchNormalization" for n in folded.graph.node)
    onnx.save(folded, str(tmp_path / "folded.onnx"))
    code = main(["quantize", str(tmp_path / "folded.onnx"), "--calib", "synthetic", "-o", str(tmp_path / "q.onnx")])
    said = capsys.readouterr().err
    assert code == 2 and "keeps no means and deviations" in said and "TrainingMode.PRESERVE" in said
    assert not (tmp_path / "q.onnx").exists()
    g = FloatNet(["n", 3, "h", 8])
    net = g.model(g.norm(g.conv("x", 4, 3, 3, "a"), 4))
    with pytest.raises(InputError, match=r"known sizes.*3x\?x8.*--shape"):
        distilled(load_float(net), 0, lambda step: None)
    shaped = load_float(net, {"x": images(1).shape})
    assert distilled(shaped, 0, lambda step: None, images=2).count == 2
