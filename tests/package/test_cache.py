"""The cache of compiled kernels: the same bytes with and without it, and nothing in it is ever trusted blindly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import hawq_tvm as ht
from hawq_tvm.compiler import build
from hawq_tvm.compiler import cache as module
from hawq_tvm.compiler.cache import Cache, folder
from hawq_tvm.targets import target

from ..models import residual_net

TARGET = "x86-avx2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv("HAWQ_TVM_CACHE", str(path))
    return path


def files(model: Any, **options: Any) -> dict[str, bytes]:
    package = ht.compile(model, TARGET, **options)
    return {"manifest.json": repr(package.manifest).encode(), **package._files}


def entries(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_packages_have_the_same_bytes_with_an_empty_cache_a_full_one_and_none(cache: Path) -> None:
    model = residual_net("int8", "uint8")
    without = files(model, cache=False)
    assert not cache.exists()
    assert files(model) == without
    kept = entries(cache)
    assert kept and all(p.suffix == ".object" for p in kept)
    with mock.patch.object(build, "_compiled", wraps=build._compiled) as compiled:
        assert files(model) == without
    assert compiled.call_count == 1  # the module without kernels that TVM's virtual machine is linked by
    assert entries(cache) == kept


def test_a_damaged_entry_is_compiled_anew(cache: Path) -> None:
    model = residual_net("int8", "uint8")
    good = files(model)
    kept = {p: p.read_bytes() for p in entries(cache)}
    for i, (path, data) in enumerate(kept.items()):
        path.write_bytes((data[:-9] + b"x" + data[-8:], data[:40], b"")[i % 3])
    assert files(model) == good
    assert {p: p.read_bytes() for p in entries(cache)} == kept


def test_processes_share_a_cache(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(residual_net("int8", "uint8").SerializeToString())
    words = [sys.executable, "-m", "hawq_tvm.cli", "compile", "model.onnx", "--quiet", "--target", TARGET, "-o"]
    runs = [subprocess.Popen([*words, name], cwd=tmp_path, stdout=subprocess.DEVNULL) for name in ("a", "b")]
    assert [run.wait() for run in runs] == [0, 0]
    subprocess.run([*words, "c", "--no-cache"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    one, two, three = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc")
    assert one == two == three
    assert all(p.suffix == ".object" for p in entries(cache))


def test_the_least_recently_read_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", limit=3000)
    for i in range(3):
        cache.put(f"k{i}", bytes(900))
        path = tmp_path / "c" / f"k{i}.object"
        os.utime(path, (1000 + i, 1000 + i))
    cache.prune()
    assert len(entries(cache.path)) == 3
    assert cache.get("k0") == bytes(900)
    cache.put("k3", bytes(900))
    cache.prune()
    assert [p.stem for p in entries(cache.path)] == ["k0", "k2", "k3"]
    cache.put("large", bytes(4000))
    assert cache.get("large") is None and cache.get("k1") is None


def test_folders_of_others_and_folders_that_cannot_be_made_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "open", tmp_path / "file", tmp_path / "file" / "below"):
        cache = Cache(path)
        cache.put("k", b"data")
        cache.prune()
        assert cache.get("k") is None
    assert not entries(tmp_path / "open")


def test_the_key_knows_source_target_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [target.parse(name) for name in ("x86-avx2", "x86-vnni", "arm-neon")]
    keys = {Cache.key(source, t) for source in ("a", "b") for t in targets}
    assert len(keys) == 6
    monkeypatch.setattr(module, "_compiler", lambda: "another")
    assert Cache.key("a", targets[0]) not in keys


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAWQ_TVM_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for base in ("", "relative"):  # the specification wants relative paths ignored
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert folder() == Path("/home/someone/.cache/hawq_tvm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert folder() == Path("/caches/hawq_tvm")
    monkeypatch.setenv("HAWQ_TVM_CACHE", "/mine")
    assert folder() == Path("/mine")
