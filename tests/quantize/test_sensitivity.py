"""Traces against exact Hessians, rounding errors, ties and ends, and measurements that are interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hawq_tvm.core.errors import InputError, ModelError, UsageError
from hawq_tvm.quantize.allocate.measurement import measure
from hawq_tvm.quantize.allocate.sensitivity import METRICS, Settings, Step
from hawq_tvm.quantize.allocate.sizes import end_layers, read_together
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float

from .networks import FloatNet, TorchNet, images, one_number, residual_net


def saved(folder: Path, name: str = "in.npz", **arrays: Any) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


TRACE = ("trace",)


def tiny_net() -> Any:
    """Two convolutions of which the second reads what a third reads too, and a classifier: small enough for whole
    Hessians.
    """
    g = FloatNet(["n", 1, 4, 4])
    y = g.node("Sigmoid", g.conv("x", 2, 1, 3, "one", pads=[1] * 4))
    z = g.node("Add", g.node("Sigmoid", g.conv(y, 2, 2, 3, "two")), g.conv(y, 2, 2, 3, "three"))
    return load_float(g.model(g.node("Gemm", g.node("Flatten", z), g.random(8, 3), name="fc")))


def test_traces_equal_the_exact_hessian(tmp_path: Path) -> None:
    graph = tiny_net()
    x, labels = np.random.default_rng(0).standard_normal((4, 1, 4, 4)).astype(np.float32), np.array([0, 2, 1, 1])
    data = open_data(saved(tmp_path, x=x, labels=labels), graph.inputs)
    found = measure(graph, data, Settings(TRACE, probes=240, tolerance=1e-9, batch=4))
    assert (found.probes, found.loss, found.converged) == (240, "cross-entropy with labels", False)

    def loss(scores: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))

    for i, layer in enumerate(graph.layers):

        def by_weight(w: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            return loss(graph.run({"x": x}, parameters={layer.weight: w})[graph.outputs[0]])

        seen: dict[str, torch.Tensor] = {}
        graph.run(
            {"x": x},
            feed=lambda node, k, v, layer=layer, seen=seen: seen.update(a=v) if (node, k) == (layer.node, 0) else None,
        )

        def by_input(a: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            return loss(
                graph.run({"x": x}, feed=lambda node, k, v: a if (node, k) == (layer.node, 0) else None)[
                    graph.outputs[0]
                ]
            )

        for side, function, at in (
            ("weight", by_weight, graph.parameters[layer.weight]),
            ("activation", by_input, seen["a"]),
        ):
            exact = torch.autograd.functional.hessian(function, at).reshape(at.numel(), at.numel()).trace().item()
            estimate, error = found.arrays[f"{side}_trace"][i], found.arrays[f"{side}_error"][i]
            # Within 4.5 standard errors: of 8 normal estimates one is farther with a chance of 5e-5. The slack is
            # float32's, for a product with no variance.
            assert abs(estimate - exact) <= 4.5 * error + 1e-5 * abs(exact) + 1e-7, (
                layer.name,
                side,
                exact,
                estimate,
                error,
            )
            assert error < 0.25 * abs(exact) + 0.02  # or the comparison says nothing; a trace near 0 is known to 0.02


def test_the_standard_error_is_honest(tmp_path: Path) -> None:
    """Of many measurements of 32 probes, the share within one standard error of a long one's mean is about a normal
    variable's.
    """
    graph = tiny_net()
    data = open_data(
        saved(tmp_path, x=np.random.default_rng(0).standard_normal((4, 1, 4, 4)).astype(np.float32)), graph.inputs
    )
    runs = [
        measure(graph, data, Settings(TRACE, probes=32, tolerance=1e-9, batch=4, seed=s)).arrays for s in range(1, 9)
    ]
    long = measure(graph, data, Settings(TRACE, probes=300, tolerance=1e-9, batch=4)).arrays["weight_trace"]
    inside = np.mean([np.abs(r["weight_trace"] - long) <= r["weight_error"] for r in runs])
    # 32 trials, not quite independent: 0.68 is expected, two and a half deviations of 0.083 are 0.21.
    assert 0.47 < inside < 0.89


def test_stops_when_errors_are_small(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    data = open_data(saved(tmp_path, x=images(32)), graph.inputs)
    found = measure(graph, data, Settings(TRACE, probes=400, tolerance=0.3))
    assert found.converged and 16 <= found.probes < 400 and found.loss == "cross-entropy with the model's own argmax"


def test_interrupted_runs_continue_to_the_same_result(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    data = open_data(saved(tmp_path, x=images(10)), graph.inputs)
    settings, state = Settings(METRICS, probes=18, tolerance=1e-9), tmp_path / "state.npz"
    whole = measure(graph, data, settings)
    stops = [("traces", 4), ("traces", 12), ("Fisher", 4), ("Hessian", 8)]
    for phase, number in stops:

        def stop(step: Step, phase: str = phase, number: int = number) -> None:
            if (step.phase, step.done) == (phase, number):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(graph, data, settings, state, stop)
    steps: list[Step] = []
    found = measure(graph, data, settings, state, steps.append)
    assert not any(s.phase in ("ranges", "Fisher") for s in steps)
    assert set(found.arrays) == set(whole.arrays) and all(
        (found.arrays[k] == whole.arrays[k]).all() for k in whole.arrays
    )
    # More probes continue from those that are there; another seed, other data or another batch do not.
    assert measure(graph, data, Settings(TRACE, probes=24, tolerance=1e-9), state).probes == 24
    for other in (Settings(TRACE, seed=1), Settings(TRACE, batch=2)):
        with pytest.raises(
            UsageError, match=r"state\.npz: was measured with another model, other data or other settings"
        ):
            measure(graph, data, other, state)
    with pytest.raises(UsageError, match="was measured with another model"):
        measure(graph, open_data(saved(tmp_path, "b.npz", x=images(10, seed=1)), graph.inputs), settings, state)


def test_table(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    data = open_data(saved(tmp_path, x=images(8)), graph.inputs)
    found = measure(graph, data, Settings(METRICS, probes=16, tolerance=9))
    ends = dict.fromkeys(end_layers(graph), "W8A8")
    table = found.table("trace", ties=read_together(graph), fixed=ends)
    rows = {r.name: r for r in table.rows}
    assert end_layers(graph) == {"stem", "fc"} and {n for n, r in rows.items() if r.fixed} == {"stem", "fc"}
    assert rows["a1"].tie == rows["short"].tie != "" and not any(rows[n].tie for n in ("stem", "a2", "b1", "b2", "fc"))
    assert (rows["a1"].parameters, rows["a1"].macs, rows["fc"].macs) == (6 * 4 * 9, 6 * 4 * 9 * 16, 30)
    for metric in METRICS:
        values = found.values(metric)
        assert (values >= 0).all() and (values[:, 2] >= values[:, 0]).all()  # 4 bits cost more than 8
    assert set(rows["b1"].facts) >= {"weight_trace", "weight_error", "activation_trace", "hessian", "fisher", "output"}
    free = found.table("fisher")
    assert not any(r.tie or r.fixed for r in free.rows) and free.pairs is None


def test_programs_and_probabilities(tmp_path: Path) -> None:
    program = torch.export.export(TorchNet().eval(), (torch.from_numpy(images(2)),))
    graph = load_float(program)
    found = measure(
        graph,
        open_data(saved(tmp_path, x=images(5)), graph.inputs),
        Settings(("trace", "fisher"), probes=16, tolerance=9),
    )
    # The program takes two images at a time.
    assert found.images == 4 and [r.name for r in found.table("trace").rows] == [
        "stem",
        "deep",
        "fc",
    ]
    with pytest.raises(UsageError, match=r"model fixes its batch.*expected 2"):
        measure(graph, open_data(saved(tmp_path, x=images(5)), graph.inputs), Settings(batch=4))
    # A Softmax at the end changes nothing: the loss takes its logarithm.
    nets = []
    for softmax in (False, True):
        g = FloatNet(["n", 3, 8, 8])
        y = g.node("Flatten", g.node("GlobalAveragePool", g.conv("x", 4, 3, 3, "c")))
        nets.append(load_float(g.model(g.node("Softmax", y) if softmax else y)))
    traces = [
        measure(n, open_data(saved(tmp_path, x=images(4)), n.inputs), Settings(TRACE, probes=16, tolerance=9)).arrays[
            "weight_trace"
        ]
        for n in nets
    ]
    np.testing.assert_allclose(*traces, rtol=1e-4)  # two ways to the same loss in float32


@pytest.mark.parametrize("flat", [False, True])
def test_one_number_is_no_class(flat: bool, tmp_path: Path) -> None:
    """It counts by its squared change: of one class no answer would ever be wrong, and all bits would cost nothing."""
    graph = load_float(one_number(flat))
    data = open_data(saved(tmp_path, x=images(16)), graph.inputs)
    found = measure(graph, data, Settings(("hessian", "output"), tolerance=9))
    assert (found.values("hessian") > 0).all()
    assert np.allclose(found.values("hessian"), found.values("output") / 2, rtol=0.5)  # of parts, each by its square
    assert (measure(graph, data, Settings(TRACE, tolerance=9)).values("trace") > 0).all()
    with pytest.raises(ModelError, match=r"no classifier's output; expected \d+ images x classes, two or more"):
        measure(graph, data, Settings(TRACE, classes=True))


def test_refusals(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    with pytest.raises(InputError, match=r"a label that the model has no class for; expected 0 to 4; found 7"):
        measure(graph, open_data(saved(tmp_path, x=images(2), labels=np.array([0, 7])), graph.inputs), Settings(TRACE))
    with pytest.raises(
        UsageError, match=r"--metric: is no metric; expected hessian, trace, fisher, output; found size"
    ):
        Settings(("size",))
    for bad in ({"probes": 1}, {"tolerance": 0.0}, {"seed": -1}, {"batch": 0}):
        with pytest.raises(UsageError):
            Settings(**bad)
    g = FloatNet(["n", 3, 8, 8])
    dense = load_float(g.model(g.conv("x", 4, 3, 3, "c")))
    with pytest.raises(UsageError, match="needs answers that are classes"):
        measure(dense, open_data(saved(tmp_path, x=images(2)), dense.inputs), Settings(("fisher",)))
