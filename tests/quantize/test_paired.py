"""Paired statistics beside published values, closed forms and a search for the likeliest shares."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from scipy.optimize import minimize_scalar

from hawq_tvm.cli import main
from hawq_tvm.quantize.judge.evaluation import evaluate
from hawq_tvm.quantize.judge.paired import paired

from .networks import FloatNet

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("lost", "gained", "images", "p"),
    [
        (1, 9, 10, 22 / 1024),  # 2 (1 + 10) / 2^10
        (9, 1, 300, 22 / 1024),
        (0, 5, 300, 2 / 32),
        (3, 3, 300, 1.0),
        (0, 0, 300, 1.0),
        (86, 150, 1600, 3.716e-5),  # approval of a prime minister, Agresti, "Categorical Data Analysis"
    ],
)
def test_mcnemar(lost: int, gained: int, images: int, p: float) -> None:
    assert paired(lost, gained, images).p == pytest.approx(p, rel=1e-4)


def test_intervals_that_are_known() -> None:
    found = paired(2, 12, 50)
    assert (found.difference, round(found.low, 4), round(found.high, 4)) == (0.2, 0.0611, 0.3447)
    for images in (1, 300):  # where nothing changed, Z^2 / (n + Z^2)
        found = paired(0, 0, images)
        assert -found.low == pytest.approx(found.high) == pytest.approx(Z**2 / (images + Z**2), rel=1e-6)
    assert paired(0, 10, 10).high == 1 and paired(10, 0, 10).low == -1


@pytest.mark.parametrize(("lost", "gained", "images"), [(4, 9, 40), (0, 7, 120), (30, 11, 900)])
def test_ends_are_a_standard_score_away(lost: int, gained: int, images: int) -> None:
    """The likeliest shares of a given difference, searched for and not solved for."""

    def score(difference: float) -> float:
        def unlikely(q: float) -> float:
            shares = (q, q + difference, 1 - 2 * q - difference)
            counts = (lost, gained, images - lost - gained)
            return -sum(n * math.log(max(s, 1e-300)) for n, s in zip(counts, shares, strict=True) if n)

        bounds = max(0.0, -difference), (1 - difference) / 2
        q = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        return float((gained - lost - images * difference) / math.sqrt(images * (2 * q + difference - difference**2)))

    found = paired(lost, gained, images)
    assert score(found.low) == pytest.approx(Z, rel=1e-4) and score(found.high) == pytest.approx(-Z, rel=1e-4)
    other = paired(gained, lost, images)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_evaluate_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models that answer all but some images alike: a class is the place of the one, and a model swaps two."""
    for name, order in (("one", [0, 1, 2]), ("two", [0, 2, 1])):
        g = FloatNet(["n", 3])
        onnx.save(g.model(g.node("MatMul", "x", g.constant(np.eye(3)[order]))), str(tmp_path / f"{name}.onnx"))
    x = np.eye(3, dtype=np.float32)[[0] * 20 + [1] * 9 + [2]]
    np.savez(tmp_path / "in.npz", x=x, labels=np.array([0] * 20 + [1] * 9 + [1]))  # "one" has 29 right, "two" 21
    found = evaluate(tmp_path / "two.onnx", tmp_path / "in.npz", against=tmp_path / "one.onnx")
    assert (found.lost, found.gained, found.paired) == (9, 1, paired(9, 1, 30))
    options = ["--data", str(tmp_path / "in.npz"), "--against", str(tmp_path / "one.onnx"), "--quiet"]
    assert main(["evaluate", str(tmp_path / "two.onnx"), *options]) == 0
    assert "McNemar's exact p = 0.0215: more than chance" in " ".join(capsys.readouterr().out.split())
    assert main(["evaluate", str(tmp_path / "one.onnx"), *options, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)["against"]
    assert (fields["difference"], fields["mcnemar_p"], fields["confidence"]) == (0.0, 1.0, 0.95)
    assert fields["interval"] == [paired(0, 0, 30).low, paired(0, 0, 30).high]
    assert main(["evaluate", str(tmp_path / "one.onnx"), *options]) == 0
    assert "no finding" in capsys.readouterr().out
