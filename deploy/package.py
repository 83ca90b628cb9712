"""The package on disk: one folder NAME.hawq, or a single file (archive.py), with the library, the integer graph it
was made from, and the proofs.

    manifest.json     format version, interface, target, versions, and the SHA-256 of every other file
    model.so          the library: kernels, constants, what TVM's virtual machine needs, and for a CPU the C interface
    model.h           the C interface of a CPU's library, and the model's sizes and scales; a GPU's has none
    graph.json        the PACKED module; its constants are in constants.npz
    graph.txt         the same module as readable TVMScript
    certificate.json  the integer-only certificate
    report.json       for every kernel: rule, tile, where the tile comes from, and why earlier rules refused
    tail.onnx         where the manifest has `cut`: the model's float end, which was cut off

The graph's three files may be left out (`stripped`), and a signature of the manifest, manifest.json.minisig, may be
there. A package is written to a temporary folder beside its destination and renamed, and it is checked in full
before any code in it is loaded. The same model compiled twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import OutputError, PackageError
from hawq_tvm.core.files import check_folder, write_bytes

from . import archive, contents, folders

FORMAT_VERSION = 2
TAIL = "tail.onnx"  # the float end of a model, where one was cut off
FILES = ("model.so", "model.h", "graph.json", "constants.npz", "graph.txt", "certificate.json", "report.json")
MANIFEST = archive.FIRST
SIGNATURE = f"{MANIFEST}.minisig"  # of the manifest, which holds every other file's hash; may be absent
# The integer graph, which `strip` leaves out.
GRAPH = ("graph.json", "constants.npz", "graph.txt")
HEADER = "model.h"  # of a CPU's library; a GPU's has no C interface


def dump_json(value: Any) -> bytes:
    """JSON with sorted keys and a final newline, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def install(destination: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a package to the folder `destination` in one step; a package that is there is replaced, anything else
    refused.

    Raises OutputError when the destination exists and is no package, or cannot be written.
    """
    check_destination(destination)
    destination = Path(os.path.realpath(destination))  # a link stays, and leads to the new package
    try:
        staging = _staging(destination)
        try:
            new, old = staging / "new", staging / "old"
            new.mkdir()  # with the user's permissions: those of `staging` are its owner's alone
            for name, data in {**files, MANIFEST: dump_json(manifest)}.items():
                _write(new / name, data)
            folders.replace(new, old, destination)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as e:
        raise _unwritable(destination, e) from e


def check_destination(destination: Path) -> None:
    """Whether a package can be written to a folder, found out before it is compiled; nothing is left behind.

    Raises OutputError when it exists and is no package, or when the folder around it does not exist or takes no files.
    """
    try:
        check_folder(destination)
        if destination.name in ("", ".."):
            raise OutputError(
                "cannot be written",
                where=str(destination),
                expected="the name of a folder to make",
                remedy="add a name, by habit NAME.hawq",
            )
        if destination.exists() and not _may_replace(destination):
            raise OutputError(
                "exists and is not a package's folder",
                where=str(destination),
                remedy="choose another name, or remove it",
            )
        _staging(destination).rmdir()
    except OSError as e:
        raise _unwritable(destination, e) from e


def _staging(destination: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{destination.name[:40]}.", dir=destination.parent))


def _unwritable(destination: Path, e: OSError) -> OutputError:
    return OutputError(
        "cannot be written",
        where=str(destination),
        found=e.strerror or str(e),
        remedy="check the path and its permissions",
    )


def _may_replace(destination: Path) -> bool:
    """Whether a path is an empty folder or a package, damaged perhaps, in which nothing else is kept."""
    if not destination.is_dir():
        return False
    names = {p.name for p in destination.iterdir()}
    return not names or {MANIFEST, "certificate.json"} <= names <= {MANIFEST, SIGNATURE, TAIL, *FILES}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def install_file(destination: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a package as a single file, in one step; a single-file package that is there is replaced, anything else
    refused.

    Raises OutputError when the destination exists and is no such file, or cannot be written, or 4 GiB would not do.
    """
    if destination.exists() and not archive.is_one(destination):
        raise OutputError(
            "exists and is not a single-file package",
            where=str(destination),
            remedy="choose another name, or remove it",
        )
    write_bytes(destination, archive.pack({**files, MANIFEST: dump_json(manifest)}, str(destination)))


def read_files(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the other files of a package, a folder or a single file; every hash is checked before
    anything is used.

    Raises PackageError for a missing, damaged, extra, unreadable or foreign file, or another format version.
    """
    try:
        return _read(path, str(path))
    except OSError as e:
        raise PackageError(
            "cannot be read", where=str(path), found=e.strerror or str(e), remedy="check the path and its permissions"
        ) from e


def _read(path: Path, where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    if not path.exists():
        raise PackageError("does not exist", where=where, remedy="check the path")
    if path.is_dir():
        return folders.reading(path, lambda folder: _checked(*_folder(folder, where), where))
    return _checked(*_single_file(path, where), where)


def _checked(names: set[str], read: Callable[[str], bytes], where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = _checked_manifest(read(MANIFEST), where)
    hashes = manifest["sha256"]
    required = {n for n in FILES if n not in GRAPH and (n != HEADER or manifest["target"].get("kind") != "cuda")}
    required |= {TAIL} if "cut" in manifest else set()
    _check_names(required, set(hashes), set(names) - {MANIFEST, SIGNATURE}, where)
    files = {name: read(name) for name in (*hashes, *({SIGNATURE} & set(names)))}
    for name in hashes:
        if hashlib.sha256(files[name]).hexdigest() != hashes[name]:
            raise PackageError(
                "is damaged: a file does not match its checksum",
                where=where,
                found=name,
                remedy="compile or copy it again",
            )
    return manifest, files


def _check_names(required: set[str], listed: set[str], present: set[str], where: str) -> None:
    """Whether the files are those of the manifest, and these what a package holds: the graph is there as a whole or
    not at all.
    """
    expected = required | (set(GRAPH) if listed & set(GRAPH) else set())
    if gone := (expected | listed) - (present & listed):
        raise PackageError(
            "is damaged: a file is missing",
            where=where,
            found=f"no {', '.join(sorted(gone))}",
            remedy="compile or copy it again",
        )
    if extra := (present | listed) - expected:
        raise PackageError(
            "holds a file that does not belong there",
            where=where,
            found=", ".join(sorted(extra)),
            remedy="remove it, or compile again",
        )


def _folder(folder: folders.Folder, where: str) -> tuple[set[str], Callable[[str], bytes]]:
    """The names in a folder, and what reads one: plain files only, no links."""

    def read(name: str) -> bytes:
        data = folder.read(name)
        if data is None:
            raise PackageError(
                "is damaged: a file is not a plain file", where=where, found=name, remedy="compile it again"
            )
        return data

    names = folder.names()
    if MANIFEST not in names:
        raise PackageError("is not a package", where=where, expected=MANIFEST, found="no such file")
    return names, read


def _single_file(path: Path, where: str) -> tuple[set[str], Callable[[str], bytes]]:
    if not archive.is_one(path):
        raise PackageError(
            "is not a package",
            where=where,
            expected="what `hawq-tvm compile` or `hawq-tvm pack` wrote",
            found="another file",
        )
    contents = archive.unpack(path.read_bytes(), where)
    return set(contents), contents.__getitem__


def require_graph(manifest: Mapping[str, Any], where: str) -> None:
    """Refuse what needs the integer graph where it was stripped.

    Raises PackageError.
    """
    if not set(GRAPH) <= set(manifest["sha256"]):
        raise PackageError(
            "was stripped of its integer graph, which verify, prove and profile work from",
            where=where,
            expected="the full package",
            found=f"no {GRAPH[0]}",
            remedy=f"use the package it was made from (graph_sha256 {manifest.get('graph_sha256')}), or compile again",
        )


def stripped(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A package without its integer graph: it runs and is timed, and keeps `graph_sha256`; the hashes of what was
    left out are in `stripped`.

    A signature is left out too: it is the full package's.
    """
    kept = {name: data for name, data in files.items() if name not in (*GRAPH, SIGNATURE)}
    gone = {name: manifest["sha256"][name] for name in GRAPH if name in manifest["sha256"]}
    return sealed({**manifest, "stripped": {**manifest.get("stripped", {}), **gone}}, kept), kept


def _checked_manifest(data: bytes, where: str) -> dict[str, Any]:
    manifest = contents.read(data, "manifest", where)
    if not isinstance(manifest, dict) or type(manifest.get("format")) is not int:
        raise PackageError("is damaged: its manifest has no format version", where=where, remedy="compile it again")
    if manifest["format"] != FORMAT_VERSION:
        raise PackageError(
            "has another format version",
            where=where,
            expected=str(FORMAT_VERSION),
            found=str(manifest["format"]),
            remedy="use the hawq-tvm version that wrote it, or compile it again",
        )
    if data != dump_json(manifest) or manifest.get("seal") != _seal(manifest):
        raise PackageError("is damaged: its manifest was changed", where=where, remedy="compile or copy it again")
    contents.fit(manifest, "manifest", where)
    return manifest


def _seal(manifest: Mapping[str, Any]) -> str:
    """The hash of everything in the manifest but itself: it finds damage, it is no signature."""
    return hashlib.sha256(dump_json({k: v for k, v in manifest.items() if k != "seal"})).hexdigest()


def sealed(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest with format version, file hashes and its own seal."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != SIGNATURE}
    full = {**manifest, "format": FORMAT_VERSION, "sha256": hashes}
    return {**full, "seal": _seal(full)}
