"""What a wheel holds: all that the checkout has in the product's folders, no tests, and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="builds a wheel without the network")
ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("hawq_tvm", "relay_passes", "schedules", "deploy")
LEFT_OUT = ("deploy/benchmarks/",)  # measured here, read on the project's page


def test_a_wheel_has_every_file_of_the_product(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        told = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    there = {str(p.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).rglob("*") if p.is_file()}
    wanted = {n for n in there if not n.startswith(LEFT_OUT) and "__pycache__" not in n and "/." not in n}
    assert names == wanted
    assert "hawq-tvm = hawq_tvm.cli:main" in told
