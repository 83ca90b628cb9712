"""How far a model's outputs are from another's: their squared change, as a share of the other's squares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hawq_tvm.core.errors import UsageError

Array = np.ndarray[Any, Any]


class Changes:
    """Added up over batches, output by output in order: names may differ."""

    def __init__(self) -> None:
        self.sums: list[list[float]] = []

    def add(self, ours: Mapping[str, Array], theirs: Mapping[str, Array], one: str, other: str) -> None:
        """One batch; one, other: the models.  What is infinite in both alike, or not a number, is left out.

        Raises UsageError for outputs of another number or of other shapes.
        """
        said = [[f"{name} {'x'.join(map(str, v.shape))}" for name, v in found.items()] for found in (ours, theirs)]
        if [v.shape for v in ours.values()] != [v.shape for v in theirs.values()]:
            raise UsageError("gives other outputs", where=other, expected=", ".join(said[0]), found=", ".join(said[1]))
        self.sums = self.sums or [[0.0, 0.0] for _ in ours]
        for sums, mine, their in zip(self.sums, ours.values(), theirs.values(), strict=True):
            a, b = mine.astype(np.float64), their.astype(np.float64)
            with np.errstate(invalid="ignore"):
                kept = ~((a == b) & np.isinf(b)) & ~(np.isnan(a) & np.isnan(b))
                sums[0] += float(np.square(a[kept] - b[kept]).sum())
                sums[1] += float(np.square(b[kept]).sum())

    def mean(self) -> float | None:
        """Of all outputs; None where nothing was added, or where one of the other's is 0 throughout."""
        if not self.sums or any(not square > 0 for _, square in self.sums):
            return None
        return float(np.mean([change / square for change, square in self.sums]))
