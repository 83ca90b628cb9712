"""The profile of a package: the right kernels in the right order, honest arithmetic, and files that other programs
read.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.core import work
from hawq_tvm.core.errors import PackageError, UsageError
from hawq_tvm.measure import profile
from hawq_tvm.verify import instrument
from hawq_tvm.verify.compare import layer_calls

from ..models import Graph, float_output, residual_net

QUICK: dict[str, Any] = {"warmup_ms": 0, "duration": 0, "iterations": 3, "threads": 1}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def package() -> ht.Package:
    return ht.compile(residual_net())


@pytest.fixture(scope="module")
def report(package: ht.Package) -> profile.ProfileReport:
    return package.profile(**QUICK)


@pytest.fixture(scope="module")
def folder(package: ht.Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.save(tmp_path_factory.mktemp("profile") / "tiny.hawq")


def test_every_kernel_once_in_network_order(package: ht.Package, report: profile.ProfileReport) -> None:
    calls = layer_calls(package.graph)
    assert [r.layer for r in report.rows] == [b.var.name for b in calls] and [r.order for r in report.rows] == list(
        range(len(calls))
    )
    rules = {k["function"]: (k["rule"], k["tile"]) for k in package.report()}
    assert all((r.rule, r.tile) == rules[r.function] for r in report.rows)
    assert report.iterations == 3 and report.threads == 1 and report.machine["cpu"]
    assert all(r.median_ms < report.latency_ms * 10 for r in report.rows) and report.instrument_us > 0
    times = [r.median_ms for r in report.by_time]
    assert times == sorted(times, reverse=True)
    assert sum(n for n, _ in report.rules().values()) == len(calls)


def test_products_and_bytes(package: ht.Package, report: profile.ProfileReport) -> None:
    assert sorted(r.products for r in report.rows if r.products) == sorted(
        [2 * 64 * 8 * 27, 2 * 64 * 8 * 72, 2 * 10 * 8]
    )
    assert report.gop == pytest.approx(2 * 2 * (64 * 8 * 27 + 64 * 8 * 72 + 80) / 1e9)
    first = report.rows[0]
    assert first.layer.startswith("quantizelinear") and first.bytes >= 2 * 3 * 64 * (4 + 1) and first.tops is None
    run = package.run_layers(package.random_inputs(1, 0)[0])
    for row, written in zip(report.rows, run.layers, strict=True):
        assert isinstance(written, np.ndarray) and row.bytes > written.nbytes


def test_a_grouped_convolution_has_the_products_of_its_groups_alone() -> None:
    g = Graph()
    x = g.qdq(g.input("x", [1, 16, 6, 6]), 0.1, 3)
    y = g.qdq(g.conv(x, g.weight([16, 1, 3, 3]), group=16, pads=[1, 1, 1, 1]), 0.2)
    z = g.qdq(g.conv(y, g.weight([8, 4, 1, 1]), group=4), 0.2)
    graph = ht.compile(g.model([float_output(z)])).graph
    found = [work.layer_products(graph[b.value.op]) for b in layer_calls(graph)]
    assert [n for n in found if n] == [16 * 36 * 9, 8 * 36 * 4]


def test_the_arithmetic_of_a_report(package: ht.Package, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians, less the median cost of the instrument; what is outside comes from neighbours, the rest is
    disturbance.
    """

    def measured(vm: Any, call: Any, stopwatch: profile._Stopwatch, *_: Any) -> list[float]:
        stopwatch.costs = [[100, 300, 200] for _ in stopwatch.costs]
        stopwatch.times = [[1_000_200, 90_000_200, 200 + 1000 * i] for i in range(stopwatch.count)]
        kernels = sum(np.array(stopwatch.times)) / 1e6
        return [20.0, 1000.0, float(kernels[2]) + 3 - 0.0002 * stopwatch.count]

    monkeypatch.setattr(profile, "_alternate", measured)
    report = package.profile(**QUICK, limit_tops=0.5)
    assert [r.median_ms for r in report.rows] == [1.0] * len(report.rows)
    assert report.instrument_us == 0.2 and report.latency_ms == 20
    assert report.outside_ms == pytest.approx(sorted([20 - len(report.rows), 1000 - 90 * len(report.rows), 3])[1])
    assert report.kernels_ms + report.outside_ms + report.disturbance_ms == pytest.approx(20)
    assert sum(ms for _, ms, _ in report.parts()) == pytest.approx(20) and report.rows[0].share == 0.05
    row = max(report.rows, key=lambda r: r.products)
    assert row.tops == 2 * row.products / 1e9 and row.share_of_limit == row.tops / 0.5
    assert report.rows[0].share_of_limit is None
    assert replace(row, median_ms=-1e-6).tops is None


def test_the_instrument_runs_the_real_kernels_and_leaves(package: ht.Package) -> None:
    inputs = package.random_inputs(1, 5)[0]
    before = package.run(inputs)
    seen: list[str] = []
    with instrument.watched(package.vm, lambda func, symbol, *_: seen.append(symbol)):
        package.run(inputs)
    count = len(seen)
    assert count > len(package.report())
    package.run(inputs)
    kernels = {k["function"] for k in package.report()}
    stopwatch = profile._Stopwatch(kernels, len(kernels))
    with instrument.watched(package.vm, stopwatch):
        after = package.run(inputs)
    assert all(np.array_equal(before[k], after[k]) for k in before) and all(len(t) == 1 for t in stopwatch.times)
    package.run(inputs)
    assert all(len(t) == 1 for t in stopwatch.times) and len(seen) == count


def test_other_kernels_than_the_graph_has_are_an_error() -> None:
    with pytest.raises(PackageError, match="expected 2 kernel calls; found 0"):
        profile._Stopwatch(set(), 2).run(lambda: None)


@pytest.mark.parametrize(
    "arguments", [{"threads": 0}, {"duration": -1}, {"iterations": 0}, {"limit_tops": 0}, {"limit_tops": float("nan")}]
)
def test_foolish_numbers(package: ht.Package, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        package.profile(**{**QUICK, **arguments})


def test_the_picture(report: profile.ProfileReport) -> None:
    hostile = 'a<b>&"c' + "\x01" + "x" * 120
    times = [0.5 + i for i in range(len(report.rows))]
    rows = tuple(
        replace(r, median_ms=t, layer=hostile if r.order == 1 else r.layer)
        for r, t in zip(report.rows, times, strict=True)
    )
    drawn = replace(report, rows=rows, latency_ms=sum(times), outside_ms=-0.25)
    root = ET.fromstring(drawn.svg())
    texts = [t.text or "" for t in root.iter(f"{SVG}text")]
    assert any(t.startswith(f"{report.name}: ") and "GOP" in t for t in texts) and any(
        report.machine["cpu"] in t for t in texts
    )
    bars = [float(r.attrib["width"]) for r in root.iterfind(f"{SVG}g/{SVG}rect")]
    assert len(bars) == len(rows) + 2 and bars[-2] == 0, "a negative rest has no bar"
    assert bars[:-2] == pytest.approx([bars[0] / 0.5 * t for t in times], abs=0.2)
    assert any("-0.2500 ms" in t for t in texts) and rows[0].layer in texts
    assert any('a<b>&"c�' in (t.text or "") for t in root.iter(f"{SVG}title"))
    assert max(len(r) for r in (t for t in texts if t.startswith("a<b>"))) == 100
    ET.fromstring(replace(report, rows=tuple(replace(r, median_ms=0.0) for r in rows), latency_ms=1e-9).svg())


def test_the_overlay_names_nodes_of_the_onnx_graph(report: profile.ProfileReport) -> None:
    data = report.overlay()
    nodes = {n.name for n in residual_net().graph.node}
    named = set(data["results"]) & nodes
    assert len(named) >= 4 and all(isinstance(v["value"], float) for v in data["results"].values())
    assert [g["stop"] for g in data["gradient"]] == [0, 1]
    ((graph, placed),) = report.overlay(residual_net()).items()
    assert graph == residual_net().graph.name and set(placed["results"]) <= nodes
    assert sum(v["value"] for v in placed["results"].values()) == pytest.approx(report.kernels_ms, abs=1e-4)


def test_names_of_our_own_lead_back_to_a_node() -> None:
    nodes = {"conv.1": "conv.1", "conv": "conv", "y": "last"}
    found = [
        profile._node_of(layer, nodes) for layer in ("conv.1", "conv.1.nhwc", "conv.2.in0", "y", "y.nchw", "other.max")
    ]
    assert found == ["conv.1", "conv.1", "conv", "last", "last", "other.max"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", str(folder), "--duration", "0", "--threads", "1", "--quiet"]
    inputs, svg, overlay = tmp_path / "in.npz", tmp_path / "time.svg", tmp_path / "nodes.json"
    np.savez(inputs, x=np.zeros((2, 3, 8, 8), np.float32))
    assert main([*command, "--inputs", str(inputs), "--svg", str(svg), "--overlay", str(overlay)]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("TOPS", "GOP", "share", "of limit", "outside kernels", "disturbance", "total", "wrote")
    )
    assert ET.parse(svg).getroot().tag == f"{SVG}svg" and json.loads(overlay.read_text())["results"]
    names = {n.name for n in residual_net().graph.node}
    assert any(name in printed for name in names if name.startswith("quantizelinear")), "names are never cut"
    assert {p.name for p in tmp_path.iterdir()} == {"in.npz", "time.svg", "nodes.json"}
    assert main([*command, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["iterations"] == 10 and fields["kernels"][0]["median_ms"] == max(
        k["median_ms"] for k in fields["kernels"]
    )
    assert fields["kernels_ms"] + fields["outside_kernels_ms"] + fields["disturbance_ms"] == pytest.approx(
        fields["latency_ms"], abs=1e-5
    )


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--threads", "0"], 2),
        (["--duration", "-1"], 2),
        (["--svg", "no/such/folder.svg"], 2),
        (["--inputs", "no.npz"], 2),
        (["--model", "m.onnx"], 2),
        (["--overlay", "o.json", "--model", "no.onnx"], 3),
    ],
)
def test_the_command_refuses(
    folder: Path,
    arguments: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", str(folder), "--duration", "0", *arguments]) == code
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_float_tail_is_no_kernel_of_ours() -> None:
    """What the tail takes is outside kernels, or a kernel of its own, but never lost: the order of calls still fits."""
    g = Graph()
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 3, 6, 6]), 0.1, 3), g.weight([4, 3, 1, 1])), 0.2)
    package = ht.compile(g.model([float_output(g.node("Softmax", [y], axis=1))]), allow_float_tail=True)
    assert package.manifest["float_tail"]
    report = package.profile(**QUICK)
    assert [r.layer for r in report.rows] == [b.var.name for b in layer_calls(package.graph)]


def test_models_without_names_for_their_nodes() -> None:
    model = residual_net()
    for node in model.graph.node:
        node.name = ""
    rows = ht.compile(model).profile(**QUICK).rows
    assert len({r.layer for r in rows}) == len(rows)
