"""Sensitivities by several metrics, states of another run, runs that are made again, and outputs that rounding cannot
be measured by.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hawq_tvm import quantize
from hawq_tvm.cli import main
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.printed import printed_nowhere
from hawq_tvm.quantize.allocate.allocation import InfeasibleError
from hawq_tvm.quantize.allocate.measurement import measure
from hawq_tvm.quantize.allocate.plan import problem
from hawq_tvm.quantize.allocate.quadratic import Choices, proved
from hawq_tvm.quantize.allocate.sensitivity import METRICS, Settings
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float

from .networks import FloatNet, images

ORDERS = [*itertools.permutations(METRICS, 2), ("fisher", "trace", "output", "hessian")]


def net(op: str = "Sigmoid", batch: Any = "n", **attributes: Any) -> onnx.ModelProto:
    """A classifier of two matrix products."""
    g = FloatNet([batch, 3])
    y = g.node(op, g.node("Gemm", "x", g.random(3, 4), g.random(4), name="one"), **attributes)
    return g.model(g.node("Gemm", y, g.random(4, 3), g.random(3), name="two"))


def data(folder: Path, count: int) -> Path:
    np.savez(folder / "in.npz", x=np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32))
    return folder / "in.npz"


@pytest.mark.parametrize("metrics", ORDERS, ids=",".join)
def test_metrics_in_any_order(tmp_path: Path, metrics: tuple[str, ...]) -> None:
    asked = Settings(metrics, probes=16, tolerance=0.2)
    found = problem(net(), data(tmp_path, 40), asked, budgets=["bops=0.5"], fix_ends=False)
    assert set(metrics[1:]) <= set(found.table.rows[0].facts)
    told, values = found.provenance, found.sensitivities
    assert values is not None and told["metric"] == metrics[0]
    # What is said of errors is of what is minimized.
    assert ("worst_error" in told) == ("converged" in told) == (metrics[0] in ("hessian", "trace"))
    if "worst_error" in told:
        assert told["worst_error"] == values.relative_errors(metrics[0]).max()
        assert told["decision"]["stable"] == told["converged"]


def test_a_state_of_another_batch_is_refused(tmp_path: Path) -> None:
    graph, state = load_float(net()), tmp_path / "state.npz"
    inputs = open_data(data(tmp_path, 40), graph.inputs)
    batch = measure(graph, inputs, Settings(tolerance=5.0), state).batch
    with pytest.raises(UsageError, match="was measured with another model, other data or other settings"):
        measure(graph, inputs, Settings(tolerance=5.0, batch=batch), state)


def test_a_state_of_another_network_is_refused(tmp_path: Path) -> None:
    state, settings = tmp_path / "state.npz", Settings(tolerance=9)
    graphs = [load_float(net("LeakyRelu", alpha=alpha)) for alpha in (0.01, 0.01, 0.9)]
    for graph in graphs[:2]:
        measure(graph, open_data(data(tmp_path, 8), graph.inputs), settings, state)
    with pytest.raises(UsageError, match="was measured with another model"):
        measure(graphs[2], open_data(tmp_path / "in.npz", graphs[2].inputs), settings, state)

    class Curved(torch.nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.fc, self.slope = torch.nn.Linear(3, 3), slope

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.leaky_relu(self.fc(x), self.slope)

    programs = [torch.export.export(Curved(slope).eval(), (torch.zeros(1, 3),)) for slope in (0.01, 0.01, 0.9)]
    told = [load_float(program).told() for program in programs]
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("batch", ["n", 3])
def test_a_finished_run_is_the_same_again(tmp_path: Path, batch: Any) -> None:
    graph, state = load_float(net(batch=batch)), tmp_path / "state.npz"
    inputs = open_data(data(tmp_path, 200), graph.inputs)
    runs = [measure(graph, inputs, Settings(tolerance=5.0), state) for _ in range(3)]
    # 32 images at least, in whole batches.
    assert [run.seen for run in runs] == [33 if batch == 3 else 100] * 3 and all(run.converged for run in runs)
    assert all(np.array_equal(run.values("hessian"), runs[0].values("hessian")) for run in runs)


@pytest.mark.parametrize("batch", [1, "n"])
def test_images_whose_output_is_0(tmp_path: Path, batch: Any) -> None:
    """The output's unit is one for all images: those that it is 0 for weigh as the others."""
    g = FloatNet([batch, 3, 8, 8])
    y = g.node("Relu", g.conv("x", 4, 3, 3, "one"))
    graph = load_float(
        g.model(g.node("Relu", g.node("Conv", y, g.random(5, 4, 3, 3), g.constant(np.zeros(5)), name="two")))
    )
    x, seen = images(12), dict[str, Any]()
    last = graph.layers[1]
    graph.run({"x": x[:1]}, lambda name, value: seen.__setitem__(name, value))
    graph.parameters[last.bias] = -seen[last.output].amax((0, 2, 3))
    np.savez(tmp_path / "in.npz", x=x)
    found = measure(graph, open_data(tmp_path / "in.npz", graph.inputs), Settings(("hessian", "output"), tolerance=9))
    values = found.values("hessian")
    numbers = np.prod(seen[last.output].shape[1:])
    assert np.allclose(values, found.values("output") * numbers / 2, rtol=1e-3) and 0 < values.max() < numbers
    graph.parameters[last.bias] = graph.parameters[last.bias] - 1000
    with pytest.raises(
        ModelError, match="an output that rounding errors cannot be measured by; expected finite numbers"
    ):
        measure(graph, open_data(tmp_path / "in.npz", graph.inputs), Settings())


def test_scores_that_are_infinite(tmp_path: Path) -> None:
    """A class that is ruled out changes nothing; one that rounding rules out is refused."""
    found = []
    for ruled_out in ([], [-np.inf]):
        g = FloatNet(["n", 3])
        w = np.random.default_rng(1).standard_normal((3, 3 + len(ruled_out))).astype(np.float32)
        w[:, :3] = np.random.default_rng(2).standard_normal((3, 3))
        y = g.node("Gemm", "x", g.constant(w), name="one")
        y = g.node("Add", y, g.constant([0.0] * 3 + ruled_out)) if ruled_out else y
        graph = load_float(g.model(y))
        inputs = open_data(data(tmp_path, 16), graph.inputs)
        found.append(measure(graph, inputs, Settings(("hessian", "output"), tolerance=9)))
    assert np.allclose(found[0].values("hessian"), found[1].values("hessian"), rtol=1e-4)
    assert np.isfinite(found[1].values("output")).all()
    g = FloatNet(["n", 3])
    w = np.array([[0.01, 1, 1], [1, 1, 1], [1, 1, 1]])  # 0.01 is 0 in 4 bits, and its logarithm infinite
    graph = load_float(g.model(g.node("Log", g.node("Gemm", "x", g.constant(w), name="one"))))
    np.savez(tmp_path / "in.npz", x=np.eye(3, dtype=np.float32))
    with pytest.raises(
        ModelError, match="one: makes the network's output infinite, or not a number, when it is rounded"
    ):
        measure(graph, open_data(tmp_path / "in.npz", graph.inputs), Settings())


def test_a_network_that_ends_in_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = FloatNet(["n", 3])
    model = g.model(g.node("ArgMax", g.node("Gemm", "x", g.random(3, 4), g.random(4), name="one"), axis=1))
    onnx.save(model, str(tmp_path / "net.onnx"))
    command = ["allocate", str(tmp_path / "net.onnx"), "--calib", str(data(tmp_path, 8)), "--budget", "bops=0.5"]
    assert main([*command, "-o", str(tmp_path / "bits.json")]) == 3
    told = capsys.readouterr().err
    assert "has no output that rounding errors move a little; expected an output in floating point" in told
    assert not list(tmp_path.glob("bits*"))


def test_kernels_are_timed_when_other_budgets_can_be_met(tmp_path: Path) -> None:
    asked: list[str] = []

    def timed() -> dict[str, dict[str, float]]:
        asked.append("timed")
        return {name: {"W8A8": 2.0, "W4A8": 1.5, "W4A4": 1.0} for name in ("one", "two")}

    def bits(*budgets: str) -> Any:
        return problem(net(), data(tmp_path, 8), budgets=budgets, latencies=timed, fix_ends=False).allocate(budgets)

    with pytest.raises(InfeasibleError, match="--budget size=10%: no assignment meets this budget"):
        bits("latency=0.5", "size=10%")
    assert not asked
    assert bits("latency=0.5", "size=60%").totals["latency"] <= 3 and asked == ["timed"]


def test_what_libraries_print_is_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    print("ours")
    with printed_nowhere():
        ctypes.CDLL(None).puts(b"theirs")
    print("ours again")
    sys.stdout.flush()
    out, err = capfd.readouterr()
    assert (out, err) == ("ours\nours again\n", "")


@pytest.mark.parametrize("seed", [2, 3, 5])
def test_a_least_of_0_is_proved(seed: int) -> None:
    """Errors that cancel out but for what float64 leaves of them."""
    errors = np.random.default_rng(seed).normal(size=(8, 3))
    errors[7] = -(errors[0] + errors[3] + errors[4])
    choices = Choices(np.arange(0, 10, 2), errors @ errors.T, [(Fraction(1),)] * 8, [Fraction(4)])
    taken, sure = proved(choices, np.arange(0, 8, 2), 1000)
    assert sure and choices.value(taken) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "option",
    [
        *(["--metric", "trace"], ["--calib", "in.npz"], ["--state", "s.npz"], ["--no-ties"], ["--per-block"]),
        *(["--probes", "16"], ["--batch", "8"], ["--seed", "1"], ["--free-ends"], ["--tolerance", "0.2"]),
        *(["--mean", "127"], ["--preprocess", "p.json"], ["--target", "x86-avx2"], ["--threads", "1"]),
    ],
)
def test_options_of_a_model_beside_a_table(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["allocate", "--table", "t.json", "--budget", "size=0.5", "--json", *option]) == 2
    assert f"{option[0]}: is for a model" in capsys.readouterr().err


def test_every_public_name_is_where_it_is_said() -> None:
    assert sorted(quantize._HOMES) == sorted(quantize.__all__)
    assert all(getattr(quantize, name) is not None for name in quantize.__all__)
