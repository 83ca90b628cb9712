"""Hessian-aware pruning of channels: a float network and calibration data to a smaller float network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.frontend.onnx.inputs import with_shapes
from hawq_tvm.quantize.allocate.loss import Loss
from hawq_tvm.quantize.allocate.sensitivity import Progress
from hawq_tvm.quantize.network.answers import Answers
from hawq_tvm.quantize.network.data import Calibration, open_data
from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.network.float_onnx import Shapes, from_onnx
from hawq_tvm.quantize.network.pictures import Preprocess
from hawq_tvm.quantize.network.prepare import prepare
from hawq_tvm.quantize.ptq.quantizer import as_onnx

from .channels import Channels, find_channels
from .choose import Budget, choose, macs_of
from .cost import diagonals, group_costs
from .cut import without_channels
from .distil import distil
from .refit import Refit

# How far the smaller network may be from the full one whose weights for these channels are 0, as a part of the largest
# output: sums of float32 in another order.
ROUNDING = 1e-3
RANKS = ("hessian", "norm", "chance")


@dataclass(frozen=True)
class Pruning:
    """How to prune.

    budgets: what the network may take at most, such as "macs=60%".  multiple: of how many channels of a kind some
    stay.  keep: layers whose output channels all stay.  by: what channels are ranked by, "hessian", or, to compare
    with, "norm" (of their weights) or "chance".  probes, batch: of the Hessian's trace, sets of random signs and images
    for each.  images: that weights are fitted on, and then trained for `steps` batches; 0 images leave
    them as they were.  classes: whether the first output holds scores of classes, None for what it looks like
    (`network/answers.py`).
    """

    budgets: tuple[str, ...]
    multiple: int = 8
    keep: tuple[str, ...] = ()
    by: str = "hessian"
    probes: int = 32
    batch: int = 32
    images: int = 512
    steps: int = 300
    seed: int = 0
    classes: bool | None = None

    def __post_init__(self) -> None:
        if not self.budgets:
            raise UsageError("nothing says how small", where="prune", expected="--budget macs=60% and the like")
        if self.by not in RANKS:
            raise UsageError("is no way to rank channels", where=f"--by {self.by}", expected=", ".join(RANKS))
        for name, value, least in (
            ("multiple", self.multiple, 1),
            ("probes", self.probes, 1),
            ("batch", self.batch, 1),
            ("images", self.images, 0),
            ("steps", self.steps, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UsageError("is too small", where=f"--{name}", expected=f"at least {least}", found=str(value))


@dataclass(frozen=True)
class Pruned:
    """The smaller float model.

    layers: JSON-ready rows of weights' shapes before and after, and of the errors of what they make, before and after
    they were fitted.  resources: before and after.  distance: of the answers, before and after training: in nats, or,
    where they are no classes, their squared change as a share of their squares.
    """

    model: onnx.ModelProto
    layers: list[dict[str, Any]]
    resources: dict[str, tuple[float, float]]
    images: int
    distance: tuple[float, float] | None
    answers: Answers

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "layers": self.layers,
            "resources": self.resources,
            "images": self.images,
            "distance": self.distance,
            "answers": self.answers.kind,
            "answers_by": self.answers.by,
        }


def prune(
    model: Any,
    calibration: str | Path,
    pruning: Pruning,
    *,
    shapes: Shapes | None = None,
    preprocess: Preprocess | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Take channels away from a float network: ONNX (path, bytes or ModelProto), a .pt2 file or an ExportedProgram.

    What comes back is float ONNX with BatchNormalization folded, for `post_training`, `allocate` and `finetune`.
    Raises ModelError, InputError and UsageError as `load_float` and `open_data` do, and UsageError with the least that
    can be reached where a budget cannot be met.
    """
    budgets, tell = [Budget.parse(text) for text in pruning.budgets], progress or (lambda step: None)
    prepared, graph = prepare(as_onnx(model, shapes), shapes)
    if not graph.layers:
        raise ModelError("has no layers with weights", where=graph.name, expected="convolutions or matrix products")
    data = open_data(calibration, graph.inputs, preprocess)
    prepared = with_shapes(prepared, {one.name: one.shape for one in data.inputs})
    example = next(data.batches(graph.batch or 1, graph.batch is not None)).inputs
    channels = find_channels(graph, example, pruning.keep)
    batch, macs = graph.batch or min(pruning.batch, data.count), macs_of(graph, example)
    choose(graph, channels, np.zeros(channels.count), macs, budgets, pruning.multiple)  # refuses before time is spent
    loss = Loss(graph, data, pruning.classes)
    if not loss.answers.classes:
        loss.weigh(_squares(graph, data, batch))
    costs = _costs(loss, channels, pruning, batch, tell)
    stays, resources = choose(graph, channels, costs, macs, budgets, pruning.multiple)
    smaller = without_channels(prepared, channels, stays)
    cut = from_onnx(smaller)
    _check(graph, cut, channels, stays, example)
    some = _some(data, batch, graph.batch is not None, pruning.images)
    errors: dict[str, dict[str, float]] = {}
    distance = None
    if some:
        errors = Refit(smaller, graph, cut, channels, stays, some, pruning.seed).run(tell)
    if some and pruning.steps:
        distance = distil(smaller, loss, cut, some, steps=pruning.steps, seed=pruning.seed, progress=tell)
    onnx.checker.check_model(smaller)
    rows = [
        {
            "layer": layer.name,
            "before": list(graph.parameters[layer.weight].shape),
            "after": list(cut.parameters[layer.weight].shape),
            **{f"error_{k}": v for k, v in errors.get(layer.name, {}).items()},
        }
        for layer in graph.layers
    ]
    images = sum(len(next(iter(b.values()))) for b in some)
    return Pruned(smaller, rows, resources, images, distance, loss.answers)


def _squares(graph: FloatGraph, data: Calibration, batch: int) -> dict[str, float]:
    """The mean square of every output, over all data."""
    sums, counts = dict.fromkeys(graph.outputs, 0.0), dict.fromkeys(graph.outputs, 0)
    with torch.no_grad():
        for one in data.batches(batch, graph.batch is not None):
            for name, value in graph.run(one.inputs).items():
                sums[name] += float(value.double().square().sum())
                counts[name] += value.numel()
    return {name: total / max(counts[name], 1) for name, total in sums.items()}


def _costs(loss: Loss, channels: Channels, pruning: Pruning, batch: int, progress: Progress) -> NDArray[np.float64]:
    """What every group of channels costs, as it is ranked."""
    if pruning.by == "chance":
        return np.random.default_rng(pruning.seed).random(channels.count)
    hessian = pruning.by == "hessian"
    diagonal = diagonals(loss, pruning.probes, batch, pruning.seed, progress) if hessian else None
    return group_costs(loss.graph, channels, diagonal)


def _some(data: Calibration, batch: int, fixed: bool, images: int) -> list[Mapping[str, Any]]:
    """The first batches that hold so many images."""
    found: list[Mapping[str, Any]] = []
    for one in data.batches(batch, fixed):
        if sum(len(next(iter(b.values()))) for b in found) >= images:
            break
        found.append(one.inputs)
    return found


def _check(graph: FloatGraph, cut: FloatGraph, channels: Channels, stays: Any, example: Mapping[str, Any]) -> None:
    """The smaller network must compute what the full one does without the columns of what went.

    Raises ModelError where it does not: a node then holds a count of channels that was not found.
    """
    masked = {}
    for columns in channels.columns.values():
        weight = graph.parameters[columns.parameter]
        shape = [-1 if d == columns.axis else 1 for d in range(weight.ndim)]
        masked[columns.parameter] = weight * torch.from_numpy(stays[columns.groups]).reshape(shape)
    with torch.no_grad():
        wanted, found = graph.run(example, parameters=masked), cut.run(example)
    for name, value in wanted.items():
        same = value.shape == found[name].shape
        if not same or float((value - found[name]).abs().max()) > ROUNDING * float(value.abs().max()):
            raise ModelError(
                "would compute something else without these channels",
                where=name,
                found="a node that counts channels in a way that is not understood",
                remedy="name the layers before it whose channels must stay with --keep",
            )
