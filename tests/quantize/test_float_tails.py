"""Networks whose end stays float: what is behind the last weights and has no integers (TopK, ScatterND, NMS)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import ModelError
from hawq_tvm.quantize.network.float_onnx import from_onnx
from hawq_tvm.quantize.network.program_onnx import onnx_of_program
from hawq_tvm.quantize.ptq.quantizer import post_training

from .networks import FloatNet, images


def ints(g: FloatNet, *values: int) -> str:
    return g.constant(list(values), np.int64)


def body(g: FloatNet, channels: int) -> str:
    first = g.node("Relu", g.conv("x", 4, 3, 3, "first", pads=[1] * 4))
    return g.conv(first, channels, 4, 1, "last")


def centres(g: FloatNet) -> list[str]:
    """CenterNet: peaks of the heat map, the best of them, and the offsets there."""
    heat = g.node("Sigmoid", body(g, 2))
    offset = g.conv(g.node("Relu", g.conv("x", 4, 3, 3, "side", pads=[1] * 4)), 2, 4, 1, "offset")
    most = g.node("MaxPool", heat, kernel_shape=[3, 3], pads=[1] * 4)
    peak = g.node("Mul", heat, g.node("Cast", g.node("Equal", heat, most), to=TensorProto.FLOAT))
    best, at = g.several("TopK", 2, g.node("Reshape", peak, ints(g, 1, -1)), ints(g, 5))
    flat = g.node("Reshape", g.node("Transpose", offset, perm=[0, 2, 3, 1]), ints(g, 64, 2))
    return [best, g.node("Gather", flat, g.node("Mod", at, ints(g, 64)), axis=0)]


def poses(g: FloatNet) -> list[str]:
    """The place of every heat map's largest value, by TopK."""
    best, at = g.several("TopK", 2, g.node("Reshape", body(g, 3), ints(g, 1, 3, 64)), ints(g, 1))
    return [best, g.node("Concat", g.node("Div", at, ints(g, 8)), g.node("Mod", at, ints(g, 8)), axis=2)]


def boxes(g: FloatNet) -> list[str]:
    """Scores and boxes of every place, of which NonMaxSuppression chooses."""
    y = g.node("Reshape", body(g, 6), ints(g, 1, 6, 64))
    corners, scores = g.several("Split", 2, y, ints(g, 4, 2), axis=1)
    given = [ints(g, 3), g.constant([0.5]), g.constant([0.0])]
    corners = g.node("Transpose", corners, perm=[0, 2, 1])
    return [g.node("NonMaxSuppression", corners, g.node("Sigmoid", scores), *given)]


def scattered(g: FloatNet) -> list[str]:
    """Numbers written into a table one by one, as PyTorch's exporter has `table[0, k] = ...`: all are of one tensor."""
    heat, table = body(g, 8), g.constant(np.zeros((8, 1)))
    for k in range(8):
        one = g.node("Slice", heat, ints(g, k), ints(g, k + 1), ints(g, 1))
        most = g.node("Reshape", g.node("ReduceMax", one, ints(g, 1, 2, 3), keepdims=1), ints(g, 1, 1))
        table = g.node("ScatterND", table, g.constant([[k]], np.int64), most)
    return [table]


HEADS = {"centres": centres, "poses": poses, "boxes": boxes, "scattered": scattered}
# How many tensors separate the integers from the end.
TENSORS = {"centres": 2, "poses": 1, "boxes": 1, "scattered": 1}


def network(head: Callable[[FloatNet], list[str]]) -> onnx.ModelProto:
    g = FloatNet([1, 3, 8, 8])
    first, *others = head(g)
    model = g.model(first)
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in others)
    return model


@pytest.mark.parametrize("name", HEADS)
def test_the_end_stays_float(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`quantize` tells it, `compile` cuts it off there, and `run` gives what ONNX Runtime makes of the whole file."""
    model, x = network(HEADS[name]), images(4)
    onnx.save(model, tmp_path / "f.onnx")
    np.savez(tmp_path / "in.npz", x=x)
    files = [str(tmp_path / "f.onnx"), "--calib", str(tmp_path / "in.npz"), "-o", str(tmp_path / "q.onnx")]
    assert main(["quantize", *files, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["float_tail"]
    assert len(told["tensors"]) == TENSORS[name] and told["outputs"] == [o.name for o in model.graph.output], told
    assert main(["quantize", *files]) == 0
    assert "stays float: compile with --allow-float-tail" in capsys.readouterr().out
    for verb in (["inspect"], ["compile", "-o", str(tmp_path / "no.hawq")]):
        assert main([verb[0], str(tmp_path / "q.onnx"), *verb[1:]]) == 3
        assert name == "centres" or "--allow-float-tail" in "".join(capsys.readouterr())  # that has Equal before
    assert main(["inspect", str(tmp_path / "q.onnx"), "--allow-float-tail"]) == 0
    package = ht.compile(str(tmp_path / "q.onnx"), allow_float_tail=True)
    assert package.manifest["cut"]["tensors"] == told["tensors"]
    package.verify(random=2, seed=0).raise_if_mismatch()
    assert package.prove().ok
    given = {"x": x[:1]}
    found, wanted = package.run(given), onnxruntime.InferenceSession(tmp_path / "q.onnx").run(None, given)
    for (key, value), other in zip(found.items(), wanted, strict=True):
        assert value.shape == other.shape and key in told["outputs"]
        np.testing.assert_allclose(value, other, atol=0.05)  # ONNX Runtime rounds the layers before in float


def best(g: FloatNet) -> list[str]:
    """Scores of which all but the three best are 0: a classifier whose end is TopK."""
    scores = g.node("ReduceMean", body(g, 6), ints(g, 2, 3), keepdims=0)
    top, at = g.several("TopK", 2, scores, ints(g, 3))
    return [g.node("ScatterElements", g.constant(np.zeros((1, 6))), at, top, axis=1)]


def test_a_classifier_with_a_float_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate` counts the same of the file and of its package, and neither is one where its end gives no scores."""

    def evaluated(name: str, code: int = 0) -> dict[str, Any]:
        assert main(["evaluate", str(tmp_path / name), "--data", str(tmp_path / "d.npz"), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    x = images(16)
    onnx.save(network(best), tmp_path / "f.onnx")
    wanted = onnxruntime.InferenceSession(tmp_path / "f.onnx")
    classes = np.concatenate([wanted.run(None, {"x": x[i : i + 1]})[0].argmax(1) for i in range(16)])
    np.savez(tmp_path / "d.npz", x=x, labels=classes)
    calib = ["--calib", str(tmp_path / "d.npz"), "-o", str(tmp_path / "q.onnx")]
    assert main(["quantize", str(tmp_path / "f.onnx"), *calib, "--quiet"]) == 0
    package = ht.compile(str(tmp_path / "q.onnx"), allow_float_tail=True)
    package.save(tmp_path / "q.hawq")
    package.verify(random=1, seed=0).raise_if_mismatch()
    capsys.readouterr()
    float_file, file, ours = (evaluated(name) for name in ("f.onnx", "q.onnx", "q.hawq"))
    assert float_file["top1"] == 1.0 and ours["top1"] >= 0.9
    assert {**file, "model": ""} == {**ours, "model": ""}

    onnx.save(network(poses), tmp_path / "f.onnx")
    assert main(["quantize", str(tmp_path / "f.onnx"), *calib, "--quiet"]) == 0
    ht.compile(str(tmp_path / "q.onnx"), allow_float_tail=True).save(tmp_path / "q.hawq")
    capsys.readouterr()
    told = [evaluated(name, 3) for name in ("f.onnx", "q.onnx", "q.hawq")]
    assert all(
        one["message"] == "is no classifier's output" and "onnx.utils.extract_model" in one["remedy"] for one in told
    )
    assert len({one["found"] for one in told}) == 1, told


class Best(torch.nn.Module):
    """Two layers and what `end` makes of their result."""

    def __init__(self, end: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.last, self.end = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 6, 1), end

    def forward(self, x: torch.Tensor) -> Any:
        return self.end(self.last(torch.relu(self.first(x))))


def exported(end: Callable[[torch.Tensor], Any]) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    return torch.export.export(Best(end).eval(), (torch.from_numpy(images(1)),))


def test_the_end_of_a_program_stays_float(tmp_path: Path) -> None:
    """A .pt2 file is quantized as the ONNX file of the same network is."""
    program, x = exported(lambda y: tuple(torch.topk(y.flatten(2).sigmoid(), 5, dim=2))), images(4)
    torch.export.save(program, tmp_path / "f.pt2")
    np.savez(tmp_path / "in.npz", x=x)
    found = post_training(tmp_path / "f.pt2", tmp_path / "in.npz")
    assert len(found.notes["float_tail"]["tensors"]) == 1 and [row["layer"] for row in found.layers] == [
        "first",
        "last",
    ]
    package = ht.compile(found.model, allow_float_tail=True)
    package.verify(random=1, seed=0).raise_if_mismatch()
    best, at = package.run({"x": x[:1]}).values()
    wanted, places = program.module()(torch.from_numpy(x[:1]))
    np.testing.assert_allclose(best, wanted.detach(), atol=0.02)
    assert at.shape == places.shape and at.dtype == np.int64


def test_writes_that_an_export_loses_are_refused() -> None:
    """PyTorch's exporter makes a table of zeros of this, without a word."""

    def table(y: torch.Tensor) -> torch.Tensor:
        made = torch.zeros(6, 1)
        for k in range(6):
            made[k, 0] = y[0, k].max()
        return made

    with pytest.raises(
        ModelError, match=r"copy_: writes into part of a tensor, which PyTorch's exporter to ONNX loses"
    ):
        onnx_of_program(exported(table))
    onnx_of_program(exported(lambda y: y.flatten(1).relu_()))  # nothing reads what it was
    onnx_of_program(exported(lambda y: y.add_(5.0).flatten(1) * 2))

    def seen_by_another(whole: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        def tail(y: torch.Tensor) -> torch.Tensor:
            other = y.view(1, -1)
            (y if whole else y[:, 0]).add_(5.0)
            return other * 2

        return tail

    for whole in (True, False):
        with pytest.raises(ModelError, match=r"add_: writes into part of a tensor"):
            onnx_of_program(exported(seen_by_another(whole)))


def test_what_takes_no_end_names_the_fewest_tensors(tmp_path: Path) -> None:
    """Whoever wants a float graph alone is told where to end it; weights behind the end are refused by all."""
    with pytest.raises(ModelError, match=r"ScatterND is not supported.*with the outputs conv_2 \(onnx.utils"):
        from_onnx(network(scattered))

    def many(g: FloatNet) -> list[str]:
        y = body(g, 8)
        parts = [g.conv(y, 1, 8, 1, f"part{k}") for k in range(7)]
        return [o for p in parts for o in g.several("TopK", 2, g.node("Flatten", p), ints(g, 1))]

    with pytest.raises(
        ModelError, match=r"flatten_10, flatten_12, flatten_14, flatten_16, flatten_18, \.\.\. \(7 in all\)"
    ):
        from_onnx(network(many))
