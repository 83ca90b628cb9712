"""Several libraries of one model on the same inputs: every layer of every library against one evaluation of the
reference.

Equal to the reference in every element is equal to each other. Libraries for different targets come from graphs that
differ at most in how layers lie in memory, and in which are one: 4-bit results that a GPU's library keeps two to a byte
(A20) are opened before they are compared, and an attention that is one layer for a CPU is compared by its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.core import arith, ops, stages
from hawq_tvm.core.errors import PackageError, UsageError
from hawq_tvm.targets import target as targets
from hawq_tvm.verify.compare import Expected, LayerRun, RunLayers, Tally, VerifyReport, compare_run, expect, layer_calls
from hawq_tvm.verify.records import inputs_text

if TYPE_CHECKING:
    from .package import Package

Array = NDArray[Any]


@dataclass(frozen=True)
class Library:
    """A library to compare: how it is called, what it was compiled for and how it is run, its graph (PACKED), and
    how it is run once.

    run_layers raises PackageError when this machine cannot run it.
    """

    name: str
    target: str
    graph: tvm.IRModule
    run_layers: RunLayers


@dataclass(frozen=True)
class Verdict:
    """One library: how it compared with the reference, or why this machine could not run it."""

    name: str
    target: str
    report: VerifyReport | None
    not_run: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ran, and every element of every layer was equal."""
        return self.report is not None and self.report.ok

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        fields = {"ok": self.ok, "summary": self.not_run, **(self.report.to_dict() if self.report else {})}
        return {"package": self.name, "target": self.target, "not_run": self.not_run or None, **fields}


@dataclass(frozen=True)
class JointReport:
    """The comparison of several libraries on the same inputs."""

    verdicts: tuple[Verdict, ...]
    inputs: int

    @property
    def ran(self) -> tuple[Verdict, ...]:
        """The libraries that this machine could run."""
        return tuple(v for v in self.verdicts if v.report is not None)

    @property
    def identical(self) -> bool:
        """Whether all that ran are equal to the reference, hence to each other, and any ran."""
        return bool(self.ran) and all(v.ok for v in self.ran)

    @property
    def ok(self) -> bool:
        """Whether all ran and are identical."""
        return self.identical and len(self.ran) == len(self.verdicts)

    def summary(self) -> str:
        """The verdict in a line for each thing to know."""
        lines = [f"{v.name}: {v.report.summary()}" for v in self.ran if v.report and not v.ok]
        if self.identical:
            report = max((v.report for v in self.ran if v.report), key=lambda r: len(r.rows))
            of = "" if self.ok else f" of {len(self.verdicts)}"
            lines.append(
                f"identical: {len(report.rows)} layers, {report.elements} elements over {inputs_text(self.inputs)}, in"
                f" {len(self.ran)}{of} packages and the reference"
            )
        lines += [
            f"not run: {v.name}: {v.not_run.removeprefix(f'{v.name}: ')}" for v in self.verdicts if v.report is None
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "ok": self.ok,
            "identical": self.identical,
            "summary": self.summary(),
            "inputs": self.inputs,
            "packages": [v.to_dict() for v in self.verdicts],
        }


def verify_packages(
    packages: Sequence[Package],
    inputs: Mapping[str, Array] | Iterable[Mapping[str, Array]] | None = None,
    *,
    random: int | None = None,
    seed: int = 0,
    through: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> JointReport:
    """Every layer of several packages of one model, for whatever targets, against one evaluation of the reference,
    exactly.

    inputs, random, seed: as for `Package.verify`, the same for all.  through: how this CPU's packages are run, see
    `Package.run_layers`.  progress: called with a package's path before it runs. A stripped package is verified by
    the graph of a full one beside it.
    Raises UsageError when they are of different integer graphs, PackageError when there is no full one to go by.
    """
    first = packages[0]
    for p in packages:
        if p.manifest["graph_sha256"] != first.manifest["graph_sha256"]:
            raise UsageError(
                f"is no package of the same integer graph as {first.where}",
                where=p.where,
                expected=first.manifest["graph_sha256"][:12],
                found=p.manifest["graph_sha256"][:12],
                remedy="compile both from one model, with one version of hawq-tvm",
            )
        full = next((q for q in packages if not q.is_stripped and q.on_gpu == p.on_gpu), None)
        if p.is_stripped and full is not None:
            p.lend_graph(full.graph)
    ways = {id(p): None if p.on_gpu or p.is_foreign else through for p in packages}
    libraries = [
        Library(
            p.where,
            f"{targets.text(p.manifest['target'])}, run by {p.way(ways[id(p)])}",
            p.graph,
            partial(p.run_layers, through=ways[id(p)]),
        )
        for p in packages
    ]
    return verify_together(libraries, packages[0].batches(inputs, random, seed), progress)


def verify_together(
    libraries: Sequence[Library],
    batches: Sequence[Mapping[str, Array]],
    progress: Callable[[str], None] = lambda name: None,
) -> JointReport:
    """Run every library, all of one integer graph, on every input and compare each of its layers with the reference.

    progress: called with a library's name before it runs.
    """
    first = max(libraries, key=lambda lib: (len(layer_calls(lib.graph)), not _packed(lib.graph)))
    expected: dict[int, Expected] = {}
    heads: dict[int, Mapping[str, Array]] = {}

    def verdict(library: Library) -> Verdict:
        progress(library.name)
        tally = Tally()
        for i, inputs in enumerate(batches):
            try:
                run = library.run_layers(inputs)
            except PackageError as e:
                return Verdict(library.name, library.target, None, str(e))
            if i not in expected:
                expected[i], heads[i] = expect(first.graph, inputs, run.head), run.head
            for name, value in heads[
                i
            ].items():  # a float head is no part of the integer graph: each library has its own functions
                tally.compare(f"float head {name}", value, run.head[name], lambda _: [])
            compare_run(expected[i], _opened(run, library.graph, expected[i]), tally, library.graph)
        return Verdict(library.name, library.target, tally.report(len(batches)))

    return JointReport(tuple(verdict(lib) for lib in libraries), len(batches))


def _packed(graph: tvm.IRModule) -> set[str]:
    """The layers of a PACKED module that keep their 4-bit results two to a byte."""
    found = set()
    for b in layer_calls(graph):
        func = graph[b.value.op]
        results = {i.var: i.value for i in stages.bindings(func)}
        last = results.get(func.body.body)
        if isinstance(last, relax.Call) and ops.op_name(last) == "hawq.pack_int4":
            found.add(b.var.name)
    return found


def _opened(run: LayerRun, graph: tvm.IRModule, expected: Expected) -> LayerRun:
    """A run with the 4-bit results that only this library packs as 8-bit elements."""
    packed = _packed(graph) - _packed(expected.module)
    if not packed:
        return run
    wanted = {b.var.name: expected.known[b.var] for b in layer_calls(expected.module)}
    layers = [
        (
            arith.unpack_int4(np.asarray(value), wanted[b.var.name].shape, wanted[b.var.name].dtype == np.int8)
            if b.var.name in packed
            else value
        )
        for b, value in zip(layer_calls(graph), run.layers, strict=True)
    ]
    return replace(run, layers=layers)
