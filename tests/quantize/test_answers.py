"""What a network's answers are taken for, scores of classes or other numbers: one rule for every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.quantize.allocate.loss import CHANGE, DISTANCE, Loss
from hawq_tvm.quantize.allocate.measurement import measure
from hawq_tvm.quantize.allocate.sensitivity import Settings
from hawq_tvm.quantize.judge.ends import end_of_integers, end_of_onnx
from hawq_tvm.quantize.judge.evaluation import evaluate
from hawq_tvm.quantize.network.answers import End, answers_of, end_of
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float
from hawq_tvm.quantize.prune.distil import distil
from hawq_tvm.quantize.ptq.quantizer import post_training
from hawq_tvm.quantize.ptq.recipe import Recipe
from hawq_tvm.quantize.qat.training import Training, finetune

from .networks import FloatNet, images

NUMBERS = 6
Tail = Callable[[FloatNet, str], str]


def unit(g: FloatNet, y: str) -> str:
    """Rows of length 1, as embeddings often are."""
    return g.node("Div", y, g.node("Sqrt", g.node("ReduceSum", g.node("Mul", y, y), g.constant([1], np.int64))))


def normal(g: FloatNet, y: str) -> str:
    return g.node("LayerNormalization", y, g.constant(np.ones(NUMBERS)), g.constant(np.zeros(NUMBERS)))


def of_two(g: FloatNet, y: str) -> str:
    return g.node("Mul", y, g.node("Gemm", "f", g.random(4, NUMBERS), g.random(NUMBERS)))


# By what follows the sums of a last layer.
ENDS: dict[str, tuple[Tail, End]] = {
    "nothing": (lambda g, y: y, End.SUMS),
    "scaled": (lambda g, y: g.node("Add", g.node("Mul", y, g.constant(4)), g.constant(range(NUMBERS))), End.SUMS),
    "normalized by channel": (lambda g, y: g.norm(y, NUMBERS), End.SUMS),
    "moved": (lambda g, y: g.node("Reshape", g.node("Identity", y), g.constant([0, -1], int)), End.SUMS),
    "softmax": (lambda g, y: g.node("Softmax", y, axis=1), End.SOFTMAX),
    "softmax, moved": (lambda g, y: g.node("Identity", g.node("Softmax", y, axis=1)), End.SOFTMAX),
    "log of softmax": (lambda g, y: g.node("Log", g.node("Softmax", y, axis=1)), End.LOG_SOFTMAX),
    "log softmax": (lambda g, y: g.node("LogSoftmax", y, axis=1), End.LOG_SOFTMAX),
    "scaled softmax": (lambda g, y: g.node("Mul", g.node("Softmax", y, axis=1), g.constant(2)), End.OTHER),
    "length 1": (unit, End.OTHER),
    "normalized": (normal, End.OTHER),
    "tanh": (lambda g, y: g.node("Tanh", y), End.OTHER),
    "relu": (lambda g, y: g.node("Relu", y), End.OTHER),
    "log": (lambda g, y: g.node("Log", y), End.OTHER),
    "of two layers": (of_two, End.OTHER),
}  # fmt: skip


def network(tail: Tail, batch: Any = "n") -> onnx.ModelProto:
    """A convolution, the mean of each channel, a product, and an end."""
    g = FloatNet([batch, 3, 8, 8])
    y = g.node("Flatten", g.node("GlobalAveragePool", g.node("Relu", g.conv("x", 4, 3, 3, "stem"))))
    g.nodes[-1].output[0] = "f"
    del y
    return g.model(tail(g, g.node("Gemm", "f", g.random(4, NUMBERS), g.random(NUMBERS), name="fc")))


def save(path: Path, model: onnx.ModelProto) -> str:
    onnx.save(model, str(path))
    return str(path)


@pytest.mark.parametrize("name", ENDS)
def test_what_an_onnx_network_ends_in(name: str) -> None:
    tail, wanted = ENDS[name]
    model = network(tail)
    graph = load_float(model)
    assert end_of(graph.nodes, graph.parameters, graph.outputs[0]) is end_of_onnx(model.graph) is wanted


def test_averages_of_sums_are_scores_and_averages_of_features_are_not() -> None:
    for relu, wanted in ((False, End.SUMS), (True, End.OTHER)):
        g = FloatNet(["n", 3, 8, 8])
        y = g.conv("x", NUMBERS, 3, 3, "stem")
        y = g.node("Flatten", g.node("GlobalAveragePool", g.node("Relu", y) if relu else y))
        assert end_of_onnx(g.model(y).graph) is wanted


class Program(nn.Module):
    def __init__(self, tail: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.tail = nn.Conv2d(3, 4, 3), nn.BatchNorm1d(NUMBERS), tail
        self.fc = nn.Linear(4, NUMBERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.norm(self.fc(torch.relu(self.conv(x)).mean((2, 3)))))


@pytest.mark.parametrize(
    "tail, wanted",
    [
        (lambda y: y * 4, End.SUMS),
        (lambda y: y[:, None, :3].squeeze(1), End.SUMS),
        (lambda y: y.softmax(1), End.SOFTMAX),
        (lambda y: y.softmax(1).log(), End.LOG_SOFTMAX),
        (lambda y: y.log_softmax(1), End.LOG_SOFTMAX),
        (lambda y: nn.functional.normalize(y), End.OTHER),
        (torch.tanh, End.OTHER),
    ],
)
def test_what_a_program_ends_in(tail: Any, wanted: End) -> None:
    graph = load_float(torch.export.export(Program(tail).eval(), (torch.zeros(2, 3, 8, 8),)))
    assert end_of(graph.nodes, graph.parameters, graph.outputs[0]) is wanted


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    np.savez(folder / "in.npz", x=images(24))
    np.savez(folder / "labelled.npz", x=images(24), labels=np.arange(24) % NUMBERS)
    return folder


@pytest.mark.parametrize("name", ["nothing", "softmax", "length 1", "of two layers"])
def test_what_a_quantized_network_and_its_package_end_in(name: str, place: Path) -> None:
    tail, wanted = ENDS[name]
    found = post_training(network(tail, 1), place / "in.npz", Recipe()).model
    assert end_of_onnx(found.graph) is end_of_integers(ht.compile(found).graph) is wanted


@pytest.mark.parametrize(
    "shape, end, labelled, asked, wanted",
    [
        ((8, 5), End.SUMS, False, None, (True, "sums", False)),
        ((8, 5), End.SUMS, True, None, (True, "labels", False)),
        ((8, 5), End.SOFTMAX, True, None, (True, "labels", True)),
        ((8, 5, 1, 1), End.SOFTMAX, False, None, (True, "softmax", True)),
        ((8, 5), End.LOG_SOFTMAX, False, None, (True, "softmax", False)),
        ((8, 5), End.OTHER, False, None, (False, "end", False)),
        ((8, 5), End.OTHER, True, None, (True, "labels", False)),
        ((8, 5), End.OTHER, False, True, (True, "asked", False)),
        ((8, 5), End.SOFTMAX, True, False, (False, "asked", False)),
        *(
            (shape, End.SOFTMAX, True, None, (False, "shape", False))
            for shape in ((8,), (8, 1), (5, 8), (8, 5, 2), (8, 1, 5), ())
        ),
    ],
)
def test_the_rule(shape: Any, end: End, labelled: bool, asked: bool | None, wanted: Any) -> None:
    found = answers_of("y", shape, 8, end, labelled=labelled, asked=asked)
    assert (found.classes, found.by, found.probabilities) == wanted
    assert bool(found.hint) == (found.by in ("sums", "end"))
    integers = answers_of("y", shape, 8, end, floating=False, labelled=labelled)
    assert not integers.classes and integers.by == "shape"


def test_scores_that_cannot_be_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"y: is no classifier's output; expected 8 images x classes.*found 8x5x2"):
        answers_of("y", (8, 5, 2), 8, End.SUMS, asked=True)
    g = FloatNet(["n", 3, 8, 8])
    model = save(place / "dense.onnx", g.model(g.conv(g.node("Relu", g.conv("x", 4, 3, 3, "a")), 2, 4, 3, "b")))
    data, out = ["--classes", "--quiet"], str(place / "never")
    for words in (
        ["allocate", model, "--calib", str(place / "in.npz"), "--budget", "bops=0.5", "-o", out],
        ["prune", model, "--calib", str(place / "in.npz"), "--budget", "macs=90%", "--multiple", "1", "-o", out],
        ["finetune", model, "--data", str(place / "in.npz"), "-o", out],
        ["evaluate", model, "--data", str(place / "in.npz"), "--against", model],
    ):
        assert main([*words, *data]) == 3 and "is no classifier's output" in capsys.readouterr().err, words[0]
    g = FloatNet(["n", 3, 8, 8])
    y = g.conv(g.node("Relu", g.conv("x", 4, 3, 3, "a")), 2, 4, 3, "b")
    ends = save(place / "ends.onnx", g.model(g.node("ArgMax", y, axis=1)))
    words = ["prune", ends, "--calib", str(place / "in.npz"), "--budget", "macs=90%", "--multiple", "1", "-o", out]
    assert main([*words, "--quiet"]) == 3 and "that rounding errors move a little" in capsys.readouterr().err
    assert not (place / "never").exists()
    with pytest.raises(SystemExit):
        main(["evaluate", model, "--data", str(place / "in.npz"), *data, "--no-classes"])
    assert "not allowed with argument --classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    "end, data, flags, kind, by",
    [
        ("length 1", "in.npz", [], "numbers", "end"),
        ("length 1", "labelled.npz", [], "classes", "labels"),
        ("length 1", "in.npz", ["--classes"], "classes", "asked"),
        ("nothing", "in.npz", [], "classes", "sums"),
        ("nothing", "labelled.npz", ["--no-classes"], "numbers", "asked"),
        ("softmax", "in.npz", [], "classes", "softmax"),
    ],
)
def test_every_command_says_the_same(
    end: str, data: str, flags: list[str], kind: str, by: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, calib = save(place / "net.onnx", network(ENDS[end][0])), str(place / data)
    assert main(["quantize", model, "--calib", calib, "-o", str(place / "q.onnx"), "--quiet", "--json"]) == 0
    capsys.readouterr()
    told = []
    for words in (
        ["allocate", model, "--calib", calib, "--budget", "bops=0.5", "--free-ends"],
        ["prune", model, "--calib", calib, "--budget", "macs=80%", "--multiple", "1", "--steps", "2", "--probes", "2"],
        ["finetune", model, "--data", calib, "--epochs", "1", "--checked", "0", "--device", "cpu"],
        ["evaluate", str(place / "q.onnx"), "--data", calib, "--against", model],
    ):
        more = ["-o", str(place / "out")] if words[0] != "evaluate" else []
        (place / "out.state.npz").unlink(missing_ok=True)
        assert main([*words, *more, *flags, "--quiet", "--json"]) == 0
        fields = json.loads(capsys.readouterr().out)
        told.append(fields.get("measured", fields.get("finetune", fields)))
    assert [(one["answers"], one["answers_by"]) for one in told] == [(kind, by)] * 4
    classes = kind == "classes"
    assert told[0]["loss"] == (DISTANCE if classes else CHANGE)
    assert (told[2]["epochs_run"][0]["agreement"] is not None) == classes
    against = told[3]["against"]
    assert (against["flips"] is not None) == classes and (against["squared_change"] is None) == classes
    assert main(["evaluate", str(place / "q.onnx"), "--data", calib, "--against", model, *flags, "--quiet"]) == 0
    text = capsys.readouterr().out
    assert ("first answers differ" in text) == classes and ("squared change of the outputs" in text) != classes
    assert ("--no-classes if" in text, "--classes if" in text) == (by == "sums", by == "end")


@pytest.mark.parametrize(
    "metric, end, said",
    [
        ("hessian", "nothing", DISTANCE),
        ("hessian", "tanh", CHANGE),
        ("trace", "nothing", "cross-entropy with the model's own argmax"),
        ("trace", "tanh", CHANGE),
        ("output", "nothing", "squared change of gemm_4, as a share of its squares"),
        ("output,hessian", "tanh", "squared change of tanh_5, as a share of its squares"),
        ("fisher", "softmax", "cross-entropy with the model's own argmax"),
    ],
)
def test_the_report_says_what_was_minimized(metric: str, end: str, said: str, place: Path) -> None:
    graph = load_float(network(ENDS[end][0]))
    settings = Settings(tuple(metric.split(",")), probes=4, tolerance=9)
    assert measure(graph, open_data(place / "in.npz", graph.inputs), settings).provenance()["loss"] == said


def test_gradients_of_a_squared_change_are_refused(place: Path) -> None:
    graph = load_float(network(ENDS["tanh"][0]))
    data = open_data(place / "in.npz", graph.inputs)
    with pytest.raises(UsageError, match=r"--metric fisher: needs answers that are classes.*--classes"):
        measure(graph, data, Settings(("hessian", "fisher")))
    assert (measure(graph, data, Settings(("fisher",), classes=True)).values("fisher") > 0).all()


def test_a_state_is_of_one_kind_of_answers(place: Path, tmp_path: Path) -> None:
    graph = load_float(network(ENDS["nothing"][0]))
    data = open_data(place / "in.npz", graph.inputs)
    measure(graph, data, Settings(tolerance=9), tmp_path / "state.npz")
    with pytest.raises(UsageError, match="another model, other data or other settings"):
        measure(graph, data, Settings(tolerance=9, classes=False), tmp_path / "state.npz")


def test_the_squared_change_has_the_hessian_of_the_jacobian(place: Path) -> None:
    """At no change its slope is 0 and its Hessian J^T J by the squares of the outputs."""
    graph = load_float(network(ENDS["tanh"][0]))
    data = open_data(place / "in.npz", graph.inputs)
    loss = Loss(graph, data)
    loss.weigh({graph.outputs[0]: 0.25})
    batch, name = next(data.batches(3)), graph.layers[1].weight

    def outputs(weight: torch.Tensor) -> torch.Tensor:
        return graph.run(batch.inputs, parameters={name: weight})[graph.outputs[0]]

    weight = graph.parameters[name]
    hessian = torch.autograd.functional.hessian(lambda w: loss.of(batch, parameters={name: w}).sum(), weight)
    jacobian = torch.autograd.functional.jacobian(outputs, weight).reshape(3 * NUMBERS, -1)
    size = weight.numel()
    torch.testing.assert_close(hessian.reshape(size, size), 4 * jacobian.T @ jacobian, rtol=1e-4, atol=1e-5)
    assert not loss.of(batch).any()


def twins() -> list[onnx.ModelProto]:
    """A network with scores, with their softmax, and with the logarithm of it."""
    return [network(ENDS[name][0]) for name in ("nothing", "softmax", "log softmax")]


def test_a_smaller_network_learns_the_same_of_scores_and_of_probabilities(place: Path) -> None:
    x = images(16, seed=3)
    found = []
    for model in twins():
        graph, cut = load_float(model), load_float(model)
        weight = cut.layers[0].weight
        cut.parameters[weight] = cut.parameters[weight] * 0.5
        loss = Loss(graph, open_data(place / "in.npz", graph.inputs))
        found.append(distil(model, loss, cut, [{"x": x}], steps=30, seed=0, progress=lambda step: None))
    plain = load_float(twins()[0])
    half = {plain.layers[0].weight: plain.parameters[plain.layers[0].weight] * 0.5}
    p, q = (plain.run({"x": x}, parameters=v)[plain.outputs[0]].double().log_softmax(1) for v in ({}, half))
    wanted = float((p.exp() * (p - q)).sum(1).mean())
    np.testing.assert_allclose([before for before, _ in found], wanted, rtol=1e-4)  # sums of float32
    np.testing.assert_allclose([after for _, after in found], found[0][1], rtol=0.1)
    assert found[0][1] < 0.8 * found[0][0]


def test_finetuning_learns_the_logarithms_of_a_softmax(place: Path) -> None:
    """Before training, of both networks: their integers differ in the softmax's own rounding alone."""
    scores, probabilities, _ = twins()
    losses = []
    for model in (scores, probabilities):
        settings = Training(epochs=1, alpha=0.5, checked=4, batch=8, device="cpu", held_out=0.5)
        found = finetune(model, place / "labelled.npz", Recipe(), settings).notes["finetune"]
        assert found["package_equal_on"] == 4
        losses.append(found["epochs_run"][0]["loss"])
    # A softmax taken for scores is nearly flat: its loss would be near log(6) / 2, and it is not.
    np.testing.assert_allclose(*losses, rtol=0.1)


def test_the_change_of_outputs_is_their_own(place: Path) -> None:
    """Of several outputs, the mean of shares; a batch that a model fixes is filled up and cut."""
    g = FloatNet([5, 3, 8, 8])
    y = g.conv("x", 4, 3, 3, "one")
    model = g.model(g.node("Tanh", y))
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(y))
    other = onnx.ModelProto()
    other.CopyFrom(model)
    bias = next(t for t in other.graph.initializer if t.name == other.graph.node[0].input[2])
    moved = onnx.numpy_helper.to_array(bias) + np.float32(0.25)
    bias.CopyFrom(onnx.numpy_helper.from_array(moved, bias.name))
    ours, theirs = save(place / "ours.onnx", other), save(place / "theirs.onnx", model)
    found = evaluate(ours, place / "in.npz", against=theirs)
    graph = load_float(theirs)
    shares = []
    for i, name in enumerate(graph.outputs):
        one, two = (
            torch.cat(
                [load_float(m).run({"x": x})[load_float(m).outputs[i]] for x in torch.tensor(images(25)).split(5)]
            )
            for m in (ours, theirs)
        )
        one, two = one[:24].double(), two[:24].double()
        shares.append(float((one - two).square().sum() / two.square().sum()))
        assert name
    assert found.flips is None and found.images == 24 and found.change == pytest.approx(np.mean(shares), rel=1e-4)
    g = FloatNet(["n", 3, 8, 8])
    pooled = save(place / "pooled.onnx", g.model(g.conv("x", 3, 3, 3, "one")))
    with pytest.raises(UsageError, match=r"theirs.onnx: gives other outputs; expected conv_0 .*; found tanh_1"):
        evaluate(pooled, place / "in.npz", against=theirs)
