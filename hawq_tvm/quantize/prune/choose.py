"""Which channels go: those that cost least for what they save, until the budgets are met."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq_tvm.core.errors import UsageError
from hawq_tvm.quantize.network.float_graph import FloatGraph

from .channels import KEPT, Channels

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]
RESOURCES = ("macs", "weights")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """At most `limit` of a resource, or, where it is a share, that part of the network's own."""

    text: str
    resource: str
    limit: float
    share: bool

    @staticmethod
    def parse(text: str) -> Budget:
        """A budget such as macs=60%, macs=1.2G or weights=500K.

        Raises UsageError for another text.
        """
        match = re.fullmatch(rf"({'|'.join(RESOURCES)})=([0-9]+(?:\.[0-9]+)?)([KMG%]?)", text)
        number = float(match[2]) if match else 0.0
        if match is None or number == 0 or (match[3] == "%" and number > 100):
            raise UsageError(
                "is no budget", where=f"--budget {text}", expected="macs=60%, macs=1.2G, weights=60% or weights=500K"
            )
        share = match[3] == "%"
        return Budget(text, match[1], number / 100 if share else number * UNITS[match[3]], share)


class Sizes:
    """The multiplications for one image and the weights of every layer, by how many channels it makes and reads.

    made, read: full counts by layer, and `held` how many of them each group has; macs: the full network's.
    """

    def __init__(self, graph: FloatGraph, channels: Channels, macs: Sequence[int]) -> None:
        names = [layer.name for layer in graph.layers]
        made, read = (
            np.stack(
                [
                    np.bincount(side[name].groups, minlength=channels.count)
                    if name in side
                    else np.eye(1, channels.count, KEPT)[0]
                    for name in names
                ]
            ).astype(float)
            for side in (channels.rows, channels.columns)
        )
        self.made, self.read = made, read
        full = np.array([graph.parameters[layer.weight].numel() for layer in graph.layers], float)
        pairs = made.sum(1) * read.sum(1)
        self.each = {"macs": np.array(macs, float) / pairs, "weights": full / pairs}

    def total(self, resource: str, made: Array, read: Array) -> float:
        """A resource of a network whose layers make and read so many channels."""
        return float((self.each[resource] * made * read).sum())


@dataclass
class _Family:
    """Groups that are in the same places, those that cost least first; `gone` of them go."""

    groups: Numbers
    costs: Array
    made: Array
    read: Array
    gone: int = 0

    def next(self, multiple: int) -> int:
        """How many go at once so that a multiple is left; 0 where that leaves none."""
        left = len(self.groups) - self.gone
        step = left % multiple or multiple
        return step if left - step >= multiple else 0


def choose(
    graph: FloatGraph, channels: Channels, costs: Array, macs: Sequence[int], budgets: Sequence[Budget], multiple: int
) -> tuple[NDArray[np.bool_], dict[str, tuple[float, float]]]:
    """Whether each group stays, and every resource before and after.

    macs: of every layer for one image.  multiple: of how many channels alike some stay, for kernels work on so many.
    Raises UsageError with the least that can be reached where a budget cannot be met.
    """
    sizes = Sizes(graph, channels, macs)
    families = []
    for alike in channels.alike():
        order = alike[np.argsort(costs[alike], kind="stable")]
        families.append(_Family(order, costs[order], sizes.made[:, order[0]], sizes.read[:, order[0]]))
    made, read = sizes.made.sum(1), sizes.read.sum(1)
    before = {r: sizes.total(r, made, read) for r in RESOURCES}
    for budget in budgets:
        limit = budget.limit * before[budget.resource] if budget.share else budget.limit
        while (now := sizes.total(budget.resource, made, read)) > limit:
            best, least = None, np.inf
            for family in families:
                step = family.next(multiple)
                saved = now - sizes.total(budget.resource, made - step * family.made, read - step * family.read)
                if step and saved > 0:
                    price = family.costs[family.gone : family.gone + step].sum() / saved
                    best, least = (family, price) if price < least else (best, least)
            if best is None:
                raise UsageError(
                    "cannot be met by taking channels away",
                    where=f"--budget {budget.text}",
                    expected=f"at least {_readable(budget, now, before[budget.resource])}",
                    remedy="raise it, or lower --multiple" if multiple > 1 else "raise it",
                )
            step = best.next(multiple)
            best.gone += step
            made, read = made - step * best.made, read - step * best.read
    stays = np.full(channels.count, True)
    for family in families:
        stays[family.groups[: family.gone]] = False
    return stays, {r: (before[r], sizes.total(r, made, read)) for r in RESOURCES}


def _readable(budget: Budget, value: float, full: float) -> str:
    return (
        f"{budget.resource}={np.ceil(1000 * value / full) / 10:g}%"
        if budget.share
        else f"{budget.resource}={value:.0f}"
    )


def macs_of(graph: FloatGraph, example: Any) -> list[int]:
    """The multiplications of every layer for one image of an example."""
    outputs: dict[str, int] = {}
    images = len(next(iter(example.values())))

    def note(name: str, value: Any) -> None:
        outputs[name] = value.numel()

    graph.run(example, note)
    return [graph.products(layer, outputs[layer.output]) // images for layer in graph.layers]
