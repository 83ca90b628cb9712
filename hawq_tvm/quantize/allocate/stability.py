"""Whether a choice of bits stands: the integer programme is solved again with sensitivities drawn within their errors,
and the layers on whose errors another answer hangs are named, so that they are measured further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .allocation import allocate
from .budgets import Budget
from .sensitivity import Sensitivities
from .table import Table

Array = np.ndarray[Any, Any]
# Drawn sets of sensitivities, and the share of the sum of sensitivities by which other bits must be better in one to
# count: two answers that are as good as each other need no choice.
DRAWS, MARGIN = 32, 0.05
# Layers whose error contributes less than this share of the greatest contribution are not measured further.
SMALL = 0.1


@dataclass(frozen=True)
class Verdict:
    """How a choice of bits fares in drawn sensitivities.

    other: of DRAWS, those in which other bits are better by more than MARGIN of the sum.  gain: the largest such share.
    undecided: the layers whose errors that hangs on, most first.
    """

    other: int
    gain: float
    undecided: tuple[str, ...]

    @property
    def stable(self) -> bool:
        """Whether no draw asks for other bits."""
        return not self.other

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "stable": self.stable,
            "draws": DRAWS,
            "margin": MARGIN,
            "other": self.other,
            "gain": self.gain,
            "undecided": list(self.undecided),
        }


def judge(
    found: Sensitivities,
    table_of: Callable[[tuple[Array, Array | None] | None], Table],
    budgets: Sequence[Budget],
    seed: int,
) -> Verdict:
    """How the allocation by the measured sensitivities fares in sensitivities drawn within their errors.

    table_of: the problem with given sensitivities and pairs, or with the measured ones.
    Raises the errors of `allocate`.
    """
    names = [layer.name for layer in found.graph.layers]
    table, rng = table_of(None), np.random.default_rng(seed)
    ours = allocate(table, budgets).assignment
    other, gain, shares = 0, 0.0, np.zeros(len(names))
    for _ in range(DRAWS):
        drawn = table_of(found.drawn(rng))
        best = allocate(drawn, budgets, near=ours)
        held = drawn.sensitivity(ours)
        better = (held - best.sensitivity) / held if held else 0.0
        gain = max(gain, better)
        if better > MARGIN:
            other += 1
            for i, (name, here, there) in enumerate(zip(names, drawn.rows, table.rows, strict=True)):
                a, b = ours[name], best.assignment[name]
                moved = (here.sensitivity[a] - here.sensitivity[b]) - (there.sensitivity[a] - there.sensitivity[b])
                shares[i] += (moved / held) ** 2
    order = [i for i in np.argsort(-shares) if shares[i] > SMALL * shares.max()]
    return Verdict(other, gain, tuple(names[i] for i in order))
