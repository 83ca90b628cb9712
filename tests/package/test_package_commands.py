"""info, strip, sign and verify-signature: what they write, what they refuse, and that minisign agrees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from deploy import package as files
from hawq_tvm.cli import main
from hawq_tvm.core.errors import PackageError, SignatureError
from hawq_tvm.package import runtime

from ..models import residual_net

minisign = pytest.importorskip("minisign", reason="py-minisign is not installed (extra sign)")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy.hawq"))


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with k.key, k.pub, other.pub, and locked.key with the password "secret"."""
    place = tmp_path / "keys"
    place.mkdir()
    pair, other = minisign.KeyPair.generate(), minisign.KeyPair.generate()
    for name, content in (("k.key", pair.secret_key), ("k.pub", pair.public_key), ("other.pub", other.public_key)):
        (place / name).write_bytes(bytes(content) + b"\n")
    pair.secret_key.encrypt("secret", opslimit=2**15, memlimit=2**24)
    (place / "locked.key").write_bytes(bytes(pair.secret_key) + b"\n")
    return place


def _json(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def _fails(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == code
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def test_the_full_package_is_not_replaced_by_its_stripped_self(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "would replace the full package" in _fails(
        capsys, 2, "strip", folder, "-o", folder.parent / "." / folder.name
    )
    assert ht.load(folder).graph is not None


def test_a_stripped_package_runs_and_says_what_it_cannot(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.hawq"
    assert main(["strip", str(folder), "-o", str(small)]) == 0
    full, stripped = ht.load(folder), ht.load(small)
    assert {p.name for p in folder.iterdir()} - {p.name for p in small.iterdir()} == set(files.GRAPH)
    assert stripped.manifest["graph_sha256"] == full.manifest["graph_sha256"]
    assert stripped.manifest["stripped"] == {name: full.manifest["sha256"][name] for name in files.GRAPH}
    (x,) = full.random_inputs(1, 0)
    for model in (stripped, runtime.load(small)):
        np.testing.assert_array_equal(*model.run(x).values(), *full.run(x).values())
    assert stripped.bench(warmup_ms=0, duration=0, iterations=2).times_ms
    assert (
        _json(capsys, "bench", small, "--duration", "0", "--warmup-ms", "0", "--threads", "1")["products"]
        == full.products
        > 0
    )
    for verb in ("verify", "prove", "profile"):
        assert "stripped of its integer graph" in _fails(capsys, 3, verb, small)
    assert "stripped" in _fails(capsys, 3, "strip", small, "-o", tmp_path / "again.hawq")
    assert main(["strip", str(folder), "-o", str(tmp_path / "one.hawq"), "--single-file"]) == 0
    assert files.read_files(tmp_path / "one.hawq") == files.read_files(small)
    (small / "graph.json").write_bytes((folder / "graph.json").read_bytes())
    with pytest.raises(PackageError, match="does not belong"):
        ht.load(small)


@pytest.mark.parametrize("target", ["x86-64-v2", "x86-vnni"])
def test_packages_of_one_model_carry_one_hash_of_the_graph(tiny: Path, target: str) -> None:
    wanted = ht.load(tiny).manifest["graph_sha256"]
    assert ht.compile(residual_net(), target).manifest["graph_sha256"] == wanted
    assert ht.compile(residual_net("int4")).manifest["graph_sha256"] != wanted


def test_info_tells_of_any_package(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = _json(capsys, "info", folder)
    assert fields["checksums"] == "ok" and fields["has_graph"] and fields["runs_on_this_cpu"] and not fields["signed"]
    assert fields["files"] == {p.name: p.stat().st_size for p in folder.iterdir()} and fields["bytes"] == sum(
        fields["files"].values()
    )
    assert (
        sum(fields["kernels_by_rule"].values()) == len(fields["report"])
        and fields["inputs"][0]["quantization"]["scale"]
    )
    assert main(["pack", str(folder), "-o", str(tmp_path / "one.hawq")]) == 0
    assert _json(capsys, "info", tmp_path / "one.hawq")["single_file"]
    foreign = ht.compile(residual_net(), "x86-amx").save(tmp_path / "amx.hawq")
    fields = _json(capsys, "info", foreign)
    assert fields["target"]["mcpu"] == "x86-64-v4" and (fields["runs_on_this_cpu"] or "amx" in fields["cannot_run"])
    assert main(["info", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert all(
        word in printed
        for word in (
            f"format {files.FORMAT_VERSION}",
            "checksums ok",
            "scale 0.",
            "model.so",
            "this machine's CPU runs it",
            "not signed",
        )
    )
    (folder / "model.so").write_bytes(b"")
    assert "does not match its checksum" in _fails(capsys, 3, "info", folder)


@pytest.mark.parametrize("single", [False, True])
def test_signatures(folder: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], single: bool) -> None:
    place = folder
    if single:
        place = tmp_path / "one.hawq"
        assert main(["pack", str(folder), "-o", str(place)]) == 0
    assert "is not signed" in _fails(capsys, 1, "verify-signature", place, "--key", keys / "k.pub")
    assert main(["sign", str(place), "--key", str(keys / "k.key")]) == 0
    assert _json(capsys, "verify-signature", place, "--key", keys / "k.pub") == {
        "ok": True,
        "trusted_comment": "file:manifest.json\tpackage:model\thashed",
    }
    assert "not valid for this key" in _fails(capsys, 1, "verify-signature", place, "--key", keys / "other.pub")
    assert _json(capsys, "info", place)["signed"]
    for load in (ht.load, runtime.load):
        assert load(place, public_key=keys / "k.pub").name == "model"
        with pytest.raises(SignatureError, match="not valid for this key"):
            load(place, public_key=keys / "other.pub")
    again = ht.load(place).save(tmp_path / "again.hawq")
    ht.load(again, public_key=keys / "k.pub")


def test_a_signature_of_another_package(folder: Path, keys: Path, tmp_path: Path) -> None:
    other = ht.compile(residual_net("int4")).save(tmp_path / "other.hawq")
    for place in (folder, other):
        assert main(["sign", str(place), "--key", str(keys / "k.key")]) == 0
    shutil.copy(other / files.SIGNATURE, folder / files.SIGNATURE)
    ht.load(folder)  # nobody asked
    with pytest.raises(SignatureError, match="not valid for this key"):
        ht.load(folder, public_key=keys / "k.pub")
    for damaged in (b"", b"no signature\n", os.urandom(300), b"untrusted comment: x\nAAAA\ntrusted comment: y\nAAAA\n"):
        (folder / files.SIGNATURE).write_bytes(damaged)
        with pytest.raises(SignatureError):
            runtime.load(folder, public_key=keys / "k.pub")


def test_a_stripped_package_has_no_signature_of_the_full_one(folder: Path, keys: Path, tmp_path: Path) -> None:
    assert main(["sign", str(folder), "--key", str(keys / "k.key")]) == 0
    assert main(["strip", str(folder), "-o", str(tmp_path / "small.hawq")]) == 0
    with pytest.raises(SignatureError, match="is not signed"):
        ht.load(tmp_path / "small.hawq", public_key=keys / "k.pub")


def test_keys(folder: Path, keys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWQ_TVM_KEY_PASSWORD", "wrong")
    assert "wrong password" in _fails(capsys, 2, "sign", folder, "--key", keys / "locked.key")
    monkeypatch.setenv("HAWQ_TVM_KEY_PASSWORD", "secret")
    assert main(["sign", str(folder), "--key", str(keys / "locked.key")]) == 0
    assert main(["verify-signature", str(folder), "--key", str(keys / "k.pub")]) == 0
    for key in ("none.key", "k.pub", "."):
        assert "is no readable key" in _fails(capsys, 2, "sign", folder, "--key", keys / key)
    assert "is no readable key" in _fails(capsys, 2, "verify-signature", folder, "--key", keys / "k.key")


@pytest.mark.skipif(shutil.which("minisign") is None, reason="no minisign (apt-get install minisign)")
def test_minisign_itself_agrees(folder: Path, keys: Path) -> None:
    assert main(["sign", str(folder), "--key", str(keys / "k.key")]) == 0
    check = ["minisign", "-Vm", str(folder / files.MANIFEST), "-p", str(keys / "k.pub")]
    subprocess.run(check, check=True, capture_output=True)
    subprocess.run(
        ["minisign", "-G", "-W", "-p", str(keys / "m.pub"), "-s", str(keys / "m.key")], check=True, capture_output=True
    )
    (folder / files.SIGNATURE).unlink()
    subprocess.run(
        ["minisign", "-Sm", str(folder / files.MANIFEST), "-s", str(keys / "m.key")],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert main(["verify-signature", str(folder), "--key", str(keys / "m.pub")]) == 0
