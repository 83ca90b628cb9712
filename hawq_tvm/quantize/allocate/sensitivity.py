"""How much each layer minds few bits: what is measured, and the allocation problem that it makes (the sensitivity of
HAWQ-V2, equation 2.11).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .table import CHOICES, Row, Table, checked_choices
from .traces import PAIR

if TYPE_CHECKING:
    from .stability import Verdict

Array = np.ndarray[Any, Any]
METRICS = ("hessian", "fisher", "output")
# Of a layer, and what numbers its values.
SIDES = {"weight": "weights", "activation": "activations"}


@dataclass(frozen=True)
class Settings:
    """What is measured: by metrics, with random signs from seed, until the errors do no harm or the effort is spent.

    A probe is a batch of images with random signs for a layer; each batch gets two.  probes: the effort, as if all
    layers had so many: every layer gets some, the rest goes where it is needed.  tolerance: of every standard error (a
    part of 1), where no budgets say what the errors have to be good for.  batch: images at a time,
    None for the model's own batch, or 4 to 32 where it leaves that open, by the size of what layers read.
    """

    metrics: tuple[str, ...] = ("hessian",)
    probes: int = 128
    tolerance: float = 0.1
    seed: int = 0
    batch: int | None = None
    choices: tuple[str, ...] = CHOICES

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

    weights, activations: numbers of values (of activations for one image).  macs: for one image.  *_trace: the trace
    of the Hessian of the mean loss.  *_error: its standard error, as far as it comes from the signs; *_spread: the
    same from the images.  weight_square, activation_square [layer, choice]: squared norm of the rounding error
    (activations: mean over images).  *_fisher: mean squared norm of the gradient.  output [layer, choice]: squared
    change of the network's output when only this layer is rounded, relative to its square.
    counts: the probes of every layer.  converged: whether they sufficed.  worst: the largest standard error left,
    relative.  verdict: whether the bits that they were measured for stand.
    """

    graph: FloatGraph
    settings: Settings
    loss: str
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

    def values(self, metric: str) -> Array:
        """The sensitivity of every layer in every choice [layer, choice]; a negative trace, which says nothing about
        rounding, counts as 0.
        """
        if metric == "output":
            return self.arrays["output"]
        kind = "trace" if metric == "hessian" else "fisher"
        return self._of({side: self.arrays[f"{side}_{kind}"] for side in SIDES})

    def _of(self, curvatures: Mapping[str, Array]) -> Array:
        """The sensitivities by traces of weights and of inputs [layer, choice]."""
        parts = (np.maximum(curvatures[s], 0)[:, None] * self._factors(s) for s in SIDES)
        return np.sum([*parts], axis=0)

    def _factors(self, side: str) -> Array:
        """What a trace is multiplied by [layer, choice]: the mean squared rounding error."""
        return self.arrays[f"{side}_square"] / self.arrays[SIDES[side]][:, None]

    def drawn(self, rng: np.random.Generator) -> Array:
        """Sensitivities by the Hessian that the standard errors leave possible [layer, choice]: normal traces.  Images
        that were not probed yet add the spread of those that were; after one batch that is as great as the trace.
        """
        rest = 1 - np.minimum(1, self.counts // PAIR / (self.images // self.batch))
        traces = {}
        for side in SIDES:
            trace, error, spread = (self.arrays[f"{side}_{kind}"] for kind in ("trace", "error", "spread"))
            # Batches differ by their images and by their signs, whose part is the error.
            images = np.sqrt(np.maximum(np.square(spread) - np.square(error), 0))
            images = np.where(np.isfinite(spread), images, np.abs(trace))
            traces[side] = rng.normal(trace, np.hypot(error, np.sqrt(rest) * images))
        return self._of(traces)

    def relative_errors(self) -> Array:
        """The standard error of every layer's sensitivity in the narrowest choice, relative to that sensitivity, or to
        a tenth of the mean one if that is larger.
        """
        value = self.values("hessian")[:, -1]
        error = np.hypot(*(self.arrays[f"{s}_error"] * self._factors(s)[:, -1] for s in SIDES))
        return error / np.maximum(np.maximum(value, 0.1 * value.mean()), 1e-300)

    def table(self, metric: str, *, tie: bool = True, fix_ends: bool = True, values: Array | None = None) -> Table:
        """The allocation problem: layers that read one tensor tied, the first and last layers fixed to the widest
        choice.  values: sensitivities to take instead of the metric's [layer, choice], without the others beside them.
        """
        chosen = self.values(metric) if values is None else values
        readers, ends = dict[str, int](), end_layers(self.graph) if fix_ends else set()
        for layer in self.graph.layers:
            readers[layer.input] = readers.get(layer.input, 0) + 1
        others = {m: self.values(m) for m in self.settings.metrics if m != metric and values is None}
        rows = []
        for i, layer in enumerate(self.graph.layers):
            shown = {k: float(self.arrays[k][i]) for k in self._shown()}
            facts: dict[str, Any] = {k: v if math.isfinite(v) else None for k, v in shown.items()}
            facts |= {"probes": int(self.counts[i])} if len(self.counts) else {}
            facts |= {m: dict(zip(self.settings.choices, map(float, v[i]), strict=True)) for m, v in others.items()}
            rows.append(
                Row(
                    layer.name,
                    int(self.arrays["weights"][i]),
                    int(self.arrays["macs"][i]),
                    dict(zip(self.settings.choices, map(float, chosen[i]), strict=True)),
                    tie=layer.input if tie and readers[layer.input] > 1 else "",
                    fixed=self.settings.choices[0] if layer.name in ends else "",
                    facts=facts,
                )
            )
        return Table(tuple(rows), self.settings.choices)

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
            "images": self.images,
            "batch": self.batch,
            "seed": s.seed,
            "seconds": round(self.seconds, 1),
        }
        if "hessian" in s.metrics:
            fields |= {
                "probes": self.probes,
                "most_probes": int(self.counts.max()),
                "probed_images": min(int(self.counts.max()) // PAIR, self.images // self.batch) * self.batch,
                "tolerance": s.tolerance,
                "converged": self.converged,
                "worst_error": self.worst,
                "negative_traces": int((self.arrays["weight_trace"] < 0).sum()),
                **({"decision": self.verdict.to_dict()} if self.verdict else {}),
            }
        return fields


def end_layers(graph: FloatGraph) -> set[str]:
    """The layers with no weighted layer before them, or none after them."""
    before = {i.name: False for i in graph.inputs}
    layers = {one.node: one for one in graph.layers}
    first = set()
    for node in graph.nodes:
        weighted = any(before.get(n, False) for n in node.inputs)
        if node.name in layers and not weighted:
            first.add(layers[node.name].name)
        before |= {o: weighted or node.name in layers for o in node.outputs}
    after, last = dict.fromkeys(graph.outputs, False), set()
    for node in reversed(graph.nodes):
        weighted = any(after.get(o, False) for o in node.outputs)
        reached = any(o in after for o in node.outputs)
        if node.name in layers and reached and not weighted:
            last.add(layers[node.name].name)
        if reached:
            after |= {n: after.get(n, False) or weighted or node.name in layers for n in node.inputs}
    return first | last
