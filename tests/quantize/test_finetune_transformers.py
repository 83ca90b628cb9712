"""Fine-tuning of transformers: attention, normalizations, masks, embeddings, outputs that are no scores of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import hawq_tvm as ht
from hawq_tvm.core.errors import InputError
from hawq_tvm.quantize import Recipe, Training, finetune
from hawq_tvm.quantize.ptq.quantizer import draft
from hawq_tvm.quantize.qat.deployed import Deployed

from .detectors import exported
from .networks import FloatNet, images
from .test_transformers import Block, Words, masked, words_file


class Pieces(nn.Module):
    """A vector for every piece of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 16, 8, 8), Block()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.block(self.patches(x).flatten(2).transpose(1, 2))
        return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tuned")
    np.savez(place / "in.npz", x=images(12, 32))
    np.savez(place / "few.npz", x=images(4, 32))
    np.savez(place / "strong.npz", x=8 * images(16, 32))
    np.savez(place / "small.npz", x=images(8, 6))
    return place


def test_block_is_taught_by_the_float_network(data: Path) -> None:
    """From one picture at a time and coarse scales: the loss falls, the package equals what was trained."""
    torch.manual_seed(0)
    net, settings = exported(Pieces().eval()), Training(2, rate=0.6, batch=2, held_out=0.34, checked=2, device="cpu")
    recipe, how = Recipe(8, keep_ends=False), {"calibration": data / "strong.npz"}
    found = finetune(net, data / "in.npz", recipe, settings, **how).notes["finetune"]
    rows = found["epochs_run"]
    assert rows[0]["agreement"] is rows[0]["top1"] is None and found["package_equal_on"] == 2
    assert min(r["loss"] for r in rows) < 0.9 * rows[0]["loss"]  # about 0.7
    assert found["kept_epoch"] == min(rows, key=lambda r: r["loss"])["epoch"]


def test_an_interrupted_run_ends_in_the_same_bytes(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, settings = exported(Pieces().eval()), Training(epochs=2, batch=2, checked=0, device="cpu")

    def run(state: str, progress: Any = None) -> bytes:
        how = {"calibration": data / "strong.npz", "state": tmp_path / state, "progress": progress}
        found = finetune(net, data / "few.npz", Recipe("W4A8", keep_ends=False), settings, **how)
        return found.model.SerializeToString()

    def stop(step: Any) -> None:
        if step.phase == "epoch 2 of 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("one.npz", stop)
    assert run("one.npz") == run("two.npz")


def attention() -> onnx.ModelProto:
    """ONNX's operator, half as many keys as queries' heads, each query before what comes later."""
    g = FloatNet([1, 3, 6, 6], seed=5, opset=23)
    q, k, v = (
        g.node(
            "Slice",
            g.conv("x", n, 3, 1, f"c{i}"),
            g.constant([0], np.int64),
            g.constant([n], np.int64),
            g.constant([1], np.int64),
        )
        for i, n in enumerate((4, 2, 2))
    )
    y = g.node("Attention", q, k, v, g.constant(g.rng.random((6, 6)) < 0.7, bool), is_causal=1)
    return g.model(g.node("Mul", g.node("RMSNormalization", y, g.random(6)), g.constant(1.5)))


def joined() -> onnx.ModelProto:
    """An output that joins large boxes and small scores, which keep their scales."""
    g = FloatNet([1, 3, 6, 6], seed=6)
    y = g.node("Relu", g.conv("x", 4, 3, 3, "stem"))
    boxes = g.node("Mul", g.conv(y, 4, 4, 1, "boxes"), g.constant(100.0))
    return g.model(g.node("Concat", boxes, g.node("Sigmoid", g.conv(y, 2, 4, 1, "scores")), axis=1))


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "attention": attention,
    "joined": joined,
    **{f"masked, {kind}": lambda kind=kind: masked(kind) for kind in ("added", "infinite", "where")},  # type: ignore[misc]
}


@pytest.mark.parametrize("net", NETS)
def test_package_computes_what_is_trained(net: str, data: Path) -> None:
    check(NETS[net](), data / "small.npz", Recipe(8, rounding="nearest"), {"x": 2 * images(1, 6, seed=3)})


@pytest.mark.parametrize("bits", [8, 4])
def test_words_under_a_mask(bits: int, tmp_path: Path) -> None:
    """Whole numbers go in: ids, of which embeddings are chosen, and a mask."""
    torch.manual_seed(0)
    net, arrays = words_file(Words().eval())
    np.savez(tmp_path / "in.npz", **arrays)
    recipe = Recipe(bits, rounding="nearest", keep_ends=False)
    check(net, tmp_path / "in.npz", recipe, {k: v[3:4] for k, v in arrays.items()})


def check(net: Any, data: Path, recipe: Recipe, inputs: dict[str, Any]) -> None:
    """After every weight, bias and scale has moved, outputs are equal, and gradients are numbers."""
    trained = Deployed(draft(net, data, recipe))
    with torch.no_grad():
        torch.manual_seed(1)
        for name, value in trained.parameters.items():
            value += (0.1 if name.startswith(("step:", "grid:")) else 0.7) * torch.randn(value.shape)
    (theirs,) = ht.compile(trained.drafted().written().model).run(inputs).values()
    ours = trained(inputs)
    assert np.array_equal(ours.detach().numpy(), theirs) and np.unique(theirs).size > 4
    ours.square().sum().backward()  # type: ignore[no-untyped-call]
    weights = [p.grad for n, p in trained.parameters.items() if n.startswith("weight:")]
    assert all(g is not None and bool(g.isfinite().all()) and bool(g.any()) for g in weights)


def test_answers_that_are_no_classes_have_no_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    np.savez(tmp_path / "in.npz", x=images(4, 32), labels=np.zeros(4, np.int64))
    with pytest.raises(InputError, match=r"holds labels, and the model gives no scores of classes.*16x16 numbers"):
        finetune(exported(Pieces().eval()), tmp_path / "in.npz")
