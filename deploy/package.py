"""The package on disk: one folder NAME.hawq with the library, the integer graph it was made from, and the proofs.

    manifest.json     format version, interface, target, versions, and the SHA-256 of every other file
    model.so          the library: kernels, constants, what TVM's virtual machine needs, and for a CPU the C interface
    model.h           the C interface of a CPU's library, and the model's sizes and scales; a GPU's has none
    graph.json        the PACKED module; its constants are in constants.npz
    graph.txt         the same module as readable TVMScript
    certificate.json  the integer-only certificate
    report.json       for every kernel: rule, tile, where the tile comes from, and why earlier rules refused

A package is written to a temporary folder beside its destination and renamed, and it is checked in full before any code in it
is loaded. The same model compiled twice gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from hawq_tvm.errors import OutputError, PackageError
from hawq_tvm.files import check_folder

FORMAT_VERSION = 2
FILES = ("model.so", "model.h", "graph.json", "constants.npz", "graph.txt", "certificate.json", "report.json")
MANIFEST = "manifest.json"
# What readers rely on in a manifest, beside the hashes.
LAYOUT: dict[str, type] = {
    "name": str, "producer.tvm": str, "producer.tvm_ffi": str, "producer.hawq_tvm": str, "target.architecture": str,
    "target.cpu_features": list, "inputs": list, "outputs": list, "float_tail": list, "sha256": dict,
}  # fmt: skip
# Constants up to this many bytes stay in graph.json, where they can be read.
SMALL_CONSTANT = 64


def dump_json(value: Any) -> bytes:
    """JSON with sorted keys and a final newline, so that equal values are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def graph_files(module: tvm.IRModule) -> dict[str, bytes]:
    """graph.json, constants.npz and graph.txt of a module."""
    graph = json.loads(tvm.ir.save_json(module))
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for node in graph["nodes"]:
        if node["type"] == "ffi.Tensor":
            raw = base64.b64decode(node["data"])
            header, data = _split_tensor(raw)
            if len(data) > SMALL_CONSTANT:
                name = f"c{len(arrays)}"
                arrays[name] = np.frombuffer(data, np.uint8)
                node["data"] = {"header": base64.b64encode(header).decode(), "constant": name}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return {"graph.json": dump_json(graph), "constants.npz": buffer.getvalue(), "graph.txt": (module.script() + "\n").encode()}


def _split_tensor(raw: bytes) -> tuple[bytes, bytes]:
    """A serialized tensor as (header, data): the header ends with the data's length in bytes."""
    rank = int.from_bytes(raw[24:28], "little")
    end = 32 + 8 * rank + 8
    return raw[:end], raw[end:]


def load_graph(files: Mapping[str, bytes]) -> tvm.IRModule:
    """The module of graph.json and constants.npz, equal to the one that was saved."""
    graph = json.loads(files["graph.json"])
    with np.load(io.BytesIO(files["constants.npz"]), allow_pickle=False) as arrays:
        for node in graph["nodes"]:
            if node["type"] == "ffi.Tensor" and isinstance(node["data"], dict):
                raw = base64.b64decode(node["data"]["header"]) + arrays[node["data"]["constant"]].tobytes()
                node["data"] = base64.b64encode(raw).decode()
    return tvm.ir.load_json(json.dumps(graph))


def install(destination: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a package to the folder `destination` in one step; a package that is there is replaced, anything else refused.

    Raises OutputError when the destination exists and is no package, or cannot be written.
    """
    check_destination(destination)
    try:
        staging = _staging(destination)
        try:
            new, old = staging / "new", staging / "old"
            new.mkdir()  # with the user's permissions: those of `staging` are its owner's alone
            for name, data in {**files, MANIFEST: dump_json(manifest)}.items():
                _write(new / name, data)
            if destination.exists():
                os.replace(destination, old)
            try:
                os.replace(new, destination)
            except OSError:
                if old.exists():
                    os.replace(old, destination)
                raise
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
            raise OutputError("cannot be written", where=str(destination), expected="the name of a folder to make", remedy="add a name, by habit NAME.hawq")
        if destination.exists() and not _may_replace(destination):
            raise OutputError("exists and is not a package", where=str(destination), remedy="choose another name, or remove it")
        _staging(destination).rmdir()
    except OSError as e:
        raise _unwritable(destination, e) from e


def _staging(destination: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))


def _unwritable(destination: Path, e: OSError) -> OutputError:
    return OutputError("cannot be written", where=str(destination), found=e.strerror or str(e), remedy="check the path and its permissions")


def _may_replace(destination: Path) -> bool:
    """Whether a path is an empty folder or a package, damaged perhaps, in which nothing else is kept."""
    if not destination.is_dir():
        return False
    names = {p.name for p in destination.iterdir()}
    return not names or {MANIFEST, "graph.json"} <= names <= {MANIFEST, *FILES}


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def read_files(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the files of a package, every hash checked before anything is used.

    Raises PackageError for a missing, damaged, extra, unreadable or foreign file, or another format version.
    """
    try:
        return _read(folder, str(folder))
    except OSError as e:
        raise PackageError("cannot be read", where=str(folder), found=e.strerror or str(e), remedy="check the path and its permissions") from e


def _read(folder: Path, where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    if not folder.exists():
        raise PackageError("does not exist", where=where, remedy="check the path")
    if not folder.is_dir():
        raise PackageError("is not a package", where=where, expected="a folder written by `hawq-tvm compile`", found="a file")
    manifest = _read_manifest(folder, where)
    hashes = manifest["sha256"]
    present = {p.name for p in folder.iterdir()} - {MANIFEST}
    names = [n for n in FILES if n != "model.h" or manifest["target"].get("kind") != "cuda"]
    if present != set(names):
        odd = sorted(present ^ set(names))
        raise PackageError("is damaged: a file is missing or does not belong", where=where, found=", ".join(odd), remedy="compile it again")
    files: dict[str, bytes] = {}
    for name in names:
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise PackageError("is damaged: a file is not a plain file", where=where, found=name, remedy="compile it again")
        files[name] = path.read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != hashes.get(name):
            raise PackageError("is damaged: a file does not match its checksum", where=where, found=name, remedy="compile or copy it again")
    return manifest, files


def _read_manifest(folder: Path, where: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise PackageError("is not a package", where=where, expected=MANIFEST, found="no such file")
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as e:  # ValueError: no JSON, no UTF-8, or a number of absurd length
        raise PackageError("is damaged: its manifest is no JSON", where=where, found=str(e).splitlines()[0], remedy="compile it again") from e
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise PackageError("is damaged: its manifest has no format version", where=where, remedy="compile it again")
    if manifest["format"] != FORMAT_VERSION:
        raise PackageError(
            "has another format version", where=where, expected=str(FORMAT_VERSION), found=str(manifest["format"]),
            remedy="use the hawq-tvm version that wrote it, or compile it again",
        )  # fmt: skip
    if data != dump_json(manifest) or manifest.get("seal") != _seal(manifest):
        raise PackageError("is damaged: its manifest was changed", where=where, remedy="compile or copy it again")
    for key, kind in LAYOUT.items():
        if not isinstance(_field(manifest, key), kind):
            raise PackageError("has a manifest that another tool wrote", where=where, expected=f"{kind.__name__} {key}", remedy="compile it again")
    return manifest


def _field(value: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _seal(manifest: Mapping[str, Any]) -> str:
    """The hash of everything in the manifest but itself: it finds damage, it is no signature."""
    return hashlib.sha256(dump_json({k: v for k, v in manifest.items() if k != "seal"})).hexdigest()


def sealed(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest with format version, file hashes and its own seal."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    full = {**manifest, "format": FORMAT_VERSION, "sha256": hashes}
    return {**full, "seal": _seal(full)}

