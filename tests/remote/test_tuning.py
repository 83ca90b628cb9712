"""Tiles raced on several machines at once: the same records, and what happens to them when a machine is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import hawq_tvm as ht
from hawq_tvm import target, tuner
from hawq_tvm.bench.race import Result
from hawq_tvm.errors import LostError, RemoteError, UsageError
from hawq_tvm.remote import tuning
from hawq_tvm.remote.tuning import Crew, Job
from schedules import record

from .conftest import Cluster, Process, several_layers

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def short_heats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hawq_tvm.bench.race.HEAT", 0.001)
    monkeypatch.setattr("hawq_tvm.bench.race.FINAL", 0.002)


def test_records_of_other_machines_are_those_of_this_one(cluster: Cluster, tmp_path: Path, command: Command) -> None:
    """The servers run on this machine, so "host" is the same target and every workload has the same key."""
    onnx.save(several_layers(3), str(tmp_path / "m.onnx"))
    path = tmp_path / "r.json"
    arguments = ("tune", tmp_path / "m.onnx", "-o", path, "--trials", 6, "--rpc", cluster.tracker.address, "--rpc-key", "two")
    code, out, err = command(*arguments, "--json")
    report = json.loads(out)
    assert code == 0 and len(report["workloads"]) == 3 and report["threads"] == 1, err
    assert sum(report["rpc"]["servers"].values()) == 3 and report["rpc"]["notes"] == [] and report["rpc"]["failed"] == 0
    entries = record.read(path)
    assert all(0 < e.median_us <= e.default_us and (e.candidates, e.threads, e.load) == (2, 1, 0) for e in entries.values())
    expected = {w.key for w in tuner.workloads(tuner.pipeline.to_packed(tuner.pipeline.import_annotated(several_layers(3))), target.host(), 1)}
    assert set(entries) == expected
    code, out, _ = command(*arguments)
    assert code == 0 and "3 workloads had records" in out
    tuned, plain = ht.compile(several_layers(3), records=path), ht.compile(several_layers(3))
    assert sum(row["tile_from"] == "record" for row in tuned.report()) == 3
    x = plain.random_inputs(1, 0)[0]
    for name, value in plain.run(x).items():
        np.testing.assert_array_equal(tuned.run(x)[name], value, strict=True)


@pytest.mark.slow
def test_a_server_that_dies_is_replaced_by_the_others(cluster: Cluster, tmp_path: Path, command: Command) -> None:
    """One of two is killed after its first workload, while it measures another: the other does the rest. Then that one is killed, too."""
    mortals = {p.address: p for p in cluster.servers("mortal", 2)}
    cluster.wait_for("mortal", 2)
    killed: list[Process] = []
    crews: list[Crew] = []

    def kill_one_of_two(step: tuner.TuneStep) -> None:
        if step.outcome is not None and not killed:
            (crew,) = crews
            killed.append(mortals[next(iter(crew.served))])  # it measures the next workload already
            killed[0].kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "Crew", lambda *a: crews.append(Crew(*a)) or crews[-1])
        report = ht.tune(several_layers(6), tmp_path / "r.json", trials=12, progress=kill_one_of_two, servers=cluster.at("mortal", 20))
    assert len(report.outcomes) == 6 == len(record.read(tmp_path / "r.json")) and report.failed == 0
    lost = [n for n in report.notes if "measured again elsewhere" in n]
    assert len(lost) == 1 and killed[0].address in lost[0] and "was lost" in lost[0]
    (survivor,) = (p for p in mortals.values() if p is not killed[0])
    assert report.served[survivor.address] >= 4 and report.to_dict()["rpc"]["notes"] == list(report.notes)

    def kill_the_last(step: tuner.TuneStep) -> None:
        if step.outcome is not None:
            survivor.kill()

    with pytest.raises(RemoteError, match=r"no server is left.*knows no server with this key.*measured is kept"):
        ht.tune(several_layers(4), tmp_path / "s.json", trials=8, progress=kill_the_last, servers=cluster.at("mortal", 1))
    assert len(record.read(tmp_path / "s.json")) == 1
    onnx.save(several_layers(2), str(tmp_path / "m.onnx"))
    code, _, err = command("tune", tmp_path / "m.onnx", "-o", tmp_path / "s.json", "--rpc", cluster.tracker.address, "--rpc-key", "mortal")
    assert code == 4 and len(err.strip().splitlines()) == 1 and "two (2 servers)" in err


def test_a_workload_that_ends_servers_is_given_up(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    inner, tried = Crew._race, list[str]()

    def deadly(self: Crew, session: Any, job: Job, stop: Any) -> Result:
        if job.number == 1:
            tried.append(session.address)
            raise LostError("was lost", where=session.name, found="the connection ended")
        return inner(self, session, job, stop)

    monkeypatch.setattr(Crew, "_race", deadly)
    onnx.save(several_layers(3), str(tmp_path / "m.onnx"))
    arguments = ("tune", tmp_path / "m.onnx", "-o", tmp_path / "r.json", "--trials", 6, "--rpc", cluster.tracker.address, "--rpc-key", "two")
    code, out, _ = command(*arguments)
    assert code == 4 and len(tried) == tuning.ATTEMPTS and "given up" in out and "1 workloads were given up" in out
    assert len(record.read(tmp_path / "r.json")) == 2
    monkeypatch.setattr(Crew, "_race", inner)
    code, out, _ = command(*arguments)
    assert code == 0 and "given up" not in out and len(record.read(tmp_path / "r.json")) == 3


def test_what_is_wrong_with_a_candidate_is_said_and_ends_the_run(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "exported", lambda *_: b"no library")
    with pytest.raises(RemoteError, match=r"loading workload\.so .* failed there"):
        ht.tune(several_layers(2), tmp_path / "r.json", trials=4, servers=cluster.at("two"))
    assert not (tmp_path / "r.json").exists()


def test_machines_and_targets_that_do_not_suit(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = cluster.at("two")
    with pytest.raises(UsageError, match="GPU"):
        Crew(servers, "cuda-sm80", None)
    with pytest.raises(RemoteError, match=r"architecture.*expected aarch64"):
        Crew(servers, "llvm -mtriple=aarch64-linux-gnu -mcpu=neoverse-n1", None)
    crew = Crew(servers, "host", 3)
    assert crew.threads == 3 and str(crew.target) == str(target.host())
    crew.cpu = "another"
    monkeypatch.setattr(tuner, "Crew", lambda *_: crew)
    with pytest.raises(RemoteError, match=r"no server is left.*another machine than the first"):
        ht.tune(several_layers(2), tmp_path / "r.json", trials=4, servers=servers)


def test_an_interrupted_run_gives_its_servers_back(cluster: Cluster, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(several_layers(3), str(tmp_path / "m.onnx"))
    arguments = ("tune", tmp_path / "m.onnx", "-o", tmp_path / "r.json", "--trials", 6, "--rpc", cluster.tracker.address, "--rpc-key", "two")
    inner = record.dump

    def interrupted(records: record.Records) -> str:
        monkeypatch.setattr(record, "dump", inner)
        signal.raise_signal(signal.SIGINT)
        return inner(records)

    monkeypatch.setattr(record, "dump", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore the signal
    try:
        code, _, err = command(*arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and "no file was written" in err and not (tmp_path / "r.json").exists()  # it was interrupted before its first record
    code, _, err = command(*arguments)
    assert code == 0 and "lost" not in err and len(record.read(tmp_path / "r.json")) == 3
    cluster.wait_for("two", 2)  # neither was lost, here or in an earlier test
