"""The GPU's tables from a made-up report, and `bench` on a driver that only pretends."""

from __future__ import annotations

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import tvm
from rich.console import Console

import hawq_tvm as ht
from deploy.gpu_check import timing
from deploy.machine import driver
from hawq_tvm import cli
from hawq_tvm.bench.gpu import on_gpu
from hawq_tvm.cli.show_bench import show
from hawq_tvm.studies import gpu_table

from ..models import residual_net
from .test_gpu_runner import Functions


def _times(ms: float) -> dict[str, Any]:
    return {"median_ms": ms, "p10_ms": ms / 2, "p90_ms": 2 * ms, "min_ms": ms / 2, "iterations": 9}


@pytest.fixture
def report() -> dict[str, Any]:
    names = [("resnet50", b, s) for b in (1, 8) for s in (64, 224)]
    return {
        "bundle": "0" * 64,
        "date": "2026-01-02",
        "target": "cuda-sm90",
        "producer": {"tvm": "0.27", "cuda": "13.0"},
        "left_out": ["time resnet18-w8a8-224-b1"],
        "failed": {"limits": "why"},
        "machine": {
            "gpu": "NVIDIA H200",
            "driver_cuda": "13.1",
            "cpu": "some CPU",
            "cores": 16,
            "system": "Linux 6",
            "python": "3.12.3",
            "torch": "2.11",
        },
        "entries": [
            {"name": f"{n}-w8a8-{s}-b{b}", "net": n, "precision": "w8a8", "batch": b, "size": s, "verifiable": True}
            for n, b, s in names
        ],
        "verify": {
            "resnet50-w8a8-224-b1": {"ok": True, "elements": 10, "first_difference": None},
            "resnet50-w8a8-64-b1": {"ok": False, "elements": 5, "first_difference": "layer x: sample 0"},
        },
        "time": {
            "resnet50-w8a8-224-b1": {"graph": _times(0.5), "launched": _times(0.9), "tops": 16.0},
            "resnet50-w8a8-224-b8": {"graph": None, "graph_error": "no", "launched": _times(2.0), "tops": 32.0},
        },
        "peer": {"resnet50-b1/compile-fp16-channels-last": {"graph": _times(1.0), "launched": _times(1.5)}},
        "limits": {"limits": {"int8_tops": 160.0, "int8": "a product", "memory_gb_per_s": 4000.0, "memory": "a copy"}},
        "layers": {"resnet50-w8a8-224-b1": [{"layer": "a", "us": 3.5, "matrix": [3136, 64, 64]}]},
        "products": {"resnet50-w8a8-224-b1": {"3136x64x64": {"us": 4.5, "tops": 1}, "49x3x5": {"error": "k"}}},
    }


def test_the_short_table_says_what_was_not_measured(report: dict[str, Any]) -> None:
    text = gpu_table.short(report)
    assert "| resnet50 | W8A8 | 0.500 | 2.000 | not measured | not measured |" in text
    assert "| resnet50 | torch.compile fp16 | 1.000 | not measured | not measured | not measured |" in text
    assert gpu_table.short({}).count("not measured") == 4 * 4 * 4


def test_the_page_has_every_figure(report: dict[str, Any]) -> None:
    page = gpu_table.page(report)
    row = (
        "| resnet50 | W8A8 | 1 | 0.500 (0.250 to 1.000) | 0.900 (0.450 to 1.800) | 16.0 | 10.0 % | not measured | not"
        " measured | 1.000 | 2.00 | yes |"
    )
    assert row in page
    assert (
        "| resnet50 | W8A8 | 8 | not measured | 2.000 (1.000 to 4.000) | 32.0 | 20.0 % | not measured | not measured |"
        " not measured | not measured | not verified |" in page
    )
    assert (
        "1 of 2 libraries exact, 15 elements compared." in page
        and "* NOT EXACT: resnet50-w8a8-64-b1: layer x: sample 0" in page
    )
    assert "| resnet50-w8a8-224-b1 | 3136x64x64 | 3.5 | 4.5 |" in page and "| 49x3x5 | not measured | refused |" in page
    assert "Left out, because the time was over: time resnet18-w8a8-224-b1." in page and "Failed: limits (why)." in page
    rows = [line for line in page.splitlines() if line.startswith("| network") or line.startswith("| resnet50 |")]
    assert len({line.count("|") for line in rows}) == 1


def test_the_command_writes_the_page(
    report: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    assert gpu_table.main([str(tmp_path / "gpu.json"), "--output", str(tmp_path / "pages")]) == 0
    assert (tmp_path / "pages" / "nvidia-h200-2026-01-02.md").read_text() == gpu_table.page(report)
    assert json.loads((tmp_path / "pages" / "nvidia-h200-2026-01-02.json").read_text()) == report
    assert capsys.readouterr().out == gpu_table.short(report)
    for text in ("{", "[]", "{}"):
        (tmp_path / "gpu.json").write_text(text)
        assert gpu_table.main([str(tmp_path / "gpu.json")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


class Ticking(Functions):
    """A driver by whose clock any two events are a millisecond apart."""

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        self.clock += 1
        return super().cuEventRecord(event, stream)


@pytest.mark.parametrize("capture", [0, 900])
def test_bench_measures_with_events_and_graphs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], capture: int
) -> None:
    ht.compile(residual_net()).save(tmp_path / "p.hawq")
    functions, make = Ticking(capture=capture), driver.Driver
    package = ht.load(tmp_path / "p.hawq")
    assert package.vm is not None
    monkeypatch.setattr(tvm, "cuda", lambda index: tvm.cpu())
    monkeypatch.setattr(driver, "Driver", lambda: make(functions))
    monkeypatch.setattr(timing, "on", lambda machine, stream: nullcontext())
    fields = on_gpu.alone(package, duration=0, warmup_ms=0)
    assert (fields["graph"] is None) is bool(capture) and fields["latency_ms"]["median"] == (1.0 if capture else 1.5)
    assert fields["inputs_rotated"] > 1 and fields["products"] > 0 and fields["machine"]["l2_bytes"] == 50 << 20
    assert json.loads(json.dumps(fields)) == fields
    out = io.StringIO()
    show(Console(file=out, width=300), fields)
    assert ("as one CUDA graph: not measured: Refusal" in out.getvalue()) is bool(capture)
    assert "kernel by kernel: median 1.0000 ms" in out.getvalue() and "limits: not measured" in out.getvalue()


def test_bench_still_measures_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ht.compile(residual_net()).save(tmp_path / "p.hawq")
    assert cli.main(["bench", str(tmp_path / "p.hawq"), "--duration", "0", "--warmup-ms", "0", "--threads", "1"]) == 0
    assert "throughput" in capsys.readouterr().out
