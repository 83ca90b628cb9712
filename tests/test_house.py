"""The house rules that a machine can check: import direction, file sizes, no blanket excepts, a light import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("hawq_tvm", "relay_passes", "schedules", "deploy")
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
# The floors, from the ground up: a room imports rooms below it, and nothing of its own floor.
FLOORS = (
    ("hawq_tvm/core",),
    ("hawq_tvm/targets", "relay_passes", "hawq_tvm/frontend", "deploy/machine"),
    ("schedules", "deploy/gpu_check"),
    ("deploy",),
    ("hawq_tvm/compiler",),
    ("hawq_tvm/verify",),
    ("hawq_tvm/measure",),
    ("hawq_tvm/package",),
    ("hawq_tvm/remote", "hawq_tvm/bench"),
    ("hawq_tvm/tuning",),
    ("hawq_tvm/quantize",),
    ("hawq_tvm",),  # the names that users import
    ("hawq_tvm/cli",),
    ("hawq_tvm/studies",),
)
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "Makefile", *FOLDERS, "tests", "docker"}


def imports(path: Path) -> Iterator[str]:
    """The modules a file imports, absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield name
            yield from (f"{name}.{a.name}" for a in node.names)


def _ours(path: Path) -> set[str]:
    return {i for i in imports(path) if i.split(".")[0] in FOLDERS}


def _room(file: Path) -> str:
    """The room of a file: the longest of the floors' folders that it lies in."""
    rooms = {room for floor in FLOORS for room in floor}
    return next(str(p) for p in file.relative_to(ROOT).parents if str(p) in rooms)


def _file(module: str) -> Path | None:
    """The file of one of our modules; None for a name inside one."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def test_no_import_runs_upward_and_none_in_a_circle() -> None:
    floor_of = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    upward = []
    for path in SOURCES:
        for module in _ours(path):
            target = _file(module)
            # `from package import name` reads the package's own file only where the name is no module.
            if target is None or (
                target.name == "__init__.py" and any(_file(m) for m in _ours(path) if m.startswith(f"{module}."))
            ):
                continue
            here, there = _room(path), _room(target)
            if here != there and floor_of[there] >= floor_of[here]:
                upward.append(
                    f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}, which lies above it or beside it"
                )
    assert not upward, "\n".join(upward)


def test_arithmetic_imports_nothing_of_ours() -> None:
    assert _ours(ROOT / "hawq_tvm/core/arith.py") == set()


@pytest.mark.parametrize("folder, other", [("relay_passes", "schedules"), ("schedules", "relay_passes")])
def test_passes_and_schedules_do_not_know_each_other(folder: str, other: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not any(i.split(".")[0] == other for i in imports(path)), path


def test_the_reference_shares_no_arithmetic() -> None:
    for name in ("reference.py", "reference_float.py"):
        shared = {i for i in _ours(ROOT / "hawq_tvm/verify" / name) if not i.startswith("hawq_tvm.verify.reference")}
        assert not any(
            i.startswith(("hawq_tvm.core", "schedules", "relay_passes")) and i != "hawq_tvm.core.errors" for i in shared
        ), shared


def test_only_the_pipeline_joins_passes_and_schedules() -> None:
    for path in SOURCES:
        roots = {i.split(".")[0] for i in imports(path)}
        if {"relay_passes", "schedules"} <= roots:
            assert path.name == "pipeline.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 480, "asks to be split"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except at line {node.lineno}"
            blanket = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            reraises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            assert not blanket or reraises or path.parent.name == "cli", f"blanket except at line {node.lineno}"
    if text:
        assert ast.get_docstring(ast.parse(text)), "no docstring"


def test_nothing_unexpected_at_the_top() -> None:
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert TOP_LEVEL - found == set()
    generated = {"build", "dist", "hawq_tvm.egg-info", "hawq_tvm_debug", "gpu-bundle", "gpu.json"}
    assert found - TOP_LEVEL - generated == set()


def test_documented_equations_exist() -> None:
    """Every equation that the code quotes is in ARITHMETIC.md."""
    import re

    text = (ROOT / "hawq_tvm/ARITHMETIC.md").read_text()
    known = set(re.findall(r"\(A(\d+)b?\)", text))
    for path in SOURCES:
        assert set(re.findall(r"\(A(\d+)b?\)", path.read_text())) <= known, path
