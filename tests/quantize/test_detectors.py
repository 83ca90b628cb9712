"""Detectors, segmenters and mobile classifiers, quantized: integers alone, and answers like the float network's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import hawq_tvm as ht
from hawq_tvm.core.errors import InputError
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe

from .detectors import Mobile, Ssd, UNet, Yolo, exported, settled
from .networks import FloatNet, images

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("detectors") / "in.npz"
    np.savez(place, x=images(16, 32))
    return place


def answers(net: nn.Module, package: ht.Package, x: Array) -> list[tuple[Array, Array]]:
    """Real and integer outputs, one after the other."""
    with torch.no_grad():
        real = net(torch.from_numpy(x))
    real = [v.numpy() for v in (real if isinstance(real, tuple) else (real,))]
    ran = [package.run({package.inputs[0].name: one[None]}) for one in x]
    return [(v, np.concatenate([r[o.name] for r in ran])) for v, o in zip(real, package.outputs, strict=True)]


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


@pytest.mark.parametrize(
    ("kind", "bits", "least"),
    [(UNet, 8, 0.999), (Ssd, 8, 0.999), (Mobile, 8, 0.999), (Mobile, "W4A8", 0.98)],
    ids=["unet", "ssd", "mobile", "mobile4"],
)
def test_networks(kind: type[nn.Module], bits: int | str, least: float, data: Path) -> None:
    torch.manual_seed(1)
    net = settled(kind())
    package = ht.compile(post_training(exported(net), data, Recipe(bits, effort=20)).model)
    package.verify(random=1, seed=0).raise_if_mismatch()
    for real, integer in answers(net, package, images(4, 32, seed=2)):
        assert cosine(real, integer) > least


def test_boxes_and_scores_share_no_scale(data: Path) -> None:
    """They are one output, each part of it on the grid that it had before."""
    torch.manual_seed(1)
    net = settled(Yolo())
    found = post_training(exported(net), data)
    assert len(found.notes["joined"]) == 1
    package = ht.compile(found.model)
    package.verify(random=1, seed=0).raise_if_mismatch()
    ((real, integer),) = answers(net, package, images(4, 32, seed=2))
    for part in (slice(0, 4), slice(4, None)):
        assert cosine(real[:, part], integer[:, part]) > 0.999
    # A step of the scores is no step of the boxes.
    assert np.abs(real[:, 4:] - integer[:, 4:]).max() < 0.02 < 0.1 * np.abs(real[:, :4]).max()


def test_programs_as_well(data: Path) -> None:
    torch.manual_seed(1)
    program = torch.export.export(settled(UNet()), (torch.zeros(1, 3, 32, 32),))
    found = post_training(program, data)
    assert [row["layer"] for row in found.layers][-4:] == ["up", "join.0", "wide.0", "last"]
    assert ht.inspect(found.model).compilable


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    """Calibration data name their inputs; every output is as it was declared."""
    g = FloatNet([1, 3, 8, 8])
    g.inputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4, 4, 4]))
    y = g.node("Relu", g.conv("x", 4, 3, 3, "first", pads=[1] * 4, strides=[2, 2]))
    both = g.node("Concat", y, g.node("Sigmoid", "z"), axis=1)
    net = g.model(g.conv(both, 5, 8, 1, "last"))
    net.graph.output.append(helper.make_tensor_value_info(both, TensorProto.FLOAT, [1, 8, 4, 4]))
    rng = np.random.default_rng(0)
    arrays = {"x": images(16, 8), "z": 9 * rng.standard_normal((16, 4, 4, 4)).astype(np.float32)}
    np.savez(tmp_path / "in.npz", **arrays)
    package = ht.compile(post_training(net, tmp_path / "in.npz").model)
    package.verify(random=1, seed=0).raise_if_mismatch()
    one = {name: v[:1] for name, v in arrays.items()}
    real = onnxruntime.InferenceSession(net.SerializeToString()).run([o.name for o in package.outputs], one)
    integer = package.run(one)
    assert len(package.inputs) == len(package.outputs) == 2
    assert all(cosine(v, integer[o.name]) > 0.999 for v, o in zip(real, package.outputs, strict=True))
    np.savez(tmp_path / "in.npz", x=arrays["x"])
    with pytest.raises(InputError, match="arrays of other names; expected x, z"):
        post_training(net, tmp_path / "in.npz")
