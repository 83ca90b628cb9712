"""Candidate kernels of a model for a GPU that is elsewhere, as a folder with CUDA source, a manifest and a runner.

The folder holds

    manifest.json   plan (target, and for every workload its key, layers and tiles) and its hash; arguments and
                    launches; hashes of files
    w00_0.cu, ...   the candidates of one workload
    constants.npz   the constants of epilogues; data and weights are random, made from seeds where they are needed
    run.py, gpu.py, contest.py, plan.py, mma_pack.py    the runner: see its first lines
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from hawq_tvm.compiler import pipeline
from hawq_tvm.compiler.cuda import nvcc, source
from hawq_tvm.core.errors import OutputError, UsageError
from hawq_tvm.core.files import check_folder
from hawq_tvm.core.version import __version__
from hawq_tvm.targets import target as targets
from hawq_tvm.tuning.gpu import plan as plans
from hawq_tvm.tuning.gpu.plan import FORMAT, identity
from hawq_tvm.tuning.tuner import Workload, workloads
from schedules import record
from schedules.gpu import mma_pack
from schedules.rule import Kernel, Modelled, Tile
from schedules.spelling.cuda_prelude import PRELUDE

Array = NDArray[Any]
EXPORTED = Path(__file__).parent / "exported"  # programs that run elsewhere: copied, never imported here
RUNNER = (
    *(EXPORTED / f"{name}.py" for name in ("run", "gpu", "contest")),
    Path(plans.__file__),
    Path(mma_pack.__file__),
)
CANDIDATES = 24
PER_SOURCE = 24  # kernels that one nvcc compiles, in some seconds


@dataclass(frozen=True)
class ExportReport:
    """What was exported: where, for which architecture, how many workloads and candidates, and bytes."""

    folder: Path
    arch: str
    workloads: int
    candidates: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**self.__dict__, "folder": str(self.folder)}


def export(
    model: Any,
    folder: str | Path,
    target: str,
    *,
    trials: int = CANDIDATES,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_float_tail: bool = False,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> ExportReport:
    """Write the candidate kernels of a model to a new folder, whole or not at all.

    trials: candidates of each workload at most.  progress: called with the number of a workload, of how many, and a
    layer of it.
    Raises ModelError as `compile` does, UsageError for another target than one GPU architecture, OutputError when
    `folder` exists or cannot be written.
    """
    parsed, path = gpu_target(target), Path(folder)
    if trials < 2:
        raise UsageError("at least 2 trials are needed to compare anything", where="--trials", found=str(trials))
    _check(path)
    found = model_workloads(model, parsed, shapes, allow_float_tail, ranges)
    if not found:
        raise UsageError(
            "nothing in this model has several tiles", where="--export", remedy="compile it without tuning"
        )
    made = _Export(parsed)
    for number, one in enumerate(found):
        if progress is not None:
            progress(number + 1, len(found), one.layers[0])
        made.add(one, (one.rule.possible(one.layer, parsed) if isinstance(one.rule, Modelled) else one.tiles)[:trials])
    files = made.all_files()
    _install(path, files)
    return ExportReport(
        path,
        targets.gpu_architectures(parsed)[0],
        len(found),
        sum(len(w["tiles"]) for w in made.plan),
        sum(len(b) for b in files.values()),
    )


def gpu_target(text: str) -> tvm.target.Target:
    """A target that is one GPU architecture.

    Raises UsageError for another.
    """
    parsed = targets.parse(text)
    found = targets.gpu_architectures(parsed)
    if len(found) != 1:
        raise UsageError(
            "kernels are exported to be measured on one kind of GPU",
            where=f"--target {text}",
            expected="one architecture, as cuda-sm90",
            found=", ".join(found) if found else "a CPU",
            remedy="name one; tiles of a CPU are measured without --export",
        )
    return parsed


def model_workloads(
    model: Any,
    target: tvm.target.Target,
    shapes: Mapping[str, Sequence[int]] | None,
    allow_float_tail: bool,
    ranges: Mapping[str, tuple[float, float]] | None,
) -> list[Workload]:
    """The workloads of a model on a GPU."""
    fixed = {k: tuple(int(d) for d in v) for k, v in (shapes or {}).items()}
    annotated = pipeline.import_annotated(model, shapes=fixed, allow_float_tail=allow_float_tail, ranges=ranges)
    return workloads(pipeline.to_packed(annotated, target=target), target, 1)


@dataclass
class _Export:
    """The files of an export while they are made."""

    target: tvm.target.Target
    plan: list[dict[str, Any]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)

    def add(self, one: Workload, tiles: Sequence[Tile]) -> None:
        """Another workload with its first tiles."""
        number = len(self.plan)
        kernels = {
            f"w{number:02d}_t{i:02d}": one.rule.build(one.layer, self.target, tile) for i, tile in enumerate(tiles)
        }
        launches: dict[str, source.Launch] = {}
        sources: dict[str, str] = {}
        names = list(kernels)
        for part, first in enumerate(range(0, len(names), PER_SOURCE)):
            own = names[first : first + PER_SOURCE]
            code, found = source.kernels({n: kernels[n].func for n in own}, self.target, PRELUDE)
            file = f"w{number:02d}_{part}.cu"
            self.files[file] = code.encode()
            launches |= found
            sources |= dict.fromkeys(own, file)
        rule = one.rule if isinstance(one.rule, Modelled) else None
        entry: dict[str, Any] = {
            # What has no estimate goes last, what computes most first.
            "priority": len(one.layers) * rule.estimate(one.layer, self.target, tiles[0]) if rule else -1 / one.work,
            "inputs": [
                _input(a, b, 1000 * number + i) for i, (a, b) in enumerate(zip(one.inputs, one.bounds, strict=True))
            ],
            "candidates": [
                {
                    "source": sources[n],
                    "text": str(k.tile),
                    "kernel": launches[n].kernel,
                    "grid": launches[n].grid,
                    "block": launches[n].block,
                    "shared": launches[n].shared,
                    "arguments": self.arguments(one, k, launches[n]),
                }
                for n, k in kernels.items()
            ],
        }
        if rule:
            entry["weights"] = _weights(rule.weights(one.layer), 1000 * number + 999)
        self.entries.append(entry)
        self.plan.append(
            {
                "key": one.key,
                "rule": one.rule.name,
                "layers": list(one.layers),
                "tiles": [record.fields_of(t) for t in tiles],
            }
        )

    def arguments(self, one: Workload, kernel: Kernel, launch: source.Launch) -> list[dict[str, Any]]:
        """Where the data of every argument of a kernel comes from, in its order, with shape and dtype of its
        parameter.
        """
        inputs, constants, params = len(one.inputs), len(kernel.arguments), list(kernel.func.params)
        found = []
        for at in launch.arguments:
            given: dict[str, Any]
            if at < inputs:
                given = {"kind": "input", "what": at}
            elif at >= inputs + constants:
                given = {"kind": "output", "what": at - inputs - constants}
            elif at == inputs and isinstance(one.rule, Modelled):
                given = {"kind": "weights", "what": one.rule.packing(one.layer, kernel.tile)}
            else:
                given = {"kind": "constant", "what": self.constant(kernel.arguments[at - inputs])}
            found.append({**given, "shape": [int(d) for d in params[at].shape], "dtype": str(params[at].dtype)})
        return found

    def constant(self, array: Array) -> str:
        """The name of a constant in constants.npz: its elements in order, whatever its shape."""
        flat = np.ascontiguousarray(array).reshape(-1)
        name = "c" + hashlib.sha256(f"{flat.dtype}".encode() + flat.tobytes()).hexdigest()[:20]
        self.constants[name] = flat
        return name

    def all_files(self) -> dict[str, bytes]:
        """Every file of the folder by name."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.constants)  # type: ignore[arg-type]
        files = {**self.files, "constants.npz": buffer.getvalue(), **{p.name: p.read_bytes() for p in RUNNER}}
        (arch,) = targets.gpu_architectures(self.target)
        versions = {"hawq_tvm": __version__, "tvm": str(tvm.__version__)}
        plan = {"target": targets.describe(self.target), "arch": arch, "versions": versions, "workloads": self.plan}
        manifest = {
            "format": FORMAT,
            "id": identity(plan),
            "plan": plan,
            "nvcc": nvcc.cubin_options(arch),
            "workloads": self.entries,
            "files": {n: hashlib.sha256(b).hexdigest() for n, b in files.items()},
        }
        return {**files, "manifest.json": (json.dumps(manifest, indent=1) + "\n").encode()}


def _input(array: Array, bounds: tuple[int, int], seed: int) -> dict[str, Any]:
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "low": int(bounds[0]),
        "high": int(bounds[1]),
        "seed": seed,
    }


def _weights(array: Array, seed: int) -> dict[str, Any]:
    """Random weights with the bounds, the mean and the deviation of real ones: times depend on how many bits change."""
    numbers = {
        "low": int(array.min()),
        "high": int(array.max()),
        "mean": float(array.mean()),
        "std": float(array.std()),
    }
    return {"shape": list(array.shape), "dtype": str(array.dtype), "seed": seed, **numbers}


def _check(path: Path) -> None:
    """Refuse a folder that cannot be made, before the work."""
    check_folder(path)
    if path.exists() or path.is_symlink():
        raise OutputError(
            "exists", where=str(path), expected="the name of a new folder", remedy="choose another name, or remove it"
        )
    if not os.access(path.parent, os.W_OK):
        raise OutputError(
            "cannot be written", where=str(path), found="Permission denied", remedy="check the path and its permissions"
        )


def _install(path: Path, files: Mapping[str, bytes]) -> None:
    """Make a folder of files, whole or not at all."""
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", dir=path.parent))
        try:
            new = staging / "new"
            new.mkdir()
            for name, data in files.items():
                (new / name).write_bytes(data)
            os.rename(new, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as e:
        raise OutputError(
            "cannot be written",
            where=str(path),
            found=e.strerror or str(e),
            remedy="check the path and its permissions",
        ) from e
