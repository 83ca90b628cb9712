"""What one quantized file becomes: inspected, compiled, verified, proved, and run beside its producer's simulation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hawq_tvm as ht
from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import HawqError
from hawq_tvm.package.interface import FAILURES
from hawq_tvm.package.tail import errors_of_onnxruntime

Array = np.ndarray[Any, Any]
# By which part of themselves the inputs are moved, to see how far a simulation moves.
NUDGES = 2.0**-20, -(2.0**-19), 2.0**-17
INTEGERS, TAIL, NOTHING, REFUSED = "integers", "float tail", "not quantized", "refused"


def inspected(path: Path, target: str = "host") -> dict[str, Any]:
    """What `inspect` says of a file, JSON-ready: the verdict, its layers and float layers, or the sentence."""
    report = ht.inspect(path, target=target)
    if not report.compilable:
        report = ht.inspect(path, target=target, allow_float_tail=True)
    if not report.compilable:
        return {"verdict": REFUSED, "sentence": report.error}
    kept = len(report.float_tail) + (len(report.cut.nodes) if report.cut else 0)
    verdict = NOTHING if not report.integer_layers else TAIL if kept else INTEGERS
    return {"verdict": verdict, "layers": report.integer_layers, "float_layers": kept}


def judge(path: Path, draws: Sequence[Mapping[str, Array]], target: str = "host") -> dict[str, Any]:
    """Everything that the table says of a file, JSON-ready.

    draws: inputs of the network, in the order of the file's.
    verdict: integers alone, a float tail, nothing quantized, or refused, then with the sentence and what runs the file
    nevertheless (runs: "" for nobody).  ranges: what its float inputs were declared to saturate at, the least and
    greatest of the draws, where it is refused without.  kernels, float: of the package, and its float operators by
    kind.  verified, proved: whether every layer equals the reference, and the
    proof holds.  thresholds, differing: of its requantizes and functions.  apart: in steps, see `_apart`.  moved: as
    apart, between the simulation and itself on inputs that are moved by NUDGES.  indices: whether outputs of integers
    are those of the simulation.
    """
    package, ranges = _compiled(path, target, draws)
    if isinstance(package, HawqError):
        said = ht.inspect(path, target=target, allow_float_tail=True, ranges=ranges).error
        sentence = str(package)
        sentence = sentence if said == sentence else f"compile says: {sentence}; but inspect says: {said or 'yes'}"
        return {"verdict": REFUSED, "sentence": sentence, "runs": _runner(path, draws)}
    outside = stages.float_tail(package.graph["main"])
    floats = Counter(
        ops.op_name(b.value).split(".")[-1]
        for b in stages.bindings(package.graph["main"])
        if b.var.name in outside and ops.op_name(b.value)
    )
    # What ONNX Runtime does behind the library: "NAME (OPERATOR)".
    floats.update(node.rpartition("(")[2][:-1] for node in package.manifest.get("cut", {}).get("nodes", ()))
    names, proof = [i.name for i in package.inputs], package.prove()
    given = [dict(zip(names, draw.values(), strict=True)) for draw in draws]
    found: dict[str, Any] = {
        "verdict": NOTHING if not proof.kernels else TAIL if floats else INTEGERS,
        "kernels": proof.kernels,
        "float": dict(floats),
        "verified": package.verify(given).ok,
        "proved": proof.ok,
        "thresholds": proof.thresholds,
        "differing": proof.differing,
        **({"ranges": ranges} if ranges else {}),
    }
    simulated = _simulation(path)
    scales = {o.name: o.quantization.scale for o in package.outputs if o.quantization}
    rows, moved = [], [0.0]
    for inputs in given:
        ours, theirs = package.run(inputs), simulated(inputs)
        for nudge in NUDGES:
            nudged = simulated(
                {n: a * a.dtype.type(1 + nudge) if a.dtype.kind == "f" else a for n, a in inputs.items()}
            )
            moved += [_apart(a, b, scales.get(n, ())) or 0.0 for n, a, b in zip(ours, nudged, theirs, strict=True)]
        rows += [_apart(a, b, scales.get(name, ())) for (name, a), b in zip(ours.items(), theirs, strict=True)]
    apart = max((r for r in rows if r is not None), default=0.0)
    return {**found, "apart": apart, "moved": max(moved), "indices": None not in rows}


def _compiled(
    path: Path, target: str, draws: Sequence[Mapping[str, Array]]
) -> tuple[ht.Package | HawqError, dict[str, tuple[float, float]]]:
    """The package of a file, or why there is none, and the ranges of its float inputs that had to be declared: without
    a float tail if that can be.
    """
    for tail in (False, True):
        ranges: dict[str, tuple[float, float]] = {}
        while True:
            try:
                return ht.compile(path, target, allow_float_tail=tail, ranges=ranges), ranges
            except HawqError as e:
                failure = e
            asked = "--range" in str([failure, *getattr(failure, "others", ())])
            if ranges or not asked:
                break
            ranges = _own_ranges(path, draws)
            if not ranges:
                break
    return failure, ranges


def _own_ranges(path: Path, draws: Sequence[Mapping[str, Array]]) -> dict[str, tuple[float, float]]:
    """The least and the greatest of every float input."""
    names = [i["name"] for i in ht.inspect(path).model["inputs"]]
    every = [[d[k] for d in draws] for k in draws[0]]
    return {
        n: (float(np.min(a)), float(np.max(a))) for n, a in zip(names, every, strict=True) if a[0].dtype.kind == "f"
    }


def _runner(path: Path, draws: Sequence[Mapping[str, Array]]) -> str:
    """What runs a file on the network's inputs, "" where nothing does."""
    raised: tuple[type[Exception], ...] = FAILURES
    if path.suffix != ".pt2":
        raised += errors_of_onnxruntime()
    try:
        simulated = _simulation(path)
        names = list(draws[0]) if path.suffix == ".pt2" else [i.name for i in _graph(path).input]
        simulated(dict(zip(names, draws[0].values(), strict=True)))
    except raised:
        return ""
    return "PyTorch" if path.suffix == ".pt2" else "QONNX" if _is_qonnx(_graph(path)) else "ONNX Runtime"


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path).graph


def _is_qonnx(graph: Any) -> bool:
    return any("brevitas" in n.domain or "qonnx" in n.domain for n in graph.node)


def _simulation(path: Path) -> Callable[[Mapping[str, Array]], list[Array]]:
    """The producer's own float simulation of a file: PyTorch for a program, QONNX's executor, else ONNX Runtime with
    every optimization off, because its optimized kernels are other arithmetic.
    """
    if path.suffix == ".pt2":
        import torch

        module = torch.export.load(path).module()

        def program(inputs: Mapping[str, Array]) -> list[Array]:
            results = module(*(torch.from_numpy(a) for a in inputs.values()))
            return [r.detach().numpy() for r in (results if isinstance(results, tuple) else (results,))]

        return program
    import onnx

    model = onnx.load(path)
    if _is_qonnx(model.graph):
        return _qonnx(model)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))


def _qonnx(model: Any) -> Callable[[Mapping[str, Array]], list[Array]]:
    from unittest import mock

    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    wrapped = ModelWrapper(model).transform(InferShapes())

    def interpreted(inputs: Mapping[str, Array]) -> list[Array]:
        # The executor makes a model of each node, of the newest version of the format: newer than ONNX Runtime reads.
        with mock.patch("onnx.IR_VERSION", 10):
            results = execute_onnx(wrapped, dict(inputs))
        return [results[o.name] for o in model.graph.output]

    return interpreted


def _apart(ours: Array, theirs: Array, scales: Sequence[float]) -> float | None:
    """The largest difference of an output in steps: its scale, or 1/255 of the range of the simulation where it has
    none or the scale is far finer than that.

    None where integers, such as the places of the best scores, or their number are not the same.
    """
    if ours.shape != theirs.shape or ours.dtype.kind in "iub":
        return 0.0 if np.array_equal(ours, theirs) else None
    wide = float(np.ptp(theirs)) / 255 if theirs.size else 0.0
    step = float(scales[0]) if len(scales) == 1 and scales[0] > wide / 16 else wide
    return float(np.abs(ours.astype(np.float64) - theirs).max(initial=0.0)) / (step or 1.0)
