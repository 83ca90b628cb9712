"""The C program in deploy/example: built by CMake against a package, and its answers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import deploy
import hawq_tvm as ht

from ..models import Graph, float_output

EXAMPLE = Path(deploy.__file__).parent / "example"
pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake: apt-get install cmake")


@pytest.fixture(scope="module")
def package() -> ht.Package:
    g = Graph(11)
    x = g.qdq(g.input("picture", [1, 3, 12, 9]), 1 / 128, 128)
    y = g.qdq(g.node("Relu", [g.conv(x, g.weight([8, 3, 3, 3]))]), 0.05)
    pooled = g.node("Flatten", [g.qdq(g.node("GlobalAveragePool", [y]), 0.02)])
    return ht.compile(g.model([float_output(g.qdq(g.node("Gemm", [pooled, g.weight([17, 8])], transB=1), 0.01, 128))]))


@pytest.fixture(scope="module")
def program(package: ht.Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    package.save(folder / "model.hawq")
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", folder / "build", f"-DPACKAGE={folder / 'model.hawq'}"], check=True, capture_output=True)
    built = subprocess.run(["cmake", "--build", folder / "build"], check=True, capture_output=True, text=True)
    assert "warning" not in built.stdout + built.stderr
    return folder / "build/classify"


@pytest.mark.parametrize("most", [1, 100, 255, 256, 1023, 65535])
def test_it_names_the_classes_that_python_finds(most: int, package: ht.Package, program: Path, tmp_path: Path) -> None:
    """Whatever the file calls white: one byte a sample up to 255, else two."""
    samples = np.random.default_rng(0).integers(0, most + 1, (12, 9, 3))
    (tmp_path / "p.ppm").write_bytes(b"P6\n9 12\n%d\n" % most + samples.astype(">u2" if most > 255 else "u1").tobytes())
    picture = (samples * 255).astype(np.float32) / np.float32(most)
    printed = subprocess.run([program, tmp_path / "p.ppm"], check=True, capture_output=True, text=True).stdout
    (scores,) = package.run({"picture": ((picture - 127) / 128).transpose(2, 0, 1)[None]}).values()
    best = np.argsort(-scores[0], kind="stable")[:5]
    assert printed == "".join(f"class {i}: {scores[0, i]:g}\n" for i in best)


@pytest.mark.parametrize("data", [
    b"P6\n8 12\n255\n", b"P5\n9 12\n255\n", b"", b"P6\n9 12\n255\n" + b"\0" * 100,
    b"P6\n9 12\n65535\n" + b"\0" * 324, b"P6\n9 12\n0\n" + b"\0" * 324,
    b"P6\n9 12\n65536\n" + b"\0" * 648, b"P6\n9 12\n-255\n" + b"\0" * 324,
])
def test_other_pictures_are_refused(program: Path, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "p.ppm").write_bytes(data)
    done = subprocess.run([program, tmp_path / "p.ppm"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_no_package_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DPACKAGE={tmp_path}"], capture_output=True, text=True)
    assert done.returncode != 0 and "a package for a CPU" in done.stderr
