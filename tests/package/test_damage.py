"""Packages replaced, edited and half-written: never the wrong code, never a lost file, always one sentence."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from deploy import package as files
from hawq_tvm.errors import OutputError, PackageError

from ..models import residual_net

REQUIRED = (
    "name", "producer.tvm", "producer.tvm_ffi", "producer.hawq_tvm", "producer.llvm", "target.architecture", "target.cpu_features",
    "target.cpuinfo_flags", "target.kind", "c_interface", "graph_sha256", "products", "constants_bytes", "inputs", "outputs", "float_tail", "sha256",
)  # fmt: skip


@pytest.fixture(scope="module")
def package() -> ht.Package:
    return ht.compile(residual_net())


def test_a_package_compiled_anew_in_the_same_place_runs_its_own_code(package: ht.Package, tmp_path: Path) -> None:
    """The dynamic linker hands out a library that it knows by path, so the path must not be the package's."""
    other = ht.compile(residual_net("int4"))
    (x,) = package.random_inputs(1, 0)
    place = tmp_path / "m.hawq"
    old = ht.load(package.save(place))
    (first,) = old.run(x).values()
    (second,) = ht.load(other.save(place)).run(x).values()
    (wanted,) = other.run(x).values()
    np.testing.assert_array_equal(second, wanted)
    assert (first != second).any()
    np.testing.assert_array_equal(*old.run(x).values(), first)


def test_a_loaded_package_needs_its_folder_no_more(package: ht.Package, tmp_path: Path) -> None:
    loaded = ht.load(package.save(tmp_path / "m.hawq"))
    (tmp_path / "m.hawq" / "model.so").write_bytes(b"not the library that was checked")
    assert loaded.prove().ok
    loaded.verify(random=1).raise_if_mismatch()
    ht.load(loaded.save(tmp_path / "again.hawq"))


def test_a_library_copy_goes_with_its_package(package: ht.Package, tmp_path: Path) -> None:
    loaded = ht.load(package.save(tmp_path / "m.hawq"))
    copy = loaded.library
    assert copy.read_bytes() == (tmp_path / "m.hawq" / "model.so").read_bytes()
    del loaded
    assert not copy.parent.exists()


@pytest.mark.parametrize("names", [["manifest.json"], ["manifest.json", "graph.json", "notes.txt"], ["a"], ["graph.json"]])
def test_a_folder_with_anything_else_in_it_is_never_replaced(package: ht.Package, tmp_path: Path, names: list[str]) -> None:
    """A manifest.json alone makes no package: browser extensions and web pages have one too."""
    place = tmp_path / "mine"
    place.mkdir()
    for name in names:
        (place / name).write_text("precious")
    with pytest.raises(OutputError, match="exists and is not a package"):
        package.save(place)
    assert {p.name: p.read_text() for p in place.iterdir()} == dict.fromkeys(names, "precious")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_file_is_never_replaced(package: ht.Package, tmp_path: Path) -> None:
    (tmp_path / "m.hawq").write_text("precious")
    with pytest.raises(OutputError, match="exists and is not a package"):
        package.save(tmp_path / "m.hawq")
    with pytest.raises(OutputError, match="cannot be written"):
        package.save(tmp_path / "m.hawq" / "below.hawq")
    assert (tmp_path / "m.hawq").read_text() == "precious"


def test_an_empty_folder_and_a_damaged_package_are_replaced(package: ht.Package, tmp_path: Path) -> None:
    place = tmp_path / "m.hawq"
    place.mkdir()
    package.save(place)
    (place / "manifest.json").write_bytes(b"{")
    (place / "model.so").unlink()
    package.save(place)
    assert ht.load(place).name == package.name


@pytest.mark.parametrize("broken_call", [1, 2])
def test_a_failed_replacement_leaves_the_old_package(
    package: ht.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_call: int
) -> None:
    place = package.save(tmp_path / "m.hawq")
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    calls: list[Any] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == broken_call:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr("deploy.folders._exchange", lambda one, other: 38)  # ENOSYS: a system that needs two steps
    with pytest.raises(OutputError, match=r"cannot be written.*No space left"):
        package.save(place)
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.hawq"]


def test_the_folder_has_the_users_permissions(package: ht.Package, tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    place = package.save(tmp_path / "m.hawq")
    assert stat.S_IMODE(place.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


@pytest.mark.parametrize("content", [
    b"[" * 100_000, b'{"format": ' + b"9" * 10_000 + b"}", b"\xff\xfe", b"[]", b"{}", b'{"format": "1"}', b'{"format": 1}', b"null", b"NaN",
])  # fmt: skip
def test_absurd_manifests(package: ht.Package, tmp_path: Path, content: bytes) -> None:
    place = package.save(tmp_path / "m.hawq")
    (place / "manifest.json").write_bytes(content)
    with pytest.raises(PackageError, match=r"m\.hawq"):
        ht.load(place)


def test_every_byte_of_the_manifest_counts(package: ht.Package, tmp_path: Path) -> None:
    """Blanks and repeated keys too, which JSON itself ignores."""
    place = package.save(tmp_path / "m.hawq")
    text = (place / "manifest.json").read_text()
    for edited in (text + " ", text.replace("\n", "\t\n", 1), text.replace("{", '{ "name": "other",', 1), json.dumps(json.loads(text))):
        (place / "manifest.json").write_text(edited)
        with pytest.raises(PackageError, match="manifest was changed"):
            ht.load(place)


@pytest.mark.parametrize("dotted", REQUIRED)
def test_a_sealed_manifest_without_what_readers_need(package: ht.Package, tmp_path: Path, dotted: str) -> None:
    place = package.save(tmp_path / "m.hawq")
    manifest = json.loads((place / "manifest.json").read_text())
    *outer, last = dotted.split(".")
    (manifest[outer[0]] if outer else manifest)[last] = None
    manifest["seal"] = files._seal(manifest)
    (place / "manifest.json").write_bytes(files.dump_json(manifest))
    with pytest.raises(PackageError):
        ht.load(place)
