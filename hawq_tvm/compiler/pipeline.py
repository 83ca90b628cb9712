"""The whole compiler on one page: a literal list of passes, each followed by its stage's grammar check, and each stage
by TVM's own.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax

import schedules
from hawq_tvm.core import contract, ibert, ranges, stages
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.files import write_text
from hawq_tvm.core.stages import Stage
from hawq_tvm.targets.gpu import is_cuda
from relay_passes.choose_layout import choose_layout
from relay_passes.declare_ranges import Ranges, declare_ranges, with_declared_ranges
from relay_passes.drop_ties import drop_ties
from relay_passes.fold_batch_norm import fold_batch_norm
from relay_passes.fold_constants import fold_constants
from relay_passes.fold_input_clip import fold_input_clip
from relay_passes.fuse_epilogues import fuse_epilogues
from relay_passes.join_attention import join_attention
from relay_passes.join_tables import join_tables
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.match_normalization import match_normalization
from relay_passes.name_graph import name_graph
from relay_passes.pack_activations import pack_activations
from relay_passes.pack_int4 import pack_int4
from relay_passes.remove_dead_code import remove_dead_code

from .cache import Cache

if TYPE_CHECKING:
    from hawq_tvm.frontend.formats import Frontend

    from .build import Objects

Pass = Callable[[tvm.IRModule], tuple[tvm.IRModule, int]]

PIPELINE: tuple[tuple[Pass, Stage], ...] = (
    (fold_constants, Stage.ANNOTATED),
    (declare_ranges, Stage.ANNOTATED),
    (match_normalization, Stage.ANNOTATED),
    (fold_batch_norm, Stage.ANNOTATED),
    (fold_input_clip, Stage.ANNOTATED),
    (remove_dead_code, Stage.ANNOTATED),
    (lower_to_integer, Stage.INTEGER),
    (fold_constants, Stage.INTEGER),
    (join_tables, Stage.INTEGER),
    (remove_dead_code, Stage.INTEGER),
    (drop_ties, Stage.INTEGER),
    (name_graph, Stage.INTEGER),
    (choose_layout, Stage.INTEGER),
    (pack_int4, Stage.INTEGER),
    (fuse_epilogues, Stage.PACKED),
)
# The real formulas rounded (A17), (A24)-(A27), (A31), or I-BERT's polynomials (A28)-(A30).
NONLINEAR = ("real", ibert.NAME)
# What only a GPU's kernels gain by: they multiply nibbles, or open them in registers.
GPU_PIPELINE: tuple[tuple[Pass, Stage], ...] = ((pack_activations, Stage.PACKED),)
# What only the rules for CPUs have one kernel for.
CPU_PIPELINE: tuple[tuple[Pass, Stage], ...] = ((join_attention, Stage.PACKED),)


@dataclass(frozen=True)
class Compiled:
    """What a compilation leaves: the module at three stages and the executable made from the last.

    objects: the kernels that the executable lacks, where they were asked for as object files.
    """

    annotated: tvm.IRModule
    packed: tvm.IRModule
    tir: tvm.IRModule
    executable: relax.VMExecutable
    target: tvm.target.Target
    objects: Objects | None = None


@dataclass(frozen=True)
class StepReport:
    """One finished step: its name, its number of rewrites, its seconds."""

    name: str
    rewrites: int
    seconds: float


Progress = Callable[[str, StepReport | None], None]


def _silent(name: str, report: StepReport | None) -> None:
    del name, report


def debug_level() -> int:
    """HAWQ_TVM_DEBUG: 0 quiet, 1 timings and counts, 2 a module dump per pass, 3 and the TIR, 4 and the assembly."""
    value = os.environ.get("HAWQ_TVM_DEBUG", "0")
    return int(value) if value.isdigit() else 1


def _dump(index: int, name: str, text: str) -> None:
    folder = Path(os.environ.get("HAWQ_TVM_DEBUG_DIR", "hawq_tvm_debug"))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{index:02d}_{name}.txt", text)


class _Run:
    """Runs steps, times them, reports and dumps as asked."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.index, self.level = progress or _silent, 0, debug_level()

    def step(self, name: str, function: Callable[[], tuple[Any, int]]) -> Any:
        self.progress(name, None)
        start = time.perf_counter()
        result, rewrites = function()
        report = StepReport(name, rewrites, time.perf_counter() - start)
        self.progress(name, report)
        if self.level >= 1:
            print(f"hawq_tvm: {name:<18} {rewrites:>5} rewrites {report.seconds:8.3f} s", file=sys.stderr)
        if self.level >= (3 if name == "lower_to_tir" else 2) and isinstance(result, tvm.IRModule):
            _dump(self.index, name, result.script())
        self.index += 1
        return result


def ends(target: tvm.target.Target | None) -> tuple[tuple[Pass, Stage], ...]:
    """The passes behind PIPELINE that only the kernels of a target's kind gain by."""
    if target is None:
        return ()
    return GPU_PIPELINE if is_cuda(target) else CPU_PIPELINE


def until(
    module: tvm.IRModule,
    stop: Pass | None,
    progress: Progress | None = None,
    target: tvm.target.Target | None = None,
    start: Pass | None = None,
    form: bool = True,
) -> tvm.IRModule:
    """A module taken through the passes of PIPELINE, and of what ends it for the target, that come before the pass
    `stop` (None: all).

    start: the pass to begin with, for a module that has been through those before it; an ANNOTATED one begins with
    the first.  form: whether TVM's own grammar is checked, too, which refuses no model.
    Raises ModelError naming the first layer that cannot be integer; it knows all of them.
    """
    run = _Run(progress)
    passes = PIPELINE + ends(target)
    functions = [function for function, _ in passes]
    first, last = functions.index(start) if start else 0, functions.index(stop) if stop else None
    if start is None:
        stages.check_grammar(module, Stage.ANNOTATED)
    verified = Stage.ANNOTATED if start is None else None
    promised = contract.outputs(module)
    following = [*(stage for _, stage in passes[1:]), None]
    for (function, stage), after in list(zip(passes, following, strict=True))[first:last]:

        def apply(
            function: Pass = function,
            stage: Stage = stage,
            module: tvm.IRModule = module,
            verified: Stage | None = verified,
            checks_form: bool = form and after is not stage,
        ) -> tuple[tvm.IRModule, int]:
            new, rewrites = function(module)
            if new is not module or stage is not verified:
                stages.check_grammar(new, stage)
            if checks_form:
                stages.check_form(new)
            contract.check_step(promised, new, function.__name__)
            return new, rewrites

        module, verified = run.step(function.__name__, apply), stage
    return module


def to_packed(
    module: tvm.IRModule, progress: Progress | None = None, target: tvm.target.Target | None = None
) -> tvm.IRModule:
    """An ANNOTATED module taken through every pass.

    Raises ModelError as `until` does, OverflowBoundError naming the first layer that may overflow, which `drop_ties`
    finds.
    """
    return until(module, None, progress, target)


def to_packed_unnamed(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """What `to_packed` gives, and its refusals, without what only a library needs: the roundings that cost the least,
    and the graph's name.
    """
    integer = until(module, drop_ties, None, target, form=False)
    ranges.margins(integer)
    return until(integer, None, None, target, choose_layout, form=False)


def to_tir(packed: tvm.IRModule, target: tvm.target.Target) -> tuple[tvm.IRModule, int]:
    """The TIR of a PACKED module, and the number of its kernels."""
    module, count = schedules.lower_to_tir(packed, target)
    stages.verify(module, Stage.TIR)
    contract.check_step(contract.outputs(packed), module, "lower_to_tir")
    return module, count


def compile_packed(
    packed: tvm.IRModule, target: tvm.target.Target, progress: Progress | None = None
) -> tuple[tvm.IRModule, relax.VMExecutable]:
    """A PACKED module to TIR and an executable for `target`."""
    from .build import build_reported

    run = _Run(progress)
    run.index = len(PIPELINE)

    tir = run.step("lower_to_tir", lambda: to_tir(packed, target))
    executable, usage = run.step("build", lambda: (build_reported(tir, target), len(tir.functions_items()) - 1))
    if run.level >= 4:
        first = executable.mod.imports[0]
        hosts = [m for m in (first, *first.imports) if m.kind == "llvm"]
        _dump(run.index, "assembly", "\n".join(str(host.inspect_source("asm")) for host in hosts))
        for device in (m for m in first.imports if m.kind != "llvm"):
            _dump(run.index, "cuda", str(device.inspect_source()))
    return schedules.with_usage(tir, [asdict(u) for u in usage]), executable


def with_records(
    packed: tvm.IRModule, target: tvm.target.Target, records: schedules.Records, progress: Progress | None = None
) -> tvm.IRModule:
    """A PACKED module whose functions carry the measured tiles that `records`, or else the shipped records, have for
    them.
    """
    known = {**schedules.shipped_records(target), **records}
    if not known:
        return packed
    return _Run(progress).step("apply_records", lambda: schedules.apply_records(packed, target, known))


def compile_annotated(
    annotated: tvm.IRModule,
    target: tvm.target.Target,
    progress: Progress | None = None,
    records: schedules.Records | None = None,
    cache: Cache | None = None,
) -> Compiled:
    """An ANNOTATED module, wherever it came from, compiled for `target`.

    records: measured tiles to use.  cache: have the kernels of a CPU as object files, which it may hold already; they
    are not finished yet when this returns.
    """
    packed = with_records(to_packed(annotated, progress, target), target, records or {}, progress)
    if cache is None or is_cuda(target) or debug_level() >= 4:
        tir, executable = compile_packed(packed, target, progress)
        return Compiled(annotated, packed, tir, executable, target)
    from .build import Objects

    run = _Run(progress)
    run.index = len(PIPELINE)
    tir = run.step("lower_to_tir", lambda: to_tir(packed, target))
    objects = run.step("build", lambda: (Objects(tir, target, cache), len(tir.functions_items()) - 1))
    return Compiled(annotated, packed, tir, objects.executable, target, objects)


def compile_model(
    source: Any,
    target: tvm.target.Target,
    *,
    shapes: dict[str, tuple[int, ...]] | None = None,
    allow_float_tail: bool = False,
    nonlinear: str | None = None,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
    records: schedules.Records | None = None,
    cache: Cache | None = None,
) -> Compiled:
    """A model compiled for `target`; what it may be and the options are those of `import_annotated`.

    records: measured tiles to use, before those that are shipped.  cache: see `compile_annotated`.
    """
    annotated = import_annotated(
        source, shapes=shapes, allow_float_tail=allow_float_tail, nonlinear=nonlinear, ranges=ranges, progress=progress
    )
    return compile_annotated(annotated, target, progress, records, cache)


def import_annotated(
    source: Any,
    *,
    shapes: dict[str, tuple[int, ...]] | None = None,
    allow_float_tail: bool = False,
    nonlinear: str | None = None,
    ranges: Ranges | None = None,
    progress: Progress | None = None,
) -> tvm.IRModule:
    """The ANNOTATED module of a model: ONNX (path, bytes or ModelProto), PyTorch (.pt2 path, bytes or
    ExportedProgram), a HAWQ checkpoint or an I-BERT (folder or module).

    shapes: fixes symbolic dimensions by input name.  allow_float_tail: keep float operators before the first
    quantize or after the last dequantize, outside the integer region, instead of refusing them.
    nonlinear: the arithmetic of GELU, softmax and LayerNorm, one of NONLINEAR; None: the model's, or "real".
    ranges: what float inputs saturate at, (least, greatest) by name.
    Raises UsageError for another arithmetic, and for a range that `with_declared_ranges` refuses.
    """
    from hawq_tvm.frontend.formats import frontend_of

    def imported() -> tuple[tvm.IRModule, int]:
        return import_by(frontend_of(source), source, shapes, allow_float_tail, nonlinear, ranges), 0

    return _Run(progress).step("import", imported)


def import_by(
    frontend: Frontend,
    source: Any,
    shapes: Mapping[str, tuple[int, ...]] | None,
    allow_float_tail: bool,
    nonlinear: str | None = None,
    ranges: Ranges | None = None,
) -> tvm.IRModule:
    """What `import_annotated` gives, by a frontend that is known already."""
    if nonlinear not in (None, *NONLINEAR):
        raise UsageError(
            "no such arithmetic of GELU, softmax and LayerNorm",
            where="--nonlinear",
            expected=" or ".join(NONLINEAR),
            found=str(nonlinear),
        )
    try:
        run = frontend.run_before_cut if allow_float_tail and frontend.run_before_cut else frontend.run
        module = run(source, shapes)
    except ModelError as e:
        if e.imported is not None:
            e.others += _problems(_asking(e.imported, True, nonlinear, ranges))
        raise
    return _asking(module, allow_float_tail, nonlinear, ranges)


def _asking(module: tvm.IRModule, float_tail: bool, nonlinear: str | None, ranges: Ranges | None) -> tvm.IRModule:
    """A module whose `main` says what was asked for."""
    main = module["main"].with_attr("hawq.allow_float_tail", 1) if float_tail else module["main"]
    main = with_declared_ranges(main, ranges) if ranges else main
    return tvm.IRModule({"main": main.with_attr("hawq.nonlinear", nonlinear) if nonlinear else main})


def _problems(module: tvm.IRModule) -> tuple[ModelError, ...]:
    """What is wrong with the layers of a module."""
    try:
        to_packed(module)
    except ModelError as e:
        return (e, *e.others)
    return ()
