"""Tuning: the space of tiles, the records and their file, what is measured and what is not, and what a record
changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

import hawq_tvm as ht
from hawq_tvm.cli import main
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.core.errors import InputError, OutputError, ScheduleError, UsageError
from hawq_tvm.measure import race as races
from hawq_tvm.targets import target
from hawq_tvm.tuning import tuner
from schedules import record, workload
from schedules.cpu.contract_tiles import TILES, Step, choose_tile, tiles_of
from schedules.cpu.contraction import Shape
from schedules.cpu.cpu_depthwise import blocks_of_pixels
from schedules.cpu.vector_unit import VectorUnit
from schedules.layer import Layer
from schedules.record import Record
from schedules.rule import Tiled, choose
from schedules.rules import rules_for

from ..models import Graph, float_output, residual_net

HOST, PORTABLE = target.host(), tvm.target.Target({"kind": "llvm"})
RECORD = Record(
    "cpu.contract", {"pixels": 1}, 2.0, 3.0, "conv", 1, 5, "a CPU", 0.1, {"tvm": "0"}, "2026-11-21T00:00:00Z"
)


def depthwise_net(channels: int = 20, seed: int = 3, zero: int = 100) -> onnx.ModelProto:
    """A depthwise and a pointwise convolution of awkward sizes."""
    g = Graph(seed)
    x = g.qdq(g.input("x", [1, channels, 9, 11]), 0.02, zero)
    y = g.qdq(g.conv(x, g.weight([channels, 1, 3, 3]), group=channels, pads=[1, 1, 1, 1]), 0.05, zero)
    return g.model([float_output(g.qdq(g.conv(y, g.weight([33, channels, 1, 1])), 0.07, 7))])


def packed(model: onnx.ModelProto) -> tvm.IRModule:
    return pipeline.to_packed(pipeline.import_annotated(model))


@pytest.fixture
def fake_race(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No measurements: the last tile wins; the numbers of candidates of every race."""
    calls: list[int] = []

    def race(kernels: Sequence[Any], *_: Any) -> races.Result:
        calls.append(len(kernels))
        return races.Result(len(kernels) - 1, 1.0, 2.0, ())

    monkeypatch.setattr(tuner, "race", race)
    return calls


@pytest.mark.parametrize("pixels", [1, 7, 35, 112])
@pytest.mark.parametrize("channels", [1, 17, 64, 1000])
def test_the_space_holds_the_default_and_valid_tiles(pixels: int, channels: int) -> None:
    for unit in (VectorUnit(4, 16, True), VectorUnit(16, 32, True, True)):
        shape = Shape((1, 12), pixels, channels, (3, 1), 48, 16, 16, (1, 14), 16 * pixels)
        tiles = tiles_of(shape, unit, Step(2))
        assert tiles[0] == choose_tile(shape, unit, Step(2)) and len(set(tiles)) == len(tiles) <= TILES
        for tile in tiles:
            assert tile.pixels * tile.vectors + tile.vectors + 1 < unit.registers and 12 % tile.rows == 0
    sizes = blocks_of_pixels(pixels, 14)
    assert len(set(sizes)) == len(sizes) <= 14 and set(sizes) <= set(range(1, 15))


@pytest.mark.parametrize(
    ("model", "where"),
    [
        (residual_net(size=9), HOST),
        (residual_net("int4", "int8"), HOST),
        (depthwise_net(), HOST),
        (depthwise_net(), PORTABLE),
    ],
    ids=["residual", "int4", "depthwise", "portable"],
)
def test_every_tile_of_a_space_computes_the_same(
    model: onnx.ModelProto, where: tvm.target.Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(races, "_heat", lambda runs, who, *_: dict.fromkeys(who, 1.0))
    found, here = tuner.workloads(packed(model), where, 1), tuner.Here("host", 2)
    assert found and all(len(w.tiles) > 1 for w in found)
    for one in found:
        short = replace(one, tiles=[one.tiles[0], *one.tiles[1:][-3:]])
        assert short.rule.build(short.layer, where, short.tiles[-1]).tile == short.tiles[-1]
        share = len(short.tiles)
        result = races.race(tuner._kernels(short, share, where), short.inputs, tuner._outputs(short.layer), where, 2)
        entry, outcome = tuner._recorded(short, share, here, result)
        assert entry.tile == record.fields_of(one.tiles[0]) and outcome.candidates == share


def test_a_kernel_that_computes_something_else_cannot_win() -> None:
    """The second kernel has other weights, and would be faster than none: it is left out of every heat."""
    (a, *_), (b, *_) = (tuner.workloads(packed(depthwise_net(seed=s)), HOST, 1) for s in (3, 4))
    assert a.key == b.key
    kernels = [w.rule.build(w.layer, HOST, w.tiles[0]) for w in (a, b)]
    ty = a.layer.func.body.ty
    result = races.race(kernels, a.inputs, [(tuple(int(d) for d in ty.shape.values), str(ty.dtype))], HOST, 1)
    assert result.wrong == (1,) and result.winner == 0 and result.median_us > 0


def test_a_real_race_is_measured_and_recorded(tmp_path: Path) -> None:
    steps: list[tuner.TuneStep] = []
    report = ht.tune(residual_net(), tmp_path / "r.json", trials=6, threads=2, progress=steps.append)
    assert (
        report.trials == 6
        and report.threads == 2
        and len(report.outcomes) == 3
        and (report.kept, report.left) == (0, 0)
    )
    assert [(s.number, s.of, s.outcome is None) for s in steps] == [
        (n, 3, first) for n in (1, 2, 3) for first in (True, False)
    ]
    entries = record.read(tmp_path / "r.json")
    assert {o.key for o in report.outcomes} == set(entries)
    assert all(
        e.median_us <= e.default_us and e.threads == 2 and e.candidates == 2 and e.machine for e in entries.values()
    )


def test_keys_are_of_structure_target_and_threads() -> None:
    def keys(model: onnx.ModelProto, where: tvm.target.Target = HOST, threads: int = 1) -> set[str]:
        return {w.key for w in tuner.workloads(packed(model), where, threads)}

    assert keys(depthwise_net()) == keys(depthwise_net(seed=9, zero=90))  # neither values nor names
    assert not keys(depthwise_net()) & keys(depthwise_net(channels=24))
    assert not keys(depthwise_net()) & keys(depthwise_net(), target.parse("x86-64-v3"))
    one, many = keys(depthwise_net()), keys(depthwise_net(), threads=2)
    assert keys(depthwise_net(), threads=3) == many and len(one & many) == 1  # the depthwise tile divides no tasks


def test_equal_layers_are_one_workload() -> None:
    g = Graph(1)
    x = g.qdq(g.input("x", [1, 16, 6, 6]), 0.06, 100)
    for step in (0.06, 0.061, 0.062):  # so near that their shifts are alike
        x = g.qdq(g.conv(x, g.weight([16, 16, 3, 3]), pads=[1, 1, 1, 1]), step, 100)
    (only,) = tuner.workloads(packed(g.model([float_output(x)])), HOST, 1)
    assert len(only.layers) == 3


def test_records_survive_the_disk(tmp_path: Path) -> None:
    records = {"b": RECORD, "a": replace(RECORD, tile={"pixels": 2, "product": "int16"})}
    (tmp_path / "r.json").write_text(record.dump(records))
    assert record.read(tmp_path / "r.json") == records
    assert record.dump(dict(reversed(records.items()))) == record.dump(records)
    with pytest.raises(InputError, match="tune"):
        record.read(tmp_path / "none.json")


@pytest.mark.parametrize("trials", [2, 3, 5, 20, 60])
def test_trials_are_respected(trials: int, tmp_path: Path, fake_race: list[int]) -> None:
    report = ht.tune(residual_net(), tmp_path / "r.json", trials=trials)
    assert sum(fake_race) == report.trials <= trials and min(fake_race) >= 2
    assert len(fake_race) + report.left == 3 and (report.left == 0) == (trials > 5)


def test_what_has_a_record_is_not_measured_again(tmp_path: Path, fake_race: list[int]) -> None:
    path = tmp_path / "r.json"
    assert ht.tune(residual_net(), path, trials=3).left == 2
    second = ht.tune(residual_net(), path, trials=9)
    assert second.kept == 1 and len(second.outcomes) == 2 and len(fake_race) == 3
    before = path.read_text()
    third = ht.tune(residual_net(), path, trials=9)
    assert third.kept == 3 and not third.outcomes and len(fake_race) == 3 and path.read_text() == before


def test_an_interrupted_run_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_race: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(residual_net(), str(tmp_path / "m.onnx"))
    arguments = ["tune", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "r.json"), "--trials", "9"]
    inner = tuner.race

    def interrupted(*args: Any) -> races.Result:
        if fake_race:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(tuner, "race", interrupted)
    assert main(arguments) == 130 and "continues" in capsys.readouterr().err
    assert len(record.read(tmp_path / "r.json")) == 1
    monkeypatch.setattr(tuner, "race", inner)
    assert main([*arguments, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert (
        fields["kept"] == 1
        and len(fields["workloads"]) == 2
        and [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    )


def test_a_record_changes_the_tile_and_nothing_else(
    tmp_path: Path, fake_race: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ht.compile(residual_net())
    ht.tune(residual_net(), tmp_path / "r.json", trials=9)
    tuned = ht.compile(residual_net(), records=tmp_path / "r.json")
    before, after = ({r["function"]: r for r in p.report()} for p in (plain, tuned))
    changed = {f for f in before if before[f]["tile"] != after[f]["tile"]}
    assert len(changed) == 3 == sum(r["tile_from"] == "record" for r in after.values())
    assert {r["tile_from"] for r in before.values()} == {"cost model", "rule"}
    assert "is ignored" not in capsys.readouterr().err
    x = plain.random_inputs(1, 0)[0]
    for name, value in plain.run(x).items():
        np.testing.assert_array_equal(tuned.run(x)[name], value, strict=True)
    assert tuned.verify(random=1).ok
    # The stored graph alone lowers to the same kernels, and the same inputs give the same bytes.
    stored = ht.load(tuned.save(tmp_path / "t.hawq"))
    assert json.loads(json.dumps(stored.prove().to_dict())) == tuned.certificate()
    again = ht.compile(residual_net(), records=tmp_path / "r.json").save(tmp_path / "u.hawq")
    a, b = (json.loads((p / "manifest.json").read_text())["sha256"] for p in (tmp_path / "t.hawq", again))
    assert a == b


def test_broken_and_foreign_records_are_named_and_ignored(
    tmp_path: Path, fake_race: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "r.json", packed(residual_net())
    ht.tune(residual_net(), path, trials=9)
    good = record.read(path)
    (first, second, third), said = sorted(good), [""]

    def warned(text: str) -> str:
        path.write_text(text)
        capsys.readouterr()
        _, count = pipeline.schedules.apply_records(model, HOST, record.read(path))
        said[0] = capsys.readouterr().err
        return f"{count} {said[0]}"

    assert warned(record.dump(good)) == "3 "
    for text, words in (
        ("{", "no JSON"),
        ("[]", "list"),
        ("\xff", "no JSON"),
        ('{"format": "other"}', "other"),
        (f'{{"format": "{record.FORMAT}"}}', "ignored"),
    ):
        assert warned(text).startswith("0 hawq_tvm: warning: ") and words in said[0] and str(path) in said[0]
    content = json.loads(record.dump(good))
    for change, words in (
        ({"rule": "gpu.wmma"}, "no rule 'gpu.wmma'"),
        ({"rule": "cpu.depthwise"}, "not cpu.depthwise"),
        ({"tile": {"pixels": 1}}, "no such tile"),
        ({"median_us": -1}, "median_us"),
        ({"tile": [1]}, "tile"),
        ({"tile": {"pixels": [1]}}, "tile"),
        ({"extra": 1}, "extra"),
        ({"load": "low"}, "load"),
        ({"threads": None}, "threads"),
    ):
        entries = {**content["entries"], second: {**content["entries"][second], **change}}
        assert (
            warned(json.dumps({**content, "entries": entries})).startswith("2 ")
            and words in said[0]
            and repr(second) in said[0]
        )
        assert first not in said[0] and third not in said[0]
    entries = {**content["entries"], first: 5}
    assert warned(json.dumps({**content, "entries": entries})).startswith("2 ") and "no object" in said[0]
    # A record that became useless is measured again.
    path.write_text(record.dump({**good, first: replace(good[first], tile={"pixels": 1})}))
    assert [o.key for o in ht.tune(residual_net(), path, trials=9).outcomes] == [first]


def test_a_stored_tile_that_does_not_fit_is_an_error() -> None:
    model = packed(residual_net())
    tiled = {n: f for n, f in stages.private_functions(model).items() if isinstance(_rule(model, n, f), Tiled)}
    name, func = next(iter(tiled.items()))
    layer = Layer.of(
        model.get_global_var(name), func.with_attr(record.ATTRIBUTE, json.dumps({"rule": "x", "tile": {}}))
    )
    with pytest.raises(ScheduleError, match="compile the model again"):
        record.recorded_tile(_rule(model, name, func), layer, HOST)


def _rule(model: tvm.IRModule, name: str, func: Any) -> Any:
    return choose(rules_for(HOST), Layer.of(model.get_global_var(name), func), HOST).rule


def test_records_of_several_threads_go_first(tmp_path: Path, fake_race: list[int]) -> None:
    model = packed(depthwise_net())
    (one, *_) = [w for w in tuner.workloads(model, HOST, 1) if w.key.endswith(" one")]
    keys = workload.keys(one.rule, one.layer, HOST)
    found = {
        c: replace(RECORD, rule=one.rule.name, tile=record.fields_of(one.tiles[i]))
        for i, c in enumerate(("many", "one"))
    }
    chosen = record.find({keys[c]: r for c, r in found.items()}, keys.values(), one.rule, one.layer, HOST, set())
    assert chosen == found["many"]
    assert record.find({keys["one"]: found["one"]}, keys.values(), one.rule, one.layer, HOST, set()) == found["one"]


def test_the_command_line(
    tmp_path: Path, fake_race: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(residual_net(), "m.onnx")
    assert main(["tune", "m.onnx", "--trials", "9", "--threads", "1"]) == 0
    captured = capsys.readouterr()
    assert "9 tiles measured" in captured.out and "m.records.json" in captured.out and "3 of 3" in captured.err
    assert main(["compile", "m.onnx", "-o", "m.hawq", "--records", "m.records.json"]) == 0
    assert "tiles   3 from records" in capsys.readouterr().out
    assert main(["info", "m.hawq"]) == 0 and "record" in capsys.readouterr().out
    assert (
        main(["tune", "m.onnx", "--trials", "1"])
        == main(["compile", "m.onnx", "-o", "n.hawq", "--records", "none.json"])
        == 2
    )
    Path("notes.json").write_text("{}")
    assert main(["tune", "m.onnx", "-o", "notes.json"]) == 2 and Path("notes.json").read_text() == "{}"
    assert "no file of records" in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot run"):
        ht.tune(residual_net(), tmp_path / "r.json", target="llvm -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu")
    with pytest.raises(OutputError):
        ht.tune(residual_net(), tmp_path / "no" / "r.json")


def test_shipped_records_are_sound() -> None:
    for path in record.SHIPPED.glob("*.json"):
        assert record.parse(path.read_bytes(), str(path))
