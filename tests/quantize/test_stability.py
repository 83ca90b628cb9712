"""Traces of unequal numbers of samples, whether a choice of bits stands within the errors, and what is measured further
until it does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hawq_tvm.cli import main
from hawq_tvm.quantize.allocate.budgets import Budget
from hawq_tvm.quantize.allocate.measurement import SAMPLES, measure
from hawq_tvm.quantize.allocate.plan import problem
from hawq_tvm.quantize.allocate.sensitivity import Sensitivities, Settings
from hawq_tvm.quantize.allocate.sizes import Sizes
from hawq_tvm.quantize.allocate.stability import DRAWS, Verdict, judge
from hawq_tvm.quantize.allocate.table import Row, Table
from hawq_tvm.quantize.allocate.traces import added, estimated, spread
from hawq_tvm.quantize.network.answers import Answers
from hawq_tvm.quantize.network.data import open_data
from hawq_tvm.quantize.network.load import load_float

from .networks import images, residual_net


def test_every_layer_has_its_own_number_of_samples() -> None:
    samples = np.array([[1.0, 2.0], [3.0, 8.0], [5.0, np.nan], [9.0, np.nan]])
    for counts, means, errors in (([4, 2], [4.5, 5.0], [np.hypot(1, 2) / 2, 3.0]), ([2, 2], [2.0, 5.0], [1.0, 3.0])):
        trace, error = estimated(samples, np.array(counts))
        assert np.array_equal(trace, means) and np.allclose(error, errors, rtol=1e-15, atol=0)
    # Batches of means 2 and 7: deviation sqrt(12.5), of two; of one batch nothing is known.
    assert np.allclose(spread(samples, np.array([4, 2]), 2), [np.sqrt(12.5 / 2), np.inf], rtol=1e-15, atol=0)
    assert np.isinf(spread(samples, np.array([4, 2]), 1)).all()
    # Two batches that take turns stay two: means 3 and 7, each seen three times.
    turns = np.array([[2.0], [4.0], [6.0], [8.0]] * 3)
    assert np.allclose(spread(turns, np.array([12]), 2), [np.sqrt(8 / 2)], rtol=1e-15, atol=0)
    longer = added(samples, 6)
    assert longer.shape == (6, 2) and np.isnan(longer[4:]).all() and added(longer, 3) is longer


def measured(errors: Any) -> tuple[Sensitivities, Any]:
    """Seven layers: of a1, b1 and b2 two can keep 8 bits, a1 alone minds much, b1 and b2 are near each other."""
    graph = load_float(residual_net())
    values = np.array([0.0, 9.0, 0.0, 0.0, 1.0, 1.1, 0.0])
    ones, nothing = np.ones(7), np.zeros(7)
    sizes = Sizes(ones, ones, ones)
    arrays = {"weight_trace": values, "weight_error": np.array(errors)}
    arrays |= {"activation_trace": nothing, "activation_error": nothing, "weight_spread": nothing}
    arrays |= {"activation_spread": nothing, "weight_square": np.array([[0.0, 1.0]] * 7)}
    arrays |= {"activation_square": np.zeros((7, 2))}
    settings = Settings(("trace",), choices=("W8A8", "W4A4"))
    found = Sensitivities(
        graph, settings, sizes, "", Answers(True, "labels"), 8, 4, counts=np.full(7, 4), arrays=arrays
    )

    def table_of(drawn: Any) -> Table:
        values = found.values("trace") if drawn is None else drawn[0]
        rows = [
            Row(
                one.name,
                10 * (one.name in ("a1", "b1", "b2")),
                1,
                dict(zip(settings.choices, map(float, v), strict=True)),
            )
            for one, v in zip(graph.layers, values, strict=True)
        ]
        return Table(tuple(rows), settings.choices)

    return found, table_of


def test_the_layers_that_a_choice_hangs_on() -> None:
    budgets = [Budget.parse("size=25B")]  # 200 bits: of three layers of 10 weights two have 8 bits, one has 4
    found, table_of = measured([0.0] * 7)
    verdict = judge(found, table_of, budgets, 0)
    assert verdict.stable and verdict.to_dict() | {"draws": DRAWS, "margin": 0} == {
        "stable": True,
        "draws": DRAWS,
        "margin": 0,
        "other": 0,
        "gain": 0.0,
        "undecided": [],
    }
    # b1 and b2 are 0.1 apart: errors of 0.5 let the one be the other, a1's error of 1 does not matter.
    found, table_of = measured([0.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.0])
    verdict = judge(found, table_of, budgets, 0)
    assert not verdict.stable and 0.05 < verdict.gain <= 1 and set(verdict.undecided) == {"b1", "b2"}
    # Images that were not seen yet count by their spread, too.
    found, table_of = measured([0.0] * 7)
    found.arrays["weight_spread"] = np.array([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0])
    assert judge(found, table_of, budgets, 0).stable
    found.counts = np.full(7, 2)  # one batch of two
    assert set(judge(found, table_of, budgets, 0).undecided) == {"b1", "b2"}
    # What signs make of that is no part of the images'.
    found.arrays["weight_error"] = np.array([0.0, 0.0, 0.0, 0.0, 1e-9, 1e-9, 0.0])
    assert set(judge(found, table_of, budgets, 0).undecided) == {"b1", "b2"}
    same, _ = found.drawn(np.random.default_rng(0))
    found.arrays["weight_spread"] = found.arrays["weight_error"]
    assert not np.array_equal(found.drawn(np.random.default_rng(0))[0], same)
    assert judge(found, table_of, budgets, 0).stable
    # Two choices that are as good as each other need no choice.
    found, table_of = measured([0.0, 0.0, 0.0, 0.0, 0.01, 0.01, 0.0])
    assert judge(found, table_of, budgets, 0).stable


def test_only_what_matters_is_measured_further(tmp_path: Path) -> None:
    graph, settings, state = (
        load_float(residual_net()),
        Settings(("trace",), probes=40, batch=4),
        tmp_path / "state.npz",
    )
    np.savez(tmp_path / "in.npz", x=images(12))
    found = problem(graph, tmp_path / "in.npz", settings, budgets=["bops=0.4"], state=state).sensitivities
    assert found is not None and found.verdict is not None and found.counts.min() == SAMPLES
    assert found.verdict.stable == found.converged == (not found.verdict.undecided)
    # What was measured for one choice serves another, to the result of a run of its own.
    one = problem(graph, tmp_path / "in.npz", settings, budgets=["size=0.6"], state=state).sensitivities
    other = problem(graph, tmp_path / "in.npz", settings, budgets=["size=0.6"]).sensitivities
    assert one is not None and other is not None and np.array_equal(one.counts, other.counts)
    assert all(np.array_equal(v, other.arrays[k]) for k, v in one.arrays.items())


def test_the_effort_is_kept(tmp_path: Path) -> None:
    graph = load_float(residual_net())
    np.savez(tmp_path / "in.npz", x=images(12))
    data = open_data(tmp_path / "in.npz", graph.inputs)
    asked: list[tuple[int, ...]] = []

    def never(found: Sensitivities) -> Verdict:
        asked.append(tuple(found.counts))
        return Verdict(3, 0.5, ("b1", "a2"))

    found = measure(graph, data, Settings(("trace",), probes=40, batch=4), judge=never)
    # The named layers have twice as many every time, until seven times 40 are spent.
    assert asked[0] == (16,) * 7 and asked[1] == (16, 16, 32, 16, 32, 16, 16) and asked[2][2] == asked[2][4] == 64
    assert found.counts.sum() == 7 * 40 and found.counts[2] == found.counts[4] == 100 and not found.converged
    assert found.probes == 40 and found.provenance()["most_probes"] == 100
    assert found.provenance()["decision"]["undecided"] == ["b1", "a2"]
    # A layer's own samples are what they are in a run of all.
    every = measure(graph, data, Settings(("trace",), probes=100, batch=4, tolerance=1e-12))
    for side in ("weight", "activation"):
        assert np.allclose(every.arrays[f"{side}_trace"][[2, 4]], found.arrays[f"{side}_trace"][[2, 4]], rtol=1e-4)


@pytest.mark.parametrize("probes", ["64", "2"])
def test_the_report(probes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(residual_net(), str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "in.npz", x=images(12))
    command = ["allocate", str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "in.npz"), "--budget", "bops=0.5"]
    command += ["--metric", "trace"]
    assert main([*command, "--probes", probes, "--batch", "4", "-o", str(tmp_path / "b.json"), "--quiet"]) == 0

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    decision = json.loads((tmp_path / "b.json").read_text(), parse_constant=refuse)["measured"]["decision"]
    told = "the choice stands" if decision["stable"] else "the choice does NOT stand yet"
    assert told in capsys.readouterr().out and decision["draws"] == DRAWS
