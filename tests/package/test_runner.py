"""The C++ runner: the same bits as `Package.run`, inputs that do not fit refused, times measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

import hawq_tvm as ht
from deploy import package as files

from ..models import Graph, float_output, residual_net
from .conftest import run_it


def _two_ways() -> Any:
    """Two inputs, a float and an integer one, and two outputs of several types."""
    g = Graph()
    a, b = g.qdq(g.input("a", [2, 6]), 0.1, 3), g.dq(g.input("b=c", [2, 6], TensorProto.INT8), 0.05, 0, "int8")
    total = g.node("Add", [a, b])
    return g.model([float_output(g.qdq(total, 0.2, 7)), (g.q(total, 0.1, 0, "int8"), TensorProto.INT8)])


def _integers(kind: str) -> Any:
    g = Graph()
    x = g.dq(
        g.input("x", [2, 6], {"int4": TensorProto.INT4, "uint4": TensorProto.UINT4, "uint8": TensorProto.UINT8}[kind]),
        0.5,
        3 if kind[0] == "u" else 0,
        kind,
    )
    return g.model([float_output(g.qdq(g.node("Relu", [x]), 0.5, 0, "uint8"))])


MODELS = {
    "residual": residual_net,
    "int4 weights": lambda: residual_net("int4"),
    "two ways": _two_ways,
    "uint8": lambda: _integers("uint8"),
    "int4": lambda: _integers("int4"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_runner_computes_what_package_run_does(kind: str, hawq_run: Path, tmp_path: Path) -> None:
    """For a folder, a single file and a stripped one."""
    package = ht.compile(MODELS[kind](), allow_float_tail=True)
    forms = [package.save(tmp_path / "m.hawq"), tmp_path / "one.hawq", tmp_path / "small.hawq"]
    manifest, contents = files.read_files(forms[0])
    files.install_file(forms[1], manifest, contents)
    files.install_file(forms[2], *files.stripped(manifest, contents))
    for n, (path, inputs) in enumerate(zip(forms, package.random_inputs(3, 1), strict=True)):
        words: list[object] = []
        for i, (name, array) in enumerate(inputs.items()):
            np.save(tmp_path / f"in{i}.npy", array)
            words += ["--input", f"{name}={tmp_path}/in{i}.npy"]
        for i, output in enumerate(package.outputs):
            words += ["--output", f"{output.name}={tmp_path}/out{i}.npy"]
        done = run_it(hawq_run, path, *words, "--threads", 1 + n % 2)
        assert done.returncode == 0, done.stderr
        for i, (name, wanted) in enumerate(package.run(inputs).items()):
            found = np.load(tmp_path / f"out{i}.npy")
            assert found.dtype == wanted.dtype and name in done.stdout
            np.testing.assert_array_equal(found, wanted)


X = np.zeros((2, 3, 8, 8), np.float32)
NAN = np.where(np.arange(X.size).reshape(X.shape) == X.size - 1, np.nan, X).astype(np.float32)


@pytest.mark.parametrize(
    "array, words",
    [
        (X.astype("f8"), "another type"),
        (X.astype(">f4"), "another type"),
        (X.astype("i4"), "another type"),
        (X[:1], "another shape"),
        (X.ravel(), "another shape"),
        (np.float32(0), "another shape"),
        (np.asfortranarray(X), "Fortran order"),
        (NAN, "contains NaN"),
        (X[None], "another shape"),
    ],
)
def test_arrays_that_do_not_fit(tiny: Path, hawq_run: Path, tmp_path: Path, array: Any, words: str) -> None:
    np.save(tmp_path / "x.npy", array)
    done = run_it(hawq_run, tiny, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "y.npy").exists(), done.stderr


def test_damaged_arrays(tiny: Path, hawq_run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    data = (tmp_path / "x.npy").read_bytes()
    for size in {*range(0, 140, 13), *np.linspace(128, len(data) - 1, 6).astype(int).tolist()}:
        (tmp_path / "x.npy").write_bytes(data[:size])
        assert run_it(hawq_run, tiny, "--input", tmp_path / "x.npy").returncode == 2, size
    (tmp_path / "x.npy").write_bytes(data + b"\0")
    assert "is damaged" in run_it(hawq_run, tiny, "--input", tmp_path / "x.npy").stderr
    for offset in range(0, 128, 5):  # of the header: either it is refused, or it still says the same
        damaged = bytearray(data)
        damaged[offset] ^= 0xFF
        (tmp_path / "x.npy").write_bytes(damaged)
        run_it(hawq_run, tiny, "--input", tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", x=X)
    assert "an .npz file" in run_it(hawq_run, tiny, "--input", tmp_path / "x.npz").stderr


def test_values_beyond_a_narrow_type(hawq_run: Path, tmp_path: Path) -> None:
    path = ht.compile(_integers("int4"), allow_float_tail=True).save(tmp_path / "m.hawq")
    for value in (-9, 8, 127, -128):
        np.save(tmp_path / "x.npy", np.full((2, 6), value, np.int8))
        done = run_it(hawq_run, path, "--input", tmp_path / "x.npy")
        assert done.returncode == 2 and "leaves the range of int4; expected -8..7" in done.stderr


@pytest.mark.parametrize(
    "words, code",
    [
        ([], 2),
        (["PKG"], 2),
        (["PKG", "--inputs", "x.npy"], 2),
        (["PKG", "--input"], 2),
        (["PKG", "PKG", "--bench"], 2),
        (["PKG", "--input", "none.npy"], 2),
        (["PKG", "--bench", "--threads", "0"], 2),
        (["PKG", "--bench", "--threads", "1.5"], 2),
        (["PKG", "--bench", "--duration", "nan"], 2),
        (["PKG", "--bench", "--duration", "-1"], 2),
        (["PKG", "--bench", "--iterations", "many"], 2),
        (["PKG", "--input", "."], 2),
        (["PKG", "--bench", "--output", "none/y.npy"], 2),
        (["PKG", "--bench", "--output", "."], 2),
        (["none.hawq", "--bench"], 3),
    ],
)
def test_wrong_words(
    tiny: Path, hawq_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_it(
        hawq_run,
        *[str(tiny) if w == "PKG" else w for w in words],
        *(["--duration", "0"] if "--duration" not in words else []),
    )
    assert done.returncode == code and list(tmp_path.iterdir()) == [], done.stderr


def test_several_inputs_need_names(hawq_run: Path, tmp_path: Path) -> None:
    path = ht.compile(_two_ways(), allow_float_tail=True).save(tmp_path / "m.hawq")
    np.save(tmp_path / "a.npy", np.zeros((2, 6), np.float32))
    assert "expected NAME=FILE with a name of a, b=c" in run_it(hawq_run, path, "--input", tmp_path / "a.npy").stderr
    assert "b=c is missing" in run_it(hawq_run, path, "--input", f"a={tmp_path}/a.npy").stderr
    assert "twice" in run_it(hawq_run, path, "--input", f"a={tmp_path}/a.npy", "--input", f"a={tmp_path}/a.npy").stderr


def test_names_that_are_none(tiny: Path, hawq_run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    (name,) = (i.name for i in ht.load(tiny).inputs)
    done = run_it(hawq_run, tiny, "--input", f"other={tmp_path / 'x.npy'}")
    assert (
        done.returncode == 2
        and "--input: names none of the package's; expected NAME=FILE with a name of" in done.stderr
    )
    assert name in done.stderr and "other=" in done.stderr
    (tmp_path / "a=b.npy").write_bytes((tmp_path / "x.npy").read_bytes())  # a file's name may look like one
    assert run_it(hawq_run, tiny, "--input", tmp_path / "a=b.npy").returncode == 0


def test_times(tiny: Path, hawq_run: Path) -> None:
    done = run_it(
        hawq_run, tiny, "--bench", "--json", "--threads", 1, "--duration", 0, "--iterations", 7, "--warmup-ms", 0
    )
    fields = json.loads(done.stdout)
    assert (
        fields["iterations"] == 7
        and fields["threads"] == 1
        and fields["outputs"][0]["shape"] == list(ht.load(tiny).outputs[0].shape)
    )
    latency = fields["latency_ms"]
    assert (
        0 < latency["min"] <= latency["median"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        and fields["throughput_per_s"] > 0
    )
    failed = run_it(hawq_run, "none.hawq", "--bench", "--json")
    assert json.loads(failed.stdout) == {"message": "none.hawq: does not exist; remedy: check the path", "exit_code": 3}


def test_the_runner_needs_no_compiler_and_no_python(hawq_run: Path) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    needed = subprocess.run(["ldd", str(hawq_run)], capture_output=True, text=True, check=True).stdout
    assert "libtvm_runtime" in needed and "libtvm_compiler" not in needed and "libpython" not in needed


def test_ids_outside_of_a_table_are_refused(hawq_run: Path, tmp_path: Path) -> None:
    g = Graph()
    table = g.dq(g.constant(np.arange(40).reshape(10, 4), TensorProto.INT8), 0.1, 0, "int8")
    rows = g.node("Gather", [table, g.input("ids", [3], TensorProto.INT64)])
    package = ht.compile(g.model([float_output(g.qdq(rows, 0.1, 0, "int8"))]))
    path, ids = package.save(tmp_path / "e.hawq"), np.array([0, 9, -10])
    np.save(tmp_path / "x.npy", ids)
    done = run_it(hawq_run, path, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), next(iter(package.run({"ids": ids}).values())))
    np.save(tmp_path / "x.npy", ids + 1)
    done = run_it(hawq_run, path, "--input", tmp_path / "x.npy")
    assert done.returncode == 2 and "leaves the range that the model takes; expected -10..9; found 10" in done.stderr
