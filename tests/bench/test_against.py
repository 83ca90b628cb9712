"""Comparisons with other runtimes: everybody takes turns on the same processors with the same model, or is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any

import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm.bench import against, peers
from hawq_tvm.bench.engine import CannotRun
from hawq_tvm.cli import main
from hawq_tvm.core.errors import HawqError, ModelError, UsageError
from hawq_tvm.measure import limits

from ..models import residual_net

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can be pinned on Linux only")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("against") / "tiny.onnx"
    onnx.save(residual_net(), str(path))
    return path


@pytest.fixture(scope="module")
def package(model: Path) -> Path:
    path = model.parent / "tiny.hawq"
    ht.compile(str(model)).save(path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BUDGET", 0.01)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 1 << 20)


def changed(source: Path, target: Path, change: Any) -> Path:
    proto = onnx.load(str(source))
    change(proto)
    onnx.save(proto, str(target))
    return target


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
def test_a_comparison(peer: str, package: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(peer, reason=f"{peer} is not installed (pip install 'hawq-tvm[bench]')")
    before, seen = os.sched_getaffinity(0), []
    spied = peers.PEERS[peer]().__class__
    call = spied.call
    monkeypatch.setattr(spied, "call", lambda self: (seen.append(os.sched_getaffinity(0)), call(self))[1])
    report = against.compare(ht.load(package), model, [peer], warmup_ms=0, duration=0, iterations=3, threads=1)
    assert {len(s) for s in seen} == {1} and os.sched_getaffinity(0) == before
    fields = report.to_dict()
    assert (
        [e["engine"] for e in fields["engines"]] == ["hawq-tvm", peer]
        and fields["threads"] == 1
        and len(fields["pinned_to"]) == 1
    )
    assert all(e["iterations"] == 3 == fields["turns"] and e["tops"] > 0 and e["version"] for e in fields["engines"])
    assert min(e["ratio_to_fastest"] for e in fields["engines"]) == 1 and fields["others_share"] >= 0
    (row,) = fields["engines"][1]["agreement"]
    assert row["elements"] == 20 and row["largest"] <= 1.5 and (row["correlation"] is None or row["correlation"] > 0.99)
    # Conv 3x3x3 and 3x3x8 to 8 channels on 8x8 pixels, Gemm 8 to 10, batch 2.
    assert fields["products"] == 2 * (8 * 8 * 8 * 9 * (3 + 8) + 80)


def test_the_command(package: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--duration", "0", "--iterations", "2", "--warmup-ms", "0", "--threads", "1"]
    arguments = ["bench", str(package), "--against", "onnxruntime", "--model", str(model), *options]
    assert main([*arguments, "--json", str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in ("onnxruntime", "hawq-tvm", "median ms", "TOPS", "of limit", "elements differ", "other processes")
    )
    fields = json.loads((tmp_path / "b.json").read_text())
    assert [e["engine"] for e in fields["engines"]] == ["hawq-tvm", "onnxruntime"] and fields["limits"][
        "memory_read_gb_per_s"
    ] > 0
    assert main(["bench", str(package), *options, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["tops"] > 0 and alone["products"] == fields["products"] and "share_of_limit" in alone


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--against", "onnxruntime"], "onnxruntime must be given the ONNX model"),
        (["--model", "MODEL"], "--model is for --against"),
        (["--against", "PACKAGE,onnxruntime"], "onnxruntime must be given the ONNX model"),
        (["--against", "tensorrt", "--model", "MODEL"], "no such engine"),
        (["--against", ",", "--model", "MODEL"], "no engine is named"),
        (["--against", "onnxruntime", "--model", "MODEL", "--threads", "0"], "a processor of its own"),
        (["--against", "onnxruntime", "--model", "MODEL", "--threads", "9999"], "a processor of its own"),
        (["--against", "onnxruntime", "--model", "MODEL", "--duration", "nan"], "must be finite"),
        (
            ["--against", "onnxruntime,torch", "--model", "MODEL", "--threads", "1"],
            "float networks are those",
        ),
        (
            ["--against", "torch-bf16", "--model", "MODEL", "--threads", "1"],
            "float networks are those",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str], words: str, package: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "bench",
                str(package),
                *(a.replace("MODEL", str(model)).replace("PACKAGE", str(package)) for a in arguments),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert words in error and len(error.strip().splitlines()) == 1


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in [("openvino", "bench"), ("onnxruntime", "bench"), ("torch", "torch"), ("torch-int8", "torch")]:
        with pytest.raises(UsageError) as caught:
            peers.parse(name)
        assert f"pip install 'hawq-tvm[{extra}]'" in str(caught.value)


class Unable:
    """A peer that no machine can run."""

    name, package, extra, what = "unable", "sys", "bench", "nothing"

    def prepare(self, *arguments: Any) -> None:
        raise CannotRun("needs what this machine has not", where=self.name)

    def close(self) -> None:
        pass


def test_who_cannot_run_is_left_out_with_the_reason(
    package: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(peers.PEERS, "unable", Unable)
    options = ["--model", str(model), "--duration", "0", "--iterations", "1", "--warmup-ms", "0", "--threads", "1"]
    assert main(["bench", str(package), "--against", "unable,onnxruntime", *options]) == 0
    assert "left out: unable: unable: needs what this machine has not" in capsys.readouterr().out
    assert main(["bench", str(package), "--against", "unable,onnxruntime", *options, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert [e["engine"] for e in fields["engines"]] == ["hawq-tvm", "onnxruntime"] and [
        e["engine"] for e in fields["excluded"]
    ] == ["unable"]
    assert main(["bench", str(package), "--against", "unable", *options]) == 3
    assert "nothing is left to compare with" in capsys.readouterr().err


def _symbolic(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _larger(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 9


def _renamed(proto: onnx.ModelProto) -> None:
    old, new = proto.graph.output[0].name, "renamed"
    proto.graph.output[0].name = new
    for node in proto.graph.node:
        node.output[:] = [new if n == old else n for n in node.output]


def _integer(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def _other_weights(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            tensor.int32_data[:] = [-v for v in reversed(tensor.int32_data)]


@pytest.mark.parametrize(
    "change, words",
    [
        (_symbolic, "make_dynamic_shape_fixed --input_name"),
        (_larger, "another shape"),
        (_renamed, "other outputs"),
        (_integer, "a type that cannot be compared"),
        (_other_weights, "did not run the network of the package"),
    ],
)
def test_another_model_is_refused(change: Any, words: str, package: Path, model: Path, tmp_path: Path) -> None:
    other = changed(model, tmp_path / "other.onnx", change)
    with pytest.raises(ModelError) as caught:
        against.compare(ht.load(package), other, ["onnxruntime"], warmup_ms=0, duration=0, iterations=1, threads=1)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if change is _other_weights:
        assert "at least 0.9 (the bound is 0.9 because" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no model"])
def test_an_unreadable_model_is_refused(content: bytes | None, package: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(HawqError, match=r"m\.onnx"):
        against.compare(ht.load(package), path, ["onnxruntime"], threads=1)


class Fake:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def call(self) -> None:
        self.log.append(self.name)


def test_everybody_has_the_same_turns_and_each_begins_once() -> None:
    log: list[str] = []
    engines = [Fake(n, log) for n in "abc"]
    times, turns = against._take_turns(engines, 0, 0, 3, threading.Event())
    assert turns == 3 and [len(t) for t in times] == [3, 3, 3]
    # One call of warm-up each; then in every turn one that is not timed and one that is.
    assert "".join(log) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"


def test_an_engine_that_never_rests_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against, "PATIENCE", 0.05)
    monkeypatch.setattr(against.time, "process_time", against.time.perf_counter)
    with pytest.raises(UsageError, match="--against busy: its threads go on working"):
        against._wait_for_rest("busy")
