"""Packages whose checksums are right and whose contents lie: every reader compares, with the schema, the library and the graph, before it copies."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastjsonschema
import numpy as np
import pytest

import hawq_tvm as ht
from deploy import contents
from deploy import package as files
from hawq_tvm import runtime
from hawq_tvm.errors import InputError, PackageError
from hawq_tvm.native import emulated

Refused = Callable[[Path], str]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy.hawq"))


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and make all its hashes right."""
    manifest = json.loads((folder / files.MANIFEST).read_text())
    for name in manifest["sha256"]:
        if (folder / name).exists():
            manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(manifest)
    manifest["seal"] = files._seal(manifest)
    (folder / files.MANIFEST).write_bytes(files.dump_json(manifest))


def edit(where: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        at: Any = manifest
        *outer, last = (int(w) if w.isdigit() else w for w in where.split("."))
        for key in outer:
            at = at[key]
        at[last] = value

    return change


def test_the_schema_is_one() -> None:
    schema = json.loads(contents.SCHEMA.read_text())
    assert all(fastjsonschema.compile({**schema, "$ref": f"#/definitions/{name}"}) for name in schema["definitions"])


@pytest.mark.parametrize("where, value", [
    ("inputs.0.shape", [-1, 3, 8, 8]), ("inputs.0.shape", [2**41]), ("inputs.0.shape", [2**20, 2**20, 2**20]), ("inputs.0.shape", [2.5]), ("inputs.0.shape", [2.0, 3, 8, 8]),
    ("inputs.0.shape", ["2"]), ("inputs.0.shape", [True, 3, 8, 8]), ("inputs.0.shape", None), ("inputs.0.shape", [1] * 40), ("inputs.0.dtype", "object"),
    ("inputs.0.dtype", "float80"), ("inputs.0.dtype", "int8"), ("inputs.0.type", "int4"), ("inputs.0.name", ""), ("inputs.0.name", 5), ("inputs.0", {}), ("inputs.0", []),
    ("inputs.0.quantization.scale", [0]), ("inputs.0.quantization.scale", [-1.0]), ("inputs.0.quantization.scale", ["x"]),
    ("inputs.0.quantization.zero_point", ["x"]), ("inputs.0.quantization", []), ("outputs.0.shape", [-2, 10]), ("target.architecture", "../x86_64"),
    ("target.cpu_features", [5]), ("target.kind", "rom"), ("sha256.model.h", "x"), ("graph_sha256", "x"), ("products", -1), ("products", "many"),
])  # fmt: skip
def test_manifests_that_make_no_sense(folder: Path, request: pytest.FixtureRequest, where: str, value: Any) -> None:
    keys = where.split(".")
    change = (lambda m: m["sha256"].__setitem__("model.h", value)) if keys[0] == "sha256" else edit(where, value)
    reseal(folder, change)
    for load in (ht.load, runtime.load):
        with pytest.raises(PackageError) as caught:
            load(folder)
        assert "\n" not in str(caught.value) and "copy.hawq" in str(caught.value)


@pytest.mark.parametrize("where, value", [
    ("inputs.0.shape", [-1, 3, 8, 8]), ("inputs.0.shape", [2**20, 2**20, 2**20]), ("inputs.0.shape", ["2"]), ("inputs.0.dtype", "object"), ("inputs.0.type", "int4"),
    ("inputs.0.name", ""), ("inputs.0.quantization.scale", [-1.0]), ("inputs.0.quantization.scale", ["x"]), ("inputs.0.quantization.zero_point", ["x"]),
    ("inputs.0.shape", [64, 3, 64, 64]), ("inputs.0.dtype", "uint8"), ("outputs.0.shape", [2, 1000]), ("outputs.0.shape", [20]), ("outputs.0.dtype", "float64"),
])  # fmt: skip
def test_the_runner_refuses_the_same(folder: Path, hawq_run: Path, where: str, value: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        edit(where, value)(manifest)
        if where.endswith("dtype"):
            edit(where.replace("dtype", "type"), value)(manifest)

    reseal(folder, change)
    words = [str(hawq_run), str(folder), "--bench", "--duration", "0", "--iterations", "1", "--warmup-ms", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1, (done.returncode, done.stderr)


def test_two_inputs_of_one_name(folder: Path, refused: Refused) -> None:
    reseal(folder, lambda m: m["inputs"].append(m["inputs"][0]))
    assert "same name" in refused(folder)


LIES = [
    ("inputs.0.shape", [64, 3, 64, 64]), ("inputs.0.shape", [1, 3, 8, 8]), ("inputs.0.dtype", "uint8"), ("outputs.0.shape", [2, 1000]),
    ("outputs.0.dtype", "float64"), ("outputs", []),
]  # fmt: skip


@pytest.mark.parametrize("where, value", LIES)
def test_a_lie_about_the_library_is_found_before_anything_is_copied(folder: Path, where: str, value: Any) -> None:
    """Through TVM's virtual machine, the C interface, hawq-layers, and the runtime without the compiler."""

    def change(manifest: dict[str, Any]) -> None:
        edit(where, value)(manifest)
        if where.endswith("dtype"):
            edit(where.replace("dtype", "type"), value)(manifest)

    reseal(folder, change)
    package, model = ht.load(folder), runtime.load(folder)
    (x,) = package.random_inputs(1, 0)
    ways: list[Callable[[], Any]] = [
        lambda: package.run(x), lambda: model.run(x), lambda: package.verify(random=1), lambda: package.verify(random=1, through="c"), lambda: package.profile(x),
    ]  # fmt: skip
    if where.startswith("inputs"):
        ways.append(lambda: package._in_c(x, layers=False))
        library, values = package.library, list(x.values())
        ways.append(lambda: emulated.run(library, package.manifest["target"]["architecture"], [], values, layers=True))
    for way in ways:
        with pytest.raises(PackageError) as caught:
            way()
        assert "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("name, content", [
    ("report.json", b"{}"), ("report.json", b'[{"rule": 5}]'), ("report.json", b"NaN"), ("certificate.json", b"[]"), ("certificate.json", b'{"ok": true}'),
    ("certificate.json", b"[" * 100_000),
])  # fmt: skip
def test_reports_and_certificates_of_another_tool(folder: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    from hawq_tvm.cli import main

    (folder / name).write_bytes(content)
    reseal(folder, lambda m: None)
    assert main(["info", str(folder)]) == 3
    assert "internal error" not in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [
    ("graph.json", b"{}"), ("graph.json", b"[]"), ("graph.json", b"x"), ("graph.json", b'{"nodes": [{"type": "ffi.Tensor", "data": {}}]}'),
    ("graph.json", b'{"root_index": 0, "nodes": [{"type": "no.such.Type"}]}'), ("constants.npz", b""), ("constants.npz", b"PK\x03\x04"),
])  # fmt: skip
def test_graphs_of_another_tool(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    reseal(folder, lambda m: None)
    package = ht.load(folder)
    for way in (package.verify, package.prove):
        with pytest.raises(PackageError, match="has a graph that another tool wrote") as caught:
            way()
        assert "\n" not in str(caught.value)


class Strange:
    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise RuntimeError("on another device")


@pytest.mark.parametrize("reader", ["compiler", "runtime"])
def test_inputs_that_do_not_fit_are_our_errors(tiny: Path, reader: str) -> None:
    model = (ht.load if reader == "compiler" else runtime.load)(tiny)
    x = np.random.default_rng(0).normal(0, 1, (2, 3, 8, 8)).astype(np.float32)
    wanted = model.run({"x": x})
    for same in (x.astype(">f4"), np.asfortranarray(x), np.repeat(x, 2, axis=3)[..., ::2], x.tolist() and np.array(x.tolist(), np.float32), memoryview(x)):
        for name, value in model.run({"x": same}).items():
            np.testing.assert_array_equal(value, wanted[name])
    for wrong in (
        {}, {"y": x}, {"x": x, "y": x}, x, [x], None, {"x": x.astype(np.float64)}, {"x": x.astype(np.int8)}, {"x": x[0]}, {"x": x[..., None]}, {"x": None}, {"x": "text"},
        {"x": object()}, {"x": Strange()}, {"x": [[1, 2], [3]]}, {"x": np.full_like(x, np.nan)}, {"x": x.astype(np.complex64)}, {"x": x.astype(object)}, {"x": {}},
        {5: x}, {"x": np.zeros((2, 3, 8, 8), "V4")},
    ):  # fmt: skip
        with pytest.raises(InputError) as caught:
            model.run(wrong)
        assert "\n" not in str(caught.value)


def test_the_command_line_prints_what_the_manifest_holds(tiny: Path, tmp_path: Path) -> None:
    """Records in Python, the same JSON as ever."""
    done = subprocess.run([sys.executable, "-m", "hawq_tvm.cli", "info", str(tiny), "--json"], capture_output=True, text=True, check=True)
    manifest = json.loads((tiny / files.MANIFEST).read_text())
    for side in ("inputs", "outputs"):
        assert json.dumps(json.loads(done.stdout)[side]) == json.dumps(manifest[side])
