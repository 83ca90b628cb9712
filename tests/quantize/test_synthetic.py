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
from hawq_tvm.core.errors import InputError
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.ptq.quantizer import Recipe, post_training
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
    assert made.count == len(x) == 32 and x.shape[1:] == (3, *[8] * rank)
    near, noise = statistics(net, torch.from_numpy(x)), statistics(net, torch.randn(x.shape))
    assert near < 0.25 and noise > 1
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

    real, synthetic, noise = error(tmp_path / "real.npz"), error("synthetic"), error(tmp_path / "noise.npz")
    assert real < synthetic < 0.75 * noise
    options = ["--calib", "synthetic", "-o", str(tmp_path / "q.onnx"), "--quiet"]
    assert main(["quantize", str(tmp_path / "net.onnx"), *options]) == 0
    assert "32 images" in capsys.readouterr().out


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
    assert distilled(shaped, 0, lambda step: None, 2).count == 2
