"""Whether two engines ran the same network: a time of another one's would say nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEAST_CORRELATION = 0.9
WHY = (
    f"the bound is {LEAST_CORRELATION:g} because runtimes that round differently still correlate above it, while a"
    " network of other weights or other preprocessing correlates near 0"
)


@dataclass(frozen=True)
class OutputAgreement:
    """One output of ours beside another engine's.

    differing: elements that are half a step or more apart.  step: the output's scale, 1 for integers, 0 when an output
    has no single scale (then `differing` counts unequal elements).  largest: the largest difference, in steps, or
    plain when step is 0.  correlation: Pearson's, None when either output is constant.
    """

    name: str
    elements: int
    differing: int
    step: float
    largest: float
    correlation: float | None

    @property
    def equal(self) -> bool:
        """Whether every element is the same."""
        return self.differing == 0 and self.largest == 0

    @property
    def same_network(self) -> bool:
        """Whether this output can be that of the same network."""
        if self.correlation is None:
            return self.differing == 0 or (self.step > 0 and self.largest <= 2)
        return self.correlation >= LEAST_CORRELATION

    def sentence(self) -> str:
        """One line."""
        unit = "output steps" if self.step else "(absolute)"
        related = "an output is constant" if self.correlation is None else f"correlation {self.correlation:.4f}"
        share = 100 * self.differing / self.elements if self.elements else 0.0
        return (
            f"{self.name}: {self.differing} of {self.elements} elements differ ({share:.2f} %), at most by"
            f" {self.largest:.4g} {unit}, {related}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def compare(
    ours: Mapping[str, Array], theirs: Mapping[str, Array], specs: Sequence[Mapping[str, Any]]
) -> list[OutputAgreement]:
    """Every output of ours beside theirs.

    specs: the manifest's outputs.  Raises ValueError with a sentence when theirs lack one, or have another shape.
    """
    rows = []
    for spec in specs:
        name = spec["name"]
        if name not in theirs:
            raise ValueError(f"it has no output {name}, but {', '.join(theirs) or 'none'}")
        a, b = ours[name], np.asarray(theirs[name])
        if a.shape != b.shape:
            raise ValueError(f"its output {name} has the shape {b.shape}, ours {a.shape}")
        scale = spec.get("quantization", {}).get("scale", [])
        step = float(scale[0]) if len(scale) == 1 else 1.0 if a.dtype.kind in "iub" else 0.0
        rows.append(_compare(name, a.astype(np.float64), b.astype(np.float64), step))
    return rows


def _compare(name: str, a: Array, b: Array, step: float) -> OutputAgreement:
    apart = np.abs(a - b) / (step or 1.0)
    differing = int((~(apart < 0.5)).sum() if step else (a != b).sum())  # NaN differs
    constant = a.size < 2 or a.std() == 0 or b.std() == 0
    correlation = None if constant else float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
    return OutputAgreement(name, a.size, differing, step, float(apart.max(initial=0.0)), correlation)
