"""Fine-tuning in the deployed arithmetic: what is trained equals what the package computes, gradients are those of
the real formula, training helps.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core import arith
from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.core.layer_norm import Norm, normalized
from hawq_tvm.core.operators import OPERATORS
from hawq_tvm.quantize import Recipe, Training, finetune
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.ptq.quantizer import draft
from hawq_tvm.quantize.qat import rows, training
from hawq_tvm.quantize.qat.deployed import Deployed
from hawq_tvm.quantize.qat.integers import OPERATORS as TRAINED
from hawq_tvm.quantize.qat.integers import exactly, shifted
from hawq_tvm.quantize.qat.straight import nearest, on_grid

from .networks import FloatNet, TorchNet, images, one_number, residual_net

NAMES = ["stem", "a1", "a2", "short", "b1", "b2", "fc"]
BATCH = 6


def chain() -> onnx.ModelProto:
    """Convolutions with ReLU, one without a bias, a linear one, and a quantized output that is no layer's sum."""
    g = FloatNet(["n", 3, 8, 8], seed=1)
    y = g.node("Relu", g.conv("x", 5, 3, 3, "first", pads=[1] * 4))
    y = g.node("Relu", g.node("Conv", y, g.random(7, 5, 3, 3, scale=0.2), name="bare"))
    y = g.conv(y, 4, 7, 1, "linear")
    return g.model(
        g.node("Flatten", g.node("GlobalMaxPool", g.conv(y, 6, 4, 2, "last", strides=[2, 2], dilations=[2, 2])))
    )


def mobile() -> onnx.ModelProto:
    """ReLU6, depthwise, concat, max and average pools with padding, a matrix product whose bias is an addition."""
    g = FloatNet(["n", 3, 8, 8], seed=4)

    def act(y: str) -> str:
        return g.node("Clip", y, g.constant(0.0), g.constant(6.0))

    y = act(g.norm(g.conv("x", 8, 3, 3, "stem", pads=[1] * 4, strides=[2, 2]), 8))
    z = act(g.norm(g.conv(y, 8, 8, 3, "depth", pads=[1] * 4, group=8), 8))
    y = g.node("Relu", g.node("Concat", g.norm(g.conv(z, 8, 8, 1, "project"), 8), y, axis=1))
    y = g.node("MaxPool", y, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    y = g.node("AveragePool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = g.node("Reshape", y, g.constant([0, -1], np.int64))
    return g.model(g.node("Add", g.node("MatMul", y, g.random(64, 6, scale=0.3), name="fc"), g.random(6, scale=0.1)))


def averages() -> onnx.ModelProto:
    """A pool that counts its padding, a mean over axes, a Gemm; the shapes are computed from the batch."""
    g = FloatNet(["n", 3, 8, 8], seed=5, opset=17)
    y = g.node("Relu", g.conv("x", 6, 3, 3, "stem"))
    y = g.node("AveragePool", y, kernel_shape=[2, 3], pads=[1, 0, 1, 2], count_include_pad=1)
    y = g.node("ReduceMean", g.node("Relu", g.conv(y, 10, 6, 3, "deep")), axes=[2, 3], keepdims=1)
    shape = g.node(
        "Concat",
        g.node("Unsqueeze", g.node("Gather", g.node("Shape", y), g.constant(0, np.int64)), g.constant([0], np.int64)),
        g.constant([-1], np.int64),
        axis=0,
    )
    return g.model(g.node("Gemm", g.node("Reshape", y, shape), g.random(5, 10), g.random(5), transB=1, name="fc"))


def moves() -> onnx.ModelProto:
    """Padding, a transpose, products of tensors of four dimensions, a sum of a tensor with itself and with a
    constant.
    """
    g = FloatNet(["n", 3, 8, 8], seed=7)
    y = g.node("Relu", g.conv("x", 4, 3, 3, "first"))
    y = g.node("Add", g.node("Add", y, y), g.random(4, 1, 1))
    y = g.node("Transpose", g.node("Pad", y, g.constant([0, 0, 1, 1, 0, 0, 2, 0], np.int64)), perm=[0, 2, 3, 1])
    y = g.node("Relu", g.node("Add", g.node("MatMul", y, g.random(4, 5), name="inner"), g.random(5)))
    return g.model(
        g.node(
            "MatMul", g.node("ReduceMean", y, g.constant([1, 2], np.int64), keepdims=0), g.random(5, 3), name="outer"
        )
    )


def gated() -> onnx.ModelProto:
    """Hard-swish and a squeeze-and-excitation with a hard sigmoid; the function of one convolution is clipped, that of
    another is read twice; a factor for every channel.
    """
    g = FloatNet(["n", 3, 8, 8], seed=8)
    y = g.node("HardSwish", g.conv("x", 6, 3, 3, "stem", pads=[1] * 4))
    z = g.conv(g.node("GlobalAveragePool", g.conv(y, 6, 6, 3, "depth", group=6)), 3, 6, 1, "reduce")
    z = g.node("HardSigmoid", g.conv(g.node("Relu", z), 6, 3, 1, "expand"), alpha=1 / 6)
    y = g.node("Mul", z, y)
    t = g.node("Tanh", g.conv(y, 6, 6, 1, "bent"))
    y = g.node("Add", g.node("Clip", t, g.constant(-0.4), g.constant(0.3)), g.node("Mul", y, t))
    y = g.node("Sub", g.node("Div", y, g.random(6, 1, 1)), t)
    return g.model(g.node("Flatten", g.conv(y, 5, 6, 8, "last")))


def yolo() -> onnx.ModelProto:
    """SiLU, leaky ReLU, a split, a nearest resize, pools that are joined, hard-swish written out, a sigmoid of an
    average.
    """
    g = FloatNet(["n", 3, 8, 8], seed=9)

    def act(y: str) -> str:
        return g.node("Mul", y, g.node("Sigmoid", y))

    a, b = g.several("Split", 2, act(g.conv("x", 8, 3, 3, "stem", pads=[1] * 4)), axis=1, num_outputs=2)
    b = g.node("LeakyRelu", g.conv(b, 4, 4, 3, "side", pads=[1] * 4, strides=[2, 2]), alpha=0.1)
    b = g.node("Resize", b, "", g.constant([1, 1, 2, 2]), mode="nearest")
    y = g.node("Concat", a, b, g.node("MaxPool", a, kernel_shape=[3, 3], pads=[1] * 4), axis=1)
    y = g.conv(y, 6, 12, 1, "mix")
    gate = g.node(
        "Div", g.node("Clip", g.node("Add", y, g.constant(3.0)), g.constant(0.0), g.constant(6.0)), g.constant(6.0)
    )
    y = g.node("Mul", g.node("Mul", y, gate), g.constant(1.5))
    y = g.node("Mul", y, g.node("Sigmoid", g.node("GlobalAveragePool", y)))
    return g.model(g.node("Flatten", g.conv(y, 5, 6, 8, "last")))


def wide() -> onnx.ModelProto:
    """Functions of 16 bits, a sum of three."""
    g = FloatNet(["n", 3, 8, 8], seed=11)
    y = g.conv("x", 6, 3, 3, "stem")
    z = g.conv(g.node("Mul", y, g.random(6, 1, 1)), 6, 6, 1, "wide")
    y = g.node("Mul", z, g.node("Sigmoid", y))
    y = g.node("Sum", y, z, g.node("Exp", g.node("Clip", z, g.constant(-1.0), g.constant(1.0))))
    return g.model(g.node("Flatten", g.conv(y, 5, 6, 6, "last")))


def factors() -> onnx.ModelProto:
    """Sums and products that are scaled, by channels and before and after clips; one channel is shut."""
    g = FloatNet(["n", 3, 8, 8], seed=12)

    def clip(y: str, low: float, high: float) -> str:
        return g.node("Clip", y, g.constant(low), g.constant(high))

    y = clip(g.node("Mul", g.conv("x", 6, 3, 3, "stem"), g.constant(0.3)), -0.2, 0.5)
    y = g.node("Mul", y, g.random(6, 1, 1))
    z = g.node("Neg", g.node("Softplus", g.node("Sub", g.constant(0.25), g.conv(y, 6, 6, 3, "deep"))))
    z = g.node("Mul", clip(g.node("Mul", z, g.conv(z, 6, 6, 1, "gate")), -0.3, 0.3), g.constant(2.0))
    shut = g.constant(np.array([0, 1, 2, -1, 0.5, 3]).reshape(6, 1, 1))
    z = g.node("Mul", g.node("Mul", z, g.conv(y, 6, 6, 3, "other")), shut)
    return g.model(g.node("Flatten", g.conv(z, 5, 6, 4, "last")))


NETS = {
    "wide": wide,
    "factors": factors,
    "moves": moves,
    "chain": chain,
    "residual": residual_net,
    "mobile": mobile,
    "averages": averages,
    "gated": gated,
    "yolo": yolo,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    onnx.save(residual_net(), str(folder / "net.onnx"))
    x = images(160)
    # What the float network says, with a few answers wrong: labels that can be learned.
    scores = np.concatenate(
        [
            load_float(folder / "net.onnx").run({"x": one})[load_float(folder / "net.onnx").outputs[0]].numpy()
            for one in (x[:80], x[80:])
        ]
    )
    labels = scores.argmax(1)
    np.savez(folder / "in.npz", x=x[:16])
    np.savez(folder / "train.npz", x=x, labels=labels)
    np.savez(folder / "bare.npz", x=x)
    mixed = {
        n: {"weight": w, "activation": a}
        for n, (w, a) in zip(NAMES, [(8, 8), (4, 4), (8, 8), (4, 4), (4, 8), (4, 4), (8, 8)], strict=True)
    }
    (folder / "mixed.json").write_text(json.dumps({"layers": mixed}))
    return folder


# -- exactness
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "bits", "keep"),
    [
        ("chain", "W4A4", False),
        ("chain", 8, True),
        ("residual", 8, True),
        ("residual", "W4A4", False),
        ("residual", "mixed", True),
        ("moves", 4, False),
        ("mobile", "W4A8", True),
        ("mobile", 4, False),
        ("averages", 8, True),
        ("averages", 4, False),
        ("gated", 8, True),
        ("gated", "W4A8", True),
        ("gated", 4, False),
        ("yolo", 8, True),
        ("yolo", 4, False),
        ("wide", 8, True),
        ("factors", 4, True),
    ],
)
def test_package_computes_what_is_trained(place: Path, net: str, bits: Any, keep: bool) -> None:
    """At the start, and after every weight, bias and scale has moved: outputs are equal, element by element."""
    recipe = Recipe(place / "mixed.json" if bits == "mixed" else bits, keep_ends=keep, rounding="nearest")
    trained = Deployed(draft(NETS[net](), place / "in.npz", recipe))
    with torch.no_grad():
        torch.manual_seed(1)
        for name, value in trained.parameters.items():
            value += (0.1 if name.startswith(("step:", "grid:")) else 0.7) * torch.randn(value.shape)
    x = np.concatenate([images(BATCH - 2, seed=3), 4 * images(1, seed=4), np.zeros((1, 3, 8, 8), np.float32)])
    package = ht.compile(trained.drafted().written().model, shapes={"x": x.shape})
    (theirs,) = package.run({"x": x}).values()
    ours = trained({"x": x}).detach().numpy()
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    assert np.unique(ours).size > 5  # and it is not all zero


def test_start_is_post_training_quantization(place: Path) -> None:
    started = draft(residual_net(), place / "in.npz", Recipe(4, effort=20))
    written = Deployed(started).drafted()
    for name, ours in written.rounded.items():
        assert torch.equal(ours.codes, started.rounded[name].codes) and torch.equal(
            ours.scale, started.rounded[name].scale
        )
    assert written.grids == started.grids and written.narrow == started.narrow


@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor"])
def test_shifts_are_those_of_arith(rounding: str) -> None:
    rng = np.random.default_rng(0)
    shift = np.arange(0, 62, dtype=np.int64)
    offset = rng.integers(-(2**59), 2**59, shift.size)
    x = np.concatenate([[-(2**31), -1, 0, 1, 2**31 - 1], rng.integers(-(2**24), 2**24, 500)])[:, None]
    # Ties of either parity: multipliers that are powers of two.
    powers = np.int64(1) << np.minimum(np.maximum(shift - 1, 0), 30)
    for v in (x * rng.integers(-(2**31) + 1, 2**31, shift.size) + offset, x * powers):
        ours = shifted(torch.from_numpy(v), torch.from_numpy(shift), rounding).numpy()
        assert np.array_equal(ours, arith.shift_round(v, shift, rounding))


def test_products_are_exact_whatever_their_size() -> None:
    rng = np.random.default_rng(1)
    for bits in ((8, 8), (16, 12), (24, 24), (31, 20), (12, 31)):
        a, b = (torch.from_numpy(rng.integers(-(2**n) + 1, 2**n, (7, 7))) for n in bits)
        assert torch.equal(exactly(torch.matmul, a, b, (-2,)), a @ b), bits


def test_rows_are_those_of_the_arithmetic() -> None:
    """Softmax of sums from 2^30 on, and normalizations whose variance takes 1 to 62 bits."""
    rng = np.random.default_rng(2)
    table = arith.softmax_table(Fraction(1, 20), 256)
    for n in (1, 2, 9, 300):
        x = rng.integers(0, 256, (20, n))
        (m, k), how = arith.softmax_dyadic(Fraction(256), n), {"zero_point": 3, "qmin": 0, "qmax": 255}
        attrs = {"axis": 1, "multiplier": m, "shift": k, "rounding": "half_even", **how}
        ours = rows.softmax(
            attrs, rows.exponents_of_table(attrs, torch.from_numpy(x), torch.from_numpy(table)), shifted
        )
        assert np.array_equal(ours.numpy(), arith.softmax(x, table, 1, m, k, **how))
    for n, reach in ((2, 1), (7, 128), (64, 2**15), (1024, 2**20)):
        for epsilon in (Fraction(0), Fraction(1, 10**5), Fraction(10**3)):
            norm = Norm.of(n, (-reach, reach), Fraction(1, 50), epsilon, None)
            x = rng.integers(-reach, reach + 1, (20, n)) // np.int64(2) ** rng.integers(0, 20, (20, 1))
            ours = rows.layer_norm({"axes": [1], **norm.to_dict()}, torch.from_numpy(x))
            assert np.array_equal(ours.numpy(), normalized(x, [1], norm)), (n, epsilon)


# -- gradients
# ------------------------------------------------------------------------------------------------------------


def test_gradient_of_a_scale_is_that_of_learned_step_sizes() -> None:
    """Esser et al., equation 3: rounding minus value inside the range, the end of the range outside."""
    value = torch.tensor([-9.0, -0.6, 0.09, 1.2, 15.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    on_grid(value, step, nearest(value, step, (-8, 7)), (-8, 7)).sum().backward()
    ratio = value.detach() / 0.5
    wanted = torch.where(ratio <= -8, -8.0, torch.where(ratio >= 7, 7.0, ratio.round() - ratio)).sum()
    assert torch.isclose(step.grad, wanted, rtol=1e-5)  # sums of float32
    assert torch.equal(value.grad, ((ratio > -8) & (ratio < 7)).float())


def test_gradients_of_eight_bits_are_nearly_those_of_the_float_network(place: Path) -> None:
    started = draft(residual_net(), place / "in.npz", Recipe(8))
    trained, x = Deployed(started), torch.from_numpy(images(32, seed=2))
    goal = torch.arange(32) % 5
    torch.nn.functional.cross_entropy(trained({"x": x}), goal).backward()
    real = {n: p.clone().requires_grad_() for n, p in started.graph.parameters.items() if p.is_floating_point()}
    torch.nn.functional.cross_entropy(
        started.graph.run({"x": x}, parameters=real)[started.graph.outputs[0]], goal
    ).backward()
    for layer in started.graph.layers:
        ours, scale = trained.parameters[f"weight:{layer.name}"].grad, started.rounded[layer.name].scale
        ours = ours / scale.reshape([-1, *[1] * (ours.ndim - 1)])
        # Rounding of 8 bits turns a few ReLUs and pools the other way.
        assert torch.nn.functional.cosine_similarity(ours.flatten(), real[layer.weight].grad.flatten(), 0) > 0.97, (
            layer.name
        )


# -- training
# -------------------------------------------------------------------------------------------------------------

SETTINGS = Training(epochs=3, batch=16, held_out=0.2, checked=4, device="cpu")


def test_training_helps_and_repeats_itself(place: Path, tmp_path: Path) -> None:
    recipe = Recipe("W4A4", keep_ends=False)
    found = finetune(
        residual_net(),
        place / "train.npz",
        recipe,
        SETTINGS,
        calibration=place / "in.npz",
        state=tmp_path / "state.npz",
    )
    notes = found.notes["finetune"]
    rows = notes["epochs_run"]
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3] and notes["package_equal_on"] == 4
    assert (notes["images"], notes["validation_images"]) == (128, 32)
    assert rows[-1]["train_loss"] < rows[1]["train_loss"] and rows[-1]["loss"] < rows[0]["loss"]
    assert notes["kept_epoch"] == max(rows, key=lambda r: (r["top1"], -r["loss"]))["epoch"]
    # From the state of a finished run nothing is trained again, and the result is the same; so it is from the
    # beginning.
    again = finetune(
        residual_net(),
        place / "train.npz",
        recipe,
        SETTINGS,
        calibration=place / "in.npz",
        state=tmp_path / "state.npz",
    )
    assert again.model.SerializeToString() == found.model.SerializeToString() and again.notes == found.notes
    anew = finetune(
        residual_net(),
        place / "train.npz",
        recipe,
        Training(**{**SETTINGS.__dict__, "checked": 0}),
        calibration=place / "in.npz",
    )
    assert anew.model.SerializeToString() == found.model.SerializeToString()
    with pytest.raises(UsageError, match="other settings"):
        finetune(
            residual_net(),
            place / "train.npz",
            Recipe(8),
            SETTINGS,
            calibration=place / "in.npz",
            state=tmp_path / "state.npz",
        )


def test_interrupted_run_continues(place: Path, tmp_path: Path) -> None:
    settings = Training(epochs=2, batch=32, checked=0, device="cpu")

    def run(stop: bool, state: Path) -> bytes:
        def tell(step: Any) -> None:
            if stop and step.phase == "epoch 2 of 2":
                raise KeyboardInterrupt

        return finetune(
            residual_net(),
            place / "bare.npz",
            Recipe("W4A8"),
            settings,
            calibration=place / "in.npz",
            state=state,
            progress=tell,
        ).model.SerializeToString()

    with pytest.raises(KeyboardInterrupt):
        run(True, tmp_path / "one.npz")
    assert run(False, tmp_path / "one.npz") == run(False, tmp_path / "two.npz")


def test_a_state_is_of_one_validation_set(place: Path, tmp_path: Path) -> None:
    """As many other images choose another epoch."""
    for seed in (1, 2):
        np.savez(tmp_path / f"{seed}.npz", x=images(8, seed=seed))

    def run(seed: int) -> Any:
        how = {"validation": tmp_path / f"{seed}.npz", "state": tmp_path / "state.npz"}
        return finetune(one_number(False), place / "in.npz", Recipe(8), Training(1, checked=0, device="cpu"), **how)

    assert run(1).notes["finetune"]["validation_images"] == 8
    with pytest.raises(UsageError, match="another model, other data or other settings"):
        run(2)


@pytest.mark.parametrize("flat", [False, True])
def test_one_number_is_no_class(flat: bool, tmp_path: Path) -> None:
    """It is learned by its squared error, from coarse scales: of one class every answer would be right."""
    np.savez(tmp_path / "in.npz", x=images(20))
    np.savez(tmp_path / "strong.npz", x=30 * images(8))
    np.savez(tmp_path / "labels.npz", x=images(20), labels=np.zeros(20, np.int64))
    settings = Training(epochs=3, rate=0.3, batch=4, held_out=0.2, checked=4, device="cpu")

    def run(data: str) -> Any:
        return finetune(
            one_number(flat), tmp_path / data, Recipe(8), settings, calibration=tmp_path / "strong.npz"
        ).notes["finetune"]

    found = run("in.npz")
    rows = found["epochs_run"]
    assert all(r["agreement"] is r["top1"] is None and r["loss"] > 0 for r in rows) and found["package_equal_on"] == 4
    assert found["kept_epoch"] == min(rows, key=lambda r: r["loss"])["epoch"]
    assert rows[3]["train_loss"] < 0.6 * rows[1]["train_loss"]  # about a fifth
    with pytest.raises(InputError, match=r"holds labels.*answers of one number.*leave the labels out"):
        run("labels.npz")


@pytest.mark.parametrize("broken", ["gradient", "validation"])
def test_training_that_diverges_ends_in_a_sentence(
    broken: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second epoch, at its first step or where it is scored: nothing of it is written."""
    state, real = tmp_path / "state.npz", training._Run._loss
    settings, written = Training(epochs=2, checked=0, device="cpu"), list[bytes]()

    def loss(self: Any, scores: torch.Tensor, batch: Any) -> torch.Tensor:
        right = real(self, scores, batch)
        if len(self.history) < 2 or torch.is_grad_enabled() == (broken == "validation"):
            return right
        written.append(state.read_bytes())
        # The square root of 0 is a number, its slope is none.
        return right + (0 * right).sqrt() if broken == "gradient" else right * torch.nan

    monkeypatch.setattr(training._Run, "_loss", loss)
    where = {"gradient": "epoch 2, step 1", "validation": "after epoch 2"}[broken]
    with pytest.raises(UsageError, match=rf"{where}: training diverged.*lower rate than 0\.02 \(--rate\)"):
        finetune(residual_net(), place / "in.npz", Recipe(8), settings, state=state)
    assert written == [state.read_bytes()]


def test_float_answers_that_are_no_numbers(place: Path, tmp_path: Path) -> None:
    """On images that calibration did not see."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("Relu", g.node("Conv", "x", g.random(4, 3, 3, 3), name="bare"))
    net = g.model(g.node("Log", g.node("Flatten", g.node("GlobalMaxPool", y))))
    np.savez(tmp_path / "zero.npz", x=0 * images(2))
    with pytest.raises(InputError, match=r"zero\.npz, images 0 to 1: .*infinite or NaN.*leave such images out"):
        finetune(net, tmp_path / "zero.npz", Recipe(8), SETTINGS, calibration=place / "bare.npz")


def test_factors_of_smoothing_are_trained_with(place: Path) -> None:
    """Smoothing puts one behind a function, for channels that differ."""
    g = FloatNet(["n", 3, 8, 8], seed=2)
    y = g.node("MatMul", g.node("Flatten", g.conv("x", 4, 3, 5, "stem", strides=[3, 3])), g.random(16, 8), name="in")
    y = g.node("Mul", y, g.constant(np.array([0.1, 0.1, 0.2, 0.1, 30, 0.1, 0.2, 0.1])))
    y = g.node("Mul", y, g.node("Sigmoid", y))
    net = g.model(g.node("MatMul", y, g.random(8, 5), name="out"))
    found = finetune(net, place / "bare.npz", Recipe(), Training(epochs=1, checked=4, device="cpu"))
    assert found.notes["smoothed"] and found.notes["finetune"]["package_equal_on"] == 4


def test_programs_of_torch(place: Path) -> None:
    program = torch.export.export(TorchNet().eval(), (torch.zeros(4, 3, 8, 8),))
    found = finetune(
        program,
        place / "bare.npz",
        Recipe("W4A8"),
        Training(epochs=1, checked=4, device="cpu"),
        calibration=place / "in.npz",
    )
    assert found.notes["finetune"]["package_equal_on"] == 4 and not found.notes["finetune"]["labels"]


def test_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "finetune",
        str(place / "net.onnx"),
        "--data",
        str(place / "train.npz"),
        "--calib",
        str(place / "in.npz"),
        "--bits",
        "W4A4",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*line, "-o", str(tmp_path / "q.onnx"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["finetune"]["package_equal_on"] == 16 and (tmp_path / "q.onnx").stat().st_size == told["bytes"]
    assert main([*line, "-o", str(tmp_path / "p.onnx"), "--checked", "0"]) == 0
    assert "epoch 0 is the network before training" in capsys.readouterr().out
    assert main([*line, "-o", str(tmp_path / "r.onnx"), "--validation", str(place / "train.npz")]) == 2
    assert "images to train on" in capsys.readouterr().err and not (tmp_path / "r.onnx").exists()


# -- refusals
# -------------------------------------------------------------------------------------------------------------


def test_operators_without_derivatives(place: Path) -> None:
    """Refused before data are read."""
    g = FloatNet(["n", 3, 8, 8])
    y = g.node("ArgMax", g.node("Flatten", g.conv("x", 4, 3, 3, "first")), axis=1, name="answer")
    with pytest.raises(ModelError, match=r"answer: ArgMax has no derivative.*quantize after training"):
        finetune(g.model(y), place / "none.npz")
    net = residual_net()
    net.graph.output.append(onnx.helper.make_empty_tensor_value_info(net.graph.node[3].output[0]))
    with pytest.raises(ModelError, match=r"has several outputs.*extract_model"):
        finetune(net, place / "none.npz")


def test_bad_requests(place: Path, tmp_path: Path) -> None:
    net, data = place / "net.onnx", place / "train.npz"
    for wrong in (
        {"epochs": 0},
        {"rate": -1.0},
        {"alpha": 1.5},
        {"temperature": 0.0},
        {"held_out": 1.0},
        {"batch": 0},
        {"checked": -1},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Training(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device"):
        finetune(net, data, training=Training(device="abacus"))
    with pytest.raises(UsageError, match="lower rate"):
        finetune(net, data, training=Training(rate=1e4, checked=0, device="cpu"))
    x = images(12)
    np.savez(tmp_path / "long.npz", x=x, labels=np.zeros(13, np.int64))
    np.savez(tmp_path / "classes.npz", x=x, labels=np.full(12, 5))
    np.savez(tmp_path / "one.npz", x=x[:1])
    with pytest.raises(InputError, match="labels that do not fit"):
        finetune(net, tmp_path / "long.npz")
    with pytest.raises(InputError, match=r"class that the model does not have.*0 to 4"):
        finetune(net, tmp_path / "classes.npz")
    with pytest.raises(InputError, match="too few images"):
        finetune(net, tmp_path / "one.npz")
    with pytest.raises(InputError, match="does not exist"):
        finetune(net, tmp_path / "none.npz")
    (tmp_path / "bits.json").write_text(json.dumps({"layers": {"stem": {"weight": 8, "activation": 8}}}))
    with pytest.raises(InputError, match="lacks 6 layers"):
        finetune(net, data, Recipe(tmp_path / "bits.json"))
    (tmp_path / "bits.json").write_text(json.dumps({"layers": {"stern": {"weight": 8, "activation": 8}}}))
    with pytest.raises(UsageError, match="stern"):
        finetune(net, data, Recipe(tmp_path / "bits.json"))


def test_every_integer_operator_is_known() -> None:
    """But those that nothing that `quantize` writes becomes: I-BERT's, run-time scales, packed bits."""
    unknown = {n.removeprefix("hawq.") for n in OPERATORS if n not in TRAINED}
    packed = {"pack_int4", "unpack_int4"}
    assert {n for n in unknown if not n.startswith("i_")} == {"dynamic_quantize", *packed}
