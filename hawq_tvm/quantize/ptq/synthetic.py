"""Calibration data without data: inputs whose activations have the means and deviations that BatchNormalization has
kept of the training set (Cai et al., "ZeroQ", 2020; Kim et al., "Integer-only Zero-shot Quantization for Efficient
Speech Recognition", 2021).

Two things that these statistics do not say decide how good the ranges are. How inputs differ from each other: so the
statistics are those of all inputs together, and not of every batch. What inputs look like: pictures, spectra and
signals have about as much power in every octave of frequencies, so the search begins there and is one for waves,
not for pixels. White noise instead would need large peaks to move a convolution, and its averages are all alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from hawq_tvm.core.errors import InputError
from hawq_tvm.core.files import SYNTHETIC
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.data import Array, Batch, Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph, Input
from hawq_tvm.quantize.network.pictures import Preprocess, limits

Tensor = torch.Tensor
# What `calibration` is for data that are made here.
IMAGES, BATCH, ITERATIONS, RATE = 64, 8, 100, 0.1
SMALL = 1e-6
# The deviation of waves before a logistic function makes pixels of them.
STEEP = 1.6
# Deviations, as powers of two, and means, in deviations, that inputs without bounds may begin with.
EXPONENTS, MEANS = range(-10, 13), (-1.0, 0.0, 1.0)
# A tensor that is normalized, and the means and variances that were kept of its channels.
Kept = tuple[str, Tensor, Tensor]


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


def distilled(
    graph: FloatGraph, seed: int, tell: Progress, preprocess: Preprocess | None = None, images: int = IMAGES
) -> Synthetic:
    """Inputs of a network with BatchNormalization nodes, of the sizes that it declares.

    preprocess: how pixels become numbers, which bounds these; without it they have no bounds.
    Raises InputError for a network without such statistics, of open sizes, or whose inputs are no real numbers, and as
    `limits` does.
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
    draws = torch.Generator().manual_seed(seed)
    ends = None if preprocess is None else limits(SYNTHETIC, graph.inputs, preprocess)
    spans = {one.name: _Span(ends) for one in graph.inputs}
    made = [_Batch(graph, known, size, draws, spans) for _ in range(-(-images // size))]
    if ends is None:
        _scale(made[0], spans)
    _search(made, tell)
    with torch.no_grad():
        parts = [one.inputs() for one in made]
    return Synthetic(graph.inputs, {k: torch.cat([p[k] for p in parts]).numpy() for k in parts[0]})


def _keeps(op: str) -> bool:
    return op == "BatchNormalization" or "batch_norm" in op  # of ONNX, of an exported program


class _Span:
    """How far an input goes: between what black and white are, or by its mean, in deviations, and its deviation."""

    def __init__(self, ends: tuple[Array, Array] | None) -> None:
        self.ends = None if ends is None else [torch.as_tensor(v) for v in ends]
        self.mean, self.deviation = 0.0, 1.0

    def filled(self, waves: Tensor) -> Tensor:
        """The input that waves of deviation 1 stand for."""
        if self.ends is None:
            return (waves + self.mean) * self.deviation
        low, high = self.ends
        return low + (high - low) * torch.sigmoid(STEEP * waves)


class _Batch:
    """Inputs on their way, as noise whose waves are weighed, and the sums that they had when they were last seen.

    sums: by tensor, of how far every channel is from the mean that was kept, and of the square of that, by element.
    """

    def __init__(
        self,
        graph: FloatGraph,
        norms: Sequence[Kept],
        size: int,
        draws: torch.Generator,
        spans: Mapping[str, _Span],
    ) -> None:
        self.graph, self.norms, self.spans = graph, norms, spans
        self.noise = {
            one.name: torch.randn(size, *_sizes(one), generator=draws).requires_grad_() for one in graph.inputs
        }
        self.sums = [torch.zeros(2, len(mean)) for _, mean, _ in norms]

    def inputs(self) -> dict[str, Tensor]:
        """What the network reads."""
        return {name: self.spans[name].filled(_waves(value)) for name, value in self.noise.items()}

    def measured(self) -> list[Tensor]:
        """The sums of this batch, with gradients."""
        found: dict[int, Tensor] = {}

        def record(name: str, value: Tensor) -> None:
            for i, (read, mean, _) in enumerate(self.norms):
                if read == name:
                    away = value.movedim(1, 0).flatten(1) - mean[:, None]
                    found[i] = torch.stack([away.mean(1), away.square().mean(1)])

        self.graph.run(self.inputs(), record)
        return [found[i] for i in range(len(self.norms))]

    def apart(self, sums: Sequence[Tensor], others: Sequence[_Batch] = ()) -> list[Tensor]:
        """How far the statistics of this batch and of others are from those that were kept, by tensor."""
        together = [torch.stack(each).mean(0) for each in zip(sums, *(other.sums for other in others), strict=True)]
        return [_apart(each, variance) for each, (_, _, variance) in zip(together, self.norms, strict=True)]


def _scale(one: _Batch, spans: Mapping[str, _Span]) -> None:
    """Choose the mean and the deviation of every input, which the search would be long to find."""
    for span in spans.values():
        found = []
        for exponent in EXPONENTS:
            for span.mean in MEANS:
                span.deviation = 2.0**exponent
                with torch.no_grad():
                    far = sum(float(v.log1p()) for v in one.apart(one.measured()))
                found.append((far if math.isfinite(far) else math.inf, span.mean, span.deviation))
        _, span.mean, span.deviation = min(found)


def _search(made: Sequence[_Batch], tell: Progress) -> None:
    """Move all inputs, a batch at a time, until their statistics are those that were kept."""
    optimizer = torch.optim.Adam([v for one in made for v in one.noise.values()], RATE)
    with torch.no_grad():
        for one in made:
            one.sums = one.measured()
    for i in range(ITERATIONS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * i / ITERATIONS))
        for k, one in enumerate(made):
            sums = one.measured()
            optimizer.zero_grad()  # so that other batches keep still
            torch.stack(one.apart(sums, [other for other in made if other is not one])).sum().backward()
            optimizer.step()
            one.sums = [v.detach() for v in sums]
            tell(Step("making calibration data", i * len(made) + k + 1, ITERATIONS * len(made)))


def _waves(noise: Tensor) -> Tensor:
    """Noise of deviation 1 with like power in every octave of frequencies, along all axes but the first; a vector of
    features has no frequencies.
    """
    if noise.ndim < 3:
        return noise
    axes, sizes = tuple(range(1, noise.ndim)), noise.shape[1:]
    length = torch.stack(torch.meshgrid(*map(torch.fft.fftfreq, sizes), indexing="ij")).square().sum(0).sqrt()
    length.view(-1)[0] = 1 / max(sizes)  # the mean is the longest wave
    power = length ** -sum(size > 1 for size in sizes)
    return torch.fft.ifftn(torch.fft.fftn(noise, dim=axes) * (power / power.mean()).sqrt(), dim=axes).real


def _sizes(one: Input) -> list[int]:
    return [d for d in one.shape[1:] if d is not None]


def _apart(sums: Tensor, variance: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of what is there from what BatchNormalization kept, as normal distributions,
    the mean of all channels: log(s / s') - (1 - (s'^2 + (m' - m)^2) / s^2) / 2, m' and s' being kept.

    sums: for every channel the mean of m - m', and of its square.
    """
    away, square = sums
    # A difference of squares, which float32 can leave below 0.
    here, there = (square - away.square()).clamp_min(0) + SMALL, variance + SMALL
    return (0.5 * (here / there).log() - 0.5 * (1 - (there + away.square()) / here)).mean()
