"""The float and the quantized network side by side, block by block: layers are fitted, what a block has of few bits is
learned, and scales and biases are corrected, where the quantized one has got to.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hawq_tvm.core.errors import ModelError
from hawq_tvm.quantize.allocate.sensitivity import Progress, Step
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer

from .blocks import Block, blocks_of
from .fitted import fit
from .kept import Kept
from .learned import Case, Learner
from .reads import matrices, rows
from .simulated import Grids, through
from .units import added_bias
from .weights import Rounded, with_room

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]
# An iteration looks at so many elements of layers' results, but at no more than so many images.
ELEMENTS, TOGETHER = 2**21, 32
BIASED = ("Conv", "ConvTranspose", "Gemm")
# A scale is corrected by no more than this factor.
APART = 2.0
# Every so many batches one judges what the others taught.
JUDGING = 8


@dataclass(frozen=True)
class Plan:
    """How to reconstruct: whether weights are fitted, iterations a block behind that, and the seed."""

    fits: bool
    iterations: int
    seed: int


class Reconstruction:
    """A network on its way.

    rounded, grids: changed block by block.  rows: what every block gained (JSON-ready): error_before, rounded to
    nearest, and error_after are squared distances of its outputs from the float network's, as shares of those
    outputs' squares, on the images that it was learned on, given what the quantized blocks before it make of them.
    """

    def __init__(
        self,
        graph: FloatGraph,
        batches: Sequence[Mapping[str, Any]],
        grids: Grids,
        rounded: Mapping[str, Rounded],
        plan: Plan,
        tell: Progress,
    ) -> None:
        self.graph, self.grids, self.rounded, self.plan, self.tell = graph, grids, dict(rounded), plan, tell
        self.rows: list[dict[str, Any]] = []
        self.blocks = blocks_of(graph)
        self.real: list[dict[str, Any]] = [{k: torch.as_tensor(v) for k, v in b.items()} for b in batches]
        self.integer = [{k: self._put(k, v) for k, v in b.items()} for b in self.real]
        self.images = [_size(b) for b in self.real]

    def run(self, kept: Kept | None = None) -> None:
        """Reconstruct all blocks in the order of computation.

        kept: the file where blocks that are done are kept, and begun from where there is one.
        """
        if kept is not None:
            self.rows, self.rounded, self.grids = kept.read(self.rounded, self.grids)
        done, begun = len(self.rows), time.perf_counter()
        for number, block in enumerate(self.blocks):
            with torch.no_grad():
                wanted = [through(block, self.graph, held) for held in self.real]
            if number >= done:
                self.rows.append(self._block(number, block, wanted))
                if kept is not None:
                    kept.save(self.rows, self.rounded, self.grids)
                left = (time.perf_counter() - begun) / (number + 1 - done) * (len(self.blocks) - number - 1)
                self.tell(Step("reconstructing blocks", number + 1, len(self.blocks), None, left))
            self._pass(number, wanted)

    def _put(self, name: str, value: Tensor) -> Tensor:
        return self.grids.on(value, self.grids.tensors[name]) if name in self.grids.tensors else value

    def _pass(self, number: int, wanted: Sequence[Tensors]) -> None:
        """Go on behind a block, and forget what no other reads."""
        with torch.no_grad():
            found = self._found(self.blocks[number], self.rounded, self.grids)
        read = {name for block in self.blocks[number + 1 :] for name in block.inputs}
        for values, more in (*zip(self.integer, found, strict=True), *zip(self.real, wanted, strict=True)):
            values.update(more)
            for name in values.keys() - read:
                del values[name]

    # -- one block
    # ---------------------------------------------------------------------------------------------------------

    def _block(self, number: int, block: Block, wanted: Sequence[Tensors]) -> dict[str, Any]:
        """Reconstruct a block; its row."""
        begun = time.perf_counter()
        moments, elements = defaultdict[str, list[Tensor]](list), 0
        free = dict[str, Tensor]()

        def seen(layer: Layer, value: Tensor, images: int) -> None:
            nonlocal elements
            elements += value.numel()
            moments[layer.name].append(_moments(value, layer, images))

        with torch.no_grad():
            for held, images in zip(self.real, self.images, strict=True):
                through(block, self.graph, held, record=partial(seen, images=images))
            before = self._error(block, self.rounded, self.grids, wanted)
            results = {name: torch.cat(each) for name, each in moments.items()}
            for layer in block.layers:
                if self._fits(layer):
                    weight, own = self.graph.parameters[layer.weight], self._read(block, layer, deployed=True)
                    other = self._read(block, layer, deployed=False)
                    ours, centred = self.rounded[layer.name], layer in _biased(block, [layer])
                    self.rounded[layer.name], free[layer.name] = fit(ours, weight, own, other, centred)
                self.rounded = self._corrected(block, [layer], results, self.rounded, self.grids)
        sizes = {name: math.sqrt(float(each[:, 1].mean())) for name, each in results.items()}
        learner = Learner(block, self.graph, self.rounded, self.grids, sizes, free)
        iterations = self.plan.iterations if learner.learns else 0
        if iterations:
            self._learn(number, block, wanted, results, learner, elements)
        for layer in block.layers:
            ours, weight = self.rounded[layer.name], self.graph.parameters[layer.weight]
            step = self.grids.read(layer).scale
            self.rounded[layer.name] = with_room(ours, weight, step, added_bias(self.graph, layer))
        with torch.no_grad():
            after = self._error(block, self.rounded, self.grids, wanted)
        return {
            "block": number + 1,
            "layers": [layer.name for layer in block.layers],
            "error_before": before,
            "error_after": after,
            "iterations": iterations,
            "seconds": round(time.perf_counter() - begun, 1),
        }

    def _fits(self, layer: Layer) -> bool:
        return self.plan.fits and matrices(self.graph.parameters[layer.weight], layer) is not None

    def _read(self, block: Block, layer: Layer, deployed: bool) -> Tensor:
        """Rows of what a layer reads, in the quantized network or in the float one: of one layer at a time, and put
        where they stay, as they are most of what is held.
        """
        weight, batches = self.graph.parameters[layer.weight], self.integer if deployed else self.real
        images = sum(map(_size, batches))
        weights, biases = _numbers(block, self.rounded) if deployed else (None, None)
        grids = self.grids if deployed else None
        found, done = torch.empty(0), 0
        for held in batches:
            (value,) = through(block, self.graph, held, weights, biases, grids, until=layer).values()
            made = rows(value, weight, layer, images)
            if not done:  # the first batch is the largest
                found = made.new_empty(made.shape[0], -(-made.shape[1] * images // _size(held)), *made.shape[2:])
            found[:, done : done + made.shape[1]] = made
            done += made.shape[1]
        return found[:, :done]

    def _learn(
        self,
        number: int,
        block: Block,
        wanted: Sequence[Tensors],
        results: Tensors,
        learner: Learner,
        elements: int,
    ) -> None:
        """Take what is learned where it is better, on batches that did not teach it, than what there is.

        Where an iteration sees few images, biases end where the last of them pulled, and roundings that are decided at
        the end move the results once more: scales and biases are corrected again where that is better.
        """
        cases = [
            Case({n: r[n] for n in block.inputs}, {n: q[n] for n in block.inputs}, w)
            for r, q, w in zip(self.real, self.integer, wanted, strict=True)
        ]
        every = min(JUDGING, len(cases))
        judges = cases[every - 1 :: every]
        taught = [case for i, case in enumerate(cases, 1) if i % every] or cases
        stacks = self._stacks(block, wanted)
        count = sum(case.size for case in taught) if stacks else len(taught)
        together = min(max(ELEMENTS * count * len(cases) // (max(elements, 1) * len(taught)), 1), TOGETHER, count)
        learner.run(taught, together, stacks, self.plan.iterations, self.plan.seed * 1_000_003 + number)
        made, grids = learner.decided()
        learned = {**self.rounded, **made}

        def error(one: tuple[Mapping[str, Rounded], Grids]) -> float:
            found = [through(block, self.graph, c.integer, *_numbers(block, one[0]), one[1]) for c in judges]
            return _apart(found, [c.wanted for c in judges])

        with torch.no_grad():
            tried = (
                (self.rounded, self.grids),
                (learned, grids),
                (self._corrected(block, block.layers, results, learned, grids), grids),
            )
            self.rounded, self.grids = min(tried, key=error)

    def _stacks(self, block: Block, wanted: Sequence[Tensors]) -> bool:
        """Whether a block computes two batches as one: the first dimension may be fixed, or be something else."""
        some = [held[name] for held in self.real[:2] for name in block.inputs]
        if len(wanted) == 1 or any(value.ndim == 0 for value in some):
            return False
        try:
            both = {n: torch.cat([held[n] for held in self.real[:2]]) for n in block.inputs}
            right = {n: torch.cat([held[n] for held in wanted[:2]]) for n in block.outputs}
            with torch.no_grad():
                found = through(block, self.graph, both)
        except (ModelError, RuntimeError):
            return False
        return all(v.shape == right[n].shape and torch.allclose(v, right[n], 1e-3, 1e-4) for n, v in found.items())

    def _found(self, block: Block, rounded: Mapping[str, Rounded], grids: Grids) -> list[dict[str, Tensor]]:
        """What a quantized block gives."""
        return [through(block, self.graph, held, *_numbers(block, rounded), grids) for held in self.integer]

    def _error(self, block: Block, rounded: Mapping[str, Rounded], grids: Grids, wanted: Sequence[Tensors]) -> float:
        """The squared distance of its outputs as a share of the wanted ones' squares."""
        return _apart(self._found(block, rounded, grids), wanted)

    def _corrected(
        self,
        block: Block,
        layers: Sequence[Layer],
        results: Tensors,
        rounded: Mapping[str, Rounded],
        grids: Grids,
    ) -> dict[str, Rounded]:
        """Every scale and bias such that results have the float network's mean and deviation in every channel, layer by
        layer (the means: Nagel et al., "Data-Free Quantization", 2019; the deviations: without them what is rounded
        away is missing in every result, and a deep network fades).
        """
        made = dict(rounded)
        for layer in _biased(block, layers):
            found: list[Tensor] = []

            def seen(one: Layer, value: Tensor, images: int, layer: Layer = layer, to: list[Tensor] = found) -> None:
                if one is layer:
                    to.append(_moments(value, layer, images))

            for held, count in zip(self.integer, self.images, strict=True):
                record = partial(seen, images=count)
                through(block, self.graph, held, *_numbers(block, made), grids, record=record)
            made[layer.name] = _moved(made[layer.name], results[layer.name], torch.cat(found))
        return made


def _size(held: Tensors) -> int:
    """The images of a batch."""
    return max((len(value) for value in held.values() if value.ndim), default=1)


def _biased(block: Block, layers: Sequence[Layer]) -> list[Layer]:
    """Those whose operators add a bias, which makes good what results lose of their mean."""
    kinds = {node.name: node.op for node in block.nodes}
    return [layer for layer in layers if kinds[layer.node] in BIASED]


def _moved(ours: Rounded, wanted: Tensor, found: Tensor) -> Rounded:
    """With the scales and biases that take the found moments of every output channel to the wanted ones, as far as
    images agree.
    """
    means = wanted[:, 0].mean(0), found[:, 0].mean(0)
    real, own = (v[:, 1] - 2 * v[:, 0] * m + m.square() for v, m in zip((wanted, found), means, strict=True))
    real, own = (v.reshape(len(v), ours.layer.repeats, -1).sum(1) for v in (real, own))
    power = own.mean(0)
    plain = torch.where((power > 0) & (real.mean(0) > 0), real.mean(0) / power, 1.0)
    near = (plain > 1 / APART**2) & (plain < APART**2) & (power > 0)  # others say nothing of these
    middle = plain[near].median() if near.any() else 1.0
    ratio = torch.where(near, middle + _agreed(torch.where(near, (real - middle * own) / power, 0.0)), plain)
    gain = ratio.clamp(1 / APART**2, APART**2).sqrt()
    scale = (ours.scale * gain).float()
    gain = (scale.double() / ours.scale.double()).repeat(ours.layer.repeats)
    bias = torch.zeros_like(gain) if ours.bias is None else ours.bias.double()
    sums = means[1] - bias
    lost = _agreed(wanted[:, 0] - gain * (found[:, 0] - bias) - (means[1] - gain * sums))
    return replace(ours, scale=scale, bias=(means[1] - gain * sums + lost).float())


def _agreed(samples: Tensor) -> Tensor:
    """The mean of samples (images, channels), drawn to 0 by what they tell of its noise (James and Stein, 1961); one
    image tells nothing, and is all there is.
    """
    mean = samples.mean(0)
    if len(samples) == 1:
        return mean
    noise = float(samples.var(0).sum()) / len(samples)
    return mean * max(1 - noise / max(float(mean.square().sum()), 1e-300), 0.0)


def _numbers(block: Block, rounded: Mapping[str, Rounded]) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    names = [layer.name for layer in block.layers]
    return {n: rounded[n].weight for n in names}, {n: rounded[n].bias for n in names}


def _apart(found: Sequence[Tensors], wanted: Sequence[Tensors]) -> float:
    """The squared distance of outputs as a share of the wanted ones' squares."""
    real = [n for n, v in wanted[0].items() if v.is_floating_point()]
    noise = sum(float((a[n] - b[n]).double().square().sum()) for a, b in zip(found, wanted, strict=True) for n in real)
    power = sum(float(b[n].double().square().sum()) for b in wanted for n in real)
    return noise / max(power, 1e-30)


def _moments(value: Tensor, layer: Layer, images: int) -> Tensor:
    """The mean of a layer's result and of its square by image and output channel, float64 (images, 2, channels)."""
    last = value.movedim(-1 if layer.kind == "matmul" else 1, -1)
    count = images if last.ndim > 1 and last.numel() and last.shape[0] % images == 0 else 1
    rows = last.reshape(count, -1, last.shape[-1]).double()
    return torch.stack([rows.mean(1), rows.square().mean(1)], 1)
