"""Damaged, edited, foreign and malicious packages, folders and single files: every reader refuses them with a sentence, none crashes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import archive
from deploy import package as files
from hawq_tvm.cli import main
from hawq_tvm.errors import OutputError, PackageError

Refused = Callable[[Path], str]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy.hawq"))


@pytest.fixture
def single(tiny: Path, tmp_path: Path) -> Path:
    files.install_file(tmp_path / "one.hawq", *files.read_files(tiny))
    return tmp_path / "one.hawq"


def _regions(size: int, count: int) -> list[int]:
    """Offsets into `size` bytes: a seeded one in each of `count` equal regions, and both ends."""
    rng = np.random.default_rng(0)
    edges = np.linspace(0, size, min(count, size) + 1).astype(int)
    return sorted({0, size - 1, *(int(rng.integers(a, max(b, a + 1))) for a, b in itertools.pairwise(edges))})


def test_a_flipped_byte_anywhere_in_a_single_file(single: Path, refused: Refused) -> None:
    data = single.read_bytes()
    structure = [i for name in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06") for i in range(data.find(name), data.find(name) + 46) if i < len(data)]
    for offset in sorted({*_regions(len(data), 60), *structure[::2]}):
        damaged = bytearray(data)
        damaged[offset] ^= 0x5A
        single.write_bytes(damaged)
        assert "one.hawq" in refused(single), offset


def test_a_flipped_byte_anywhere_in_a_folder(folder: Path, refused: Refused) -> None:
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for offset in _regions(len(data), 40 if path.name == files.MANIFEST else 8):
            damaged = bytearray(data)
            damaged[offset] ^= 0x5A
            path.write_bytes(damaged)
            assert "copy.hawq" in refused(folder), (path.name, offset)
        path.write_bytes(data)


def test_a_single_file_cut_off_at_a_hundred_places(single: Path, refused: Refused) -> None:
    data = single.read_bytes()
    for size in [0, 1, 4, 29, 30, 43, *np.linspace(44, len(data) - 1, 94).astype(int)]:
        single.write_bytes(data[:size])
        refused(single)
    single.write_bytes(data + b"\0")
    refused(single)


def test_files_cut_off_or_gone(folder: Path, refused: Refused) -> None:
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for size in {0, 1, *np.linspace(2, len(data) - 1, 12).astype(int).tolist()}:
            path.write_bytes(data[:size])
            refused(folder)
        path.unlink()
        refused(folder)
        path.symlink_to("/etc/hostname")
        refused(folder)
        path.unlink()
        path.mkdir()
        refused(folder)
        path.rmdir()
        path.write_bytes(data)
    (folder / "more.txt").write_text("does not belong")
    assert "more.txt" in refused(folder)


def _reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / files.MANIFEST).read_text())
    change(manifest)
    manifest["seal"] = files._seal(manifest)
    (folder / files.MANIFEST).write_bytes(files.dump_json(manifest))


@pytest.mark.parametrize("where, value, words", [
    ("format", files.FORMAT_VERSION + 1, "another format version"), ("format", 10**30, ""), ("producer.tvm", "0.1", "another version of TVM"),
    ("producer.tvm_ffi", "0.0.1", "another version of TVM"), ("target.architecture", "riscv64", "another architecture"),
    ("sha256", {}, "damaged"), ("sha256", {"../model.so": "0" * 64}, ""), ("sha256", [], ""), ("target", None, ""),
    ("inputs", {}, ""), ("producer", {"tvm": []}, ""),
])  # fmt: skip
def test_an_edited_and_sealed_manifest(folder: Path, refused: Refused, where: str, value: Any, words: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *outer, last = where.split(".")
        (manifest[outer[0]] if outer else manifest)[last] = value

    _reseal(folder, change)
    assert words in refused(folder)


def test_a_package_for_another_cpu(folder: Path, refused: Refused) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["target"]["cpu_features"].append("made-up-isa")
        manifest["target"]["cpuinfo_flags"].append("made_up_isa")

    _reseal(folder, change)
    assert "made" in refused(folder) and "CPU features that this machine lacks" in refused(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": ' + b"9" * 10_000 + b"}", b"\xff\xfe", b"[]", b"{}", b'\n "seal": "', b'{\n "seal": "' + b"0" * 64 + b'",\n}'])
def test_an_absurd_manifest(folder: Path, refused: Refused, content: bytes) -> None:
    (folder / files.MANIFEST).write_bytes(content)
    refused(folder)


def test_what_is_no_package(tmp_path: Path, refused: Refused) -> None:
    assert "does not exist" in refused(tmp_path / "nothing")
    (tmp_path / "text").write_text("no package")
    assert "is not a package" in refused(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    assert "is not a package" in refused(tmp_path / "empty")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a package" in refused(tmp_path / "pipe")


def _entry(name: str, mode: int = stat.S_IFREG | 0o644, method: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, method
    return info


HOSTILE: dict[str, tuple[str, Callable[[zipfile.ZipFile], Any]]] = {
    "traversal": ("leads elsewhere", lambda z: z.writestr(_entry("../model.so"), b"x")),
    "backslash": ("leads elsewhere", lambda z: z.writestr(_entry("..\\model.so"), b"x")),
    "subfolder": ("leads elsewhere", lambda z: z.writestr(_entry("a/model.so"), b"x")),
    "absolute": ("absolute path", lambda z: z.writestr(_entry("/etc/passwd"), b"x")),
    "drive": ("absolute path", lambda z: z.writestr(_entry("C:model.so"), b"x")),
    "link": ("link or another special", lambda z: z.writestr(_entry("model.so", stat.S_IFLNK | 0o777), b"/etc/passwd")),
    "repeated": ("two entries of one name", lambda z: [z.writestr(_entry("model.so"), b) for b in (b"x", b"y")]),
    "bomb": ("compressed", lambda z: z.writestr(_entry("model.so", method=zipfile.ZIP_DEFLATED), bytes(50_000_000))),
    "control": ("other characters", lambda z: z.writestr(_entry("model\n.so"), b"x")),
    "unicode": ("other characters", lambda z: z.writestr(_entry("mödel.so"), b"x")),
    "stranger": ("", lambda z: z.writestr(_entry("more.txt"), b"x")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_malicious_archive(tiny: Path, tmp_path: Path, kind: str, refused: Refused, request: pytest.FixtureRequest) -> None:
    words, add = HOSTILE[kind]
    path = tmp_path / "hostile.hawq"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(_entry(files.MANIFEST), (tiny / files.MANIFEST).read_bytes())
        add(z)
    said = refused(path)
    # The runner has one sentence for every archive that is not as deploy/archive.py writes it.
    assert (words if "hawq-run" not in request.node.callspec.id else "damaged") in said


def test_an_encrypted_archive(single: Path, refused: Refused) -> None:
    """The flag is what counts: bit 0 of every entry, in both headers (APPNOTE 4.4.4)."""
    data = bytearray(single.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(signature, at + 4)
    single.write_bytes(data)
    refused(single)
    with pytest.raises(PackageError, match="encrypted"):
        archive.unpack(bytes(data), "one.hawq")


def test_an_archive_that_says_4_gib(single: Path, refused: Refused) -> None:
    data = bytearray(single.read_bytes())
    data[18:26] = b"\xff" * 8
    single.write_bytes(data)
    refused(single)


def test_a_single_file_comes_back_and_is_determined(tiny: Path, single: Path, tmp_path: Path) -> None:
    assert files.read_files(single) == files.read_files(tiny)
    assert main(["pack", str(tiny), "-o", str(tmp_path / "again.hawq")]) == 0
    assert (tmp_path / "again.hawq").read_bytes() == single.read_bytes()
    with zipfile.ZipFile(single) as z:
        assert z.testzip() is None and z.namelist()[0] == files.MANIFEST
        z.extractall(tmp_path / "unzipped")
    assert files.read_files(tmp_path / "unzipped") == files.read_files(tiny)


def test_only_a_single_file_package_is_replaced(tiny: Path, single: Path, tmp_path: Path) -> None:
    manifest, contents = files.read_files(tiny)
    files.install_file(single, manifest, contents)
    (tmp_path / "mine.txt").write_text("precious")
    for path in (tmp_path / "mine.txt", tmp_path):
        with pytest.raises(OutputError, match="is not a single-file package"):
            files.install_file(path, manifest, contents)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    with pytest.raises(OutputError, match="no folder"):
        files.install_file(tmp_path / "none" / "a.hawq", manifest, contents)
