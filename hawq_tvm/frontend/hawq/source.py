"""A HAWQ checkpoint as the user names it: a file, perhaps with the network and the bits that the file does not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Bits = str | Path | Mapping[str, Any] | None


@dataclass(frozen=True)
class Checkpoint:
    """What `hawq_checkpoint` gives; path: a file or its bytes."""

    path: str | Path | bytes
    network: str | None = None
    bits: Bits = None

    @property
    def where(self) -> str:
        """What messages call it."""
        return "checkpoint" if isinstance(self.path, bytes) else str(self.path)

    @property
    def stem(self) -> str:
        """The file's name without its endings."""
        return "model" if isinstance(self.path, bytes) else Path(self.path).name.partition(".")[0]


def hawq_checkpoint(path: str | Path | bytes, *, network: str | None = None, bits: Bits = None) -> Checkpoint:
    """A HAWQ checkpoint with what it does not say itself; `compile`, `inspect` and `tune` take it like a path.

    network: resnet18, resnet50, resnet50b, resnet101, mobilenetv2_w1 or inceptionv3; needed where the tensors' names
    and shapes fit several.
    bits: a configuration, as a mapping of HAWQ's layers to bits, a JSON file of one, or a name such as "uniform8" or
    "bops_0.5"; without it weights tell their width, and activations have the width of the layer that reads them.
    Nothing is read before the model is compiled.
    """
    return Checkpoint(path, network, bits)
