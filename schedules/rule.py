"""What a kernel rule is, and the ordered choice among rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tvm
from tvm import tirx

from .layer import Layer


class Tile(Protocol):
    """A frozen dataclass of tile sizes; its string goes into the compile report."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Kernel:
    """A scheduled PrimFunc: parameters are the layer's inputs, then `arguments`, then its results."""

    func: tirx.PrimFunc
    arguments: tuple[np.ndarray[Any, Any], ...]
    tile: Tile | str = ""


class Rule(Protocol):
    """One way to make a kernel. Rules are tried in order; the first that does not refuse makes the kernel."""

    name: str

    def applies(self, layer: Layer, target: tvm.target.Target) -> str | None:
        """None when this rule fits, else a sentence that says why not."""

    def build(self, layer: Layer, target: tvm.target.Target) -> Kernel:
        """The kernel of a layer that this rule fits."""


@runtime_checkable
class Tiled(Rule, Protocol):
    """A rule with several tiles for a layer, of which a cost model chooses one unless a measurement is known."""

    def tiles(self, layer: Layer, target: tvm.target.Target) -> Sequence[Tile]:
        """The tiles worth measuring for a layer that this rule fits; the cost model's choice first."""

    def build(self, layer: Layer, target: tvm.target.Target, tile: Any = None) -> Kernel:
        """The kernel of a layer with one of its tiles, by default the first."""


@runtime_checkable
class Modelled(Tiled, Protocol):
    """A rule with more tiles than `tiles` lists, a cost model in figures, and weights that every tile orders in its
    own way.
    """

    def possible(self, layer: Layer, target: tvm.target.Target) -> Sequence[Tile]:
        """Every tile of a layer that a record may name; the first are those of `tiles`."""

    def form(self, layer: Layer) -> str:
        """What a kernel's time depends on beside the layer's structure: how it multiplies, which the weights' values
        may decide.
        """

    def estimate(self, layer: Layer, target: tvm.target.Target, tile: Any) -> float:
        """The cost model's cycles."""

    def weights(self, layer: Layer) -> np.ndarray[Any, Any]:
        """The weights as the layer has them."""

    def packing(self, layer: Layer, tile: Any) -> dict[str, int]:
        """How `mma_pack.pack` makes the kernel's first argument of the weights."""


@dataclass(frozen=True)
class Choice:
    """The rule chosen for a layer, and what the rules before it said."""

    rule: Rule
    refused: dict[str, str] = field(default_factory=dict)

    def sentence(self) -> str:
        """The refusals as text for the report."""
        return " ".join(f"{name}: {why}" for name, why in self.refused.items())


def choose(rules: Sequence[Rule], layer: Layer, target: tvm.target.Target) -> Choice:
    """The first rule that fits; the last rule of every list fits everything."""
    refused: dict[str, str] = {}
    for rule in rules:
        why = rule.applies(layer, target)
        if why is None:
            return Choice(rule, refused)
        refused[rule.name] = why
    raise AssertionError(f"the last rule refused {layer.name}")
