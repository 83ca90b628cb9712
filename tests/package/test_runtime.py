"""The loader without the compiler: the same bits, and none of the compiler's modules."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.core.errors import InputError, PackageError
from hawq_tvm.measure.machine import describe
from hawq_tvm.package import runtime
from hawq_tvm.targets import tvm_files

# Not installed beside the runtime; of tvm only the libraries are.
MISSING = ("onnx", "torch", "scipy", "capstone", "iced_x86", "elftools", "rich")
SCRIPT = f"""
import sys
for name in {MISSING!r}:
    sys.modules[name] = None
import numpy as np
from hawq_tvm import runtime
package, inputs, outputs = sys.argv[1:]
with np.load(inputs) as arrays:
    made = runtime.load(package).run(dict(arrays))
np.savez(outputs, **made)
assert not {{"tvm", "schedules", "relay_passes"}} & {{name.partition(".")[0] for name in sys.modules}}
"""


def _python(*words: object) -> None:
    subprocess.run(
        [sys.executable, *map(str, words)],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": "."},
        timeout=120,
    )


def test_the_same_bits_without_the_compiler(tiny: Path, tmp_path: Path) -> None:
    package = ht.load(tiny)
    for seed in range(2):
        (x,) = package.random_inputs(1, seed)
        np.savez(tmp_path / "in.npz", **x)
        _python("-c", SCRIPT, tiny, tmp_path / "in.npz", tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz") as found:
            for name, wanted in package.run(x).items():
                np.testing.assert_array_equal(found[name], wanted)


def test_in_the_compilers_process_too(tiny: Path) -> None:
    package, model = ht.load(tiny), runtime.load(tiny)
    assert (model.name, model.inputs, model.outputs) == (
        package.name,
        package.inputs,
        package.outputs,
    ) and "Model 'model'" in repr(model)
    for x in package.random_inputs(3, 2):
        np.testing.assert_array_equal(*model.run(x).values(), *package.run(x).values())
    assert model.bench(warmup_ms=0, duration=0, iterations=3, threads=2).threads == 2
    package.verify(random=1).raise_if_mismatch()


def _processor_seconds(code: str) -> float:
    """The least of three runs; processor time, because other processes run beside the tests."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _python("-c", code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(3))


def test_importing_it_takes_less_than_half_a_second() -> None:
    assert _processor_seconds("import hawq_tvm.runtime") - _processor_seconds("") < 0.5


NAN = np.full((2, 3, 8, 8), np.nan, np.float32)


@pytest.mark.parametrize(
    "inputs, words",
    [
        ({}, "other names"),
        ({"x": np.zeros((1, 3, 8, 8), np.float32)}, "another shape"),
        ({"x": np.zeros((2, 3, 8, 8))}, "another type"),
        ({"x": np.zeros((2, 8, 8, 3), np.float32)}, "another shape"),
        ({"x": NAN}, "contains NaN"),
        (np.zeros(3), "no names"),
        ({"x": [[1], [2, 3]]}, "is no array"),
    ],
)
def test_inputs_that_do_not_fit(tiny: Path, inputs: Any, words: str) -> None:
    for load in (ht.load, runtime.load):
        with pytest.raises(InputError, match=words):
            load(tiny).run(inputs)


def test_arrays_that_are_not_contiguous_give_the_same(tiny: Path) -> None:
    package = ht.load(tiny)
    (x,) = package.random_inputs(1, 3)
    (wanted,) = package.run(x).values()
    wide = np.zeros((2, 3, 8, 16), np.float32)
    wide[..., ::2] = x["x"]
    for array in (wide[..., ::2], np.asfortranarray(x["x"]), x["x"][::-1][::-1]):
        for model in (package, runtime.load(tiny)):
            np.testing.assert_array_equal(*model.run({"x": array}).values(), wanted)


def test_another_version_of_tvm_and_none(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.tvm_version() == describe()["tvm"] == ht.load(tiny).manifest["producer"]["tvm"]
    monkeypatch.setattr(runtime, "tvm_version", lambda: "0.99")
    with pytest.raises(PackageError, match=r"another version of TVM; expected tvm 0\.99"):
        runtime.load(tiny)
    monkeypatch.setattr(tvm_files, "find_spec", lambda name: None)
    with pytest.raises(PackageError, match="TVM's runtime libraries are not installed"):
        runtime.load(tiny)


def test_a_library_that_tvm_cannot_load(tiny: Path) -> None:
    manifest = ht.load(tiny).manifest
    with pytest.raises(PackageError, match="the library cannot be loaded"):
        runtime.Model(manifest, b"\x7fELF no library", "tiny")
