"""How much each layer minds few bits: what is measured, and the allocation problem that it makes (the sensitivity of
HAWQ-V2, equation 2.11).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .table import CHOICES, Row, Table

Array = np.ndarray[Any, Any]
METRICS = ("hessian", "fisher", "output")


@dataclass(frozen=True)
class Settings:
    """What is measured: by metrics, with random signs from seed, until every standard error is below tolerance (a
    part of 1) or `probes` are used.

    A probe is a batch of images with random signs for every layer; each batch gets two.  batch: images at a time,
    None for the model's own batch, or 4 where it leaves that open.
    """

    metrics: tuple[str, ...] = ("hessian",)
    probes: int = 64
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


@dataclass
class Sensitivities:
    """What was measured, one entry per layer in each array.

    weights, activations: numbers of values (of activations for one image).  macs: for one image.  *_trace: the trace
    of the Hessian of the mean loss.  *_error: its standard error, as far as it comes from the signs; *_spread: the
    same from the images.  weight_square, activation_square [layer, choice]: squared norm of the rounding error
    (activations: mean over images).  *_fisher: mean squared norm of the gradient.  output [layer, choice]: squared
    change of the network's output when only this layer is rounded, relative to its square.
    probes: how many were used.  worst: the largest standard error left, relative.
    """

    graph: FloatGraph
    settings: Settings
    loss: str
    images: int
    batch: int
    probes: int = 0
    converged: bool = False
    worst: float | None = None
    seconds: float = 0.0
    arrays: dict[str, Array] = field(default_factory=dict)

    def values(self, metric: str) -> Array:
        """The sensitivity of every layer in every choice [layer, choice]; a negative trace, which says nothing about
        rounding, counts as 0.
        """
        if metric == "output":
            return self.arrays["output"]
        a, kind = self.arrays, "trace" if metric == "hessian" else "fisher"
        by_weight = np.maximum(a[f"weight_{kind}"], 0) / a["weights"]
        by_activation = np.maximum(a[f"activation_{kind}"], 0) / a["activations"]
        return by_weight[:, None] * a["weight_square"] + by_activation[:, None] * a["activation_square"]

    def table(self, metric: str, *, tie: bool = True, fix_ends: bool = True) -> Table:
        """The allocation problem: layers that read one tensor tied, the first and last layers fixed to the widest
        choice.
        """
        chosen, readers, ends = self.values(metric), dict[str, int](), end_layers(self.graph) if fix_ends else set()
        for layer in self.graph.layers:
            readers[layer.input] = readers.get(layer.input, 0) + 1
        others = {m: self.values(m) for m in self.settings.metrics if m != metric}
        rows = []
        for i, layer in enumerate(self.graph.layers):
            facts: dict[str, Any] = {k: float(self.arrays[k][i]) for k in self._shown()}
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
            for side in ("weight", "activation")
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
                "probed_images": min(self.probes // 2, self.images // self.batch) * self.batch,
                "tolerance": s.tolerance,
                "converged": self.converged,
                "worst_error": self.worst,
                "negative_traces": int((self.arrays["weight_trace"] < 0).sum()),
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
