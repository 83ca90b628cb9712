"""The table of producers: a small, quick part of it from the file to the page, and what the page says of the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torchao", reason="torchao is not installed: pip install --no-deps torchao")
pytest.importorskip("onnxruntime.quantization", reason="onnxruntime is not installed")

from hawq_tvm.studies.producers import __main__ as study
from hawq_tvm.studies.producers import page, worker
from hawq_tvm.studies.producers.tools import PRODUCERS

from ..models import Graph, float_output

ROW = {
    "verdict": "integers",
    "kernels": 14,
    "float": {},
    "verified": True,
    "proved": True,
    "thresholds": 100,
    "differing": 0,
    "apart": 0.0,
    "indices": True,
}


def run(work: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """The command's exit code, its numbers, and its page."""
    output = work / "page.md"
    code = study.main(["--work", str(work), "--output", str(output), *options])
    return code, json.loads((work / "producers.json").read_text())["rows"], output.read_text()


def test_a_part_of_the_table(tmp_path: Path) -> None:
    """Each file is exact, proved, and equal to its producer's simulation; an earlier run's rows are kept."""
    options = "--networks", "quartznet", "--producers", "ort,pt2e-xnnpack,nncf"
    code, rows, text = run(tmp_path, *options)
    wanted = {"quartznet.script.ort", "quartznet.dynamo.ort", "quartznet.pt2e-xnnpack"}
    assert code == 0 and wanted <= set(rows)
    for key in wanted:
        assert rows[key] == {**rows[key], "verdict": "integers", "verified": True, "proved": True, "differing": 0}
        assert rows[key]["apart"] < 1e-3
    assert f"| quartznet, TorchScript |  | {page.cell(rows['quartznet.script.ort'])} |  |" in text
    if not PRODUCERS["nncf"].version:
        assert rows["quartznet.script.nncf"] == {"verdict": "missing", "sentence": "nncf is not installed"}
        assert "1. nncf is not installed" in text and "2 lack their tool" in text
    (tmp_path / "quartznet.script.ort.onnx").write_bytes(b"read again, this would be refused")
    assert run(tmp_path, *options, "--resume")[1:] == (rows, text)
    code, rows, text = run(tmp_path, *options, "--inspect", "--exporters", "dynamo")
    assert code == 0 and rows["quartznet.dynamo.ort"]["verdict"] == "integers" and "layers, inspected" in text


def test_what_ends_a_worker_costs_one_file(tmp_path: Path) -> None:
    """A refusal, an error of a tool, and a time limit: the sentence of each, and the files behind them are done."""
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\0")
    done: list[tuple[worker.Task, dict[str, Any]]] = []
    tasks = [
        ("judge", "quartznet", str(broken)),
        ("make", "quartznet", "", "ort", str(broken), str(tmp_path / "never.onnx")),
        ("judge", "no such network", str(broken)),
        ("judge", "quartznet", str(broken)),
    ]
    worker.run(tasks, 300, lambda task, found: done.append((task, found)))
    assert [task for task, _ in done] == tasks
    found = [f for _, f in done]
    assert found[0]["verdict"] == "failed" and "broken.onnx" in found[0]["sentence"] and found[3] == found[0]
    assert [f["verdict"] for f in found[1:3]] == ["failed", "failed"] and "no such network" in found[2]["sentence"]
    worker.run(tasks[:1], 0.01, lambda task, found: done.append((task, found)))
    assert done[-1][1] == {"verdict": "failed", "sentence": "not done in 0.01 s"}


def test_the_page() -> None:
    """Every verdict has its words, equal sentences one number, and the sums count what was compiled."""
    tail = {**ROW, "verdict": "float tail", "float": {"topk": 1, "add": 2}, "apart": 1.25, "differing": 3}
    wrong = {**ROW, "verified": False, "proved": False, "indices": False}
    refused = {"verdict": "refused", "sentence": "no  such\nthing", "runs": "ONNX Runtime", "state": "abc"}
    ranged = {**ROW, "ranges": {"x": [-1.0, 2.0]}, "state": "def"}
    rows = {
        "unet.script.ort": ROW,
        "unet.script.nncf": tail,
        "unet.dynamo.ort": wrong,
        "unet.dynamo.nncf": refused,
        "unet.pt2e-x86": refused,
        "ssd.script.ort": ranged,
        "unet.pt2e-arm": {"verdict": "integers", "layers": 16, "float_layers": 0},
        "unet.pt2e-xnnpack": {"verdict": "float tail", "layers": 15, "float_layers": 2},
    }
    text = page.markdown({"rows": rows, "versions": dict.fromkeys(PRODUCERS, "")})
    assert "| unet, TorchScript |  | 14 kernels; 0 |  | 14 kernels; 2 add and 1 topk; 1.2 |" in text
    assert "| unet, torch.export |  | 14 kernels; 0; NOT EXACT; NOT PROVED; other indices |  | refused (1) |" in text
    assert (
        "| unet | refused (1) | 16 layers, inspected | 15 layers and 2 of float, inspected |  |  |" in text
        and "\n1. no such thing (ONNX Runtime runs the file)\n" in text
    )
    assert "| ssd, TorchScript |  | 14 kernels; --range; 0 |" in text
    assert "Judged by abc; by def: ssd.script.ort." in text
    alone = page.markdown({"rows": {"unet.script.ort": ROW}, "versions": dict.fromkeys(PRODUCERS, "")})
    assert "Judged by" not in alone
    plain = " ".join(text.split())
    assert "4 files compile to integers alone, 2 with a float tail; 2 are refused and 0 failed" in plain
    assert "2 were only inspected" in plain and "Of 4 that were built, not exact: 1. Not proved: 1." in plain
    assert "3 of 400 thresholds differ" in plain and "nncf not installed" in plain


def test_unknown_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert study.main(["--networks", "unet,none", "--work", str(tmp_path / "work")]) == 2
    assert "--networks: is not known here; expected yolo, ssd" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_file_whose_input_has_no_range_is_given_its_inputs(tmp_path: Path) -> None:
    """Refused without it, exact with it; and what is refused for good says who runs it."""
    from hawq_tvm.studies.producers.judge import judge

    g = Graph()
    x = g.input("in", [2, 4])
    y = g.node("MatMul", [g.qdq(g.node("Neg", [x]), 0.05, 128), g.weight([4, 4], axis=None)])
    y = g.qdq(g.node("Add", [x, g.node("Mul", [y, x])]), 0.1, 128)
    path, draws = tmp_path / "m.onnx", [{"x": np.random.default_rng(i).random((2, 4), np.float32)} for i in range(2)]
    onnx.save(g.model([float_output(y)]), path)
    row = judge(path, draws)
    ends = [float(f([d["x"] for d in draws])) for f in (np.min, np.max)]
    assert row["verdict"] == "integers" and list(row["ranges"]["in"]) == ends and row["verified"] and row["apart"] <= 1
    for op, runner in (("Mod", "ONNX Runtime"), ("NoSuchOperator", "")):
        behind = g.node(op, [y, y], **({"fmod": 1} if op == "Mod" else {}))
        last = g.node("MatMul", [g.qdq(behind, 0.1, 128), g.weight([4, 4], axis=None)])
        onnx.save(g.model([float_output(g.qdq(last, 0.1, 128))]), path)
        row = judge(path, draws)
        assert (row["verdict"], row["runs"]) == ("refused", runner)
