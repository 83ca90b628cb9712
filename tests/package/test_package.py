"""The package folder: what it holds, and that nothing damaged, foreign or foolish is ever loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from onnx import TensorProto

import hawq_tvm as ht
from deploy import graph
from deploy import package as files
from hawq_tvm.core.errors import InputError, OutputError, PackageError, UsageError
from hawq_tvm.targets import target

from ..models import Graph, float_output, residual_net


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ht.compile(residual_net()).save(tmp_path_factory.mktemp("package") / "tiny.hawq")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy.hawq")
    return tmp_path / "copy.hawq"


def test_manifest_describes_the_interface(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    (entry,) = manifest["inputs"]
    assert entry["name"] == "x" and entry["shape"] == [2, 3, 8, 8] and entry["dtype"] == "float32"
    assert entry["quantization"]["zero_point"] == [120] and entry["quantization"]["rounding"] == "half_even"
    assert manifest["outputs"][0]["quantization"]["qmax"] == 255
    assert set(manifest["sha256"]) == set(files.FILES)


def test_graph_survives_the_disk_exactly(saved: Path) -> None:
    module = ht.load(saved).graph
    again = graph.load_graph(graph.graph_files(module))
    assert tvm_ffi.structural_equal(module, again)


@pytest.mark.parametrize("name", [*files.FILES, files.MANIFEST])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove", "symlink"])
def test_damaged_files_are_refused(copy: Path, name: str, how: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    if how == "flip":
        rng = np.random.default_rng(0)
        for offset in {0, len(data) - 2, *rng.integers(0, len(data), 4).tolist()}:
            damaged = bytearray(data)
            damaged[offset] ^= 0x15
            path.write_bytes(damaged)
            with pytest.raises(PackageError):
                ht.load(copy)
        return
    if how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    if how == "symlink":
        path.symlink_to("/etc/hostname")
    with pytest.raises(PackageError, match=r"copy.hawq"):
        ht.load(copy)


def _edit(folder: Path, **changes: Any) -> None:
    """Change the manifest and seal it again, as another version of the tool would have written it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for key, value in changes.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
    manifest["seal"] = files._seal(manifest)
    (folder / "manifest.json").write_bytes(files.dump_json(manifest))


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace("float32", "float64", 1))
    with pytest.raises(PackageError, match="manifest was changed"):
        ht.load(copy)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"format": 1},
            (
                "another format version; expected 2; found 1; remedy: use the hawq-tvm version that wrote it, or"
                " compile it again"
            ),
        ),
        ({"format": 3}, "another format version"),
        ({"producer": {"tvm": "0.1"}}, "another version of TVM"),
        ({"target": {"architecture": "riscv64"}}, "another architecture"),
        ({"target": {"cpu_features": ["avx2", "made-up-isa"]}}, "lacks.*missing made-up-isa"),
    ],
)
def test_packages_from_elsewhere_are_refused(copy: Path, changes: dict[str, Any], message: str) -> None:
    _edit(copy, **changes)
    with pytest.raises(PackageError, match=message):
        ht.load(copy)


def test_an_extra_file_is_refused(copy: Path) -> None:
    (copy / "extra.so").write_bytes(b"")
    with pytest.raises(PackageError, match="does not belong"):
        ht.load(copy)


def test_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="does not exist"):
        ht.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackageError, match="is not a package"):
        ht.load(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PackageError, match="is not a package"):
        ht.load(tmp_path / "folder")


def test_saving_replaces_packages_and_nothing_else(saved: Path, copy: Path, tmp_path: Path) -> None:
    package = ht.load(saved)
    package.save(copy)
    assert ht.load(copy).name == package.name
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="exists and is not a package"):
        package.save(tmp_path / "precious")
    assert [p.name for p in (tmp_path / "precious").iterdir()] == ["thesis.tex"]
    assert {p.name for p in tmp_path.iterdir()} == {"copy.hawq", "precious"}


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "other names.*found none"),
        (
            {"x": np.zeros((2, 3, 8, 8), "f4"), "labels": np.zeros(2)},
            "no inputs; .* found labels; .*leave",
        ),
        ({"y": np.zeros((2, 3, 8, 8), "f4")}, "expected x; found y"),
        ({"x": np.zeros((1, 3, 8, 8), "f4")}, "another shape"),
        (
            {"x": np.zeros((2, 3, 8, 8))},
            r"another type; expected float32; found float64; remedy: give array\.astype\('float32'\)",
        ),
        ({"x": np.full((2, 3, 8, 8), np.nan, "f4")}, "contains NaN"),
    ],
)
def test_wrong_inputs_are_refused(saved: Path, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ht.load(saved).run(inputs)


def test_a_bare_array_is_told_the_name_it_needs(saved: Path) -> None:
    package, x = ht.load(saved), np.zeros((2, 3, 8, 8), np.float32)
    for call in (package.run, package.verify, package.bench):
        with pytest.raises(InputError, match=r"no names.*found ndarray; remedy: give \{'x': array\}"):
            call(x)
    with pytest.raises(InputError, match="is no array"):
        package.run({"x": [[1.0], [2.0, 3.0]]})


def test_integers_of_another_type_are_told_how_to_convert() -> None:
    g = Graph()
    package = ht.compile(
        g.model([float_output(g.node("Relu", [g.dq(g.input("x", [2, 6], TensorProto.UINT8), 0.5, 3)]))]),
        allow_float_tail=True,
    )
    with pytest.raises(
        InputError, match=r"expected uint8; found int64; remedy: give array\.astype\('uint8'\) if its values fit"
    ):
        package.run({"x": np.zeros((2, 6), np.int64)})
    with pytest.raises(InputError, match="expected uint8; found float32; remedy: give the quantized integers"):
        package.run({"x": np.zeros((2, 6), np.float32)})


def test_verify_of_nothing_is_an_error(saved: Path) -> None:
    package = ht.load(saved)
    for options in (
        {"random": -1},
        {"seed": -1},
        {"random": 0},
        {"inputs": []},
        {"inputs": [], "random": 0},
        {"inputs": package.random_inputs(1, 0), "random": -1},
    ):
        with pytest.raises(UsageError):
            package.verify(**options)
    assert package.verify().inputs == 1 and package.verify([], random=2).inputs == 2
    assert (
        package.verify(package.random_inputs(1, 0)).inputs == 1
        and package.verify(iter(package.random_inputs(2, 0)), random=1).inputs == 3
    )


def test_what_a_package_says_about_itself(saved: Path) -> None:
    package = ht.load(saved)
    assert [(i.name, i.type, i.dtype, i.shape) for i in package.inputs] == [("x", "float32", "float32", (2, 3, 8, 8))]
    assert [o.shape for o in package.outputs] == [(2, 10)]
    with pytest.raises(dataclasses.FrozenInstanceError):
        package.inputs[0].name = "changed"  # type: ignore[misc]
    given, said = package.inputs[0].quantization, package.manifest["inputs"][0]["quantization"]
    assert given is not None and (list(given.scale), list(given.zero_point)) == (said["scale"], said["zero_point"])
    assert (given.qmin, given.qmax, given.rounding) == (said["qmin"], said["qmax"], said["rounding"])
    assert all(
        text in repr(package)
        for text in (
            repr(package.name),
            "x: float32[2, 3, 8, 8] -> ",
            "float32[2, 10]",
            package.manifest["target"]["architecture"],
        )
    )
    assert {"compile", "load", "inspect", "Package"} <= set(dir(ht))


def test_a_package_makes_no_folders_on_the_way(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot be written; found no folder .*none; remedy: make the folder first"):
        ht.load(saved).save(tmp_path / "none" / "p.hawq")
    assert list(tmp_path.iterdir()) == []


def test_views_and_infinities_are_taken(saved: Path) -> None:
    package = ht.load(saved)
    x = np.random.default_rng(0).standard_normal((8, 8, 3, 2)).astype(np.float32)
    np.testing.assert_array_equal(
        *(next(iter(package.run({"x": v}).values())) for v in (x.T, np.ascontiguousarray(x.T)))
    )
    big = np.full((2, 3, 8, 8), np.inf, np.float32)
    package.verify({"x": big}).raise_if_mismatch()


def test_sub_byte_inputs_and_outputs() -> None:
    import ml_dtypes

    g = Graph(3)
    x = g.dq(g.input("x", [2, 6], TensorProto.INT4), 0.5, 0, "int4")
    y = g.q(g.node("MatMul", [x, g.weight([6, 4], "int4", axis=1)]), 0.07, 0, "int4")
    package = ht.compile(g.model([(y, TensorProto.INT4)]))
    values = np.random.default_rng(0).integers(-8, 8, (2, 6)).astype(np.int8)
    narrow = package.run({"x": values.astype(ml_dtypes.int4)})
    np.testing.assert_array_equal(narrow[y], package.run({"x": values})[y])
    assert narrow[y].dtype == np.int8 and package.manifest["inputs"][0]["type"] == "int4"
    with pytest.raises(InputError, match=r"leaves the range of int4; expected -8\.\.7"):
        package.run({"x": np.full((2, 6), 8, np.int8)})
    package.verify(random=3).raise_if_mismatch()


def test_a_planted_difference_is_found_with_its_accumulator(saved: Path) -> None:
    package = ht.load(saved)
    real = package.run_layers

    def tampered(inputs: Any, through: str) -> Any:
        run = real(inputs, through)
        run.layers[2].flat[7] ^= 1
        return run

    package.run_layers = tampered  # type: ignore[method-assign]
    report = package.verify(random=1)
    assert not report.ok and report.first is not None
    assert report.first.accumulator and report.first.expected ^ 1 == report.first.found
    with pytest.raises(ht.HawqError, match=r"NOT bit-exact: 1 of .* accumulator"):
        report.raise_if_mismatch()


@pytest.mark.parametrize("text", ["gpu", "llvm -foo=1", "llvm -mcpu=nonsense-9000", "{not json", '{"kind": "cuda"}'])
def test_unknown_targets_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError):
        target.parse(text)


@pytest.mark.parametrize("text", ["host", "x86-64-v3", "llvm -mcpu=x86-64-v2", '{"kind": "llvm", "mcpu": "x86-64-v3"}'])
def test_a_described_target_parses_back(text: str) -> None:
    made = target.parse(text)
    assert str(target.parse(json.dumps(target.describe(made)))) == str(made)


def test_the_host_never_claims_what_it_lacks() -> None:
    assert set(target.required_features(target.host())) <= target.host_features()


def test_a_portable_target_gives_the_same_integers(saved: Path) -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 8, 8)).astype(np.float32) * 3
    portable = ht.compile(residual_net(), "x86-64-v2")
    portable.verify({"x": x}).raise_if_mismatch()
    for a, b in zip(portable.run({"x": x}).values(), ht.load(saved).run({"x": x}).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_threads_share_a_package(saved: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    package = ht.load(saved)
    batches = package.random_inputs(8, 3)
    alone = [package.run(b) for b in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(package.run, batches * 4))
    for i, got in enumerate(together):
        for name, value in alone[i % 8].items():
            np.testing.assert_array_equal(got[name], value)
