"""Tuning for a GPU elsewhere: what is exported, and the runner on a driver without a GPU."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hawq_tvm.cli import main
from hawq_tvm.compiler.cuda import nvcc, runtime
from hawq_tvm.core.errors import UsageError
from hawq_tvm.targets import target
from hawq_tvm.tuning.gpu import export as exporter
from hawq_tvm.tuning.gpu import plan as plans
from hawq_tvm.tuning.gpu.exported import gpu
from schedules.gpu import mma_pack
from schedules.gpu.cuda_mma import Mma
from schedules.gpu.mma_tiles import MmaTile

from ..models import Graph, float_output
from .conftest import Run, network

SM90 = target.parse("cuda-sm90")
C_TYPES = {"uchar": "uint8", "signed char": "int8", "int": "int32", "int64_t": "int64", "uint": "uint32"}


# -- what is exported ------------------------------------------------------------------------------------------


def test_equal_layers_are_one_workload_and_everything_is_named(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_bytes())
    plan = manifest["plan"]
    assert manifest["id"] == plans.identity(plan) and manifest["format"] == plans.FORMAT
    assert [(w["rule"], len(w["layers"])) for w in plan["workloads"]] == [
        ("cuda.mma", 2),
        ("cuda.mma", 1),
        ("cuda.depthwise", 1),
    ] and all(w["key"].endswith("cuda -arch=sm_90") for w in plan["workloads"])
    assert set(manifest["files"]) | {"manifest.json"} == {p.name for p in exported.iterdir()}
    for planned, entry in zip(plan["workloads"], manifest["workloads"], strict=True):
        assert len(planned["tiles"]) == len(entry["candidates"]) == len({json.dumps(t) for t in planned["tiles"]})


def test_every_source_compiles(exported: Path, tmp_path: Path) -> None:
    try:
        compiler = nvcc.find()
    except UsageError as e:
        pytest.skip(f"no nvcc: {e}")
    manifest = json.loads((exported / "manifest.json").read_bytes())
    for source in sorted(exported.glob("*.cu")):
        done = subprocess.run(
            [str(compiler), *manifest["nvcc"], "-o", str(tmp_path / "x.cubin"), str(source)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        usage = {u.kernel: u for u in nvcc.parse_usage(done.stdout + done.stderr)}
        kernels = {c["kernel"] for w in manifest["workloads"] for c in w["candidates"] if c["source"] == source.name}
        assert set(usage) == kernels and {u.arch for u in usage.values()} == {"sm_90"}
        assert all(u.spill_stores == u.spill_loads == 0 for u in usage.values())


def test_launches_agree_with_kernels_and_tiles(exported: Path) -> None:
    manifest, found = (
        json.loads((exported / "manifest.json").read_bytes()),
        exporter.model_workloads(network(), SM90, None, False, None),
    )
    assert [w.key for w in found] == [w["key"] for w in manifest["plan"]["workloads"]]
    for one, entry in zip(found, manifest["workloads"], strict=True):
        for tile, c in zip(one.tiles, entry["candidates"], strict=False):
            text = (exported / c["source"]).read_text()
            bound, parameters = re.search(rf"__launch_bounds__\((\d+)\) {c['kernel']}\((.*?)\);", text).groups()
            assert int(bound) == prod(c["block"])
            signature = [
                re.fullmatch(r"(.*)\* __restrict__ (\w+)_ptr", p.strip()).groups() for p in parameters.split(",")
            ]
            assert [C_TYPES[kind] for kind, _ in signature] == [a["dtype"] for a in c["arguments"]]
            kernel = one.rule.build(one.layer, SM90, tile)
            params = {p.name: p for p in kernel.func.params}
            kinds = [
                *["input"] * len(one.inputs),
                *[
                    "weights" if isinstance(one.rule, Mma) and not i else "constant"
                    for i in range(len(kernel.arguments))
                ],
                "output",
            ]
            for (_, name), a in zip(signature, c["arguments"], strict=True):
                assert (
                    a["shape"] == [int(d) for d in params[name].shape] and a["kind"] == kinds[list(params).index(name)]
                )
                if a["kind"] == "weights":
                    np.testing.assert_array_equal(
                        mma_pack.pack(one.rule.weights(one.layer), **a["what"]).reshape(a["shape"]), kernel.arguments[0]
                    )
            if isinstance(tile, MmaTile):
                problem = one.rule.problem(one.layer)
                assert prod(c["grid"]) == prod(problem.blocks(tile)) and c["block"] == [32, tile.threads // 32, 1]
                assert 0 < c["shared"] <= tile.shared_bytes(problem.form) and c["shared"] % 16 == 0


def test_nibbles_are_packed_alike_and_data_is_not_all_zero(tmp_path: Path) -> None:
    g = Graph(4)
    y = g.qdq(g.conv(g.qdq(g.input("x", [1, 16, 6, 6]), 0.02, 128), g.weight([32, 16, 1, 1])), 4.0, 8, "uint4")
    z = g.qdq(g.conv(y, g.weight([24, 32, 3, 3], "int4")), 0.9, 100)
    model, where = g.model([float_output(z)]), target.parse("cuda-sm80")
    found = exporter.model_workloads(model, where, None, False, None)
    assert {w.rule.form(w.layer) for w in found} == {"U8S8", "U4S4"} and all(
        high > low for w in found for low, high in w.bounds
    )
    for one in found:
        for tile in one.tiles:
            packed = mma_pack.pack(one.rule.weights(one.layer), **one.rule.packing(one.layer, tile))
            np.testing.assert_array_equal(
                packed.reshape(-1), one.rule.build(one.layer, where, tile).arguments[0].reshape(-1), strict=True
            )
    # More than the cost model lists, in two sources each.
    report = exporter.export(model, tmp_path / "d", "cuda-sm80", trials=26)
    assert report.candidates == 52 and {p.name for p in (tmp_path / "d").glob("*.cu")} == {
        f"w0{w}_{p}.cu" for w in (0, 1) for p in (0, 1)
    }


def test_an_export_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(network(), str(tmp_path / "m.onnx"))
    model, place = str(tmp_path / "m.onnx"), str(tmp_path / "d")

    def refused(*options: str) -> str:
        assert main(["tune", *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and {p.name for p in tmp_path.iterdir()} == {"m.onnx"}
        return lines[0]

    assert "one architecture" in refused(model, "--export", place, "--target", "cuda")
    assert "found a CPU" in refused(model, "--export", place)
    assert "exists" in refused(model, "--export", model, "--target", "cuda-sm90")
    assert "no folder" in refused(model, "--export", str(tmp_path / "n" / "d"), "--target", "cuda-sm90")
    assert "at least 2" in refused(model, "--export", place, "--target", "cuda-sm90", "--trials", "1")
    assert "--threads has no meaning" in refused(model, "--export", place, "--threads", "1")
    assert "two steps" in refused(model, "--export", place, "--import", "t.json") and "takes a model" in refused()
    assert "--export DIR" in refused(model, "--target", "cuda-sm90")

    def stopped(self: Any, *_: Any) -> None:
        raise UsageError("stopped")

    monkeypatch.setattr(exporter._Export, "all_files", stopped)
    assert "stopped" in refused(model, "--export", place, "--target", "cuda-sm90", "--trials", "2")


# -- the runner ------------------------------------------------------------------------------------------------


def test_times_are_the_kernels_own_and_nothing_is_left_behind(run: Run) -> None:
    number = {c["kernel"]: i for i, c in enumerate(c for w in run.manifest["workloads"] for c in w["candidates"])}
    run.configure(time=lambda k: 20.0 - number[k] / 4)
    done = run()
    assert done.returncode == 0, done.stderr
    assert "3 of 3 workloads" in done.stderr and "note" not in done.stderr and done.stdout == ""
    times, manifest = run.times, run.manifest
    assert (times["format"], times["id"], times["plan"]) == (plans.TIMES, manifest["id"], manifest["plan"])
    assert times["machine"] == {"gpu": "Fake GPU", "driver": 13010, "nvcc": "13.0"}
    for planned, entry in zip(manifest["plan"]["workloads"], manifest["workloads"], strict=True):
        measured = times["workloads"][planned["key"]]
        # Float32 milliseconds.
        assert measured["median_us"] == pytest.approx(
            [20.0 - number[c["kernel"]] / 4 for c in entry["candidates"]], rel=1e-4
        )
        assert (
            measured["wrong"] == []
            and measured["failed"] == {}
            and measured["varied"]
            and measured["copies"] == measured["launches"] in (15, 16, 17)
        )
    log = run.log
    assert log["live_memory"] == log["live_graphs"] == log["live_modules"] == 0 and log["cuMemsetD8Async"] > 0
    assert {p.name for p in run.folder.iterdir()} >= {"times.json", "build"} and not list(run.folder.glob(".*"))


def test_a_wrong_candidate_is_named_and_gets_no_time(run: Run) -> None:
    entry = run.manifest["workloads"][0]
    bad = [entry["candidates"][i]["kernel"] for i in (0, 2)]
    run.configure(
        time=lambda k: 1.0 if k in bad else 9.0, mode=lambda k: {bad[0]: "wrong", bad[1]: "fail"}.get(k, "ok")
    )
    done = run()
    assert (
        done.returncode == 1
        and "WRONG" in done.stderr
        and entry["candidates"][0]["text"] in done.stderr
        and "CUDA error 701" in done.stderr
    )
    measured = run.times["workloads"][run.manifest["plan"]["workloads"][0]["key"]]
    assert measured["wrong"] == [0] and list(measured["failed"]) == ["2"]
    assert [t is None for t in measured["median_us"]] == [True, False, True, False, False]
    assert run().returncode == 1  # nothing left to measure, and still not well


def test_what_was_measured_is_not_measured_again(run: Run) -> None:
    assert run("--budget", "0").returncode == 0 and not (run.folder / "times.json").exists()
    assert run().returncode == 0
    first, times = run.log, run.times
    dropped = run.manifest["plan"]["workloads"][1]["key"]
    again = {**times, "workloads": {k: v for k, v in times["workloads"].items() if k != dropped}}
    (run.folder / "times.json").write_text(json.dumps(again))
    done = run(PATH="/nowhere")  # what is compiled needs no nvcc
    assert (
        done.returncode == 0
        and "1 of 3 workloads to measure" in done.stderr
        and set(run.times["workloads"]) == set(times["workloads"])
    )
    assert 0 < run.log["cuGraphLaunch"] < first["cuGraphLaunch"]
    for text, words in (("{", "damaged"), (json.dumps({**times, "id": "x"}), "another export")):
        (run.folder / "times.json").write_text(text)
        done = run()
        assert done.returncode == 0 and words in done.stderr and len(run.times["workloads"]) == 3


def test_a_candidate_that_breaks_the_gpu_is_left_out_next_time(run: Run) -> None:
    last = run.manifest["workloads"][0]["candidates"][-1]["kernel"]
    run.configure(mode=lambda k: "break" if k == last else "ok")
    done = run()
    assert done.returncode == 1 and "run it again" in done.stderr and "FAILED" in done.stderr
    done = run()
    measured = run.times["workloads"][run.manifest["plan"]["workloads"][0]["key"]]
    assert (
        done.returncode == 1
        and list(measured["failed"]) == ["4"]
        and measured["median_us"][4] is None
        and len(run.times["workloads"]) == 3
    )


def test_what_nvcc_refuses_is_left_out(run: Run) -> None:
    done = run(FAKE_REFUSED="w01_0.cu")
    assert done.returncode == 1 and "w01_0.cu: nvcc refuses it: w.cu(1): error: refused" in done.stderr
    found, keys = run.times["workloads"], [w["key"] for w in run.manifest["plan"]["workloads"]]
    assert [any(found[k]["median_us"]) for k in keys] == [True, False, True] and set(
        found[keys[1]]["failed"].values()
    ) == {"nvcc refuses its source"}


def test_a_small_memory_takes_fewer_copies_or_is_one_sentence(run: Run) -> None:
    assert run(FAKE_MEMORY_MB="1").returncode == 0
    assert all(1 <= w["copies"] <= w["launches"] for w in run.times["workloads"].values())
    (run.folder / "times.json").unlink()
    done = run(FAKE_MEMORY_MB="0")
    assert done.returncode == 3 and "the GPU's memory is full" in done.stderr


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"LD_LIBRARY_PATH": ""}, "no NVIDIA driver is installed here"),
        ({"FAKE_INIT": "100"}, "the NVIDIA driver finds no GPU"),
        ({"FAKE_COUNT": "0"}, "the NVIDIA driver finds no GPU"),
        ({"FAKE_INIT": "999"}, "the NVIDIA driver does not start"),
        (
            {"FAKE_CAPABILITY": "80"},
            "the candidates are for sm_90, and this GPU (Fake GPU) is sm_80: export them with --target cuda-sm80",
        ),
        ({"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}, "nvcc is not on PATH"),
        ({"FAKE_LOAD": "209"}, "the driver refuses what nvcc made"),
    ],
)
def test_a_machine_that_cannot_run_it_says_so(run: Run, environment: dict[str, str], sentence: str) -> None:
    if "LD_LIBRARY_PATH" in environment and runtime.driver() is not None:
        pytest.skip("this machine has an NVIDIA driver")
    done = run(**environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 3 and last.startswith("run.py: ") and sentence in last and "Traceback" not in done.stderr
    assert not (run.folder / "times.json").exists()


@pytest.mark.parametrize("name", ["manifest.json", "w00_0.cu", "constants.npz"])
@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_a_damaged_folder_is_refused(run: Run, name: str, damage: str) -> None:
    path, data = run.folder / name, (run.folder / name).read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(
            data[: len(data) // 2]
            if damage == "cut"
            else data.replace(b"sm_90", b"sm_80")
            if name == "manifest.json"
            else b"x"
        )
    done = run()
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 1 and "export it again" in done.stderr


def test_signatures_are_those_of_the_header() -> None:
    try:
        include = nvcc.find()
    except UsageError as e:
        pytest.skip(f"no nvcc, so no cuda.h: {e}")
    lines = subprocess.run(
        [str(include), "-E", "-x", "cu", "-include", "cuda.h", "/dev/null"], capture_output=True, text=True, check=True
    ).stdout
    text = re.sub(r"\s+", " ", lines)
    sizes = {
        "size_t": 8,
        "CUdeviceptr": 8,
        "unsigned long long": 8,
        "unsigned char": 1,
        "unsigned int": 4,
        "int": 4,
        "CUdevice": 4,
        "CUresult": 4,
        "CUfunction_attribute": 4,
        "CUdevice_attribute": 4,
        "CUstreamCaptureMode": 4,
    }

    def size(parameter: str) -> int:
        kind = re.sub(r"\b(const|\w+$)\s*", "", parameter.strip()).strip() if "*" not in parameter else "*"
        return sizes.get(kind.removesuffix("_v2"), 8)  # what is left are handles, and pointers

    for name, arguments in gpu.SIGNATURES.items():
        found = re.search(rf"CUresult {name}(?:_v2)?\(([^)]*)\);", text)
        assert found is not None, name
        assert [ctypes.sizeof(a) for a in arguments] == [size(p) for p in found[1].split(",")], (name, found[1])
