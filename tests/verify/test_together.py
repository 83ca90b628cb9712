"""Several libraries of one model: identical, or the first difference named, or not run, or not of one model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm

import hawq_tvm as ht
from hawq_tvm import cli
from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import PackageError, UsageError
from hawq_tvm.package.together import Library, verify_packages, verify_together
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.targets import target as targets
from hawq_tvm.verify.compare import LayerRun, layer_calls
from hawq_tvm.verify.reference import evaluate

from ..models import Graph, float_output
from .graphs_for_verify import Array

X = {"x": np.linspace(-3, 3, 3 * 12 * 12, dtype=np.float32).reshape(1, 3, 12, 12)}


def residual(channels: int = 16) -> Any:
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 3, 12, 12]), 0.02, 128)
    y = g.qdq(g.node("Relu", [g.conv(x, g.weight([channels, 3, 3, 3]), pads=[1, 1, 1, 1])]), 0.05)
    z = g.qdq(g.conv(y, g.weight([channels, channels, 1, 1])), 0.07, 110)
    return g.model([float_output(g.qdq(g.node("Add", [z, y]), 0.08, 60))])


def graph_of(model: Any, target: tvm.target.Target | None = None) -> tvm.IRModule:
    return pipeline.to_packed(pipeline.import_annotated(model), None, target)


def pretended(
    graph: tvm.IRModule, change: Callable[[LayerRun], LayerRun] = lambda run: run
) -> Callable[[Mapping[str, Array]], LayerRun]:
    """A library that computes what the reference computes, but for a planted change."""

    def run(inputs: Mapping[str, Array]) -> LayerRun:
        seen: dict[str, Any] = {}
        outputs = evaluate(graph, inputs, seen.__setitem__)
        return change(
            LayerRun(
                {k: np.array(v) for k, v in outputs.items()}, [np.array(seen[b.var.name]) for b in layer_calls(graph)]
            )
        )

    return run


@pytest.fixture(scope="module")
def packages() -> list[ht.Package]:
    return [ht.compile(residual(), t) for t in ("x86-64-v2", "x86-avx2", "llvm")]


def test_packages_of_several_targets_are_identical(packages: list[ht.Package]) -> None:
    seen: list[str] = []
    report = verify_packages(packages, random=2, progress=seen.append)
    assert verify_packages(packages, random=1, through="c").ok
    assert report.ok and report.identical and len(seen) == 3
    rows = report.verdicts[0].report
    assert rows is not None
    assert (
        report.summary()
        == f"identical: {len(rows.rows)} layers, {rows.elements} elements over 2 inputs, in 3 packages and the"
        " reference"
    )
    assert json.loads(json.dumps(report.to_dict()))["packages"][2]["ok"]


def test_a_difference_is_named_with_its_package_and_layer() -> None:
    graph = graph_of(residual())

    def change(run: LayerRun) -> LayerRun:
        run.layers[2][0, 3, 4, 2] += 1  # type: ignore[index]
        return run

    report = verify_together(
        [Library("a", "x86", graph, pretended(graph)), Library("b", "arm", graph, pretended(graph, change))], [X]
    )
    assert not report.ok and not report.identical and [v.ok for v in report.verdicts] == [True, False]
    layer = layer_calls(graph)[2].var.name
    assert (
        report.summary().startswith("b: NOT bit-exact: 1 of ")
        and f"first: layer {layer}, index [0, 3, 4, 2]" in report.summary()
    )


def test_a_library_that_packs_its_activations_is_the_same() -> None:
    """The graph for a GPU keeps 4-bit results two to a byte; whichever comes first, they are opened."""
    g = Graph(3)
    x = g.qdq(g.input("x", [1, 3, 12, 12]), 0.02, 128)
    y = g.qdq(g.node("Relu", [g.conv(x, g.weight([16, 3, 3, 3]), pads=[1, 1, 1, 1])]), 0.4, 0, kind="uint4")
    model = g.model([float_output(g.qdq(g.conv(y, g.weight([16, 16, 1, 1], kind="int4")), 0.07, 110))])
    plain, packed = graph_of(model), graph_of(model, cuda.make(["sm_80"]))
    widths = [b.var.ty.shape.values[-1] for m in (plain, packed) for b in layer_calls(m)[2:3]]
    assert widths[0] == 2 * widths[1]
    two = [Library("cpu", "x86", plain, pretended(plain)), Library("gpu", "cuda", packed, pretended(packed))]
    for libraries in (two, two[::-1], two[1:]):
        assert verify_together(libraries, [X]).ok

    def change(run: LayerRun) -> LayerRun:
        run.layers[2].flat[0] ^= 0x10  # type: ignore[union-attr]
        return run

    report = verify_together([two[0], replace(two[1], run_layers=pretended(packed, change))], [X])
    assert not report.identical and "gpu: NOT bit-exact: 1 of " in report.summary()


def test_what_this_machine_cannot_run_is_not_called_identical() -> None:
    graph = graph_of(residual())

    def refuse(_: Mapping[str, Array]) -> LayerRun:
        raise PackageError("needs CPU features that this machine lacks", where="c", found="missing amx-int8")

    libraries = [Library("a", "x86", graph, pretended(graph)), Library("c", "amx", graph, refuse)]
    report = verify_together(libraries, [X])
    assert report.identical and not report.ok
    assert (
        "in 1 of 2 packages and the reference" in report.summary()
        and "not run: c: needs CPU features" in report.summary()
    )
    assert not verify_together(libraries[1:], [X]).identical


def test_packages_of_other_models_are_refused(
    packages: list[ht.Package], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="no package of the same integer graph as model"):
        verify_packages([packages[0], ht.compile(residual(8), "x86-64-v2")])
    paths = [str(p.save(tmp_path / f"{i}.hawq")) for i, p in enumerate(packages)]
    assert cli.main(["verify", *paths, "--random", "1"]) == 0
    out = capsys.readouterr().out
    assert "identical" in out and "equal" in out
    assert cli.main(["verify", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]


def test_a_stripped_package_is_verified_beside_a_full_one(packages: list[ht.Package], tmp_path: Path) -> None:
    full, small = packages[1].save(tmp_path / "full.hawq"), tmp_path / "small.hawq"
    assert cli.main(["strip", str(packages[0].save(tmp_path / "other.hawq")), "-o", str(small)]) == 0
    assert verify_packages([ht.load(small), ht.load(full)], random=1).ok
    with pytest.raises(PackageError, match="was stripped of its integer graph"):
        verify_packages([ht.load(small), ht.load(small)], random=1)


def test_a_package_for_other_instructions_is_listed(
    packages: list[ht.Package], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    amx = ht.compile(residual(), "x86-amx")
    if targets.runs_here(amx.manifest["target"]["cpu_features"]):
        pytest.skip("this CPU has AMX")
    paths = [str(p.save(tmp_path / f"{i}.hawq")) for i, p in enumerate((packages[0], amx))]
    assert cli.main(["verify", *paths]) == 3
    out = capsys.readouterr().out
    assert (
        "in 1 of 2 packages and the reference" in out
        and f"not run: {paths[1]}: needs CPU features" in out
        and "(x86-amx), run by TVM's virtual machine" in out
    )
    assert cli.main(["verify", *paths, "--where-possible", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert cli.main(["verify", paths[1], paths[1]]) == 3
    capsys.readouterr()
    assert cli.main(["verify", paths[1]]) == 3
    assert "needs CPU features" in capsys.readouterr().err
