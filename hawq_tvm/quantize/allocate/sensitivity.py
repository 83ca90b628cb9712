"""How much each layer minds few bits: what is measured, and the allocation problem that it makes: by the Hessian in
the direction of the rounding errors, layers and pairs of them (`shifts.py`); by its average trace (HAWQ-V2, equation
2.11); by gradients; by the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.network.answers import Answers
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .sizes import Sizes, table_of
from .table import CHOICES, Table, checked_choices
from .traces import PAIR

if TYPE_CHECKING:
    from .stability import Verdict

Array = np.ndarray[Any, Any]
METRICS = ("hessian", "trace", "fisher", "output")
# Of a layer, and what numbers its values.
SIDES = {"weight": "weights", "activation": "activations"}


@dataclass(frozen=True)
class Settings:
    """What is measured: by metrics, on images of the data until their errors do no harm (hessian) or with random signs
    from seed until then or until the effort is spent (trace).

    A probe is a batch of images with random signs for a layer; each batch gets two.  probes: the effort, as if all
    layers had so many: every layer gets some, the rest goes where it is needed.  tolerance: of every standard error (a
    part of 1), where no budgets say what the errors have to be good for.  batch: images at a time,
    None for the model's own batch, or 4 to 32 where it leaves that open, by the size of what layers read.  classes:
    whether the first output holds scores of classes, None for what it looks like (`answers.py`).
    """

    metrics: tuple[str, ...] = ("hessian",)
    probes: int = 128
    tolerance: float = 0.1
    seed: int = 0
    batch: int | None = None
    choices: tuple[str, ...] = CHOICES
    classes: bool | None = None

    def __post_init__(self) -> None:
        unknown = [m for m in self.metrics if m not in METRICS]
        if unknown or not self.metrics:
            raise UsageError(
                "is no metric", where="--metric", expected=", ".join(METRICS), found=", ".join(unknown) or "none"
            )
        object.__setattr__(self, "choices", checked_choices(self.choices))
        if self.probes < 2:
            raise UsageError(
                "at least 2 probes are needed for a standard error", where="--probes", found=str(self.probes)
            )
        if not 0 < self.tolerance < math.inf:
            raise UsageError("must be a positive number", where="--tolerance", found=str(self.tolerance))
        if self.seed < 0 or (self.batch is not None and self.batch < 1):
            raise UsageError("seed and batch must not be negative", found=f"seed {self.seed}, batch {self.batch}")


@dataclass(frozen=True)
class Step:
    """Where a measurement is: `done` of `of` steps of a phase; worst: the largest relative standard error so far;
    seconds_left for the phase at most.
    """

    phase: str
    done: int
    of: int
    worst: float | None = None
    seconds_left: float | None = None


Progress = Callable[[Step], None]
# What says how the bits that are chosen by sensitivities fare within their errors.
Judge = Callable[["Sensitivities"], "Verdict"]


@dataclass
class Sensitivities:
    """What was measured, one entry per layer in each array.

    weight_square, activation_square [layer, choice]: squared norm of the rounding error (activations: mean over
    images).  pair_sums [part, layer and choice, layer and choice], shift_squares [part, layer and choice],
    output_square, pair_images [part]: of `shifts.py`, by parts of the batches; pair_batches: how many.  *_trace: the
    trace of the Hessian of the mean loss.  *_error: its standard error, as far as it comes from the signs; *_spread:
    the same from the images.  *_fisher: mean squared norm of the gradient.
    counts: the probes of every layer.  Of the first metric, converged: whether images or probes sufficed; worst: the
    largest standard error left, relative; verdict: whether the bits that they were measured for stand.
    """

    graph: FloatGraph
    settings: Settings
    sizes: Sizes
    loss: str
    answers: Answers
    images: int
    batch: int
    counts: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    converged: bool = False
    worst: float | None = None
    seconds: float = 0.0
    arrays: dict[str, Array] = field(default_factory=dict)
    verdict: Verdict | None = None

    @property
    def probes(self) -> int:
        """How many were used, as if all layers had as many."""
        return -(-int(self.counts.sum()) // max(1, len(self.counts)))

    @property
    def seen(self) -> int:
        """The images that layers were rounded on."""
        return int(self.arrays["pair_images"].sum()) if "pair_images" in self.arrays else 0

    def values(self, metric: str) -> Array:
        """The sensitivity of every layer in every choice [layer, choice]; a negative trace, which says nothing about
        rounding, counts as 0.
        """
        if metric == "hessian":
            return self._alone(self._pairs())
        if metric == "output":
            moved, whole = self.arrays["shift_squares"].sum(0), self.arrays["output_square"].sum()
            return self._shaped(moved / whole if whole else 0 * moved)
        return self._of({side: self.arrays[f"{side}_{metric}"] for side in SIDES})

    def pairs(self, metric: str) -> Array | None:
        """What pairs of layers and choices cost, as `Table` has it; None where a metric knows layers alone."""
        return self._pairs() if metric == "hessian" else None

    def _pairs(self, weights: Array | None = None) -> Array:
        """The mean over images; weights: how often every part counts."""
        images = self.arrays["pair_images"]
        times = np.ones(len(images)) if weights is None else weights
        pairs: Array = np.tensordot(times, self.arrays["pair_sums"], 1) / (times @ images)
        return pairs

    def _shaped(self, flat: Array) -> Array:
        return flat.reshape(len(self.graph.layers), len(self.settings.choices))

    def _alone(self, pairs: Array) -> Array:
        return self._shaped(np.diag(pairs).copy())

    def _of(self, curvatures: Mapping[str, Array]) -> Array:
        """The sensitivities by traces of weights and of inputs [layer, choice]."""
        parts = (np.maximum(curvatures[s], 0)[:, None] * self._factors(s) for s in SIDES)
        return np.sum([*parts], axis=0)

    def _factors(self, side: str) -> Array:
        """What a trace is multiplied by [layer, choice]: the mean squared rounding error."""
        counted: Array = getattr(self.sizes, SIDES[side])
        return self.arrays[f"{side}_square"] / counted[:, None]

    def drawn(self, rng: np.random.Generator) -> tuple[Array, Array | None]:
        """Sensitivities and pairs that the errors of the first metric leave possible.

        By the Hessian: of parts drawn with replacement, as many as there are.  By traces: normal ones.  Images that
        were not probed yet add the spread of those that were; after one batch that is as great as the trace.
        """
        if self.settings.metrics[0] == "hessian":
            batches = len(self.arrays["pair_images"])
            pairs = self._pairs(rng.multinomial(batches, np.full(batches, 1 / batches)).astype(np.float64))
            return self._alone(pairs), pairs
        rest = 1 - np.minimum(1, self.counts // PAIR / (self.images // self.batch))
        traces = {}
        for side in SIDES:
            trace, error, spread = (self.arrays[f"{side}_{kind}"] for kind in ("trace", "error", "spread"))
            # Batches differ by their images and by their signs, whose part is the error.
            images = np.sqrt(np.maximum(np.square(spread) - np.square(error), 0))
            images = np.where(np.isfinite(spread), images, np.abs(trace))
            traces[side] = rng.normal(trace, np.hypot(error, np.sqrt(rest) * images))
        return self._of(traces), None

    def relative_errors(self, metric: str) -> Array:
        """The standard error of every layer's sensitivity in the narrowest choice, relative to that sensitivity, or to
        a tenth of the mean one if that is larger; from images (hessian), or from signs (trace).
        """
        value = self.values(metric)[:, -1]
        if metric == "hessian":
            error = self.image_errors()[:, -1]
        else:
            error = np.hypot(*(self.arrays[f"{s}_error"] * self._factors(s)[:, -1] for s in SIDES))
        return error / np.maximum(np.maximum(value, 0.1 * value.mean()), 1e-300)

    def image_errors(self) -> Array:
        """The standard errors of sensitivities by the Hessian over other images of the kind [layer, choice], infinite
        after a single batch.
        """
        images, sums = self.arrays["pair_images"], np.diagonal(self.arrays["pair_sums"], axis1=1, axis2=2)
        number = len(images)
        if number < 2:
            return self._shaped(np.full(sums.shape[1], np.inf))
        off = sums - images[:, None] * (sums.sum(0) / images.sum())
        return self._shaped(np.sqrt(np.square(off).sum(0) * number / (number - 1)) / images.sum())

    def table(
        self,
        metric: str,
        *,
        ties: Mapping[str, str] | None = None,
        fixed: Mapping[str, str] | None = None,
        drawn: tuple[Array, Array | None] | None = None,
    ) -> Table:
        """The allocation problem; ties, fixed: by layer.  drawn: sensitivities and pairs to take instead of the
        metric's, without the others beside them.
        """
        values, pairs = drawn or (self.values(metric), self.pairs(metric))
        choices = self.settings.choices
        others = {m: self.values(m) for m in self.settings.metrics if m != metric and drawn is None}
        facts = []
        for i in range(len(self.graph.layers)):
            shown = {k: float(self.arrays[k][i]) for k in self._shown()}
            fact: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in shown.items()}
            fact |= {"probes": int(self.counts[i])} if len(self.counts) else {}
            fact |= {m: dict(zip(choices, map(float, v[i]), strict=True)) for m, v in others.items()}
            facts.append(fact)
        return table_of(self.graph, self.sizes, choices, values, pairs, ties=ties, fixed=fixed, facts=facts)

    def _shown(self) -> list[str]:
        return [
            f"{side}_{kind}"
            for kind in ("trace", "error", "spread", "fisher")
            for side in SIDES
            if f"{side}_{kind}" in self.arrays
        ]

    def provenance(self) -> dict[str, Any]:
        """JSON-ready facts about how it was measured."""
        s = self.settings
        fields: dict[str, Any] = {
            "metrics": list(s.metrics),
            "loss": self.loss,
            "answers": self.answers.kind,
            "answers_by": self.answers.by,
            "images": self.images,
            "batch": self.batch,
            "seed": s.seed,
            "seconds": round(self.seconds, 1),
        }
        measured = {"converged": self.converged, "worst_error": self.worst, "tolerance": s.tolerance}
        if self.seen:
            fields |= {"rounded_images": self.seen}
        if "trace" in s.metrics:
            fields |= {
                "probes": self.probes,
                "most_probes": int(self.counts.max()),
                "probed_images": min(int(self.counts.max()) // PAIR, self.images // self.batch) * self.batch,
                "negative_traces": int((self.arrays["weight_trace"] < 0).sum()),
            }
        if s.metrics[0] in ("hessian", "trace"):
            fields |= measured | ({"decision": self.verdict.to_dict()} if self.verdict else {})
        if isinstance(self.worst, float) and not math.isfinite(self.worst):
            fields["worst_error"] = None
        return fields
