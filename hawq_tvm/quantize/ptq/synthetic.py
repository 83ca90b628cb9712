"""Calibration data without data: inputs whose activations have the means and deviations that BatchNormalization has
kept of the training set (Cai et al., "ZeroQ", 2020; Kim et al., "Integer-only Zero-shot Quantization for Efficient
Speech Recognition", 2021).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hawq_tvm.core.errors import InputError
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.data import Array, Batch, Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph, Input

Tensor = torch.Tensor
# What `calibration` is for data that are made here.
SYNTHETIC = "synthetic"
IMAGES, BATCH, ITERATIONS = 32, 8, 200
RATE, LEAST_RATE, PATIENCE = 0.05, 1e-4, 25
SMALL = 1e-6


class Synthetic(Calibration):
    """Data that are held in memory, without labels."""

    def __init__(self, inputs: Sequence[Input], arrays: dict[str, Array]) -> None:
        self.inputs = tuple(replace(one, shape=(one.shape[0], *arrays[one.name].shape[1:])) for one in inputs)
        self.where, self.has_labels, self.count = SYNTHETIC, False, len(next(iter(arrays.values())))
        self._arrays = arrays
        self.fingerprint = hashlib.sha256(b"".join(v.tobytes() for v in arrays.values())).hexdigest()

    def batches(self, size: int, fixed: bool = False) -> Iterator[Batch]:
        """Batches of `size` in order, the last one smaller; fixed: left out instead."""
        for start in range(0, self.count, size):
            if start + size <= self.count or not fixed:
                yield Batch({n: v[start : start + size] for n, v in self._arrays.items()}, None)


def distilled(graph: FloatGraph, seed: int, tell: Progress, images: int = IMAGES) -> Synthetic:
    """Inputs of a network with BatchNormalization nodes, of the sizes that it declares.

    Raises InputError for a network without such statistics, of open sizes, or whose inputs are no real numbers.
    """
    norms = [(n.inputs[0], *n.inputs[-2:]) for n in graph.nodes if _keeps(n.op)]
    held = graph.parameters
    known = [(name, held[mean], held[variance]) for name, mean, variance in norms if {mean, variance} <= held.keys()]
    if not known:
        raise InputError(
            "keeps no means and deviations that data could be made from",
            where=f"{graph.name}: --calib {SYNTHETIC}",
            expected="BatchNormalization nodes",
            found="none: exporters fold them into the convolutions before them",
            remedy="export it with them (torch.onnx.export(..., training=TrainingMode.PRESERVE) of a network in eval"
            " mode, or torch.export), or calibrate with data",
        )
    for one in graph.inputs:
        if one.dtype != "float32" or not one.shape or None in one.shape[1:]:
            raise InputError(
                "is an input that no data can be made for",
                where=f"{one.name}: --calib {SYNTHETIC}",
                expected="real numbers (float32) of known sizes",
                found=f"{one.dtype} {'x'.join('?' if d is None else str(d) for d in one.shape)}",
                remedy="fix its sizes with --shape, or calibrate with data",
            )
    size = graph.batch or BATCH
    count = -(-images // size)
    draws = torch.Generator().manual_seed(seed)
    parts = [_batch(graph, known, size, draws, tell, (i * ITERATIONS, count * ITERATIONS)) for i in range(count)]
    return Synthetic(graph.inputs, {one.name: np.concatenate([p[one.name] for p in parts]) for one in graph.inputs})


def _keeps(op: str) -> bool:
    return op == "BatchNormalization" or "batch_norm" in op  # of ONNX, of an exported program


def _batch(
    graph: FloatGraph,
    norms: Sequence[tuple[str, Tensor, Tensor]],
    size: int,
    draws: torch.Generator,
    tell: Progress,
    progress: tuple[int, int],
) -> dict[str, Array]:
    made = {one.name: torch.randn(size, *_sizes(one), generator=draws).requires_grad_() for one in graph.inputs}
    optimizer = torch.optim.Adam(made.values(), RATE)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=PATIENCE, min_lr=LEAST_RATE)
    for i in range(ITERATIONS):
        values: dict[str, Any] = {name: None for name, *_ in norms}

        def record(name: str, value: Tensor, values: dict[str, Any] = values) -> None:
            if name in values:
                values[name] = value

        graph.run(made, record)
        loss = torch.stack([_apart(values[name], mean, variance) for name, mean, variance in norms]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step(loss.detach())
        tell(Step("making calibration data", progress[0] + i + 1, progress[1]))
    return {name: value.detach().numpy() for name, value in made.items()}


def _sizes(one: Input) -> list[int]:
    return [d for d in one.shape[1:] if d is not None]


def _apart(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of what is there from what BatchNormalization kept, as normal distributions,
    the mean of all channels: log(s / s') - (1 - (s'^2 + (m' - m)^2) / s^2) / 2, m' and s' being kept.
    """
    rows = value.movedim(1, 0).flatten(1)
    here, there = rows.var(1, unbiased=rows.shape[1] > 1) + SMALL, variance + SMALL
    return (0.5 * (here / there).log() - 0.5 * (1 - (there + (mean - rows.mean(1)).square()) / here)).mean()
