"""Times of a GPU elsewhere become records: applied by compile, refused when foreign or damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

import schedules
from hawq_tvm.cli import main
from hawq_tvm.compiler import pipeline
from hawq_tvm.compiler.cuda import runtime
from hawq_tvm.targets import target
from hawq_tvm.tuning.gpu import export as exporter
from hawq_tvm.tuning.gpu import times as importer
from schedules import record
from schedules.gpu.mma_tiles import MmaTile

from ..models import Graph, float_output
from .conftest import Run, network

SM90 = target.parse("cuda-sm90")


@pytest.fixture
def measured(run: Run) -> Run:
    """Times in which the last candidate of the first workload is much faster than the model's, and that of the
    second hardly.
    """
    last = [w["candidates"][-1]["kernel"] for w in run.manifest["workloads"]]
    run.configure(time=lambda k: {last[0]: 5.0, last[1]: 9.9}.get(k, 10.0))
    assert run().returncode == 0
    return run


def test_times_become_records_that_compile_applies(
    measured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(network(), str(tmp_path / "m.onnx"))
    model, times, records = str(tmp_path / "m.onnx"), str(measured.folder / "times.json"), str(tmp_path / "r.json")
    assert main(["tune", "--import", times, "-o", records, model, "--target", "cuda-sm90"]) == 0
    assert "on the GPU" in capsys.readouterr().out
    entries, plan = record.read(Path(records)), measured.manifest["plan"]["workloads"]
    assert [entries[w["key"]].tile for w in plan] == [plan[0]["tiles"][-1], plan[1]["tiles"][0], plan[2]["tiles"][0]]
    first = entries[plan[0]["key"]]
    assert (first.median_us, first.default_us, first.machine, first.candidates, first.threads) == (
        5.0,
        10.0,
        "Fake GPU",
        5,
        0,
    )
    assert record.parse(record.dump(entries).encode(), "r.json") == entries
    packed = pipeline.to_packed(pipeline.import_annotated(network()), target=SM90)
    tir, _ = schedules.lower_to_tir(pipeline.with_records(packed, SM90, entries), SM90)
    rows = [r for r in schedules.report(tir) if r["tile_from"] == "record"]
    assert len(rows) == 4 and sum(r["tile"] == str(_tile(first.tile)) for r in rows) >= 2
    other = target.parse("cuda-sm80")
    assert (
        pipeline.schedules.apply_records(packed, other, entries)[1] == 0 and "is ignored" not in capsys.readouterr().err
    )
    if runtime.driver() is None and shutil.which("nvcc"):
        assert (
            main(
                [
                    "compile",
                    model,
                    "-o",
                    str(tmp_path / "m.hawq"),
                    "--target",
                    "cuda-sm90",
                    "--records",
                    records,
                    "--json",
                    "--quiet",
                ]
            )
            == 0
        )
        assert json.loads(capsys.readouterr().out)["tiles_from"]["record"] == 4


def _tile(fields: dict[str, Any]) -> MmaTile:
    return MmaTile(**{**fields, "warps": tuple(fields["warps"])})


def test_broken_records_of_a_gpu_are_named_and_ignored(
    measured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importer.import_times(measured.folder / "times.json", tmp_path / "r.json")
    entries = record.read(tmp_path / "r.json")
    packed, key = (
        pipeline.to_packed(pipeline.import_annotated(network()), target=SM90),
        measured.manifest["plan"]["workloads"][0]["key"],
    )
    good = entries[key].tile
    for tile in (
        {**good, "warps": [64, 1]},
        {**good, "warps": 2},
        {k: v for k, v in good.items() if k != "rows"},
        {**good, "stages": 99},
    ):
        capsys.readouterr()
        assert (
            pipeline.schedules.apply_records(packed, SM90, {**entries, key: replace(entries[key], tile=tile)})[1] == 2
        )
        assert repr(key) in capsys.readouterr().err
    text = record.dump({**entries, key: replace(entries[key], tile={**good, "warps": ["2", 1]})})  # type: ignore[dict-item]
    assert key not in record.parse(text.encode(), "r.json") and "tile" in capsys.readouterr().err
    # What the cost model does not list today may still be recorded.
    (one, *_) = exporter.model_workloads(network(), SM90, None, False, None)
    listed = {str(t) for t in one.tiles}
    beyond = next(t for t in one.rule.possible(one.layer, SM90) if str(t) not in listed)
    assert record.tile_of(one.rule, one.layer, SM90, json.loads(json.dumps(record.fields_of(beyond)))) == beyond


def test_foreign_and_damaged_times_are_refused(
    measured: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, records, good = tmp_path / "t.json", tmp_path / "r.json", measured.times
    key = measured.manifest["plan"]["workloads"][0]["key"]

    def refused(content: Any, *options: str) -> str:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        assert main(["tune", "--import", str(path), "-o", str(records), *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and not records.exists()
        return lines[0]

    def with_first(**fields: Any) -> dict[str, Any]:
        return {**good, "workloads": {**good["workloads"], key: {**good["workloads"][key], **fields}}}

    assert (
        "no JSON" in refused("{")
        and "another format" in refused("[]")
        and "another format" in refused({**good, "format": "x"})
    )
    assert "hash is another" in refused({**good, "id": "0" * 64}) and "hash is another" in refused({**good, "plan": {}})
    for change in (
        {"median_us": [1.0]},
        {"median_us": [-1.0] * 5},
        {"median_us": "fast"},
        {"wrong": [0]},
        {"wrong": 5},
        {"date": 3},
    ):
        assert "is damaged" in refused(with_first(**change))
    assert "is damaged" in refused({**good, "machine": {}}) and "not in the plan" in refused(
        {**good, "workloads": {"x": {}}}
    )
    assert "another architecture" in refused(good, "--target", "cuda-sm80")
    g = Graph(9)
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 8, 5, 5]), 0.02, 128), g.weight([8, 8, 1, 1])), 0.05, 100)
    onnx.save(g.model([float_output(y)]), str(tmp_path / "other.onnx"))
    assert "another model" in refused(good, str(tmp_path / "other.onnx"))
    assert (
        main(["tune", "--import", str(tmp_path / "none.json"), "-o", str(records)]) == 2
        and main(["tune", "--import", str(path)]) == 2
    )
