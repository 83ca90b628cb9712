"""One measurement of sensitivities: passes over the calibration data, kept in a file so that an interrupted run can
be continued.

Layers are rounded as `quantize` rounds them to nearest: weights per output channel, activations on the grid of the
least squared error. By the Hessian they are rounded one at a time: see `shifts.py`. By its trace, the loss grows by
about v^T H v / 2 when v is added to weights or activations. With H's average curvature Tr(H) / n
instead of H, and v the rounding error Q(x) - x, a layer's sensitivity is Tr(H) / n ||Q(x) - x||^2, for its weights
and its input each, added. v^T H v has the mean Tr(H) over random signs v; a sample is one batch of images with a
pair of them. Every layer's weights and every layer's input are probed on their own: products with all signs at once
have the right means too, but the cross terms between layers make the standard deviation 9 to 100 times as large
(weights of ResNet-18; ResNet-50's inputs are no better), which the products that are saved do not make up for.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.files import check_output, load_npz, save_npz
from hawq_tvm.quantize.network.data import Batch, Calibration
from hawq_tvm.quantize.network.float_graph import FloatGraph
from hawq_tvm.quantize.ptq.observers import Grid, Histogram, fitted
from hawq_tvm.quantize.ptq.weights import nearest

from .gradients import Gradients
from .loss import DISTANCE, Loss
from .sensitivity import SIDES, Judge, Progress, Sensitivities, Settings, Step
from .shifts import Shifts
from .sizes import Sizes, sizes_of
from .table import widths
from .traces import PAIR, added, estimated, spread

Array = np.ndarray[Any, Any]
# Fewest batches and images before what they leave open is believed.
FEWEST, LEAST_IMAGES = 4, 32
# What batches give is added up in so many parts, and kept every so many seconds.
PAIRED, PARTS, SAVED = ("pair_sums", "shift_squares", "output_square", "pair_images"), 32, 10
# Fewest samples before a standard error is believed.
SAMPLES = 16
# Images at a time, where the model leaves that open: as many as have that many elements in what layers read, at least
# and at most.
ELEMENTS, BATCHES = 2**22, (4, 32)


def measure(
    graph: FloatGraph,
    data: Calibration,
    settings: Settings,
    state: Path | None = None,
    progress: Progress | None = None,
    judge: Judge | None = None,
    sizes: Sizes | None = None,
) -> Sensitivities:
    """Measure every layer on calibration data.

    state: an .npz file that holds what has been measured; an interrupted run is continued by the next, to the same
    result.  judge: says which layers' errors a choice of bits hangs on; without one, all errors have to be below
    settings.tolerance.  sizes: of the layers, where they are known.
    Raises ModelError when gradients are asked for and the network is no classifier, InputError for labels that it does
    not have, UsageError when state is of another run.
    """
    return _Measurement(graph, data, settings, state, progress or (lambda step: None), judge, sizes).run()


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
        sizes: Sizes | None,
    ) -> None:
        self.graph, self.data, self.settings, self.state, self.progress = graph, data, settings, state, progress
        self.judge, self.layer_sizes = judge, sizes or sizes_of(graph, data)
        fixed = graph.batch
        if fixed and settings.batch not in (None, fixed):
            raise UsageError(
                "the model fixes its batch", where="--batch", expected=str(fixed), found=str(settings.batch)
            )
        self.loss = Loss(graph, data, settings.classes)
        if "fisher" in settings.metrics and not self.loss.answers.classes:
            raise UsageError(
                "needs answers that are classes: the squared change of others has no slope to measure by",
                where="--metric fisher",
                found=f"{graph.outputs[0]}, taken for numbers",
                remedy="take --metric hessian, or say --classes if they are scores",
            )
        self.gradients = Gradients(graph, self.loss)
        if not fixed and settings.batch and settings.batch > data.count:
            raise UsageError(
                "is more images than there are", where=f"--batch {settings.batch}", expected=f"at most {data.count}"
            )
        fitting = ELEMENTS // max(1, int(self.layer_sizes.activations.sum()))
        fitting = min(max(BATCHES[0], min(fitting, BATCHES[1])), data.count)
        self.fixed, self.size = fixed is not None, fixed or settings.batch or fitting
        whole, rest = divmod(data.count, self.size)
        self.sizes = [self.size] * whole + ([rest] if rest and not self.fixed else [])
        # Layers are rounded on smaller batches where there are few images: one says nothing of others.
        own = max(1, min(self.size, data.count // (2 * FEWEST)))
        self.rounded_size = self.size if self.fixed or settings.batch else own
        self.arrays: dict[str, Array] = {}
        self.key = self._key()

    def _key(self) -> str:
        s, digest = self.settings, hashlib.sha256()
        told = (
            5,
            self.loss.answers,
            s.seed,
            self.size,
            self.rounded_size,
            s.choices,
            self.data.fingerprint,
            self.graph.told(),
        )
        digest.update(repr(told).encode())
        for name, value in sorted(self.graph.parameters.items()):
            if isinstance(value, torch.Tensor):
                digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def run(self) -> Sensitivities:
        self._load()
        start = time.monotonic()
        images = sum(self.sizes)
        if "grids" not in self.arrays:
            self._rounding()
        result = Sensitivities(
            self.graph,
            self.settings,
            self.layer_sizes,
            self._told(),
            self.loss.answers,
            images,
            self.size,
            arrays=dict(self.arrays),
        )
        squares = np.square(self.arrays["output_units"])
        self.loss.weigh(dict(zip(self.graph.outputs, map(float, squares), strict=True)))
        metrics = set(self.settings.metrics)
        if "trace" in metrics:
            self._hutchinson(result)
        if "fisher" in metrics and "weight_fisher" not in self.arrays:
            self._fisher()
        if metrics & {"hessian", "output"}:
            self._shift(result)
        samples = [f"{side}_samples" for side in SIDES]
        result.arrays = {k: v for k, v in (self.arrays | result.arrays).items() if k not in samples}
        result.seconds = time.monotonic() - start
        return result

    def _told(self) -> str:
        """What is minimized, or the loss whose derivatives tell it."""
        first, classes = self.settings.metrics[0], self.loss.answers.classes
        if first == "output":
            return f"squared change of {self.graph.outputs[0]}, as a share of its squares"
        return DISTANCE if first == "hessian" and classes else self.loss.text

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
        """The grids of what layers read, and the errors that rounding makes: two passes over the data."""
        layers, choices = self.graph.layers, [widths(c) for c in self.settings.choices]
        ranges, read = dict[str, tuple[float, float]](), {one.input for one in layers}

        def see(name: str, value: Any) -> None:
            if name in read:
                low, high = float(value.min()), float(value.max())
                old = ranges.get(name, (low, high))
                ranges[name] = min(low, old[0]), max(high, old[1])

        def fill(name: str, value: Any) -> None:
            if name in read:
                seen[name].add(value.numpy())

        powers: Array = np.zeros(len(self.graph.outputs))
        with torch.no_grad():
            for record, phase in ((see, "ranges"), (fill, "histograms")):
                seen = {name: Histogram(*ends) for name, ends in ranges.items()}
                for done, batch in enumerate(self._batches(), 1):
                    outputs = self.graph.run(batch.inputs, record)
                    if phase == "ranges":
                        means = [float(outputs[n].double().square().mean()) for n in self.graph.outputs]
                        powers = powers + np.array(means) * batch.size
                    self.progress(Step(phase, done, len(self.sizes)))
        fitted_once = {
            (name, bits): fitted(seen[name], bits, seen[name].low >= 0) for name in read for _, bits in choices
        }
        grids = [[fitted_once[one.input, bits] for _, bits in choices] for one in layers]
        squares = [[_error(seen[one.input], grid) for grid in row] for one, row in zip(layers, grids, strict=True)]
        self.arrays |= {
            "grids": np.array([[(g.scale, g.zero, g.low, g.high) for g in row] for row in grids]),
            "weight_square": np.array(
                [
                    [float((w - self.graph.parameters[one.weight]).double().square().sum()) for w in row]
                    for one, row in zip(layers, self._rounded_weights(), strict=True)
                ]
            ),
            "activation_square": np.array(squares) / sum(self.sizes),
            "output_units": np.sqrt(powers / sum(self.sizes)),
        }
        self._save()

    def _rounded_weights(self) -> Iterator[list[torch.Tensor]]:
        """Of every layer, by choice."""
        for one in self.graph.layers:
            weight = self.graph.parameters[one.weight]
            by_bits = {
                bits: nearest(weight, None, one, bits, bits < 8, 1.0).weight
                for bits in {widths(c)[0] for c in self.settings.choices}
            }
            yield [by_bits[widths(c)[0]] for c in self.settings.choices]

    # -- the Hessian
    # ------------------------------------------------------------------------------------------------------

    def _shift(self, result: Sensitivities) -> None:
        """Round every layer in every choice, alone, on some batches, then on twice as many until the errors do no harm
        or all images were seen; where the output itself is asked for, on all of them.
        """
        count, of = self.data.count, sum(self.sizes)
        size = self.rounded_size
        choices = [widths(c) for c in self.settings.choices]
        weights = [dict(zip([w for w, _ in choices], row, strict=True)) for row in self._rounded_weights()]
        grids = [
            {a: Grid(float(g[0]), *map(int, g[1:])) for (_, a), g in zip(choices, row, strict=True)}
            for row in self.arrays["grids"]
        ]
        shifts = Shifts(self.graph, self.loss, choices, weights, grids)
        # Told by sizes alone: a run that is continued, or made again, stops where the first one did.
        wanted, done = max(FEWEST, -(-min(LEAST_IMAGES, count) // size)), int(self.arrays.get("pair_batches", 0))
        while wanted < done:
            wanted *= 2
        start, seen, saved = time.monotonic(), done * size, time.monotonic()
        worst: float | None = None
        settled: bool | None = None
        try:
            for number, batch in enumerate(self.data.batches(size, self.fixed), 1):
                if number > done:
                    self._add(number - 1, dict(zip(PAIRED, (*shifts.of(batch), batch.size), strict=True)))
                    if time.monotonic() - saved > SAVED:
                        self._save()
                        saved = time.monotonic()
                elif number < done:
                    continue
                result.arrays = result.arrays | self.arrays
                left = (time.monotonic() - start) / max(1, result.seen - seen) * (of - result.seen)
                worst = float(result.relative_errors("hessian").max())
                self.progress(Step("Hessian", result.seen, of, worst if number > 1 else None, left))
                settled = None
                if number == wanted and "output" not in self.settings.metrics:
                    settled, wanted = self._settled(result), 2 * wanted
                    if settled:
                        break
        finally:
            self._save()
        if self.settings.metrics[0] == "hessian":
            result.worst, result.converged = worst, self._settled(result) if settled is None else settled

    def _add(self, number: int, found: dict[str, Any]) -> None:
        """Add what a batch gave to its part: the first PARTS batches have one each, and those after them take turns."""
        for name, value in found.items():
            held, one = self.arrays.get(name), np.asarray(value)[None]
            if held is None or len(held) < PARTS:
                self.arrays[name] = one if held is None else np.concatenate([held, one])
            else:
                part = np.arange(PARTS) == number % PARTS
                self.arrays[name] = held + part.reshape(-1, *[1] * (held.ndim - 1)) * one
        self.arrays["pair_batches"] = np.array(number + 1)

    def _settled(self, result: Sensitivities) -> bool:
        """Whether the errors that images leave do no harm to what is minimized."""
        if self.judge is None or self.settings.metrics[0] != "hessian":
            return bool((result.relative_errors("hessian") <= self.settings.tolerance).all())
        if len(result.arrays["pair_images"]) < 2:
            return False  # one batch says nothing of other images
        result.verdict = self.judge(result)
        return result.verdict.stable

    # -- its trace
    # --------------------------------------------------------------------------------------------------------

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
        if self.settings.metrics[0] == "trace":
            result.converged = not len(wanted)
            result.worst = float(result.relative_errors("trace").max())

    def _unsettled(self, result: Sensitivities) -> Array:
        """The numbers of the layers that have to be sampled further."""
        if self.judge is None or self.settings.metrics[0] != "trace":
            return np.flatnonzero(result.relative_errors("trace") > self.settings.tolerance)
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
                    values = self.gradients.probed(batch, lacking, number, self.settings.seed)
                    for side, ours in zip(SIDES, values, strict=True):
                        self.arrays[f"{side}_samples"][number : number + PAIR, lacking] = ours
                    self._save()
                counts[now] += PAIR
                number += PAIR
                left = (time.monotonic() - start) / (counts.sum() - began) * (most * of - counts.sum())
                self._estimate(result)
                worst = float(result.relative_errors("trace").max())
                self.progress(Step("traces", int(counts.sum() // of), most, worst, left))
                if not (counts[wanted] < until).any():
                    break

    def _estimate(self, result: Sensitivities) -> None:
        for side in SIDES:
            samples = self.arrays[f"{side}_samples"]
            result.arrays[f"{side}_trace"], result.arrays[f"{side}_error"] = estimated(samples, result.counts)
            result.arrays[f"{side}_spread"] = spread(samples, result.counts, self.data.count // self.size or 1)

    # -- for comparison
    # ---------------------------------------------------------------------------------------------------

    def _fisher(self) -> None:
        """The mean squared norm of every image's gradient, by weights and by activations."""
        totals: Array = np.zeros((2, len(self.graph.layers)))
        size = self.size if self.fixed else 1
        for done, batch in enumerate(self.data.batches(size, self.fixed), 1):
            totals = totals + self.gradients.squares(batch)
            self.progress(Step("Fisher", done, -(-self.data.count // size)))
        self.arrays["weight_fisher"], self.arrays["activation_fisher"] = totals / sum(self.sizes)
        self._save()


def _error(seen: Histogram, grid: Grid) -> float:
    """The squared error of what was seen on a grid, to the width of a bin."""
    return float(np.square(grid.rounded(seen.centers) - seen.centers) @ seen.counts)
