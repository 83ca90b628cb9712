"""`allocate` and `latency` as a user meets them: files, JSON, exit codes, refusals with nothing half-written; and
measured latencies.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import hawq_tvm as ht
from hawq_tvm import quantize
from hawq_tvm.cli import main
from hawq_tvm.compiler import pipeline
from hawq_tvm.core.work import products
from hawq_tvm.quantize.allocate import latency as latencies
from hawq_tvm.quantize.allocate.latency import layer_model, measure_latencies
from hawq_tvm.quantize.allocate.plan import read_latencies
from hawq_tvm.quantize.allocate.table import CHOICES, read_bits
from hawq_tvm.quantize.network.load import load_float

from .networks import TorchNet, images, residual_net
from .published import RESNET50, table


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocate")
    onnx.save(residual_net(), str(folder / "net.onnx"))
    np.savez(folder / "in.npz", x=images(8))
    (folder / "resnet50.json").write_text(json.dumps(table(RESNET50).to_dict()))
    return folder


def arguments(place: Path, *more: str) -> list[str]:
    return ["allocate", str(place / "net.onnx"), "--calib", str(place / "in.npz"), "--quiet", "--probes", "16", *more]


def test_allocate_a_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits, front, plot = (tmp_path / n for n in ("bits.json", "front.json", "front.svg"))
    options = ["--budget", "size=0.5", "--budget", "bops=0.6", "--metric", "hessian,trace,fisher,output", "-o"]
    options.append(str(bits))
    assert main(arguments(place, *options, "--pareto", str(front), "--plot", str(plot))) == 0
    out = capsys.readouterr().out
    assert (
        "fixed W8A8" in out
        and "Kullback-Leibler distance to the float network's answers" in out
        and "size=0.5" in out
        and "fisher" in out
    )
    graph = load_float(place / "net.onnx")
    chosen = read_bits(bits, [one.name for one in graph.layers])
    assert chosen["stem"] == chosen["fc"] == (8, 8) and chosen["a1"] == chosen["short"]
    fields = json.loads(bits.read_text())
    assert all(b["reached"] <= b["limit"] for b in fields["budgets"]) and fields["solver"]["status"] == "optimal"
    assert (
        fields["measured"]["probes"] == 16
        and fields["measured"]["seed"] == 0
        and fields["measured"]["images"] == fields["measured"]["probed_images"] == 8
    )
    assert {
        "layer",
        "choice",
        "weight_trace",
        "weight_error",
        "size",
        "bops",
        "sensitivity",
        "fisher",
        "output",
        "share",
        "trace",
    } <= set(fields["report"][0])
    assert sum(r["share"] for r in fields["report"]) == pytest.approx(fields["sensitivity"])
    fronts = json.loads(front.read_text())
    assert (
        [f["resource"] for f in fronts["fronts"]] == ["size", "bops"]
        and len(fronts["layers"]) == 7
        and plot.read_bytes().startswith(b"<?xml")
    )
    cost, value, digits = fronts["fronts"][0]["points"][0]
    assert len(digits) == 7 and cost > 0 and value > 0
    # The same command takes what is measured from the state beside it.
    assert (tmp_path / "bits.state.npz").exists()
    assert main(arguments(place, *options)) == 0 and json.loads(bits.read_text())["report"] == fields["report"]


def test_measured_latencies_are_kept(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget of latency measures this machine's kernels once; the table beside the bits serves the next run."""
    calls: list[int] = []

    def time_each(contenders: Any, *_: Any) -> list[float]:
        calls.append(len(contenders))
        return [4.0, 3.0, 2.0]

    monkeypatch.setattr(latencies, "time_each", time_each)
    bits, kept = tmp_path / "bits.json", tmp_path / "bits.latency.json"
    fixed = str(place / "fixed.onnx")
    onnx.save(residual_net(1), fixed)
    command = ["allocate", fixed, "--calib", str(place / "in.npz"), "--probes", "2", "--budget", "latency=80%"]
    assert main([*command, "-o", str(bits)]) == 0 and calls == [3] * 5
    assert "bits.latency.json, for --latency" in capsys.readouterr().err
    first = json.loads(bits.read_text())
    assert first["totals"]["latency"] <= 0.8 * 7 * 4 and first["measured"]["latency"] == str(kept)
    assert json.loads(kept.read_text())["layers"]["a1"]["latency_us"] == {"W8A8": 4.0, "W4A8": 3.0, "W4A4": 2.0}
    assert main([*command, "-o", str(bits), "--latency", str(kept)]) == 0 and len(calls) == 5
    assert json.loads(bits.read_text())["layers"] == first["layers"]


def test_pairs_apart(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and activations are chosen apart from what --choices names, widest first; a package of them is exact."""
    bits = tmp_path / "bits.json"
    assert main(arguments(place, "--budget", "bops=0.5", "--choices", "W4A4,W8A4,W4A8,W8A8", "-o", str(bits))) == 0
    capsys.readouterr()
    fields = json.loads(bits.read_text())
    assert {r["choice"] for r in fields["report"]} <= {"W8A8", "W8A4", "W4A8", "W4A4"}
    assert "share" in fields["report"][1] and fields["measured"]["decision"]["draws"]
    layers = {n: {"weight": 8, "activation": 4} for n in fields["layers"]}
    bits.write_text(json.dumps({"layers": layers}))
    found = quantize.post_training(
        str(place / "net.onnx"), place / "in.npz", quantize.Recipe(bits, rounding="nearest", observer="minmax")
    )
    assert {(r["weight_bits"], r["activation_bits"]) for r in found.layers} == {(8, 4)}
    package = ht.compile(found.model, shapes={"x": (1, 3, 8, 8)})
    package.verify(random=2, seed=0).raise_if_mismatch()
    assert package.prove().ok


def test_allocate_a_table(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["allocate", "--table", str(place / "resnet50.json"), "--json"]
    assert main([*options, "--budget", "bops=0.5", "--budget", "latency=0.8"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (
        len(fields["layers"]) == 52
        and fields["solver"]["seconds"] < 1
        and {b["resource"] for b in fields["budgets"]} == {"bops", "latency"}
    )
    assert main([*options, "--budget", "bops=0.5", "--fix", "x44=W8A8"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"]["x44"] == {"weight": 8, "activation": 8}
    assert main([*options, "--plot", str(tmp_path / "f.png")]) == 0 and (tmp_path / "f.png").read_bytes().startswith(
        b"\x89PNG"
    )
    assert json.loads(capsys.readouterr().out)["front_points"]["size"] == 201


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "size=40%"], "no assignment meets this budget"),
        (["--budget", "speed=1"], "a budget is not understood"),
        (["--budget", "size=0.5", "--fix", "a3=W8A8"], "there is no weighted layer 'a3'"),
        (["--budget", "size=0.5", "--fix", "a1=W9A8"], "bit width out of range"),
        (["--budget", "size=0.5", "--fix", "a1=W2A2"], "is no choice of this table"),
        (["--budget", "size=0.5", "--choices", "W8A8,W5A8"], "--choices: is a bit width out of range"),
        (["--budget", "size=0.5", "--choices", "W8A8,W8A8"], "--choices: names a choice twice"),
        (["--budget", "size=0.5", "--choices", "8"], "--choices: is no choice of bits"),
        (["--budget", "size=0.5", "--choices", "W4A8,W4A4"], "--choices: lacks the choice that the first and last"),
        (["--budget", "size=0.5", "--batch", "1000"], "--batch 1000: is more images than there are"),
        (["--budget", "size=0.5", "--fix", "a1"], "is not understood"),
        (["--budget", "size=0.5", "--metric", "x"], "is no metric"),
        ([], "there is nothing to allocate for"),
        (["--budget", "size=0.5", "--plot", "f.pdf"], "PNG or SVG"),
        (["--budget", "size=0.5", "--fix", "a1=W8A8", "--fix", "short=W4A4"], "which is tied to it"),
        (["--budget", "latency=0.5", "--latency", "none.json"], "cannot be read"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals(
    options: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(place, *options, "-o", str(tmp_path / "bits.json"), "--state", str(place / "state.npz"))) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and list(tmp_path.iterdir()) == []


def test_a_picture_needs_matplotlib_before_anything_is_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    state = tmp_path / "kept.npz"
    assert main(arguments(place, "--plot", str(tmp_path / "f.svg"), "--state", str(state))) == 2
    assert "this needs matplotlib" in capsys.readouterr().err and not state.exists()


def test_wrong_commands(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, bits, budget = str(place / "net.onnx"), str(tmp_path / "bits.json"), ["--budget", "size=0.5"]
    for command, code, message in [
        (["allocate", *budget, "-o", bits], 2, "takes a model or --table"),
        (["allocate", model, *budget, "-o", bits], 2, "needs calibration data"),
        (["allocate", model, "--calib", "none", *budget, "-o", bits], 2, "none: does not exist"),
        (["allocate", "none.onnx", "--calib", "none", *budget, "-o", bits], 3, "no such file"),
        (["allocate", model, "--calib", "none", *budget], 2, "where to write the bits"),
        (["allocate", model, "--calib", str(place), *budget, "-o", bits, "--mean", "a"], 2, "is no list of numbers"),
        (["allocate", "--table", str(place / "net.onnx"), *budget, "-o", bits], 2, "is no JSON"),
        (["allocate", "--table", str(place / "none.json"), *budget, "-o", bits], 2, "cannot be read"),
        (
            ["allocate", "--table", "t.json", "--choices", "W8A8,W4A4", *budget, "-o", bits],
            2,
            "--choices: is for a model",
        ),
        (
            ["allocate", "--table", str(place / "resnet50.json"), *budget, "-o", str(tmp_path / "no" / "bits.json")],
            2,
            "no folder",
        ),
        (["latency", model, "-o", str(tmp_path / "t.json"), "--target", "x86-amx-9"], 2, "did you mean x86-amx?"),
    ]:
        assert main([*command, "--quiet"]) == code, command
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_labels_beyond_the_classes_leave_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", x=images(4), labels=np.array([1, 2, 3, 9]))
    assert (
        main(
            [
                "allocate",
                str(place / "net.onnx"),
                "--calib",
                str(tmp_path / "in.npz"),
                "--budget",
                "size=0.5",
                "-o",
                str(tmp_path / "b.json"),
                "--quiet",
            ]
        )
        == 2
    )
    assert "a label that the model has no class for" in capsys.readouterr().err and not (tmp_path / "b.json").exists()


def test_latencies_are_measured_and_used(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, bits = tmp_path / "table.json", tmp_path / "bits.json"
    assert main(["latency", str(place / "net.onnx"), "-o", str(path), "--threads", "1", "--quiet"]) == 0
    assert "all layers: W8A8" in capsys.readouterr().out
    times = read_latencies(path)
    assert set(times) == {"stem", "a1", "a2", "short", "b1", "b2", "fc"} and all(
        0 < t < 1e6 for one in times.values() for t in one.values()
    )
    fields = json.loads(path.read_text())
    assert (
        fields["threads"] == 1
        and fields["layers"]["a1"]["macs"] == 6 * 4 * 9 * 16
        and set(fields["layers"]["a1"]["rule"]) == set(CHOICES)
    )
    assert times["b1"] == times["b2"]  # one structure, measured once
    assert main(arguments(place, "--budget", "latency=0.9", "--latency", str(path), "-o", str(bits))) == 0
    (budget,) = json.loads(bits.read_text())["budgets"]
    assert budget["resource"] == "latency" and budget["reached"] <= budget["limit"]
    path.write_text(json.dumps({"layers": {n: e for n, e in fields["layers"].items() if n != "b1"}}))
    assert main(arguments(place, "--budget", "latency=0.9", "--latency", str(path), "-o", str(bits))) == 2
    assert "lacks the latency of b1" in capsys.readouterr().err


def test_weights_of_any_width_are_chosen_and_written(place: Path, tmp_path: Path) -> None:
    bits, written = tmp_path / "bits.json", tmp_path / "q.onnx"
    choices = "W8A8,W6A8,W4A8,W3A8,W2A8"
    assert main(arguments(place, "--budget", "size=40%", "--choices", choices, "-o", str(bits))) == 0
    fields = json.loads(bits.read_text())
    assert fields["budgets"][0]["reached"] <= fields["budgets"][0]["limit"]
    asked = {name: entry["weight"] for name, entry in fields["layers"].items()}
    assert len(set(asked.values()) - {4, 8}) > 0
    files = [str(place / "net.onnx"), "--calib", str(place / "in.npz"), "-o", str(written)]
    assert main(["quantize", *files, "--bits", str(bits), "--rounding", "nearest"]) == 0
    codes = {t.name: numpy_helper.to_array(t).astype(int) for t in onnx.load(written).graph.initializer}
    for name, width in asked.items():
        assert np.abs(codes[f"{name}_weight_quantized"]).max() <= 2 ** (width - 1)


@pytest.mark.parametrize("choice", (*CHOICES, "W2A8", "W3A4", "W6A8"))
def test_layers_are_compiled_with_their_own_window(choice: str) -> None:
    graph = load_float(residual_net())
    for name, shape in (("short", (1, 4, 8, 8)), ("fc", (1, 6))):
        layer = graph.layer(name)
        model = layer_model(layer, graph.parameters[layer.weight], shape, choice)
        module = pipeline.to_packed(pipeline.import_annotated(model))
        assert products(module) == {"short": 6 * 4 * 16, "fc": 5 * 6}[name]


def test_light_imports() -> None:
    code = (
        "import sys, hawq_tvm.cli.commands, hawq_tvm.quantize.network.data\n"
        "from hawq_tvm.quantize.allocate import allocation, pareto, plan\n"
        "print([m for m in ('torch', 'scipy', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("torch", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, module, None)
    options = ["--budget", "size=0.5", "-o", str(tmp_path / "b.json")]
    assert (
        main(arguments(place, *options)) == main(["allocate", "--table", str(place / "resnet50.json"), *options]) == 2
    )
    err = capsys.readouterr().err
    assert "needs torch" in err and "needs scipy.optimize" in err and "pip install 'hawq-tvm[quantize]'" in err


def test_python_takes_programs(tmp_path: Path) -> None:
    program = torch.export.export(TorchNet().eval(), (torch.from_numpy(images(2)),))
    np.savez(tmp_path / "in.npz", x=images(4))
    problem = quantize.problem(program, tmp_path / "in.npz", quantize.Settings(probes=16), fixed={"deep": "W4A8"})
    assert problem.allocate(["size=1"]).assignment == {
        "stem": "W8A8",
        "deep": "W4A8",
        "fc": "W8A8",
    } and problem.table.resources() == ["size", "bops"]


def test_every_structure_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def time_each(contenders: Any, *_: Any) -> list[float]:
        calls.append(contenders)
        return [float(len(calls)), 2.0, 3.0]

    monkeypatch.setattr(latencies, "time_each", time_each)
    report = measure_latencies(load_float(residual_net()))
    assert len(calls) == 5 and all(len(c) == 3 for c in calls)
    assert (
        report.latencies["a2"] == report.latencies["b1"] == report.latencies["b2"]
        and report.latencies["stem"]["W8A8"] == 1.0
    )
