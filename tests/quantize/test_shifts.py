"""What rounding costs by the Hessian, layers and pairs of them: against the exact Hessian, and the choice of bits by it
against every assignment.
"""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hawq_tvm.cli import main
from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.allocate import allocation, measurement, shifts
from hawq_tvm.quantize.allocate.allocation import InfeasibleError, allocate
from hawq_tvm.quantize.allocate.budgets import Budget
from hawq_tvm.quantize.allocate.measurement import measure
from hawq_tvm.quantize.allocate.pareto import front
from hawq_tvm.quantize.allocate.plan import problem
from hawq_tvm.quantize.allocate.quadratic import Choices, proved
from hawq_tvm.quantize.allocate.sensitivity import Settings, Step
from hawq_tvm.quantize.allocate.table import Row, Table
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float

from .detectors import exported
from .networks import FloatNet, TorchNet, images, residual_net
from .test_transformers import Vision

Array = np.ndarray[Any, Any]


def tiny_net(softmax: bool = False) -> Any:
    """Two matrix products around a curve: small enough for whole Hessians."""
    g = FloatNet(["n", 3])
    y = g.node("Sigmoid", g.node("Gemm", "x", g.random(3, 4), g.random(4), name="one"))
    y = g.node("Gemm", y, g.random(4, 3), g.random(3), name="two")
    return load_float(g.model(g.node("Softmax", y) if softmax else y))


def vectors(count: int) -> Array:
    return np.random.default_rng(0).standard_normal((count, 3)).astype(np.float32)


@pytest.mark.parametrize("softmax", [False, True])
def test_small_errors_cost_what_the_exact_hessian_says(tmp_path: Path, softmax: bool) -> None:
    """1/2 e^T H e with all pairs, H from autograd by weights and inputs at once."""
    graph, x = tiny_net(softmax), vectors(16)
    np.savez(tmp_path / "in.npz", x=x)
    found = measure(graph, open_data(tmp_path / "in.npz", graph.inputs), Settings(choices=("W8A8",), tolerance=1e-9))
    assert found.seen == 16 and not found.converged
    weights = [graph.parameters[layer.weight].double() for layer in graph.layers]
    biases = [graph.parameters[layer.bias].double() for layer in graph.layers]
    with torch.no_grad():
        a = torch.from_numpy(x).double()
        h = (a @ weights[0] + biases[0]).sigmoid()

    def distance(w1: Any, e1: Any, w2: Any, e2: Any) -> Any:
        plain = (h @ weights[1] + biases[1]).log_softmax(1)
        b = ((a + e1) @ (weights[0] + w1) + biases[0]).sigmoid()
        moved = ((b + e2) @ (weights[1] + w2) + biases[1]).log_softmax(1)
        return (plain.exp() * (plain - moved)).sum(1).mean()

    zeros = [torch.zeros_like(v) for v in (weights[0], a, weights[1], h)]
    hessian = torch.autograd.functional.hessian(distance, tuple(zeros))
    rounded = [
        row[0].double()
        for row in measurement._Measurement(
            graph,
            open_data(tmp_path / "in.npz", graph.inputs),
            found.settings,
            None,
            lambda step: None,
            None,
            found.sizes,
        )._rounded_weights()
    ]
    grids = found.arrays["grids"][:, 0]

    def off(value: Any, grid: Array) -> Any:
        scale, zero, low, high = map(float, grid)
        return (value / scale).round().clamp(low - zero, high - zero) * scale - value

    errors = [rounded[0] - weights[0], off(a, grids[0]), rounded[1] - weights[1], off(h, grids[1])]

    def cost(i: int, j: int) -> float:
        flat = hessian[i][j].reshape(errors[i].numel(), errors[j].numel())
        return float(errors[i].flatten() @ flat @ errors[j].flatten()) / 2

    own = [sum(cost(i, j) for i in s for j in s) for s in ((0, 1), (2, 3))]
    both = sum(cost(i, j) for i in (0, 1) for j in (2, 3))
    pairs = found.pairs("hessian")
    assert pairs is not None and pairs.shape == (2, 2)
    # Errors of 8 bits are small, not infinitely so: terms of third order are some per cent of these.
    root = np.sqrt(own[0] * own[1])
    assert np.allclose(np.diag(pairs), own, rtol=0.05) and abs(pairs[0, 1] - both) < 0.05 * root
    assert np.array_equal(found.values("hessian")[:, 0], np.diag(pairs))


def test_all_layers_rounded_cost_the_distance(tmp_path: Path) -> None:
    """The sum over all pairs is near the Kullback-Leibler distance of the network with the weights of all layers
    rounded.
    """
    graph, x = load_float(residual_net()), images(64)
    np.savez(tmp_path / "in.npz", x=x)
    found = measure(
        graph, open_data(tmp_path / "in.npz", graph.inputs), Settings(choices=("W8A8", "W4A8"), tolerance=1e-9)
    )
    table = found.table("hessian")
    whole = table.sensitivity(dict.fromkeys([r.name for r in table.rows], "W4A8"))
    weights = {}
    run = measurement._Measurement(
        graph, open_data(tmp_path / "in.npz", graph.inputs), found.settings, None, lambda step: None, None, found.sizes
    )
    for layer, row in zip(graph.layers, run._rounded_weights(), strict=True):
        weights[layer.weight] = row[1]
    with torch.no_grad():
        plain = graph.run({"x": x})[graph.outputs[0]].double().log_softmax(1)
        moved = graph.run({"x": x}, parameters=weights)[graph.outputs[0]].double().log_softmax(1)
    assert whole == pytest.approx(float((plain.exp() * (plain - moved)).sum(1).mean()), rel=0.3)
    shares = table.shares(dict.fromkeys([r.name for r in table.rows], "W4A8"))
    assert sum(shares.values()) == pytest.approx(whole, rel=1e-12)  # a plain sum, of float numbers that fsum adds up


def test_only_what_follows_is_computed_again(tmp_path: Path) -> None:
    program = torch.export.export(TorchNet().eval(), (torch.from_numpy(images(2)),))
    for graph in (load_float(residual_net()), load_float(program)):
        values: dict[str, Any] = {}
        x = images(2)
        with torch.no_grad():
            graph.run({graph.inputs[0].name: x}, lambda n, v, values=values: values.__setitem__(n, v))
            kept = {n: v.clone() for n, v in values.items() if isinstance(v, torch.Tensor)}
            for layer in graph.layers:
                node = next(n for n in graph.nodes if n.name == layer.node)
                new = {layer.weight: graph.parameters[layer.weight] * 1.1}
                operands = [new.get(n, values.get(n, graph.parameters.get(n))) for n in node.inputs]
                again = graph.rerun(values, node.name, operands)
                plain = graph.run({graph.inputs[0].name: x}, parameters=new)
                assert all(torch.equal(again[n], plain[n]) for n in plain)
        assert all(torch.equal(v, values[n]) for n, v in kept.items())  # nothing is changed in place


def test_what_is_no_classifier_is_measured_by_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = FloatNet(["n", 3, 8, 8])
    graph = load_float(g.model(g.conv(g.node("Relu", g.conv("x", 4, 3, 3, "one")), 5, 4, 3, "two")))
    np.savez(tmp_path / "in.npz", x=images(32))
    data = open_data(tmp_path / "in.npz", graph.inputs)
    found = measure(graph, data, Settings(("hessian", "output"), tolerance=9))
    # Half of the squared change of the output by its mean square, summed over the numbers of an image.
    assert np.allclose(found.values("hessian"), found.values("output") * 5 * 16 / 2, rtol=1e-3)  # float32's products
    # Long outputs are added up with random signs: the same but for chance.
    monkeypatch.setattr(shifts, "LONGEST", 32)
    folded = measure(graph, data, Settings(tolerance=9))
    assert np.allclose(folded.values("hessian"), found.values("hessian"), rtol=0.3)
    traced = measure(graph, data, Settings(("trace", "hessian"), probes=64, tolerance=9))
    assert (traced.values("trace") > 0).all()


def test_images_are_added_until_the_choice_stands(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    np.savez(tmp_path / "in.npz", x=images(200))
    steps: list[Step] = []
    found = problem(graph, tmp_path / "in.npz", budgets=["bops=0.4"], progress=steps.append).sensitivities
    assert found is not None and found.verdict is not None and 32 <= found.seen <= 200
    assert found.verdict.stable == found.converged and (found.converged or found.seen == 200)
    assert [s.done for s in steps if s.phase == "Hessian"][-1] == found.seen
    # One batch says nothing of other images.
    np.savez(tmp_path / "one.npz", x=images(1))
    found = problem(graph, tmp_path / "one.npz", budgets=["bops=0.4"]).sensitivities
    assert found is not None and found.verdict is None and not found.converged
    assert found.provenance()["worst_error"] is None


def test_interrupted_rounding_continues(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    np.savez(tmp_path / "in.npz", x=images(48))
    whole = problem(graph, tmp_path / "in.npz", budgets=["bops=0.4"])

    def stop(step: Step) -> None:
        if (step.phase, step.done) == ("Hessian", 12):
            raise KeyboardInterrupt

    state = tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        problem(graph, tmp_path / "in.npz", budgets=["bops=0.4"], state=state, progress=stop)
    steps: list[Step] = []
    again = problem(graph, tmp_path / "in.npz", budgets=["bops=0.4"], state=state, progress=steps.append)
    assert not any(s.phase == "ranges" for s in steps)
    assert again.table.pairs is not None and whole.table.pairs is not None
    assert np.array_equal(again.table.pairs, whole.table.pairs)


def test_batches_take_turns_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tiny_net()
    np.savez(tmp_path / "in.npz", x=vectors(40))
    data, asked = open_data(tmp_path / "in.npz", graph.inputs), Settings(batch=4, tolerance=1e-9)
    whole = measure(graph, data, asked)
    monkeypatch.setattr(measurement, "PARTS", 3)
    parts = measure(graph, data, asked)
    assert whole.arrays["pair_images"].tolist() == [4] * 10 and parts.arrays["pair_images"].tolist() == [16, 12, 12]
    sums = whole.arrays["pair_sums"]
    assert np.allclose(parts.arrays["pair_sums"], [sums[i::3].sum(0) for i in range(3)], rtol=1e-12, atol=0)
    assert np.allclose(parts.values("hessian"), whole.values("hessian"), rtol=1e-12, atol=0)


@st.composite
def paired(draw_: Any) -> Table:
    """Up to five layers whose errors are vectors of small integers: what pairs cost is exact."""
    choices = draw_(st.sampled_from([("W8A8", "W4A8", "W4A4"), ("W8A8", "W4A4")]))
    count = draw_(st.integers(1, 5))
    vectors_ = draw_(
        st.lists(
            st.lists(st.integers(-9, 9), min_size=4, max_size=4),
            min_size=count * len(choices),
            max_size=count * len(choices),
        )
    )
    pairs = np.array(vectors_, np.float64) @ np.array(vectors_, np.float64).T
    rows = []
    for i in range(count):
        alone = {c: float(pairs[i * len(choices) + k, i * len(choices) + k]) for k, c in enumerate(choices)}
        tie, fixed = draw_(st.sampled_from(["", "", "a"])), draw_(st.sampled_from(["", "", "", "W8A8"]))
        rows.append(Row(f"x{i}", draw_(st.integers(1, 99)), draw_(st.integers(0, 99)), alone, tie=tie, fixed=fixed))
    return Table(tuple(rows), choices, pairs)


def assignments(table: Table) -> list[dict[str, str]]:
    groups = table.groups()
    return [
        {row.name: choice for group, choice in zip(groups, picked, strict=True) for row in group}
        for picked in itertools.product(*(table.allowed(g) for g in groups))
    ]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(paired(), st.integers(0, 10), st.sampled_from(["size", "bops"]))
def test_pairs_against_brute_force(table: Table, tenth: int, resource: str) -> None:
    budget = Budget(resource, "fraction", Fraction(tenth, 10), "")
    found = allocate(table, [budget])
    limit = found.limits[0].limit
    met = [a for a in assignments(table) if table.total(resource, a) <= limit]
    least = min(table.sensitivity(a) for a in met)
    assert found.assignment in met and found.sensitivity == least
    assert found.solver["status"] == "optimal"
    # One search alone keeps the limit, too, and is no worse than where it began.
    near = met[0]
    other = allocate(table, [budget], near=near)
    assert other.assignment in met and least <= other.sensitivity <= table.sensitivity(near)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(paired())
def test_front_with_pairs(table: Table) -> None:
    found = front(table, "size")
    points = [(float(table.total("size", a)), table.sensitivity(a)) for a in assignments(table)]
    assert (np.diff(found.costs) > 0).all() and (np.diff(found.sensitivities) < 0).all()
    for cost, value in zip(found.costs, found.sensitivities, strict=True):
        assert (cost, value) in points
    assert found.sensitivities[-1] == min(value for _, value in points)


def test_what_is_proved_is_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that push both ways: the programme finds the least from a bad beginning, and proves it."""
    rng = np.random.default_rng(0)
    errors = np.repeat(rng.uniform(-2, 2, 9), 2)[:, None] * np.tile([0.1, 1.0], 9)[:, None] * rng.uniform(0, 1, (18, 3))
    costs = [(Fraction(int(c)),) for _ in range(9) for c in (8, 4)]
    choices = Choices(np.arange(0, 20, 2), errors @ errors.T, costs, [Fraction(52)])
    taken, sure = proved(choices, np.arange(1, 19, 2), 1000)
    every = [np.arange(0, 18, 2) + p for p in itertools.product((0, 1), repeat=9)]
    best = min(choices.value(one) for one in every if choices.met(one))
    assert sure and choices.met(taken) and choices.value(taken) == pytest.approx(best, rel=1e-5)
    # Of more layers than that it says that it is not proved.
    rows = tuple(Row(f"x{i}", 1, 1, {"W8A8": float(choices.pairs[2 * i, 2 * i]), "W4A4": 1.0}) for i in range(9))
    table = Table(rows, ("W8A8", "W4A4"), choices.pairs)
    monkeypatch.setattr(allocation, "PROVABLE", 100)
    found = allocate(table, [Budget.parse("size=0.4")])
    assert found.solver["status"] == "best found" and found.sensitivity >= best * (1 - 1e-9)


def test_budgets_that_nothing_meets_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(residual_net(), str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "in.npz", x=images(12))
    steps: list[Step] = []
    with pytest.raises(InfeasibleError, match=r"--budget size=10%: no assignment meets this budget; expected size of"):
        problem(tmp_path / "net.onnx", tmp_path / "in.npz", budgets=["size=10%"], progress=steps.append)
    assert not steps
    command = ["allocate", str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "in.npz"), "--budget", "bops=0.5M"]
    assert main([*command, "-o", str(tmp_path / "b.json")]) == 2
    told = capsys.readouterr().err
    assert "at least, by" in told and "remedy: raise it to" in told and not (tmp_path / "b.state.npz").exists()
    # What the refusal says can be reached is.
    least = told.split("raise it to ")[1].split(",")[0].replace(" ", "")
    assert main([*command[:-1], f"bops={least}", "-o", str(tmp_path / "b.json"), "--quiet"]) == 0


def test_transformers_have_one_row_a_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    onnx.save(exported(Vision().eval()), str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "in.npz", x=images(16, 32))
    command = ["allocate", str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "in.npz"), "--budget", "bops=0.5"]
    assert main([*command, "--per-block", "-o", str(tmp_path / "b.json"), "--quiet"]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    ties: dict[str, set[str]] = {}
    for row in found["report"]:
        if "tie" in row:
            ties.setdefault(row["tie"], set()).add(row["choice"])
    # The attention's four layers and the two after it; the first and the last stay alone.
    assert len(found["report"]) == 8 and [len(v) for v in ties.values()] == [1, 1]
    assert sorted(sum(r.get("tie") == t for r in found["report"]) for t in ties) == [2, 4]
    out = capsys.readouterr().out
    assert ", 4 layers" in out and ", 2 layers" in out and out.count("fixed W8A8") == 2
    with pytest.raises(UsageError, match="is no metric"):
        Settings(("blocks",))
    assert main([*command, "--per-block", "--no-ties", "-o", str(tmp_path / "b.json")]) == 2
