"""Packages of ours as each other's rivals: equal outputs where the integer graph is the same, a plain sentence where
it is not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm.bench import against, packaged
from hawq_tvm.cli import main
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.same_graph import same_graph
from hawq_tvm.measure import limits

from ..models import Graph, residual_net

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can be pinned on Linux only")

QUICK = ["--duration", "0", "--iterations", "2", "--warmup-ms", "0", "--threads", "1"]


def dense(kind: str, inputs: int = 32) -> onnx.ModelProto:
    """One matrix product with weights of a type."""
    g = Graph()
    x = g.qdq(g.input("x", (4, inputs)), 0.05, 3)
    w = g.weight((inputs, 16), kind, axis=None)
    return g.model([g.qdq(g.node("MatMul", [x, w]), 0.1, 7)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.hawq and portable.hawq of one model for two targets, w8.hawq and w4.hawq of two models for the same
    inputs.
    """
    path = tmp_path_factory.mktemp("packages")
    ht.compile(residual_net()).save(path / "tiny.hawq")
    ht.compile(residual_net(), target="x86-64-v2").save(path / "portable.hawq")
    for name, kind in [("w8", "int8"), ("w4", "int4")]:
        ht.compile(dense(kind)).save(path / f"{name}.hawq")
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET", 0.01)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 1 << 20)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, *QUICK, "--json"]) == 0
    fields: dict[str, Any] = json.loads(capsys.readouterr().out)
    return fields


def test_the_c_interface_is_compared_exactly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = bench(capsys, str(folder / "tiny.hawq"), "--against", "c")
    ours, theirs = fields["engines"]
    assert (ours["engine"], theirs["engine"]) == ("hawq-tvm", "c") and theirs[
        "what"
    ] == "the same library through its C interface"
    (row,) = theirs["agreement"]
    assert (row["differing"], row["largest"]) == (0, 0) and theirs["products"] == ours["products"]


def test_one_graph_for_two_targets_is_compared_exactly(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(folder / "portable.hawq")
    fields = bench(capsys, str(folder / "tiny.hawq"), "--against", other)
    ours, theirs = fields["engines"]
    assert (
        theirs["engine"] == other
        and theirs["what"].startswith("another package of the same integer graph")
        and ours["agreement"] == []
    )
    (row,) = theirs["agreement"]
    assert (row["differing"], row["largest"]) == (0, 0) and theirs["products"] == ours["products"] == fields["products"]


def test_other_weights_are_timed_and_not_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = bench(capsys, str(folder / "w4.hawq"), "--against", f"{folder / 'w8.hawq'},{folder / 'w8.hawq'}")
    _, theirs = fields["engines"]
    assert theirs["agreement"] == [] and theirs["tops"] > 0 and theirs["ratio_to_fastest"] >= 1
    assert (
        "1 layers of int8 weights, beside 1 layers of 4-bit weights of ours" in theirs["what"]
        and "timed without comparing outputs" in theirs["what"]
    )
    assert main(["bench", str(folder / "w4.hawq"), "--against", str(folder / "w8.hawq"), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "w8.hawq" in printed and "timed without comparing outputs" in printed and "beside ours" not in printed


def test_one_type_of_weights_and_other_values(folder: Path) -> None:
    beside = ht.load(folder / "w8.hawq")
    model = dense("int8")
    weight = next(i for i in model.graph.initializer if i.dims == [32, 16])
    weight.int32_data[:] = list(reversed(weight.int32_data))
    ht.compile(model).save(folder / "reversed.hawq")
    rival = packaged.Rival(str(folder / "reversed.hawq"), beside)
    assert not rival.same and "1 layers of int8 weights as ours has" in rival.what


def test_records_make_no_other_graph(folder: Path) -> None:
    graph = ht.load(folder / "tiny.hawq").graph
    marked = graph.clone()
    name = next(gv for gv in marked.get_global_vars() if gv.name_hint != "main")
    marked.update_func(name, marked[name].with_attr("hawq.record", "{}"))
    assert same_graph(graph, marked) and not same_graph(graph, ht.load(folder / "w8.hawq").graph)


def test_unequal_outputs_of_one_graph_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = packaged.Packaged.outputs

    def off_by_one(self: packaged.Packaged) -> dict[str, np.ndarray[Any, Any]]:
        return {k: v + np.float32(isinstance(self, packaged.Rival)) for k, v in outputs(self).items()}

    monkeypatch.setattr(packaged.Packaged, "outputs", off_by_one)
    with pytest.raises(ModelError, match="two libraries of one integer graph have different outputs"):
        against.compare(
            ht.load(folder / "tiny.hawq"), None, [str(folder / "portable.hawq")], duration=0, iterations=1, threads=1
        )


@pytest.mark.parametrize(
    "other, words, code",
    [
        ("w8.hawq", "takes other inputs than the package that is measured", 3),
        ("nowhere.hawq", "nowhere.hawq", 3),
        ("nowhere", "no such engine", 2),
    ],
)
def test_refusals(other: str, words: str, code: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder / "tiny.hawq"), "--against", str(folder / other), *QUICK]) == code
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1
