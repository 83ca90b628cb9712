"""One measurement of sensitivities: passes over the calibration data, kept in a file so that an interrupted run can
be continued.

The loss grows by about v^T H v / 2 when v is added to weights or activations. With H's average curvature Tr(H) / n
instead of H, and v the rounding error Q(x) - x, a layer's sensitivity is Tr(H) / n ||Q(x) - x||^2, for its weights
and its input each, added. v^T H v has the mean Tr(H) over random signs v; a sample is one batch of images with a
pair of them. Every layer's weights and every layer's input are probed on their own: products with all signs at once
have the right means too, but the cross terms between layers make the standard deviation 9 to 100 times as large
(weights of ResNet-18; ResNet-50's inputs are no better), which the products that are saved do not make up for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.core.files import check_output, load_npz, save_npz
from hawq_tvm.quantize.network.data import Batch, Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .loss import Loss
from .sensitivity import SIDES, Judge, Progress, Sensitivities, Settings, Step
from .table import widths
from .traces import PAIR, added, estimated, spread

Array = np.ndarray[Any, Any]
# Fewest samples before a standard error is believed.
SAMPLES = 16
# Images at a time, where the model leaves that open: as many as have that many elements in what layers read, at least
# and at most.
ELEMENTS, BATCHES = 2**22, (4, 32)


def rounded_weight(weight: torch.Tensor, axis: int, bits: int) -> torch.Tensor:
    """Weights rounded per channel of `axis`: symmetric, the scale from the largest magnitude, codes -2^(b-1) to
    2^(b-1) - 1.
    """
    top = 2 ** (bits - 1) - 1
    others = [d for d in range(weight.ndim) if d != axis]
    scale = weight.abs().amax(others, keepdim=True).clamp_min(1e-30) / top
    return (weight / scale).round().clamp(-top - 1, top) * scale


def rounded_activation(value: torch.Tensor, low: float, high: float, bits: int) -> torch.Tensor:
    """Activations rounded per tensor over [low, high], widened to hold 0, with an integer zero point: unsigned where
    low is not negative.
    """
    low, high, top = min(low, 0.0), max(high, 0.0), 2**bits - 1
    scale = max((high - low) / top, 1e-30)
    zero = round(-low / scale)
    return ((value / scale).round() + zero).clamp(0, top).sub(zero) * scale


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))


def measure(
    graph: FloatGraph,
    data: Calibration,
    settings: Settings,
    state: Path | None = None,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> Sensitivities:
    """Measure every layer on calibration data.

    state: an .npz file that holds what has been measured; an interrupted run is continued by the next, to the same
    result.  judge: says which layers' errors a choice of bits hangs on; without one, all errors have to be below
    settings.tolerance.
    Raises ModelError when the network is no classifier, InputError for labels that it does not have, UsageError when
    state is of another run.
    """
    return _Measurement(graph, data, settings, state, progress or (lambda step: None), judge).run()


class _Measurement:
    """One run: its batches, its arrays, and the file they are kept in."""

    def __init__(
        self,
        graph: FloatGraph,
        data: Calibration,
        settings: Settings,
        state: Path | None,
        progress: Progress,
        judge: Judge | None,
    ) -> None:
        self.graph, self.data, self.settings, self.state, self.progress = graph, data, settings, state, progress
        self.judge = judge
        if not graph.layers:
            raise ModelError("has no layers with weights", where=graph.name, expected="convolutions or matrix products")
        fixed = graph.batch
        if fixed and settings.batch not in (None, fixed):
            raise UsageError(
                "the model fixes its batch", where="--batch", expected=str(fixed), found=str(settings.batch)
            )
        nodes = {n.name: n.inputs for n in graph.nodes}
        self.edges = {one.node: i for i, one in enumerate(graph.layers)}
        # The numbers of the operands that are a layer's input and its weight.
        self.operands = {
            one.node: (nodes[one.node].index(one.input), nodes[one.node].index(one.weight)) for one in graph.layers
        }
        self.loss = Loss(graph, data)
        if not fixed and settings.batch and settings.batch > data.count:
            raise UsageError(
                "is more images than there are", where=f"--batch {settings.batch}", expected=f"at most {data.count}"
            )
        self.fixed, self.size = fixed is not None, fixed or settings.batch or self._fitting()
        whole, rest = divmod(data.count, self.size)
        self.sizes = [self.size] * whole + ([rest] if rest and not self.fixed else [])
        self.arrays: dict[str, Array] = {}
        self.key = self._key()

    def _fitting(self) -> int:
        """Images at a time whose layers' inputs have about ELEMENTS elements."""
        elements = 0

        def count(node: str, operand: int, value: Any) -> None:
            nonlocal elements
            elements += value.numel() if node in self.edges and operand == self.operands[node][0] else 0

        with torch.no_grad():
            self.loss.scores(next(self.data.batches(1)), feed=count)
        return min(max(BATCHES[0], min(ELEMENTS // elements, BATCHES[1])), self.data.count)

    def _key(self) -> str:
        s, digest = self.settings, hashlib.sha256()
        told = (2, s.seed, self.size, s.choices, self.data.fingerprint, [one.name for one in self.graph.layers])
        digest.update(repr(told).encode())
        for name, value in sorted(self.graph.parameters.items()):
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def run(self) -> Sensitivities:
        self._load()
        start = time.monotonic()
        images = sum(self.sizes)
        if "activation_square" not in self.arrays:
            self._rounding()
        result = Sensitivities(self.graph, self.settings, self.loss.text, images, self.size, arrays=dict(self.arrays))
        if "hessian" in self.settings.metrics:
            self._hutchinson(result)
        if "fisher" in self.settings.metrics and "weight_fisher" not in self.arrays:
            self._fisher()
        if "output" in self.settings.metrics:
            self._output()
        samples = [f"{side}_samples" for side in SIDES]
        result.arrays = {k: v for k, v in (result.arrays | self.arrays).items() if k not in samples}
        result.seconds = time.monotonic() - start
        return result

    def _load(self) -> None:
        if self.state is None:
            return
        check_output(self.state)
        if not self.state.exists():
            return
        arrays = load_npz(str(self.state))
        if str(arrays.get("key", "")) != self.key:
            raise UsageError(
                "was measured with another model, other data or other settings",
                where=str(self.state),
                expected="a state of this very run",
                remedy="remove it, or name another with --state",
            )
        self.arrays = {k: v for k, v in arrays.items() if k != "key"}

    def _save(self) -> None:
        if self.state is not None:
            save_npz(self.state, {"key": np.array(self.key), **self.arrays})

    def _batches(self) -> Iterator[Batch]:
        return self.data.batches(self.size, self.fixed)

    def _rounding(self) -> None:
        """The sizes, ranges and rounding errors of weights and activations: two passes over the data."""
        layers, choices = self.graph.layers, [widths(c) for c in self.settings.choices]
        low, high = np.full(len(layers), np.inf), np.full(len(layers), -np.inf)
        counts, outputs = np.zeros(len(layers), np.int64), dict[str, int]()
        square = np.zeros((len(layers), len(choices)))
        names = {one.output for one in layers}

        def see(node: str, operand: int, value: Any) -> None:
            if node in self.edges and operand == self.operands[node][0]:
                i = self.edges[node]
                low[i], high[i] = min(low[i], float(value.min())), max(high[i], float(value.max()))
                counts[i] = value.numel() // len(value)

        def note(name: str, value: Any) -> None:
            if name in names:
                outputs[name] = value.numel() // len(value)

        def compare(node: str, operand: int, value: Any) -> None:
            if node in self.edges and operand == self.operands[node][0]:
                i = self.edges[node]
                for bits in {b for _, b in choices}:
                    error = float((rounded_activation(value, low[i], high[i], bits) - value).double().square().sum())
                    square[i, [k for k, (_, b) in enumerate(choices) if b == bits]] += error

        with torch.no_grad():
            for feed, record, phase in ((see, note, "ranges"), (compare, None, "rounding errors")):
                for done, batch in enumerate(self._batches(), 1):
                    self.loss.scores(batch, feed=feed, record=record)
                    self.progress(Step(phase, done, len(self.sizes)))
            weights = [self.graph.parameters[one.weight] for one in layers]
            by_weight = [
                [float((rounded_weight(w, one.channel_axis, b) - w).double().square().sum()) for b, _ in choices]
                for w, one in zip(weights, layers, strict=True)
            ]
        macs = [self.graph.products(one, outputs[one.output]) for one in layers]
        self.arrays |= {
            "weights": np.array([w.numel() for w in weights]),
            "activations": counts,
            "macs": np.array(macs),
            "low": low,
            "high": high,
            "weight_square": np.array(by_weight),
            "activation_square": square / sum(self.sizes),
        }
        self._save()

    def _variables(
        self, batch: Batch, chosen: Sequence[int] | Array
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """The losses of a batch, and the weights and inputs of the chosen layers as what they can be differentiated by.

        A tensor that two layers read counts for each on its own.
        """
        ours = [self.graph.layers[i] for i in chosen]
        weights = [self.graph.parameters[one.weight].detach().clone().requires_grad_() for one in ours]
        activations: list[Any] = [None] * len(weights)
        places = {one.node: i for i, one in enumerate(ours)}

        def feed(node: str, operand: int, value: Any) -> Any:
            i = places.get(node)
            if i is None or operand not in self.operands[node]:
                return None
            if operand == self.operands[node][1]:
                return weights[i]
            activations[i] = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            return activations[i]

        return self.loss.of(batch, feed=feed), weights, activations

    # -- the Hessian
    # ------------------------------------------------------------------------------------------------------

    def _hutchinson(self, result: Sensitivities) -> None:
        """Sample every layer a little, then twice as often those that are not settled, until none is left or the
        effort is spent: as many samples as `probes` of every layer would be.
        """
        layers = len(self.graph.layers)
        result.counts, wanted = np.zeros(layers, np.int64), np.arange(layers)
        while len(wanted):
            left = (self.settings.probes * layers - result.counts.sum()) // (PAIR * len(wanted)) * PAIR
            more = min(left, max(SAMPLES, result.counts[wanted].max()))
            if more < PAIR:
                break
            self._sample(result, wanted, int(more))
            wanted = self._unsettled(result)
        result.converged = not len(wanted)
        result.worst = float(result.relative_errors().max())

    def _unsettled(self, result: Sensitivities) -> Array:
        """The numbers of the layers that have to be sampled further."""
        if self.judge is None:
            return np.flatnonzero(result.relative_errors() > self.settings.tolerance)
        result.verdict = self.judge(result)
        return np.flatnonzero([one.name in result.verdict.undecided for one in self.graph.layers])

    def _sample(self, result: Sensitivities, wanted: Array, more: int) -> None:
        """Take so many more samples of the wanted layers, but for those that the state holds."""
        counts, start, began, most = result.counts, time.monotonic(), result.counts.sum(), self.settings.probes
        until, of = counts[wanted] + more, len(counts)
        number, whole = int(counts[wanted].min()), self.data.count // self.size or 1
        for name in (f"{side}_samples" for side in SIDES):
            self.arrays[name] = added(self.arrays.get(name, np.empty((0, of))), int(until.max()))
        while (counts[wanted] < until).any():
            # Without a last smaller batch: every sample has as many images.
            for batch in islice(self.data.batches(self.size, True), number // PAIR % whole, None):
                now = wanted[(counts[wanted] <= number) & (number < until)]
                lacking = now[np.isnan(self.arrays["weight_samples"][number, now])]
                if len(lacking):
                    values = self._probe(number, batch, lacking)
                    for side, ours in zip(SIDES, values, strict=True):
                        self.arrays[f"{side}_samples"][number : number + PAIR, lacking] = ours
                    self._save()
                counts[now] += PAIR
                number += PAIR
                left = (time.monotonic() - start) / (counts.sum() - began) * (most * of - counts.sum())
                self._estimate(result)
                worst = float(result.relative_errors().max())
                self.progress(Step("Hessian", int(counts.sum() // of), most, worst, left))
                if not (counts[wanted] < until).any():
                    break

    def _estimate(self, result: Sensitivities) -> None:
        for side in SIDES:
            samples = self.arrays[f"{side}_samples"]
            result.arrays[f"{side}_trace"], result.arrays[f"{side}_error"] = estimated(samples, result.counts)
            result.arrays[f"{side}_spread"] = spread(samples, result.counts, self.data.count // self.size or 1)

    def _probe(self, number: int, batch: Batch, chosen: Array) -> tuple[Array, Array]:
        """v^T H v of the chosen layers' weights, and of their inputs, for one batch and the PAIR of random signs from
        that number on [sign, layer].  A layer's signs are its own, whichever others are chosen.
        """
        losses, weights, activations = self._variables(batch, chosen)
        # Activations stand once per image: the mean loss's Hessian by them holds each image's, divided by the number of
        # images.
        variables = [*weights, *activations]
        gradients = torch.autograd.grad(losses.mean(), variables, create_graph=True)
        values = np.zeros((PAIR, len(SIDES), len(chosen)))
        for k in range(PAIR):
            for i, (variable, gradient) in enumerate(zip(variables, gradients, strict=True)):
                side, place = divmod(i, len(chosen))
                told = f"{self.settings.seed} {number + k} {side} {chosen[place]}".encode()
                random = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(told).digest()[:7], "big"))
                sign = torch.randint(0, 2, variable.shape, generator=random, dtype=variable.dtype).mul_(2).sub_(1)
                (product,) = torch.autograd.grad(gradient, variable, sign, retain_graph=True, materialize_grads=True)
                values[k, side, place] = _dot(sign, product)
        return values[:, 0], values[:, 1]

    # -- for comparison
    # ---------------------------------------------------------------------------------------------------

    def _fisher(self) -> None:
        """The mean squared norm of every image's gradient, by weights and by activations."""
        totals: Array = np.zeros((2, len(self.graph.layers)))
        size = self.size if self.fixed else 1
        for done, batch in enumerate(self.data.batches(size, self.fixed), 1):
            losses, weights, activations = self._variables(batch, range(len(self.graph.layers)))
            for i in range(batch.size):
                gradients = torch.autograd.grad(losses[i], [*weights, *activations], retain_graph=i + 1 < batch.size)
                squares = [float(g.square().sum(dtype=torch.float64)) for g in gradients]
                totals = totals + np.reshape(squares, (2, -1))
            self.progress(Step("Fisher", done, -(-self.data.count // size)))
        self.arrays["weight_fisher"], self.arrays["activation_fisher"] = totals / sum(self.sizes)
        self._save()

    def _output(self) -> None:
        """The network's output with one layer rounded at a time, against its output with none."""
        layers, choices = self.graph.layers, [widths(c) for c in self.settings.choices]
        if "output" not in self.arrays:
            self.arrays["output"] = np.full((len(layers), len(choices)), np.nan)
        with torch.no_grad():
            exact = [self.loss.scores(batch) for batch in self._batches()]
            total = sum(float(y.double().square().sum()) for y in exact)
            for i, layer in enumerate(layers):
                for k, (weight_bits, activation_bits) in enumerate(choices):
                    if np.isnan(self.arrays["output"][i, k]):
                        weight = rounded_weight(self.graph.parameters[layer.weight], layer.channel_axis, weight_bits)
                        feed = self._rounder(i, activation_bits, weight)
                        changed = sum(
                            float((self.loss.scores(b, feed=feed) - y).double().square().sum())
                            for b, y in zip(self._batches(), exact, strict=True)
                        )
                        self.arrays["output"][i, k] = changed / total if total else 0.0
                        self._save()
                    self.progress(Step("output", i * len(choices) + k + 1, len(layers) * len(choices)))

    def _rounder(self, i: int, bits: int, weight: torch.Tensor) -> Callable[[str, int, Any], Any]:
        node, low, high = self.graph.layers[i].node, float(self.arrays["low"][i]), float(self.arrays["high"][i])

        def feed(name: str, operand: int, value: Any) -> Any:
            if name != node:
                return None
            if operand == self.operands[node][1]:
                return weight
            return rounded_activation(value, low, high, bits) if operand == self.operands[node][0] else None

        return feed
