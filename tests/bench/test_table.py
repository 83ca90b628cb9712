"""The benchmark page: what it says comes from the measurements, and wrong options end before any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hawq_tvm.bench import peers
from hawq_tvm.studies import table


def engine(name: str, median: float, ratio: float) -> dict[str, Any]:
    agreement = [] if name == "hawq-tvm" else ["output: 1 of 1000 elements differ"]
    return {
        "engine": name,
        "version": "1.2",
        "what": "a model",
        "latency_ms": {"median": median, "min": median / 2},
        "cpu_ms": {"median": median / 4 if name == "hawq-tvm" else median, "min": median / 4},
        "ratio_to_fastest": ratio,
        "tops": 0.25,
        "share_of_limit": 0.5,
        "agreement_text": agreement,
    }


def comparison(threads: int) -> dict[str, Any]:
    machine = {"cpu": "Some(R) CPU @ 2 GHz", "cores": 2, "system": "Linux 6", "python": "3.11", "tvm": "0.27"}
    limits = {"int8_tops_per_core": {"vpdpbusd 512": 0.5}, "l2_read_gb_per_s": 100.0, "memory_read_gb_per_s": 10.0}
    engines = [engine("hawq-tvm", 8.0, 2.0), engine("onnxruntime", 4.0, 1.0)]
    return {"machine": machine, "threads": threads, "others_share": 0.125, "limits": limits, "engines": engines}


def test_the_page_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "parse", lambda text: text.split(","))
    monkeypatch.setattr(table.machine, "available_cores", lambda: 2)
    monkeypatch.setattr(table, "prepare", lambda net, batch, work: (work / "m.onnx", work / "m.hawq"))
    monkeypatch.setattr(table, "measure", lambda model, package, threads, *_: comparison(threads))
    assert table.main(["--nets", "resnet18,resnet50", "--batches", "1,8", "--output", str(tmp_path)]) == 0
    (page,), (numbers,) = tmp_path.glob("*.md"), tmp_path.glob("*.json")
    assert page.stem == numbers.stem and page.stem.startswith("some-cpu-2-ghz-20")
    text = page.read_text()
    assert text in capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| resnet")]
    assert (
        len(lines) == 8
        and "| resnet50 | 8 | 2 | 8.00 (4.00) | 4.00 (2.00) | 2.00 | 0.50 | 0.250 | 50.0 % | 12 % |" in lines
    )
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    results = json.loads(numbers.read_text())["results"]
    assert [(r["net"], r["batch"], r["threads"]) for r in results][:3] == [
        ("resnet18", 1, 1),
        ("resnet18", 1, 2),
        ("resnet18", 8, 1),
    ]


def test_a_pair_is_measured_beside_its_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    monkeypatch.setattr(peers, "parse", lambda text: text.split(","))
    monkeypatch.setattr(table, "measure", lambda *given: seen.append(given) or comparison(given[2]))
    options = ["--nets", "none", "--threads", "1", "--output", str(tmp_path), "--pairs"]
    assert table.main([*options, "a=a.hawq,a.onnx", "b=b.hawq,b.onnx,b.npz"]) == 0
    assert [(g[0].name, g[1].name, *(p.name for p in g[5:])) for g in seen] == [
        ("a.onnx", "a.hawq"),
        ("b.onnx", "b.hawq", "b.npz"),
    ]
    # Of a pair there is no float network to run in bf16.
    assert all(g[4] == ["openvino", "onnxruntime"] for g in seen)
    assert "| b | 1 | 1 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        table.main([*options, "a=a.hawq"])


@pytest.mark.parametrize(
    "options",
    [["--nets", "alexnet"], ["--threads", "9999"], ["--batches", "0"], ["--batches", "x"], ["--against", "nobody"]],
)
def test_wrong_options(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = table.main(["--against", "onnxruntime", *options])
    except SystemExit as e:  # argparse's own
        code = e.code
    assert code == 2 and list(tmp_path.iterdir()) == []


def test_a_failed_command_ends_with_its_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "prepare", lambda net, batch, work: (work / "none.onnx", work / "none.hawq"))
    options = [
        "--nets",
        "resnet18",
        "--threads",
        "1",
        "--against",
        "onnxruntime",
        "--work",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    assert table.main(options) == 3
    assert "none.hawq" in capsys.readouterr().err and not (tmp_path / "out").exists()
